"""Make traces: pools that come and go, with daily tides, shared outages and wandering prices. The same seed makes the same trace.

A pool is up and down in turn. How long, `lifetimes` says, on a clock that runs faster while the pool is busy: at the busiest
hour capacity ages (1 + tide) times as fast, and outages end as much slower. An outage that several pools share takes them all
down at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Floats, Ints
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H
from holdfast.simulate.traces.lifetimes import Lifetimes
from holdfast.simulate.traces.trace import Trace

__all__ = ["Outages", "Pool", "PriceWalk", "generate"]

_DAY_S = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceWalk:
    """Logarithm of the price: it wanders, and is drawn back to its mean. Kept between a floor and a ceiling."""

    mean_microusd_h: int
    spread: float = 0.0
    """Standard deviation of the logarithm in the long run. 0: one price."""
    memory_s: float = 5 * _DAY_S
    """Time in which a deviation falls to 1/e."""
    every_s: int = 3600
    """How often the price moves."""
    floor_microusd_h: int = 0
    ceiling_microusd_h: int = HIGHEST_MICROUSD_H

    def __post_init__(self) -> None:
        if not 0 <= self.floor_microusd_h <= self.mean_microusd_h <= self.ceiling_microusd_h <= HIGHEST_MICROUSD_H:
            raise UsageError("a price walks with 0 <= floor <= mean <= ceiling")
        if not (0 <= self.spread <= 5 and self.memory_s > 0 and self.every_s > 0):
            raise UsageError("a price walks with a spread between 0 and 5, and memory_s and every_s above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One pool of spot capacity."""

    name: str
    up: Lifetimes
    down: Lifetimes
    price: PriceWalk
    machines: int = 1
    """The most that it has. Whenever it comes up it has between one and so many, each number as likely."""
    tide: float = 0.0
    """How much faster capacity ages at the busiest hour, and outages end slower; half a day later it is the other way round."""
    busiest_hour: float = 14.0
    region: str = ""
    """Pools of one region share the outages of that name."""

    def __post_init__(self) -> None:
        if self.machines < 1 or not 0 <= self.tide < 10:
            raise UsageError(f"pool {self.name} has at least one machine and a tide between 0 and 10")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outages:
    """What all pools of a region suffer together."""

    region: str
    apart: Lifetimes
    last: Lifetimes


def generate(
    pools: Sequence[Pool],
    *,
    tick_s: int,
    duration_s: int,
    on_demand_microusd_h: int,
    seed: int,
    outages: Sequence[Outages] = (),
) -> Trace:
    """A trace of these pools from midnight on. What a pool does depends on the seed and its place in the list, not on the other
    pools."""
    if tick_s < 1 or not pools or duration_s < tick_s:
        raise UsageError("a trace has at least one pool and one tick of a second or more")
    ticks = duration_s // tick_s
    common = {
        each.region: _alternating(
            np.random.default_rng([seed, 1, number]), each.apart, each.last, tick_s, ticks, None, 1
        )
        for number, each in enumerate(outages)
    }
    capacity: list[NDArray[np.int32]] = []
    prices: list[Ints] = []
    for number, pool in enumerate(pools):
        luck = np.random.default_rng([seed, 0, number])
        clock = _tide(pool, tick_s, ticks) if pool.tide else None
        row = _alternating(luck, pool.up, pool.down, tick_s, ticks, clock, pool.machines)
        capacity.append(np.where(common[pool.region] > 0, row, 0) if pool.region in common else row)
        prices.append(_walk(luck, pool.price, tick_s, ticks))
    return Trace(
        pools=tuple(pool.name for pool in pools),
        tick_s=tick_s,
        capacity=np.vstack(capacity).astype(np.int32),
        microusd_h=np.vstack(prices),
        on_demand_microusd_h=on_demand_microusd_h,
    )


def _tide(pool: Pool, tick_s: int, ticks: int) -> Floats:
    """How fast capacity ages in each tick; outages run by its inverse. 1 on average of its logarithm."""
    hours = (np.arange(ticks) * tick_s % _DAY_S) / 3600
    speed: Floats = np.exp(math.log1p(pool.tide) * np.cos((hours - pool.busiest_hour) / 24 * 2 * math.pi))
    return speed


def _alternating(
    luck: np.random.Generator,
    up: Lifetimes,
    down: Lifetimes,
    tick_s: int,
    ticks: int,
    speed: Floats | None,
    machines: int,
) -> NDArray[np.int32]:
    """Capacity per tick, as a probe at its beginning would find it. It begins at a random point of an up or a down time."""
    paces = (None, None) if speed is None else (speed, 1 / speed)
    clocks = [_clock(tick_s, ticks, pace) for pace in paces]
    states = (up, down)
    row = np.zeros(ticks, np.int32)
    means = [float(each.draw(luck, 256).mean()) for each in states]
    is_down = bool(luck.random() * sum(means) >= means[0])
    begin_s, first = 0.0, True
    end_s = float(ticks * tick_s)
    while begin_s < end_s:
        lasts_s = max(float(states[is_down].draw(luck, 1)[0]), 1e-3)
        if first:
            lasts_s, first = lasts_s * luck.random(), False
        times, ages = clocks[is_down]
        until_s = float(np.interp(np.interp(begin_s, times, ages) + lasts_s, ages, times, right=end_s))
        # A step of a tiny duration must move on.
        until_s = max(until_s, begin_s + 1e-3)
        if not is_down:
            row[math.ceil(begin_s / tick_s) : math.ceil(until_s / tick_s)] = luck.integers(1, machines + 1)
        begin_s, is_down = until_s, not is_down
    return row


def _clock(tick_s: int, ticks: int, speed: Floats | None) -> tuple[Floats, Floats]:
    """Wall time and age at every tick's edge."""
    times: Floats = np.arange(ticks + 1, dtype=np.float64) * tick_s
    if speed is None:
        return times, times
    ages: Floats = np.concatenate([[0.0], np.cumsum(speed * tick_s)])
    return times, ages


def _walk(luck: np.random.Generator, price: PriceWalk, tick_s: int, ticks: int) -> Ints:
    if not price.spread:
        return np.full(ticks, price.mean_microusd_h, np.int64)
    moves = -(-ticks * tick_s // price.every_s)
    keep = math.exp(-price.every_s / price.memory_s)
    pushes = luck.standard_normal(moves) * price.spread * math.sqrt(1 - keep * keep)
    levels = np.empty(moves)
    level = float(luck.standard_normal()) * price.spread
    for move, push in enumerate(pushes.tolist()):
        level = keep * level + push
        levels[move] = level
    # The mean of e^level is e^(spread squared / 2).
    walked = price.mean_microusd_h * np.exp(levels - price.spread**2 / 2)
    bounded = np.clip(np.rint(walked), price.floor_microusd_h, price.ceiling_microusd_h).astype(np.int64)
    each: Ints = bounded[np.arange(ticks) * tick_s // price.every_s]
    return each
