"""The HTTP around a cloud: one thread per connection, a timeline that unfolds as time passes, and the ways to fail.

The timeline is applied when somebody asks (and by `advance`), with the times that it states; nothing runs in the background. With
an injected clock everything but a stall happens in that clock's time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.config import Duration
from holdfast.core.errors import UsageError
from holdfast.testing.loopback import Answer, Request, listening
from holdfast.testing.metadata.ask import Ask, Cloud, http_date
from holdfast.testing.metadata.aws import AwsCloud
from holdfast.testing.metadata.azure import AzureCloud
from holdfast.testing.metadata.gcp import GcpCloud
from holdfast.testing.metadata.timeline import Step, parse_timeline

__all__ = ["CLOUDS", "Fault", "MetadataServer", "metadata_server"]

CLOUDS: dict[str, Callable[[], Cloud]] = {"aws": AwsCloud, "gcp": GcpCloud, "azure": AzureCloud}
_STALL_STEP_S = 0.02
_DRIP_S = 0.2
_GARBAGE = b"<html><body>\x00\xff{not metadata</body></html>"


class Fault(StrEnum):
    """How a metadata server fails. Each is also a verb of the timeline; `recover` ends it."""

    STALL = "stall"
    """Requests are read and never answered."""
    ERROR = "error"
    """500."""
    GARBAGE = "garbage"
    """200, and a body that is none of the protocol's."""
    DENY = "deny"
    """401 to everything, fresh tokens included."""
    DRIP = "drip"
    """The right answer, one byte now and then: never silent, never done."""
    RESET = "reset"
    """The connection is closed without an answer."""


@dataclass(frozen=True, slots=True)
class _Failing:
    fault: Fault
    body: bytes
    until_s: float | None


class MetadataServer:
    """A running server. Made by `metadata_server`. Thread safety: every method may be called from any thread."""

    def __init__(
        self, cloud: Cloud, steps: Iterable[Step], clock: Clock, *, from_first_request: bool, wait_step_s: float
    ) -> None:
        self.cloud = cloud
        self.endpoint = ""
        self.asked: list[tuple[Ask, int]] = []
        """Every request that was answered, and the status."""
        self.happened: list[Step] = []
        """What has been applied, in order."""
        self._clock, self._wait_step_s = clock, wait_step_s
        self._steps = list(steps)
        for step in self._steps:
            self._check(step)
        self._begin_s = None if from_first_request else clock.monotonic_s()
        self._failing: _Failing | None = None
        self._lock = threading.RLock()
        self._closed = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """What a process that shall hear this server needs in its environment."""
        return self.cloud.environment(self.endpoint)

    def do(
        self, what: str, *, lead: Duration | None = None, id: str | None = None, lasting: Duration | None = None
    ) -> None:
        """Let something happen now: a verb of the cloud, a fault, or `recover`."""
        entry: dict[str, Any] = {"do": what, "id": id, "lead": lead, "for": lasting}
        (step,) = parse_timeline([{name: value for name, value in entry.items() if value is not None}])
        self._check(step)
        with self._lock:
            self._apply(step, self._clock.monotonic_s())

    def misbehave(self, fault: Fault, body: bytes = _GARBAGE) -> None:
        """Fail from now on; `body` is what `GARBAGE` answers."""
        with self._lock:
            self._failing = _Failing(fault, body, None)

    def recover(self) -> None:
        """Stop failing. Requests that are stalled are answered."""
        with self._lock:
            self._failing = None

    def advance(self) -> list[Step]:
        """Apply what is due; returns it."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            due: list[Step] = []
            while self._begin_s is not None and self._steps and self._begin_s + self._steps[0].at_s <= now_s:
                due.append(self._steps.pop(0))
                self._apply(due[-1], self._begin_s + due[-1].at_s)
            if self._failing and self._failing.until_s is not None and self._failing.until_s <= now_s:
                self._failing = None
            return due

    def _check(self, step: Step) -> None:
        verbs = [*self.cloud.verbs, *Fault, "recover"]
        if step.do not in verbs:
            raise UsageError(f"{step.do!r} cannot happen at {self.cloud.name}; what can: {', '.join(verbs)}")

    def _apply(self, step: Step, at_s: float) -> None:
        self.happened.append(step)
        if step.do == "recover":
            self._failing = None
        elif step.do in list(Fault):
            until_s = None if step.for_s is None else at_s + step.for_s
            self._failing = _Failing(Fault(step.do), _GARBAGE, until_s)
        else:
            self.cloud.apply(step, self._clock.unix_s() - self._clock.monotonic_s() + at_s)

    def _handle(self, request: Request) -> None:
        ask = _read(request)
        asked_s = self._clock.monotonic_s()
        with self._lock:
            if self._begin_s is None:
                self._begin_s = asked_s
        while not self._closed.is_set():
            self.advance()
            failing = self._failing
            if failing is not None and failing.fault == Fault.STALL:
                self._closed.wait(_STALL_STEP_S)
                continue
            with self._lock:
                now_s = self._clock.monotonic_s()
                answer = _failure(failing) or self.cloud.answer(ask, self._clock.unix_s(), now_s - asked_s)
                if answer is not None:
                    self.asked.append((ask, answer.status))
            if answer is not None:
                self._send(request, answer, failing)
                return
            self._clock.sleep(self._wait_step_s)
        request.close_connection = True

    def _send(self, request: Request, answer: Answer, failing: _Failing | None) -> None:
        if failing is not None and failing.fault == Fault.RESET:
            request.close_connection = True
            return
        request.send_response_only(answer.status)
        headers = (
            *answer.headers,
            ("Date", http_date(self._clock.unix_s())),
            ("Content-Length", str(len(answer.body))),
        )
        for name, value in headers:
            request.send_header(name, value)
        request.end_headers()
        if failing is None or failing.fault != Fault.DRIP:
            request.wfile.write(answer.body)
            return
        for byte in answer.body:
            request.wfile.write(bytes([byte]))
            request.wfile.flush()
            if self._closed.wait(_DRIP_S):
                return

    def _close(self) -> None:
        self._closed.set()


def _failure(failing: _Failing | None) -> Answer | None:
    match failing:
        case _Failing(fault=Fault.ERROR | Fault.RESET):
            return Answer(500, (), b"Internal Server Error")
        case _Failing(fault=Fault.DENY):
            return Answer(401, (), b"")
        case _Failing(fault=Fault.GARBAGE, body=body):
            return Answer(200, (("Content-Type", "text/html"),), body)
    return None


def _read(request: Request) -> Ask:
    parts = urlsplit(request.path)
    names = {name.lower() for name in request.headers}
    headers = {name: ", ".join(request.headers.get_all(name, [])) for name in names}
    length = headers.get("content-length", "0")
    body = request.rfile.read(int(length)) if length.isdigit() else b""
    return Ask(request.command, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), headers, body)


@contextmanager
def metadata_server(
    cloud: str | Cloud,
    *,
    timeline: Iterable[Step | tuple[Duration, str] | Mapping[str, Any]] = (),
    clock: Clock | None = None,
    address: tuple[str, int] = ("127.0.0.1", 0),
    from_first_request: bool = False,
    wait_step_s: float = 0.02,
) -> Iterator[MetadataServer]:
    """A metadata server of `cloud` ("aws", "gcp", "azure", or a `Cloud` with settings of its own) while the block runs.

    The timeline begins now, or, `from_first_request`, when somebody first asks. Requests that wait look for news every
    `wait_step_s` of the clock. Raises UsageError for a cloud or a verb that does not exist and for an address that cannot be bound.
    """
    if isinstance(cloud, str):
        if cloud not in CLOUDS:
            raise UsageError(f"there is no metadata server of {cloud!r}; there are {', '.join(CLOUDS)}")
        cloud = CLOUDS[cloud]()
    steps = parse_timeline(timeline)
    server = MetadataServer(
        cloud, steps, clock or SystemClock(), from_first_request=from_first_request, wait_step_s=wait_step_s
    )
    with ExitStack() as running:
        try:
            server.endpoint = running.enter_context(listening(server._handle, address))
        except OSError as error:
            raise UsageError(f"cannot listen on {address[0]}:{address[1]}: {error.strerror}") from None
        running.callback(server._close)
        yield server
