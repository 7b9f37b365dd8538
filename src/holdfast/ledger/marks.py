"""Moments in an attempt's life at which it is known how much time went where: running totals, in whole microseconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from holdfast.ledger.doings import Doing

__all__ = ["NOTHING", "Mark", "Save", "accumulated", "at_step", "elapsed_us"]

NOTHING = (0,) * len(Doing)


@dataclass(frozen=True, slots=True)
class Mark:
    """`step` steps were complete, and `spent_us` had gone to each `Doing`. `is_snapshot`: the state was copied at this moment."""

    step: int
    spent_us: tuple[int, ...]
    is_snapshot: bool

    @property
    def elapsed_us(self) -> int:
        return sum(self.spent_us)


@dataclass(frozen=True, slots=True)
class Save:
    """A committed checkpoint. `durable_us` counts from the snapshot on."""

    step: int
    reason: str
    stall_us: int
    durable_us: int
    total_bytes: int
    sent_bytes: int
    deduplicated_bytes: int


def accumulated(marks: Iterable[Mark], start_step: int) -> tuple[Mark, ...]:
    """In order of time, and with totals that never shrink, whatever was recorded."""
    spent: tuple[int, ...] = NOTHING
    step = start_step
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.elapsed_us, mark.step)):
        spent = tuple(map(max, spent, mark.spent_us))
        step = max(step, mark.step)
        found.append(Mark(step, spent, mark.is_snapshot))
    return tuple(found)


def elapsed_us(marks: Sequence[Mark]) -> int:
    return marks[-1].elapsed_us if marks else 0


def at_step(marks: Sequence[Mark], step: int) -> tuple[int, ...]:
    """The totals when the state of `step` was copied; between two marks, in proportion to the steps.

    `marks` as `accumulated` returns them. Before the first mark of that step it is that mark.
    """
    snapshot = next((mark for mark in reversed(marks) if mark.is_snapshot and mark.step == step), None)
    if snapshot is not None:
        return snapshot.spent_us
    after = bisect_right(marks, step, key=lambda mark: mark.step)
    if after == len(marks):
        return marks[-1].spent_us if marks else NOTHING
    if after == 0:
        return marks[0].spent_us
    low, high = marks[after - 1], marks[after]
    done, of = step - low.step, high.step - low.step
    return tuple(a + (b - a) * done // of for a, b in zip(low.spent_us, high.spent_us, strict=True))
