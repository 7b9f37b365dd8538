"""Uniform Progress (Can't Be Late, NSDI 2024): spend the slack evenly over the time there is.

With work C and deadline R, the job should have done t·C/R by time t. Without spot it takes on-demand when it is behind that
line, and leaves on-demand again only when it is ahead of where the line will be two changeovers later, so that a short lead
does not pay for two moves.

The paper and its published code differ in one point, and both are here. By the text, a job that is far enough ahead leaves
on-demand whether or not there is spot to go to: it waits. By the code it stays until there is some (`waits_for_spot`): a
changeover back to on-demand is not paid for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Clause, Floats, Situation, Why, first_of
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.safety import last_resort, on_spot, spot_is_safe, wait_is_safe

__all__ = ["UniformProgress", "UniformProgressAsWritten"]


@dataclass(frozen=True, slots=True)
class UniformProgress(MarketPolicy):
    """Uniform Progress as its authors' code has it: on-demand is left only for spot capacity."""

    name: ClassVar[str] = "uniform-progress"
    summary: ClassVar[str] = "spends the slack evenly; leaves on-demand only for spot"
    keeps_deadline: ClassVar[bool] = True
    waits_for_spot: ClassVar[bool] = True
    """Whether a job that is ahead stays on on-demand while there is no spot."""

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        job, now_s, cheapest = situation.job, situation.now_s, situation.cheapest
        # Progress ≥ t·C/R without a division: both sides times R.
        done = (job.work_s - situation.work_left_s) * job.deadline_s
        behind = done < now_s * job.work_s
        leaves = done >= (now_s + 2 * job.changeover_s) * job.work_s
        on_demand = situation.running == ON_DEMAND
        start = (cheapest >= 0) & spot_is_safe(situation)
        clauses = [
            Clause(on_demand & leaves & start, cheapest, Why.AHEAD_SO_SPOT),
            Clause(on_demand & leaves & wait_is_safe(situation), *self._ahead_without_spot()),
            Clause(on_demand, ON_DEMAND, Why.STILL_BEHIND),
            *on_spot(situation),
            Clause(start, cheapest, Why.SPOT_IS_THERE),
            *last_resort(situation),
            Clause(behind, ON_DEMAND, Why.BEHIND),
        ]
        return memory, first_of(clauses, (NOTHING, Why.AHEAD_SO_WAIT))

    def _ahead_without_spot(self) -> tuple[int, Why]:
        return (ON_DEMAND, Why.AHEAD_BUT_NO_SPOT) if self.waits_for_spot else (NOTHING, Why.AHEAD_SO_WAIT)


@dataclass(frozen=True, slots=True)
class UniformProgressAsWritten(UniformProgress):
    """Uniform Progress as its paper has it: a job that is ahead leaves on-demand, and waits if there is no spot."""

    name: ClassVar[str] = "uniform-progress-as-written"
    summary: ClassVar[str] = "spends the slack evenly; leaves on-demand as soon as it is ahead"
    waits_for_spot: ClassVar[bool] = False
