"""Where an attempt's time goes: every moment of the loop's thread belongs to exactly one of a few doings.

    process start → STARTUP → (restore) RESTORE → PREPARATION → (loop) DATA ⇄ STEP, with STALL and EVALUATION where they happen

The totals add up to the attempt's age. They are running totals, so a record of them that is lost costs nothing: the next one says
it all. Another thread may read them at any time: the state is one tuple that is replaced, never changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.core.clock import Clock, SystemClock
from holdfast.ledger.doings import Doing

__all__ = ["Stopwatch", "attempt_age_s"]


class _State(NamedTuple):
    doing: Doing
    since_s: float
    totals_s: tuple[float, ...]
    step: int
    first_step_s: float | None


class Stopwatch:
    """Thread safety: `totals` may be called from any thread, the rest belongs to the loop's."""

    def __init__(self, clock: Clock, age_s: float) -> None:
        self._now_s = clock.monotonic_s
        self._state = _State(Doing.STARTUP, self._now_s() - age_s, (0.0,) * len(Doing), 0, None)

    def enter(self, doing: Doing) -> Doing:
        """From now on it does this. Returns what it did."""
        before, since_s, totals_s, step, first_step_s = self._state
        now_s = self._now_s()
        grown = list(totals_s)
        grown[before] += now_s - since_s
        self._state = _State(doing, now_s, tuple(grown), step, first_step_s)
        return before

    @contextmanager
    def during(self, doing: Doing) -> Iterator[None]:
        before = self.enter(doing)
        try:
            yield
        finally:
            self.enter(before)

    def begin_at(self, step: int) -> None:
        """The attempt's first step will be the one after `step`."""
        self._state = self._state._replace(step=step)

    def stepped(self, step: int) -> None:
        """`step` is complete."""
        doing, since_s, totals_s, before, first_step_s = self._state
        if first_step_s is None and step > before:
            first_step_s = totals_s[Doing.STEP] + (self._now_s() - since_s if doing is Doing.STEP else 0.0)
        self._state = _State(doing, since_s, totals_s, step, first_step_s)

    def totals(self) -> dict[str, Any]:
        """The running totals up to now in seconds, the last complete step, and what the first step took (None before its end)."""
        doing, since_s, totals_s, step, first_step_s = self._state
        grown = list(totals_s)
        # Another thread's reading of the clock may be older than the state that it finds.
        grown[doing] += max(0.0, self._now_s() - since_s)
        figures = {doing.field: round(grown[doing], 6) for doing in Doing}
        return {"step": step, **figures, "first_step_s": None if first_step_s is None else round(first_step_s, 6)}


_is_first = True


def attempt_age_s(clock: Clock) -> float:
    """For how long the attempt that begins now has been under way: since its process started.

    Zero for a second run in the same process, in an interactive session, under another clock than the system's, and where the
    operating system does not tell.
    """
    global _is_first
    is_first, _is_first = _is_first, False
    if not is_first or not isinstance(clock, SystemClock) or not _is_script():
        return 0.0
    try:
        # Field 22, counted behind the command in parentheses: the start in clock ticks after boot.
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _is_script() -> bool:
    import __main__

    return hasattr(__main__, "__file__")
