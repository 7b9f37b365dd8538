"""A network and a service that misbehave: an HTTP proxy between a client and a real server, on 127.0.0.1 only.

`FaultyStore` plays faults above the client; this plays them below it, on real connections, so that what is tested is how the
client's own retries and timeouts come out as one of our errors. The plan decides about each request in order of arrival:

    with ministack_server() as server, faulty_proxy(server.endpoint, in_turn("PUT", HttpFault.LOST_ANSWER)) as proxy:
        store = open_store(url, options={**server.options, "endpoint": proxy.endpoint})

The proxy passes signatures and the Host header on as they are.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from threading import Event, Lock

from holdfast.core.clock import Clock, SystemClock
from holdfast.testing.loopback import Answer, Request, forward, listening, reply

__all__ = ["Exchange", "FaultyProxy", "HttpFault", "HttpPlan", "every", "faulty_proxy", "in_turn"]


class HttpFault(Enum):
    """What may happen to one request."""

    DELAYED = "is passed on, and its answer comes `delay_s` late on the injected clock"
    STALLED = "is read, is not passed on, and never answered"
    LOST_ANSWER = "is applied; the connection is reset before a byte of the answer"
    STALLED_AFTER = "is applied and never answered"
    RESET_BEFORE = "is not applied; the connection is reset"
    RESET_IN_REQUEST = "is not applied; the connection is reset when half of its body has been read"
    RESET_IN_ANSWER = "is applied; the connection is reset in the middle of the answer's body"
    TRUNCATED = "is applied; the answer's body ends in the middle, though its Content-Length promises all of it"
    SHORTENED = "is applied; half of the answer's body is missing and its Content-Length agrees"
    SLOW_DOWN = "503 SlowDown; not applied"
    SLOW_DOWN_AFTER = "503 SlowDown, although it was applied"
    INTERNAL_AFTER = "500 InternalError, although it was applied"
    BAD_GATEWAY = "502 with a page of HTML from some box in between; not applied"
    CONFLICT = "409 ConditionalRequestConflict; not applied"
    CONFLICT_AFTER = "409 ConditionalRequestConflict, although it was applied"
    FORBIDDEN = "403 AccessDenied; not applied"
    EXPIRED = "400 ExpiredToken, as S3 says of a session token that has run out; not applied"
    GARBAGE = "is not applied; the answer is not HTTP"


_APPLIED = frozenset(
    {
        HttpFault.DELAYED,
        HttpFault.LOST_ANSWER,
        HttpFault.STALLED_AFTER,
        HttpFault.RESET_IN_ANSWER,
        HttpFault.TRUNCATED,
        HttpFault.SHORTENED,
        HttpFault.SLOW_DOWN_AFTER,
        HttpFault.INTERNAL_AFTER,
        HttpFault.CONFLICT_AFTER,
    }
)
_ANSWERS = {
    HttpFault.SLOW_DOWN: (503, "SlowDown"),
    HttpFault.SLOW_DOWN_AFTER: (503, "SlowDown"),
    HttpFault.INTERNAL_AFTER: (500, "InternalError"),
    HttpFault.CONFLICT: (409, "ConditionalRequestConflict"),
    HttpFault.CONFLICT_AFTER: (409, "ConditionalRequestConflict"),
    HttpFault.FORBIDDEN: (403, "AccessDenied"),
    HttpFault.EXPIRED: (400, "ExpiredToken"),
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request: its number from 0 in order of arrival, and how many of its method had come before."""

    number: int
    method: str
    target: str
    repeat: int


HttpPlan = Callable[[Exchange], HttpFault | None]


def in_turn(method: str, *faults: HttpFault | None) -> HttpPlan:
    """The first request of `method` suffers the first of `faults`, and so on; all others work."""
    return lambda seen: faults[seen.repeat] if seen.method == method and seen.repeat < len(faults) else None


def every(fault: HttpFault, *methods: str) -> HttpPlan:
    """Each request of these methods suffers `fault`; without methods, each request."""
    return lambda seen: fault if not methods or seen.method in methods else None


@dataclass(slots=True)
class FaultyProxy:
    """A running proxy. `plan` may be replaced between requests. Thread safety: `log` grows in order of arrival."""

    endpoint: str
    plan: HttpPlan
    log: list[tuple[Exchange, HttpFault | None]] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def forget(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self.log.clear()
            self._seen.clear()

    def decide(self, request: Request) -> HttpFault | None:
        with self._lock:
            seen = Exchange(len(self.log), request.command, request.path, self._seen[request.command])
            self._seen[request.command] += 1
            fault = self.plan(seen)
            self.log.append((seen, fault))
        return fault


@contextmanager
def faulty_proxy(
    behind: str, plan: HttpPlan, *, clock: Clock | None = None, delay_s: float = 1.0
) -> Iterator[FaultyProxy]:
    """A proxy in front of the server at `behind`. Stalled requests are let go when the block is left."""
    timekeeper = clock or SystemClock()
    closing = Event()
    proxy = FaultyProxy("", plan)

    def handle(request: Request) -> None:
        fault = proxy.decide(request)
        answer = _passed_on(behind, request, fault)
        if answer is None:
            return
        if fault in (HttpFault.STALLED, HttpFault.STALLED_AFTER):
            closing.wait()
            _reset(request)
            return
        if fault is HttpFault.DELAYED:
            timekeeper.sleep(delay_s)
        _deliver(request, answer, fault)

    with listening(handle) as proxy.endpoint:
        try:
            yield proxy
        finally:
            closing.set()


def _passed_on(behind: str, request: Request, fault: HttpFault | None) -> Answer | None:
    """The server's answer, an answer of our own where the request is not to be applied, or None when the client is gone."""
    length_bytes = int(request.headers.get("Content-Length") or 0)
    if fault is HttpFault.RESET_BEFORE:
        _reset(request)
        return None
    if fault is HttpFault.RESET_IN_REQUEST:
        request.rfile.read(length_bytes // 2)
        _reset(request)
        return None
    body = request.rfile.read(length_bytes)
    if len(body) < length_bytes:
        return None
    if fault is None or fault in _APPLIED:
        return forward(behind, request.command, request.path, request.headers.items(), body)
    return Answer(200)


def _deliver(request: Request, answer: Answer, fault: HttpFault | None) -> None:
    half = answer.body[: len(answer.body) // 2]
    if fault is HttpFault.LOST_ANSWER:
        _reset(request)
    elif fault in (HttpFault.RESET_IN_ANSWER, HttpFault.TRUNCATED):
        reply(request, replace(answer, body=half, length_bytes=len(answer.body)))
        request.wfile.flush()
        if fault is HttpFault.RESET_IN_ANSWER:
            _reset(request)
        request.close_connection = True
    elif fault is HttpFault.SHORTENED:
        reply(request, replace(answer, body=half))
    elif fault is HttpFault.BAD_GATEWAY:
        reply(request, Answer(502, (("Content-Type", "text/html"),), b"<html><h1>502 Bad Gateway</h1></html>"))
    elif fault is HttpFault.GARBAGE:
        request.wfile.write(b"220 mail.example ESMTP ready\r\n")
        request.close_connection = True
    elif fault in _ANSWERS:
        status, code = _ANSWERS[fault]
        document = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        reply(request, Answer(status, (("Content-Type", "application/xml"),), document.encode()))
    else:
        reply(request, answer)


def _reset(request: Request) -> None:
    """Close with RST, as a host that has vanished does: what was sent and not yet read is lost too.

    The descriptor itself is closed, because the server's own way of ending a connection sends FIN first.
    """
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())
    request.close_connection = True
