"""A small HTTP server inside this process, on 127.0.0.1: the ground under the proxies that tests put between client and server.

One thread for each connection. A handler reads the request and writes the answer itself, so that it can also misbehave.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

__all__ = ["Answer", "Request", "forward", "listening", "reply"]

Request = BaseHTTPRequestHandler

_OF_ONE_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})
_SET_BY_REPLY = frozenset({"date", "server"})
_UPSTREAM_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of a server. `headers` leave out what belongs to one connection only, and the length."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    length_bytes: int | None = None
    """What the Content-Length says, where it is not the body's: the answer to a HEAD request has a length and no body."""


@contextmanager
def listening(handle: Callable[[Request], None], address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[str]:
    """`http://127.0.0.1:<port>` while the block runs; `handle` gets every request, in the thread of its connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_any(self) -> None:
            handle(self)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: object, client_address: object) -> None:
            """A peer that hangs up is what these servers are for."""

    server = Server(address, Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://{address[0]}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(request: Request, answer: Answer) -> None:
    """Send the answer; the request's body must have been read."""
    request.send_response(answer.status)
    for name, value in answer.headers:
        request.send_header(name, value)
    length_bytes = len(answer.body) if answer.length_bytes is None else answer.length_bytes
    if answer.status not in (204, 304):
        request.send_header("Content-Length", str(length_bytes))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(answer.body)


def forward(endpoint: str, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes = b"") -> Answer:
    """Make the request to the server at `endpoint`, and wait for the whole answer."""
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=_UPSTREAM_S)
    try:
        sent = [(name, value) for name, value in headers if name.lower() not in _OF_ONE_CONNECTION]
        named_host = any(name.lower() == "host" for name, _ in sent)
        connection.putrequest(method, target, skip_host=named_host, skip_accept_encoding=True)
        for name, value in sent:
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        if body:
            connection.send(body)
        answer = connection.getresponse()
        left_out = _OF_ONE_CONNECTION | _SET_BY_REPLY
        found = tuple((name, value) for name, value in answer.getheaders() if name.lower() not in left_out)
        stated = answer.getheader("Content-Length")
        whole = answer.read()
        return Answer(answer.status, found, whole, int(stated) if method == "HEAD" and stated else None)
    finally:
        connection.close()
