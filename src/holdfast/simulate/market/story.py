"""One window told in words: when the policy changed its mind, why, and what it knew then.

The engine plays that one window and the policy explains its own choices, so that what is told is what was simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Situation, Why
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Context, Decision, Market, Offer, Running
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.outcome import Outcomes
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

__all__ = ["Told", "context_of", "tell"]


@dataclass(frozen=True, slots=True)
class Told:
    """What was known, and what was decided."""

    context: Context
    decision: Decision


def tell(
    trace: Trace, policy: MarketPolicy, workload: Workload, start: int, *, every_tick: bool = False
) -> tuple[Outcomes, tuple[Told, ...]]:
    """The window's outcome, and its decisions: those with another target or another clause than the one before, or all."""
    told: list[Told] = []
    before: tuple[int, Why] | None = None

    def watch(situation: Situation, choice: Choice) -> None:
        nonlocal before
        target, why, costs = choice.of(0)
        if every_tick or (target, why) != before:
            context = context_of(situation, 0, trace.pools)
            told.append(Told(context, policy.in_words(context, target, why, costs)))
        before = (target, why)

    outcomes = simulate(trace, policy, workload, np.array([start], np.int64), watch)
    return outcomes, tuple(told)


def context_of(situation: Situation, window: int, pools: tuple[str, ...]) -> Context:
    """One window of a situation, as a controller would have put it."""
    place = int(situation.running[window])
    market = {NOTHING: Market.NOTHING, ON_DEMAND: Market.ON_DEMAND}.get(place, Market.SPOT)
    there = {1: True, 0: False, -1: None}
    return Context(
        job=situation.job,
        now_s=situation.now_s,
        tick_s=situation.tick_s,
        work_left_s=int(situation.work_left_s[window]),
        running=Running(market, pools[place] if place >= 0 else None, int(situation.changeover_left_s[window])),
        offers=tuple(
            Offer(pool, there[int(situation.available[row, window])], int(situation.microusd_h[row, window]))
            for row, pool in enumerate(pools)
        ),
        on_demand_microusd_h=situation.on_demand_microusd_h,
    )
