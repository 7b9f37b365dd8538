"""What the command writes, kept under the run's URL: bytes go in as they come, immutable segments come out.

    keep(bytes) → current segment → closed segments (bounded) → store
                  closed by size, by age, by flush()

    logs/<attempt>/<series>-<n>.log     segment n of one start of the command; a series is named by time, a token and the start;
                                        start 0 is what came before: a machine's set-up

The stream is kept as a terminal would have shown it, both outputs together (two pipes have no exact common order; what is written
within one look of the reader may change places). Lines are never parsed: nothing is looked for and nothing is added, except a note
where bytes are missing. Nothing here makes the command wait: what a slow or failing store does not take stays in memory, and beyond
the bound the oldest bytes are given up, because the newest tell why a command has died. A segment gets its number when it is first
sent, so numbers have no holes, and is sent again with the very same bytes until there is an answer.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.core.clock import Clock
from holdfast.core.config import format_bytes
from holdfast.core.errors import HoldfastError
from holdfast.store.base import Store

__all__ = ["PREFIX", "LogKeeper", "LogLimits", "LogSegment", "parse_log_key"]

PREFIX = "logs/"
_NAME = re.compile(r"logs/(\d+)/(\d{13,}-[0-9a-f]+-\d+)-(\d+)\.log")
_LOOK_S = 1.0
"""How often the thread looks at the age of the current segment."""
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLimits:
    """Bounds of what is kept. A segment is at most one write of the command larger than `segment_bytes`."""

    segment_bytes: int = 1 << 20
    segment_age_s: float = 15.0
    waiting_bytes: int = 16 << 20
    """What waits in memory for the store, before the oldest is given up."""


@dataclass(frozen=True, slots=True, order=True)
class LogSegment:
    """What a key says. Ordered as the output was written."""

    attempt: int
    series: str
    number: int

    @property
    def start(self) -> int:
        return int(self.series.rpartition("-")[2])

    @property
    def key(self) -> str:
        return f"{PREFIX}{self.attempt:06d}/{self.series}-{self.number:08d}.log"


def parse_log_key(key: str) -> LogSegment | None:
    match = _NAME.fullmatch(key)
    return None if match is None else LogSegment(int(match[1]), match[2], int(match[3]))


@dataclass(slots=True)
class _Closed:
    """A closed segment; `start` says which start of the command wrote it."""

    start: int
    body: bytes
    dropped_before_bytes: int


class LogKeeper:
    """Thread safety: every method may be called from any thread; `keep` never blocks and never raises.

    Bytes that come before the first `begin` belong to no attempt and are not kept.
    """

    def __init__(
        self,
        store: Store,
        *,
        token: str,
        clock: Clock,
        say: Callable[[str], None],
        limits: LogLimits | None = None,
    ) -> None:
        self._store, self._token, self._clock, self._say = store, token, clock, say
        self._limits = limits or LogLimits()
        self._changed = threading.Condition()
        self._start = 0
        self._series: dict[int, str] = {}
        self._attempts: dict[int, int] = {}
        self._current = bytearray()
        self._current_since_s = 0.0
        self._current_dropped_bytes = 0
        self._closed: deque[_Closed] = deque()
        self._waiting_bytes = 0
        self._sending: tuple[str, bytes] | None = None
        self._numbers: dict[int, int] = {}
        self._hurry = self._closing = False
        self._failures = 0
        self.dropped_bytes = 0
        """All that was given up so far."""
        self._thread = threading.Thread(target=self._work, name="holdfast-logs", daemon=True)
        self._thread.start()

    def begin(self, start: int) -> None:
        """From now on the command's start number `start` is writing."""
        with self._changed:
            self._close_current()
            self._start = start
            self._series[start] = f"{max(0, int(1000 * self._clock.unix_s())):013d}-{self._token}-{start:04d}"

    def label(self, start: int, attempt: int) -> None:
        """Which attempt of the run this start is. Nothing of it is sent before that is known; the first word holds."""
        with self._changed:
            self._attempts.setdefault(start, attempt)
            self._changed.notify_all()

    def keep(self, data: bytes) -> None:
        with self._changed:
            if not self._series:
                return
            if not self._current:
                self._current_since_s = self._clock.monotonic_s()
            self._current += data
            self._waiting_bytes += len(data)
            if len(self._current) >= self._limits.segment_bytes:
                self._close_current()
                self._changed.notify_all()
            while self._waiting_bytes > self._limits.waiting_bytes:
                self._give_up_oldest()

    def flush(self, timeout_s: float) -> bool:
        """Make durable what has been kept so far. False when that did not succeed in time; it is tried on."""
        give_up_s = self._clock.monotonic_s() + timeout_s
        with self._changed:
            self._close_current()
            self._hurry = True
            self._changed.notify_all()
            while self._closed or self._sending:
                left_s = give_up_s - self._clock.monotonic_s()
                if left_s <= 0 or not self._thread.is_alive():
                    return False
                self._changed.wait(min(left_s, _LOOK_S))
        return True

    def close(self, timeout_s: float) -> None:
        """Flush, and stop. What did not get through in time is given up, counted and said."""
        flushed = self.flush(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            left_bytes = self._waiting_bytes + (len(self._sending[1]) if self._sending else 0)
            self.dropped_bytes += 0 if flushed else left_bytes
        if flushed:
            self._thread.join()
        if self.dropped_bytes:
            self._say(
                f"holdfast: {format_bytes(self.dropped_bytes)} of the command's output were not kept in "
                f"{self._store.url}/{PREFIX}: the store was too slow or failed"
            )

    # ---- below: with the lock held

    def _close_current(self) -> None:
        if self._current or self._current_dropped_bytes:
            self._closed.append(_Closed(self._start, bytes(self._current), self._current_dropped_bytes))
            self._current.clear()
            self._current_dropped_bytes = 0

    def _give_up_oldest(self) -> None:
        if not self._closed:
            self._close_current()
        oldest = self._closed.popleft()
        lost_bytes = len(oldest.body)
        self._waiting_bytes -= lost_bytes
        self.dropped_bytes += lost_bytes
        if self._closed:
            self._closed[0].dropped_before_bytes += lost_bytes + oldest.dropped_before_bytes
        else:
            self._current_dropped_bytes += lost_bytes + oldest.dropped_before_bytes

    def _take(self) -> tuple[str, bytes] | None:
        """The next segment to send, with its final name and bytes; None when there is nothing, or its attempt is not known yet."""
        if self._sending is None and self._closed and self._closed[0].start in self._attempts:
            closed = self._closed.popleft()
            self._waiting_bytes -= len(closed.body)
            number = self._numbers.get(closed.start, 0)
            self._numbers[closed.start] = number + 1
            segment = LogSegment(self._attempts[closed.start], self._series[closed.start], number)
            self._sending = (segment.key, _note(closed.dropped_before_bytes) + closed.body)
        return self._sending

    def _wait(self) -> tuple[str, bytes] | None:
        """Until there is something to send and it may be tried; None at the end."""
        pause_s = _PAUSES_S[min(self._failures, len(_PAUSES_S)) - 1] if self._failures else 0.0
        try_at_s = self._clock.monotonic_s() + pause_s
        while not self._closing:
            if self._current and self._clock.monotonic_s() - self._current_since_s >= self._limits.segment_age_s:
                self._close_current()
            if self._clock.monotonic_s() >= try_at_s or self._hurry:
                self._hurry = False
                taken = self._take()
                if taken is not None:
                    return taken
            self._changed.wait(_LOOK_S)
        return None

    # ---- the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                segment = self._wait()
            if segment is None:
                return
            failed = self._put(segment)
            with self._changed:
                if failed is None:
                    self._sending = None
                recovered, first_failure = failed is None and self._failures > 0, failed and not self._failures
                self._failures = self._failures + 1 if failed else 0
                self._changed.notify_all()
            if first_failure:
                kept = format_bytes(self._limits.waiting_bytes)
                self._say(
                    f"holdfast: logs cannot be written: {failed}; trying again, the newest {kept} are kept meanwhile"
                )
            elif recovered:
                self._say("holdfast: logs are written again")

    def _put(self, segment: tuple[str, bytes]) -> str | None:
        try:
            self._store.put(*segment)
        except (HoldfastError, OSError) as error:
            return " ".join(str(error).split())
        return None


def _note(dropped_bytes: int) -> bytes:
    if not dropped_bytes:
        return b""
    return (
        f"\n[holdfast: {dropped_bytes} bytes of output are missing here: the store was too slow or failed]\n".encode()
    )
