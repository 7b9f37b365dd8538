"""Which run is looked at next, and how closely: what has been called for, what is due, what must wait after a failure. No I/O.

    call (news, a list) ─┐
    call_at (a moment) ──┴─→ ready, most urgent first ──→ take (one thread) ──→ done, or failed: not before …

A run is in one thread's hands at a time. What is called for meanwhile is not lost: it comes as soon as the run is put back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from threading import Condition

from holdfast.fleet.shell import Look

__all__ = ["Agenda", "Turn", "Urgency"]


_BACK_OFF = -1
"""Among timers: the end of a back-off."""


class Urgency(IntEnum):
    """What waits when there are fewer threads than work. Smaller is sooner."""

    NEWS = 0
    DUE = 1
    LISTED = 2
    ROUND = 3
    """Its turn to be read, without any reason."""


@dataclass(slots=True)
class _Entry:
    look: Look = Look.AWAY
    urgency: Urgency | None = None
    """Of what has been called for and is not taken; None: nothing."""
    place: int | None = None
    """In the row of those that are ready; other places of it are void."""
    is_taken: bool = False
    not_before_s: float = float("-inf")
    timers: dict[Look, tuple[float, Urgency]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """A run in somebody's hands."""

    run_id: str
    look: Look
    entry: _Entry


class Agenda:
    """Thread safety: every method. Times are of `now_s`, a monotonic clock."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._changed = Condition()
        self._entries: dict[str, _Entry] = {}
        self._ready: list[tuple[Urgency, int, str]] = []
        self._timers: list[tuple[float, str, int]] = []
        """Moments, with the look that is due then, or _BACK_OFF."""
        self._places = 0

    def __contains__(self, run_id: object) -> bool:
        with self._changed:
            return run_id in self._entries

    def __len__(self) -> int:
        with self._changed:
            return len(self._entries)

    def add(self, run_id: str) -> None:
        with self._changed:
            self._entries.setdefault(run_id, _Entry())

    def remove(self, run_id: str) -> bool:
        """Whether somebody has it in hand, and finishes."""
        with self._changed:
            entry = self._entries.pop(run_id, None)
            return entry is not None and entry.is_taken

    def call(self, run_id: str, look: Look, urgency: Urgency) -> None:
        """Look at it as soon as there is a thread; at least so closely."""
        with self._changed:
            entry = self._entries.get(run_id)
            if entry is not None:
                self._call(run_id, entry, look, urgency)

    def call_at(self, run_id: str, at_s: float, look: Look, urgency: Urgency) -> None:
        """Look at it then. A later word about the same look takes the place of this one, unless its moment has come."""
        with self._changed:
            self._ring()
            entry = self._entries.get(run_id)
            if entry is not None and entry.timers.get(look) != (at_s, urgency):
                entry.timers[look] = (at_s, urgency)
                heapq.heappush(self._timers, (at_s, run_id, int(look)))
                self._changed.notify()

    def take(self, wait_s: float = 0.0) -> Turn | None:
        """The most urgent one; the caller gives it back with `done` or `failed`. Waits for one at most `wait_s`, in real time."""
        with self._changed:
            found = self._next()
            if found is None and wait_s > 0:
                soonest_s = self._timers[0][0] - self._now_s() if self._timers else wait_s
                self._changed.wait(min(wait_s, max(0.0, soonest_s)))
                found = self._next()
            return found

    def done(self, turn: Turn) -> None:
        with self._changed:
            turn.entry.not_before_s = float("-inf")
            self._put_back(turn)

    def failed(self, turn: Turn, look: Look, retry_s: float) -> None:
        """Look at it again after this long and not before, whatever is called for."""
        entry = turn.entry
        with self._changed:
            entry.not_before_s = self._now_s() + retry_s
            entry.look = max(entry.look, look)
            entry.urgency = Urgency.DUE if entry.urgency is None else min(entry.urgency, Urgency.DUE)
            heapq.heappush(self._timers, (entry.not_before_s, turn.run_id, _BACK_OFF))
            self._put_back(turn)
            self._changed.notify()

    def wake(self) -> None:
        """Whoever waits looks up."""
        with self._changed:
            self._changed.notify_all()

    # ---- with the lock held

    def _call(self, run_id: str, entry: _Entry, look: Look, urgency: Urgency) -> None:
        entry.look = max(entry.look, look)
        sooner = entry.urgency is None or urgency < entry.urgency
        if sooner:
            entry.urgency = urgency
        if entry.is_taken or self._now_s() < entry.not_before_s or not (sooner or entry.place is None):
            return
        self._make_ready(run_id, entry, urgency)

    def _make_ready(self, run_id: str, entry: _Entry, urgency: Urgency) -> None:
        self._places += 1
        entry.place = self._places
        heapq.heappush(self._ready, (urgency, entry.place, run_id))
        self._changed.notify()

    def _put_back(self, turn: Turn) -> None:
        """It may have been removed meanwhile, and even be there anew: that is another entry."""
        entry = turn.entry
        entry.is_taken = False
        is_here = self._entries.get(turn.run_id) is entry
        if is_here and entry.urgency is not None and self._now_s() >= entry.not_before_s:
            self._make_ready(turn.run_id, entry, entry.urgency)

    def _next(self) -> Turn | None:
        self._ring()
        while self._ready:
            _, place, run_id = heapq.heappop(self._ready)
            entry = self._entries.get(run_id)
            if entry is None or entry.place != place:
                continue
            look = entry.look
            entry.look, entry.urgency, entry.place, entry.is_taken = Look.AWAY, None, None, True
            return Turn(run_id, look, entry)
        return None

    def _ring(self) -> None:
        now_s = self._now_s()
        while self._timers and self._timers[0][0] <= now_s:
            at_s, run_id, what = heapq.heappop(self._timers)
            entry = self._entries.get(run_id)
            if entry is None:
                continue
            if what == _BACK_OFF:
                if (
                    not entry.is_taken
                    and entry.place is None
                    and entry.urgency is not None
                    and now_s >= entry.not_before_s
                ):
                    self._make_ready(run_id, entry, entry.urgency)
            elif entry.timers.get(Look(what), (None,))[0] == at_s:
                _, urgency = entry.timers.pop(Look(what))
                self._call(run_id, entry, Look(what), urgency)
