"""Hours and the deadline: how much slack is left where a job may not start, or not run, at every hour; and what must be done then.

`safety` has the limits for a market that is open at all hours; here are the same limits with two changes. Let d be the changeover,
T the tick, L what a preemption takes back:

- **Run hours.** The time left is what is left of the open hours, less a changeover for each later opening (`Weekly.room_s`). It
  drops by no more than the time that passes, so each step of the argument in `safety` holds for it.
- **Start hours.** On-demand that runs is never lost, so on-demand now still needs slack ≥ d. But whoever may have nothing at the
  next look may have to wait until the hours begin again: a wait, a start on spot and a stay on spot need that gap on top. The gap
  shrinks as fast as time passes, and at the last look before it opens on-demand can still be started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Bools, Choice, Clause, Ints, Situation, Why
from holdfast.policy.market.facts import Job
from holdfast.policy.market.rules_week import Weekly

__all__ = ["Hours", "hold_the_deadline", "overlaid"]


@dataclass(frozen=True, slots=True)
class Hours:
    """What the hours mean at this tick. Arrays have one element per window."""

    may_run: Bools
    """Through the whole tick."""
    may_start: Bools
    slack_s: Ints
    """As `Situation.slack_s`, of the time in which the job may run."""
    gap_s: Ints
    """From the next look until something may be started; 0: at once."""

    @classmethod
    def of(cls, situation: Situation, starts: Weekly, runs: Weekly, start_utc_s: Ints) -> Hours:
        """`start_utc_s` is the moment at which the job's clock began, one for all windows or one for each."""
        windows = situation.work_left_s.shape
        if starts.always and runs.always:
            whenever = np.ones(windows, np.bool_)
            return cls(whenever, whenever, situation.slack_s, np.zeros(windows, np.int64))
        start = np.broadcast_to(start_utc_s, windows)
        now, tick_s = start + situation.now_s, situation.tick_s
        may_run = runs.open_for_s(now) >= tick_s
        room_s = runs.room_s(now, start + situation.job.deadline_s, tick_s, situation.job.changeover_s)
        gap_s = np.minimum(starts.wait_s(now + tick_s, tick_s), situation.job.deadline_s)
        return cls(may_run, may_run & (starts.open_for_s(now) > 0), room_s - situation.work_left_s, gap_s)

    def not_there_s(self, situation: Situation) -> Ints:
        """Time until the deadline that is of no use, as work: so a policy that knows no hours sees the slack there is."""
        lost_s = situation.slack_s - self.slack_s + self.gap_s
        bounded: Ints = np.clip(lost_s, 0, situation.job.deadline_s)
        return bounded

    def may_stay(self, situation: Situation) -> Bools:
        """Where what runs on spot may be kept, even if the coming tick ends in a preemption."""
        job = situation.job
        costs_s = np.minimum(situation.changeover_left_s, situation.tick_s) + job.changeover_s + job.max_lost_s
        return self.slack_s - self.gap_s >= costs_s

    def may_start_spot(self, job: Job) -> Bools:
        return self.may_start & (self.slack_s - self.gap_s >= 2 * job.changeover_s + job.max_lost_s)

    def may_wait(self, situation: Situation) -> Bools:
        return self.slack_s - self.gap_s >= situation.job.changeover_s + situation.tick_s


def hold_the_deadline(situation: Situation, alive: Ints, wish: Choice, hours: Hours) -> list[Clause]:
    """Clauses for windows in which what is wished could make the job late. `alive` runs now, and could go on."""
    job, target = situation.job, wish.target
    stays_safe = hours.may_stay(situation)
    moves = (target >= 0) & (target != alive)
    unsafe = (
        (moves & ~hours.may_start_spot(job))
        | ((target >= 0) & ~moves & ~stays_safe)
        | ((target == NOTHING) & ~hours.may_wait(situation))
    )
    unsafe &= situation.work_left_s > 0
    on_spot, on_demand = alive >= 0, alive == ON_DEMAND
    in_time = hours.slack_s >= job.changeover_s
    return [
        Clause(unsafe & on_demand, ON_DEMAND, Why.DEADLINE_IN_HOURS),
        Clause(unsafe & on_spot & stays_safe, alive, Why.ON_SPOT_UNTIL_TAKEN),
        Clause(unsafe & on_spot & ~hours.may_start, alive, Why.HOURS_KEEP),
        Clause(unsafe & on_spot & ~in_time, alive, Why.TOO_LATE_TO_LEAVE),
        Clause(unsafe & hours.may_start & in_time, ON_DEMAND, Why.DEADLINE_IN_HOURS),
        Clause(unsafe & hours.may_start, ON_DEMAND, Why.TOO_LATE),
    ]


def overlaid(choice: Choice, clauses: Sequence[Clause]) -> Choice:
    """Per window the first clause that holds; the choice itself where none does."""
    target, why = choice.target.copy(), choice.why.copy()
    for clause in reversed(clauses):
        np.copyto(target, clause.target, where=clause.holds)
        np.copyto(why, np.int8(clause.why), where=clause.holds)
    return Choice(target, why, choice.costs)
