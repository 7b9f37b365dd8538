"""How often capacity may be taken away before spot costs as much as on-demand: found by bisection on the mean life, in the engine.

Waiting for capacity costs nothing, so outages are short here; what counts is what a life pays and what it gets done. Where all
lives are equally long and nothing is lost, that is k·d / (k - 1), with d the changeover and k the on-demand price by spot's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.facts import Job
from holdfast.policy.market.registry import policy_named
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.terms import Terms
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.traces.synthetic import Pool, PriceWalk, generate

__all__ = ["BreakEven", "break_even"]

_SHORTEST_S, _LONGEST_S = 20.0, 60 * 86400.0
_ROUNDS = 8
_LIVES = 30
"""Lives that a sample has room for; more say little more."""
_TICKS_A_LIFE = 10
_EVEN = 50.0
"""A shape at which all are as good as equally long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Of the whole gang. `life_s` 0: spot is cheaper however often it is taken; None: never."""

    life_s: float | None
    preemptions_per_day: float | None
    closed_form_s: float | None
    """k·d / (k - 1)."""
    likely_life_s: float
    price_ratio: float
    """On-demand by spot."""

    @property
    def margin(self) -> float | None:
        """How many times as long as it must, capacity is taken to last."""
        return None if not self.life_s else self.likely_life_s / self.life_s


def break_even(terms: Terms, pools: Sequence[Price], shape: float, *, samples: int, seed: int) -> BreakEven:
    """For the cheapest of the pools, at the table's prices."""
    on_demand = min(pool.on_demand_usd_h for pool in pools)
    floor = terms.floor / terms.machines
    spot = min(pool.spot_usd_h for pool in pools) * (1 - floor) + on_demand * floor
    ratio = on_demand / spot
    trial = _Trial(terms, spot, on_demand, shape, samples, seed)
    life_s = None if ratio <= 1 else _bisect(trial)
    return BreakEven(
        life_s=life_s,
        preemptions_per_day=86400 / life_s if life_s else None,
        closed_form_s=ratio * terms.job.changeover_s / (ratio - 1) if ratio > 1 else None,
        likely_life_s=terms.gang_life_s,
        price_ratio=ratio,
    )


def _bisect(trial: _Trial) -> float | None:
    """Around what a start and a loss take; beyond that only where it must be."""
    taken_s = max(1.0, trial.terms.job.changeover_s + min(trial.terms.job.max_lost_s, 86400) / 2)
    ratio = trial.on_demand_usd_h / trial.spot_usd_h
    low_s, high_s = max(_SHORTEST_S, taken_s / 10), min(_LONGEST_S, 10 * taken_s * ratio / (ratio - 1))
    if not trial.spot_is_dearer(low_s):
        low_s, high_s = _SHORTEST_S, low_s
        if not trial.spot_is_dearer(low_s):
            return 0.0
    elif trial.spot_is_dearer(high_s):
        low_s, high_s = high_s, _LONGEST_S
        if trial.spot_is_dearer(high_s):
            return None
    for _ in range(_ROUNDS):
        middle_s = (low_s * high_s) ** 0.5
        low_s, high_s = (middle_s, high_s) if trial.spot_is_dearer(middle_s) else (low_s, middle_s)
    return float((low_s * high_s) ** 0.5)


@dataclass(frozen=True, slots=True)
class _Trial:
    terms: Terms
    spot_usd_h: float
    on_demand_usd_h: float
    shape: float
    samples: int
    seed: int

    def spot_is_dearer(self, life_s: float) -> bool:
        """By what a second of work that counts comes to."""
        whole = self.terms.job
        work_s = max(60, round(min(whole.work_s, _LIVES * life_s)))
        tick_s = max(1, round(life_s / _TICKS_A_LIFE))
        follow_s = max(tick_s, round(min(3 * (work_s + whole.changeover_s), 3 * _LIVES * life_s)))
        job = Job(
            work_s=work_s, deadline_s=follow_s, changeover_s=whole.changeover_s, max_lost_s=min(whole.max_lost_s, work_s)
        )  # fmt: skip
        ticks = -(-follow_s // tick_s)
        pool = Pool(
            name="pool",
            up=Weibull(self.shape, life_s),
            down=Weibull(_EVEN, 2.0 * tick_s),
            price=PriceWalk(mean_microusd_h=round(self.spot_usd_h * 1e6)),
        )
        # One long market: its windows follow each other.
        trace = generate(
            [pool],
            tick_s=tick_s,
            duration_s=self.samples * ticks * tick_s,
            on_demand_microusd_h=round(self.on_demand_usd_h * 1e6),
            seed=self.seed,
        )
        starts = np.arange(self.samples, dtype=np.int64) * ticks
        outcomes = simulate(trace, policy_named("spot"), Workload(job=job), starts)
        useful_s = float(outcomes.useful_s.sum())
        if useful_s <= 0:
            return True
        paid = float(outcomes.microusd.sum()) / useful_s
        on_demand = self.on_demand_usd_h * 1e6 / 3600 * (whole.work_s + whole.changeover_s) / whole.work_s
        return paid > on_demand
