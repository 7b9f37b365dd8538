"""Describe a trace in a few figures, from which `synthetic` can make others like it, or from which a policy can learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import NOTHING, Bools, Floats, Ints, Situation
from holdfast.policy.market.beliefs import Beliefs, Sightings
from holdfast.policy.market.facts import LONGEST_S, Job
from holdfast.policy.market.ours import Ours
from holdfast.simulate.traces.lifetimes import Weibull, fit_weibull
from holdfast.simulate.traces.synthetic import Pool, PriceWalk
from holdfast.simulate.traces.trace import Trace

__all__ = ["Likeness", "fit_beliefs", "fit_ours", "fit_pool", "runs"]

_DAY_S = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """What one pool was like, for gangs of one size."""

    pool: str
    availability: float
    """Share of the time with capacity."""
    up: Weibull | None
    """How long capacity lasted, as far as ticks show it; None where it came and went fewer than twice."""
    down: Weibull | None
    young_share: float
    """Of the stretches of capacity that ended, those that lasted ten minutes at most."""
    by_hour: tuple[float, ...]
    """Availability in each hour of the day, counted from the start of the trace; nan where the trace is shorter."""
    price: PriceWalk

    def as_pool(self, *, machines: int = 1) -> Pool:
        """A synthetic pool like this one, without its daily tide."""
        if self.up is None or self.down is None:
            raise UsageError(f"pool {self.pool} came and went too rarely to be made again")
        return Pool(name=self.pool, up=self.up, down=self.down, price=self.price, machines=machines)


def runs(there: Bools) -> tuple[Ints, Bools, Bools]:
    """Stretches of equal ticks: how many ticks each has, whether it was up, and whether it is seen from beginning to end."""
    edges = np.flatnonzero(np.diff(there.astype(np.int8))) + 1
    bounds = np.concatenate([[0], edges, [len(there)]])
    whole = np.ones(len(bounds) - 1, np.bool_)
    whole[[0, -1]] = False
    return np.diff(bounds), there[bounds[:-1]], whole


def fit_pool(trace: Trace, pool: str, *, gang: int = 1) -> Likeness:
    """Fit one pool. A stretch of n ticks counts as n ticks long; in truth it was up to one longer or shorter."""
    one = trace.only(pool)
    there = one.available(gang)[0]
    lengths, up, whole = runs(there)
    lengths_s = (lengths * trace.tick_s).astype(np.float64)
    ended_up = whole & up
    young = lengths_s[ended_up] <= 600
    return Likeness(
        pool=pool,
        availability=float(there.mean()),
        up=_fit(lengths_s, up, whole),
        down=_fit(lengths_s, ~up, whole),
        young_share=float(young.mean()) if len(young) else 0.0,
        by_hour=_by_hour(there, trace.tick_s),
        price=_fit_price(one.microusd_h[0], trace.tick_s),
    )


def fit_beliefs(trace: Trace, *, gang: int = 1) -> Beliefs:
    """What the policy `ours` may believe after this history. One pool: that pool's own past. Several: what a pool of that kind is
    like, as sure as they agree."""
    sightings = [Sightings.of(row, trace.tick_s) for row in trace.available(gang)]
    return Beliefs.learned(reduce(Sightings.and_of, sightings))


def fit_ours(trace: Trace, *, gang: int = 1) -> Ours:
    """`ours` with what it may believe after this history of the very pools that it will choose from: how long capacity lasts in
    each, and how long none of those up to some price has any."""
    there, price = trace.available(gang), trace.microusd_h.mean(axis=1)
    alone = [Sightings.of(row, trace.tick_s) for row in there]
    markets = [Sightings.of(there[price <= each].any(axis=0), trace.tick_s) for each in np.unique(price)]
    up, down = reduce(Sightings.and_of, alone), reduce(Sightings.and_of, markets)
    beliefs = Beliefs.learned(replace(up, down_ends=down.down_ends, down_h=down.down_h))
    return Ours(beliefs).after(_looks(trace, there))


def _looks(trace: Trace, there: Bools) -> Iterator[Situation]:
    """The history as one that only looked on would have seen it."""
    job = Job(work_s=LONGEST_S, deadline_s=LONGEST_S, changeover_s=0)
    none = np.full(1, NOTHING, np.int64)
    for tick in range(trace.ticks):
        yield Situation(
            job=job,
            now_s=tick * trace.tick_s,
            tick_s=trace.tick_s,
            work_left_s=none + 1 + LONGEST_S,
            running=none,
            changeover_left_s=np.zeros(1, np.int64),
            available=there[:, tick, None].astype(np.int8),
            microusd_h=trace.microusd_h[:, tick, None],
            on_demand_microusd_h=trace.on_demand_microusd_h,
            cheapest=none,
        )


def _fit(lengths_s: Floats, of_kind: Bools, whole: Bools) -> Weibull | None:
    # The first stretch is left out: its beginning was not seen. The last is cut off, and known to have lasted at least so long.
    used = of_kind.copy()
    used[0] = False
    if (used & whole).sum() < 2:
        return None
    return fit_weibull(lengths_s[used], whole[used])


def _by_hour(there: Bools, tick_s: int) -> tuple[float, ...]:
    hour = np.arange(len(there)) * tick_s % _DAY_S // 3600
    return tuple(float(there[hour == each].mean()) if (hour == each).any() else math.nan for each in range(24))


def _fit_price(microusd_h: Ints, tick_s: int) -> PriceWalk:
    """Mean, spread and memory: the correlation of the logarithm with itself an hour later says how fast it forgets."""
    mean = int(np.rint(microusd_h.mean()))
    lag = max(1, 3600 // tick_s)
    if mean == 0 or (microusd_h == microusd_h[0]).all() or (microusd_h == 0).any() or len(microusd_h) <= 2 * lag:
        return PriceWalk(mean_microusd_h=mean)
    logs = np.log(microusd_h) - np.log(microusd_h).mean()
    variance = float((logs * logs).mean())
    kept = float((logs[lag:] * logs[:-lag]).mean()) / variance
    memory_s = -lag * tick_s / math.log(min(max(kept, 1e-3), 1 - 1e-6))
    return PriceWalk(
        mean_microusd_h=mean,
        spread=min(math.sqrt(variance), 5.0),
        memory_s=memory_s,
        floor_microusd_h=int(microusd_h.min()),
        ceiling_microusd_h=int(microusd_h.max()),
    )
