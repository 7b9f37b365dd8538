"""May a standby begin? Handover, not theft: the last save of the machine before it is never fenced.

predecessor: released                                  → yes
             noticed, its deadline and the grace over  → yes; counted from when this machine saw the word, so later than it was
             its launch has ended                      → yes
             withdrawn                                 → the notice counts no more
a predecessor that never began to work was a standby itself: then what it waited for must be over too
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.agent.machine.records import Records
from holdfast.core.clock import Clock
from holdfast.core.launches import Ended, Intent, MachineWord, ended_key, intent_key, word_key

__all__ = ["Gate"]


@dataclass(slots=True)
class _Before:
    """What is known of one launch before."""

    next_word: int = 0
    claimed: bool = False
    released: bool = False
    ended: bool = False
    over_at_s: float | None = None
    """When its notice's deadline is over, on this machine's timer; None: no notice with a deadline stands."""


class Gate:
    """Thread safety: none."""

    def __init__(self, records: Records, predecessor: int | None, grace_s: float, clock: Clock) -> None:
        self._records, self._grace_s, self._clock = records, grace_s, clock
        self._first = predecessor
        self._known: dict[int, _Before] = {}

    def look(self) -> str | None:
        """Why this machine may claim; None: not yet. Raises what stores raise: then nobody has said yes."""
        why, launch = "nobody was before it", self._first
        passed: set[int] = set()
        while launch is not None and launch not in passed:
            passed.add(launch)
            before = self._known.setdefault(launch, _Before())
            self._read(launch, before)
            over = self._over(launch, before)
            if over is None:
                return None
            why = over if len(passed) == 1 else f"{why}, and {over}"
            if before.claimed:
                break
            intent = self._records.read(intent_key(launch), Intent)
            launch = None if intent is None else intent.predecessor
        return why

    def _over(self, launch: int, before: _Before) -> str | None:
        if before.released:
            return f"launch {launch} has released"
        if before.ended:
            return f"launch {launch} has ended"
        if before.over_at_s is not None and self._clock.monotonic_s() >= before.over_at_s:
            return f"the deadline of launch {launch} is over"
        return None

    def _read(self, launch: int, before: _Before) -> None:
        while True:
            word = self._records.read(word_key(launch, before.next_word), MachineWord)
            if word is None:
                break
            before.next_word += 1
            if word.kind == "claimed":
                before.claimed = True
            elif word.kind == "released":
                before.released = True
            elif word.kind in ("notice", "withdrawn"):
                # Each word says all that stands: the newest replaces the others.
                known = word.kind == "notice" and word.deadline_s is not None
                moment_s = self._clock.monotonic_s() + (word.deadline_s or 0) + self._grace_s
                before.over_at_s = moment_s if known else None
        if not before.ended:
            before.ended = self._records.read(ended_key(launch), Ended) is not None
