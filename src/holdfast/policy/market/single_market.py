"""The two policies that know one market only: what the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Clause, Floats, Situation, Why, first_of
from holdfast.policy.market.base import MarketPolicy

__all__ = ["OnDemandOnly", "SpotOnly"]


@dataclass(frozen=True, slots=True)
class OnDemandOnly(MarketPolicy):
    """On-demand from the first moment to the last."""

    name: ClassVar[str] = "on-demand"
    summary: ClassVar[str] = "on-demand only"
    keeps_deadline: ClassVar[bool] = True

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        windows = situation.running.shape
        return memory, Choice(np.full(windows, ON_DEMAND, np.int64), np.full(windows, Why.ON_DEMAND_ONLY, np.int8))


@dataclass(frozen=True, slots=True)
class SpotOnly(MarketPolicy):
    """Spot when there is some below the on-demand price, else wait; the deadline is a wish."""

    name: ClassVar[str] = "spot"
    summary: ClassVar[str] = "spot only, however late it gets"
    keeps_deadline: ClassVar[bool] = False

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        clauses = [
            Clause(situation.running >= 0, situation.running, Why.ON_SPOT_UNTIL_TAKEN),
            Clause(situation.cheapest >= 0, situation.cheapest, Why.SPOT_IS_THERE),
        ]
        return memory, first_of(clauses, (NOTHING, Why.WAIT_FOR_SPOT))
