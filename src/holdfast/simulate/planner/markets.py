"""Assumptions to traces: one made-up market per sample, each with a mean life, outages and a price of its own.

How long capacity lasts differs between markets (by the ranges of the assumptions, stratified, so that few samples cover them) and
within one (Weibull). All samples stand one behind the other in one trace, so that the engine plays them side by side. The same seed
makes the same luck whatever the figures are: two plans differ by their figures, not by their luck.

Prices do not move within a sample. Policies decide at the price in the table; what was paid for spot capacity is multiplied by the
sample's `price` afterwards, and is never above on-demand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import Floats, Ints
from holdfast.simulate.planner.assumed import Assumptions
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.terms import Terms
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.traces.synthetic import Pool, PriceWalk, generate
from holdfast.simulate.traces.trace import Trace

__all__ = ["Worlds", "make_worlds", "strata"]

_SHORTEST_S = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Worlds:
    """As many windows as samples."""

    trace: Trace
    starts: Ints
    price: Floats
    """Of each sample: what spot capacity costs, by what the trace says."""
    likeness: Ints
    """The samples in the order of their mean life: neighbours are alike."""


def make_worlds(terms: Terms, assumed: Assumptions, pools: Sequence[Price], samples: int, seed: int) -> Worlds:
    """Markets for these pools. Prices are those of one machine, with its share of a floor on demand in them."""
    lives, outages, prices = (
        np.array([figure.at(share) for share in strata(samples, seed, number).tolist()])
        for number, figure in enumerate((assumed.life_s, assumed.outage_s, assumed.spot_price))
    )
    spot_machines = max(1, terms.machines - terms.floor)
    shorter = spot_machines**assumed.gang.likely
    on_demand_usd_h = min(pool.on_demand_usd_h for pool in pools)
    on_floor = terms.floor / terms.machines
    units = [_microusd(pool.spot_usd_h * (1 - on_floor) + on_demand_usd_h * on_floor) for pool in pools]
    ticks = -(-terms.follow_s // terms.tick_s)
    traces = [
        generate(
            [
                Pool(
                    name=pool.pool,
                    up=Weibull(assumed.shape.likely, max(float(lives[sample]) / shorter, _SHORTEST_S)),
                    down=Weibull(assumed.shape.likely, max(float(outages[sample]), _SHORTEST_S)),
                    price=PriceWalk(mean_microusd_h=unit),
                )
                for pool, unit in zip(pools, units, strict=True)
            ],
            tick_s=terms.tick_s,
            duration_s=ticks * terms.tick_s,
            on_demand_microusd_h=_microusd(on_demand_usd_h),
            seed=seed * 1_000_003 + sample,
        )
        for sample in range(samples)
    ]
    trace = Trace(
        pools=traces[0].pools,
        tick_s=terms.tick_s,
        capacity=np.concatenate([each.capacity for each in traces], axis=1),
        microusd_h=np.concatenate([each.microusd_h for each in traces], axis=1),
        on_demand_microusd_h=traces[0].on_demand_microusd_h,
    )
    cheapest = min(pool.spot_usd_h for pool in pools)
    dearest = max(on_demand_usd_h / cheapest, 1.0)
    paid = np.minimum(prices, dearest)
    share = cheapest * (1 - on_floor) / (cheapest * (1 - on_floor) + on_demand_usd_h * on_floor)
    return Worlds(
        trace, np.arange(samples, dtype=np.int64) * ticks, 1 + share * (paid - 1), np.argsort(lives, kind="stable")
    )


def strata(samples: int, seed: int, number: int) -> Floats:
    """One share between 0 and 1 of each of so many equal parts, in an order of their own per `number`."""
    luck = np.random.default_rng([seed, 77, number])
    shares: Floats = (luck.permutation(samples) + luck.random(samples)) / samples
    return shares


def _microusd(usd: float) -> int:
    return round(usd * 1e6)
