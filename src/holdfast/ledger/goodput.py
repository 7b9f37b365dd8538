"""Where the billed time of a run went: useful work, and everything that was not, in buckets that add up to it exactly.

    timeline → per attempt: what of it was kept? → buckets

The buckets are those that the field knows from measuring goodput, plus evaluation, idle (billed) and queue wait (not billed).
What an attempt did after the checkpoint that a later attempt went back to was done again: all of it is lost work, waiting for data
and evaluations included. Stalls for saves, restores and starts are what they are, whether the attempt came to anything or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from holdfast.ledger.doings import Doing
from holdfast.ledger.marks import NOTHING, at_step
from holdfast.ledger.timeline import AttemptRecord, Ending, Timeline

__all__ = ["Account", "Bucket", "accounts_of", "first_step_excess_us"]


class Bucket(StrEnum):
    """In the order in which reports show them."""

    USEFUL = "useful"
    EVALUATION = "evaluation"
    DATA = "data_loading"
    SAVE = "checkpoint_save"
    INITIALISATION = "initialisation"
    RESTORE = "restore"
    PREPARATION = "training_prep"
    STARTUP = "program_startup"
    RECOVERY = "infrastructure_recovery"
    LOST = "lost_work"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Account:
    """One attempt's. `billed_us` is the sum of `buckets`; the gap before the attempt is in one of them where it was billed."""

    attempt: AttemptRecord
    retained_step: int
    lost_steps: int
    buckets: Mapping[Bucket, int]
    queue_wait_us: int
    """Before the attempt, with no machine that costs anything."""
    kept_us: tuple[int, ...]
    """The attempt's running totals at the moment up to which its work was kept."""

    @property
    def billed_us(self) -> int:
        return sum(self.buckets.values())

    @property
    def wall_us(self) -> int:
        return self.billed_us + self.queue_wait_us


def accounts_of(timeline: Timeline) -> tuple[Account, ...]:
    """One per attempt, in order. Pure."""
    attempts = timeline.attempts
    return tuple(
        _account(attempt, attempts[index + 1 :], attempts[index - 1] if index else None)
        for index, attempt in enumerate(attempts)
    )


def _retained(attempt: AttemptRecord, later: Sequence[AttemptRecord]) -> int | None:
    """The step that a later attempt of its generation went back to, the lowest of all; None when none has gone on yet."""
    starts = [
        other.start_step for other in later if other.generation == attempt.generation and other.start_step is not None
    ]
    return max(min([attempt.reached_step, *starts]), attempt.start_step or 0) if starts else None


def _account(attempt: AttemptRecord, later: Sequence[AttemptRecord], previous: AttemptRecord | None) -> Account:
    went_back_to = _retained(attempt, later)
    spent = attempt.marks[-1].spent_us if attempt.marks else NOTHING
    kept = spent if went_back_to is None else at_step(attempt.marks, went_back_to)
    retained = attempt.reached_step if went_back_to is None else went_back_to
    excess_us = first_step_excess_us(attempt)
    useful_us = kept[Doing.STEP]
    lost_us = sum(spent[doing] - kept[doing] for doing in _DONE_AGAIN)
    # The first step's excess is a cost of starting, also where its work was not kept.
    if useful_us >= excess_us:
        useful_us -= excess_us
    else:
        excess_us = min(excess_us, spent[Doing.STEP] - kept[Doing.STEP])
        lost_us -= excess_us
    buckets = {
        Bucket.USEFUL: useful_us,
        Bucket.EVALUATION: kept[Doing.EVALUATION],
        Bucket.DATA: kept[Doing.DATA],
        Bucket.SAVE: spent[Doing.STALL],
        Bucket.INITIALISATION: spent[Doing.STARTUP],
        Bucket.RESTORE: spent[Doing.RESTORE],
        Bucket.PREPARATION: kept[Doing.PREPARATION],
        Bucket.STARTUP: excess_us,
        Bucket.RECOVERY: 0,
        Bucket.LOST: lost_us,
        Bucket.IDLE: attempt.unexplained_us,
    }
    buckets[Bucket.RECOVERY if previous else Bucket.INITIALISATION] += attempt.boot_us
    if attempt.is_gap_billed:
        asked = previous is not None and previous.ending is Ending.INTERRUPTED
        buckets[Bucket.IDLE if asked else Bucket.RECOVERY] += attempt.gap_us
    queue_wait_us = 0 if attempt.is_gap_billed else attempt.gap_us
    return Account(attempt, retained, attempt.reached_step - retained, buckets, queue_wait_us, kept)


_DONE_AGAIN = (Doing.STEP, Doing.DATA, Doing.EVALUATION, Doing.PREPARATION)


def first_step_excess_us(attempt: AttemptRecord) -> int:
    """How much longer the first step took than the others on average: compilation, warming up. Zero where there are no others."""
    steps = attempt.reached_step - (attempt.start_step or 0)
    if attempt.first_step_us is None or steps < 2:
        return 0
    total_us = attempt.marks[-1].spent_us[Doing.STEP]
    first_us = min(attempt.first_step_us, total_us)
    return max(0, first_us - (total_us - first_us) // (steps - 1))
