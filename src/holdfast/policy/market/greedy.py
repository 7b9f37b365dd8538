"""Greedy: spot when there is some, else wait, and on-demand at the last safe moment.

It spends its slack as fast as it can, so it is cheap on pools that are nearly always there and dear on the others: the slack is
gone by the time spot comes back. The baseline that smarter policies are measured from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Clause, Floats, Situation, Why, first_of
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.safety import last_resort, on_spot, spot_is_safe

__all__ = ["Greedy"]


@dataclass(frozen=True, slots=True)
class Greedy(MarketPolicy):
    """Spot when there is some, else wait; on-demand to the end once the deadline asks for it."""

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "spot when there is some, else wait until the last safe moment"
    keeps_deadline: ClassVar[bool] = True

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        start = (situation.cheapest >= 0) & spot_is_safe(situation)
        clauses = [
            Clause(situation.running == ON_DEMAND, ON_DEMAND, Why.ON_DEMAND_TO_THE_END),
            *on_spot(situation),
            Clause(start, situation.cheapest, Why.SPOT_IS_THERE),
            *last_resort(situation),
        ]
        return memory, first_of(clauses, (NOTHING, Why.WAIT_FOR_SPOT))
