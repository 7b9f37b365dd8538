"""Events become immutable segments under `events/`, one writer per process.

`emit` only appends to a list, so nothing in the training loop waits for the network. Segments are closed when a checkpoint is about
to be committed (so that everything logged up to a step is durable once that step is), and every few seconds in between. Now and
then the same thread merges small segments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError
from holdfast.core.events import Event
from holdfast.ledger.compact import compact
from holdfast.ledger.segments import segment_key
from holdfast.store.base import Store

__all__ = ["Ledger"]

_COMPACT_EVERY = 32
"""Wakes of the thread between two compactions. The first comes with the first periodic wake, for earlier attempts' segments."""


class Segment(NamedTuple):
    """Events that become one object."""

    key: str
    events: tuple[Event, ...]

    def body(self) -> bytes:
        return b"".join(msgspec.json.encode(event) + b"\n" for event in self.events)


class Ledger:
    """A sink that keeps events. Thread-safe. A store that fails costs no event: they stay in memory until the next flush.

    `pulse` is called in the ledger's thread before each of its flushes: for events that are due when time has passed. Without
    `flush_every_s` there is no thread: whoever has very many ledgers flushes them.
    """

    def __init__(
        self,
        store: Store,
        *,
        attempt: int,
        node: str,
        clock: Clock,
        flush_every_s: float | None = 15.0,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._attempt, self._node, self._clock = store, attempt, node, clock
        self._flush_every_s, self._pulse = flush_every_s, pulse
        self._pending: list[Event] = []
        self._segment = 0
        self._closed: Segment | None = None
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._wakes_until_compaction = _COMPACT_EVERY
        self._has_compacted = False
        self._thread: threading.Thread | None = None
        if flush_every_s is not None:
            self._thread = threading.Thread(target=self._work, name="holdfast-ledger", daemon=True)
            self._thread.start()

    def emit(self, event: Event) -> None:
        with self._lock:
            self._pending.append(event)

    def flush(self) -> None:
        """Make everything emitted so far durable. Raises what the store raises; nothing is lost then.

        A segment whose outcome is unknown is put again with the very same bytes: segments never change.
        """
        with self._flushing:
            self._send_closed()
            with self._lock:
                if self._pending:
                    self._closed = self._open_segment()
                    self._pending = []
                    self._segment += 1
            self._send_closed()

    def _open_segment(self) -> Segment:
        return Segment(segment_key(self._attempt, self._node, self._segment), tuple(self._pending))

    def _send_closed(self) -> None:
        if self._closed is not None:
            self._store.put(self._closed.key, self._closed.body())
            self._closed = None

    def unsent(self) -> dict[str, bytes]:
        """What is not known to be durable yet, as the segments that it will be in. Never waits for the store.

        For whoever goes on from a state that is kept elsewhere, should this process die: they put what is not there yet. A segment
        that was sent meanwhile holds at least as much.
        """
        with self._lock:
            closed, pending = self._closed, self._open_segment() if self._pending else None
        return {segment.key: segment.body() for segment in (closed, pending) if segment is not None}

    def nudge(self) -> None:
        """Have the thread flush soon: something was emitted that should not die with the process."""
        self._wake.set()

    def close(self) -> None:
        """Flush what can be flushed and stop the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
        except HoldfastError:
            return

    def _work(self) -> None:
        while not self._closing:
            nudged = self._wake.wait(self._flush_every_s)
            self._wake.clear()
            try:
                self._pulse()
                self.flush()
                self._compact_now_and_then(nudged)
            except HoldfastError:
                continue

    def _compact_now_and_then(self, nudged: bool) -> None:
        self._wakes_until_compaction -= 1
        if self._wakes_until_compaction <= 0 or not (nudged or self._has_compacted):
            self._wakes_until_compaction, self._has_compacted = _COMPACT_EVERY, True
            compact(self._store, live_attempt=self._attempt, stopping=lambda: self._closing)
