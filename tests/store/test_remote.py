"""The cloud store against a server that answers whatever a test wants: errors, lost answers, secrets in its texts."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from threading import Event

import pytest
from obstore.store import S3Store

from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
    UsageError,
)
from holdfast.store import Store, open_store
from holdfast.store.remote import ObjectStore, request_timeout_s
from holdfast.testing.loopback import Answer as Reply
from holdfast.testing.loopback import listening, reply

_KEY, _SECRET = "AKIAEXAMPLEEXAMPLE00", "verySecretKeyThatNobodyMaySee"

Answer = Callable[[BaseHTTPRequestHandler], tuple[int, bytes] | None]
"""What the server does with a request: a status and a body, or None when it has answered by itself."""


@contextmanager
def _server(answer: Answer) -> Iterator[str]:
    def handle(request: BaseHTTPRequestHandler) -> None:
        answered = answer(request)
        if answered is None:
            return
        status, body = answered
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        reply(request, Reply(status, (("ETag", '"1"'),), body))

    with listening(handle) as endpoint:
        yield endpoint


class _BriskClock:
    """Real time, in which every pause is short."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.002))


def _store(endpoint: str, *, retries: int = 0, timeout_s: float = 10.0) -> ObjectStore:
    def connect(_: float) -> S3Store:
        return S3Store(
            "bucket",
            prefix="run",
            config={
                "endpoint": endpoint,
                "access_key_id": _KEY,
                "secret_access_key": _SECRET,
                "session_token": "session" + _SECRET,
                "region": "us-east-1",
            },
            client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s)},
            retry_config={
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=20),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=1),
                    "max_backoff": timedelta(milliseconds=2),
                    "base": 2,
                },
            },
        )

    return ObjectStore("s3://bucket/run", connect, secrets=(_KEY, _SECRET), clock=_BriskClock())


_CALLS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("a/b", max_bytes=100),
    "read_into": lambda store: store.read_into("a/b", 4, memoryview(bytearray(5))),
    "head": lambda store: store.read_into("a/b", 4, memoryview(bytearray(0))),
    "put": lambda store: store.put("a/b", b"body"),
    "put_new": lambda store: store.put_new("a/b", b"body"),
    "list": lambda store: list(store.list("a/")),
    "delete": lambda store: store.delete("a/b"),
}
_READS = ("get", "read_into", "head")


def _expected(call: str, status: int) -> type[HoldfastError] | None:
    if status in (401, 403):
        return PermissionDenied
    if status == 404 and (call in _READS or call == "delete"):
        return NotFound if call in _READS else None
    if status == 507:
        return StoreFull
    if status == 412 and call == "put_new":
        return None
    if status == 416 and call in _READS:
        return IntegrityError
    return StoreUnavailable


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 412, 416, 429, 500, 502, 503, 507])
def test_every_answer_becomes_one_of_our_errors_without_secrets(status: int) -> None:
    """The server repeats the credentials in its error document, as real ones do with parts of a signed request."""
    said = (
        f"<Error><Code>{'ConditionalRequestConflict' if status == 409 else 'Wrong'}</Code>"
        f"<Message>key {_KEY}, secret {_SECRET}, see https://user:{_SECRET}@host/x?X-Amz-Signature=abcdef</Message>"
        f"<AWSAccessKeyId>{_KEY}</AWSAccessKeyId><StringToSign>AWS4-HMAC {_SECRET}</StringToSign></Error>"
    ).encode()
    with _server(lambda request: (status, said)) as endpoint:
        for call, make in _CALLS.items():
            expected = _expected(call, status)
            store = _store(endpoint)
            if expected is None:
                assert make(store) in (False, None)
                continue
            with pytest.raises(StoreError if expected is not IntegrityError else IntegrityError) as caught:
                make(store)
            assert type(caught.value) is expected, (call, status)
            text = repr(caught.value) + str(caught.value)
            assert _SECRET not in text
            assert _KEY not in text
            assert "abcdef" not in text
            assert "see https" not in text  # The server's prose is left out altogether; its code is kept.
            assert "a/" in text
            assert caught.value.__cause__ is None
            assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("code", "expected"),
    [("AccessDenied", PermissionDenied), ("NoSuchKey", None), ("InvalidObjectState", StoreUnavailable)],
)
def test_s3_answers_a_refused_deletion_with_200(code: str, expected: type[StoreError] | None) -> None:
    """The client deletes one object by the request for many, whose answer says of each what became of it."""
    said = (
        '<?xml version="1.0"?><DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Error><Key>run/a</Key><Code>{code}</Code><Message>key {_SECRET}</Message></Error></DeleteResult>"
    ).encode()
    with _server(lambda request: (200, said)) as endpoint:
        if expected is None:
            _store(endpoint).delete("a")
            return
        with pytest.raises(expected, match=code) as caught:
            _store(endpoint).delete("a")
        assert _SECRET not in str(caught.value)


@pytest.mark.parametrize(("line", "expected"), [("403 Forbidden", PermissionDenied), ("404 Not Found", None)])
def test_azure_answers_a_refused_deletion_with_202(line: str, expected: type[StoreError] | None) -> None:
    lines = (
        "--b",
        "Content-Type: application/http",
        "Content-ID: 0",
        "",
        f"HTTP/1.1 {line}",
        "x-ms-request-id: 1",
        "",
        "",
        "--b--",
        "",
    )
    part = "\r\n".join(lines)

    def handle(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers["Content-Length"]))
        reply(request, Reply(202, (("Content-Type", "multipart/mixed; boundary=b"),), part.encode()))

    with listening(handle) as endpoint:
        options = {"account_name": "account", "account_key": "aGlkZGVu", "endpoint": f"{endpoint}/account"}
        store = open_store("az://container/run", options=options)
        if expected is None:
            store.delete("a")
            return
        with pytest.raises(expected, match="403"):
            store.delete("a")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (409, "BlobAlreadyExists", False),
        (409, "ContainerBeingDeleted", StoreUnavailable),
        (409, "OperationAborted", StoreUnavailable),
        (400, "ExpiredToken", PermissionDenied),
        (400, "InvalidToken", PermissionDenied),
        (400, "RequestTimeout", StoreUnavailable),
    ],
)
def test_the_services_own_code_decides_where_the_status_is_ambiguous(
    status: int, code: str, expected: type[StoreError] | bool
) -> None:
    with _server(lambda request: (status, f"<Error><Code>{code}</Code></Error>".encode())) as endpoint:
        if expected is False:
            assert not _store(endpoint).put_new("heads/1", b"mine")
            return
        assert isinstance(expected, type)
        with pytest.raises(expected, match=code):
            _store(endpoint).put_new("heads/1", b"mine")


def test_a_missing_bucket_is_not_a_missing_object() -> None:
    said = b"<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>"
    with _server(lambda request: (404, said)) as endpoint:
        for make in _CALLS.values():
            if make is _CALLS["head"]:
                continue  # A HEAD answer has no body that could tell.
            with pytest.raises(StoreUnavailable, match="bucket does not exist"):
                make(_store(endpoint))


def test_a_write_whose_answer_was_lost_and_repeated_is_reported_as_taken() -> None:
    seen: list[bytes] = []

    def apply_then_fail(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        del request.headers["Content-Length"]
        seen.append(body)
        assert request.headers["If-None-Match"] == "*"
        return (500, b"") if len(seen) == 1 else (412, b"")

    with _server(apply_then_fail) as endpoint:
        assert not _store(endpoint, retries=3).put_new("heads/1", b"mine")
    assert seen == [b"mine", b"mine"]


def test_the_body_is_let_go_when_a_request_times_out() -> None:
    """The client's own threads may still be sending when the call fails; the memory must not be reused before they stop."""
    finish = Event()

    def stall(request: BaseHTTPRequestHandler) -> None:
        finish.wait(30)

    with _server(stall) as endpoint:
        memory = mmap.mmap(-1, 32 * 2**20)
        store = _store(endpoint, timeout_s=0.2)
        view = memoryview(memory)
        with pytest.raises(StoreUnavailable):
            store.put("data/x", [view[: 2**20], view[2**20 :]])
        view.release()
        memory.close()
        finish.set()


def test_nobody_listens() -> None:
    with _server(lambda request: (200, b"")) as endpoint:
        pass
    for make in _CALLS.values():
        with pytest.raises(StoreUnavailable):
            make(_store(endpoint))


def test_a_body_that_ends_early_is_never_returned() -> None:
    def cut(request: BaseHTTPRequestHandler) -> None:
        ranged = "Range" in request.headers
        request.send_response(206 if ranged else 200)
        request.send_header("Content-Length", "100")
        request.send_header("ETag", '"1"')
        request.send_header("Last-Modified", "Sat, 21 Nov 2026 08:00:00 GMT")
        if ranged:
            request.send_header("Content-Range", "bytes 0-99/1000")
        request.end_headers()
        request.wfile.write(b"x" * 60)
        request.close_connection = True

    with _server(cut) as endpoint:
        with pytest.raises((StoreUnavailable, IntegrityError)):
            _store(endpoint).get("a", max_bytes=1000)
        with pytest.raises((StoreUnavailable, IntegrityError)):
            _store(endpoint).read_into("a", 0, memoryview(bytearray(100)))


def test_timeouts_grow_with_the_bytes() -> None:
    assert request_timeout_s(0) == (0, 30.0)
    assert request_timeout_s(2**20) == (0, 30.0)
    assert request_timeout_s(64 * 2**20) == (2, 30.0 + 256.0)
    last = 0.0
    for size_bytes in (1, 2**21, 2**25, 2**28):
        assert request_timeout_s(size_bytes)[1] > last
        last = request_timeout_s(size_bytes)[1]
    assert request_timeout_s(2**40) == request_timeout_s(2**29)


def test_clients_are_made_once_per_size_class() -> None:
    made: list[float] = []
    with _server(lambda request: (200, b"")) as endpoint:
        inner = _store(endpoint)

        def connect(timeout_s: float) -> S3Store:
            made.append(timeout_s)
            return inner._connect(timeout_s)  # type: ignore[return-value]

        store = ObjectStore("s3://bucket/run", connect)
        for _ in range(3):
            store.put("a", b"1")
            store.put("b", bytes(2 * 2**20))
    assert made == [30.0, 30.0 + 32.0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_hanging() -> None:
    with _server(lambda request: (200, b"")) as endpoint:
        store = _store(endpoint)
        store.put("a", b"1")
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                store.put("a", b"1")
            except UsageError as error:
                os.write(write_end, str(error).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as said:
            assert b"forked process" in said.read()
        os.waitpid(child, 0)
