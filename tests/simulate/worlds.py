"""Random small worlds: windows of a few seconds to a few minutes, with everything that the simulator knows in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st
from slow_market import World

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Floats, Situation, Why
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Job
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

PRICES = (0, 1, 7, 900, 1800, 3599, 973_100, 1_100_000, 2_000_000, 3_060_000)


@st.composite
def worlds(draw: st.DrawFn, *, pools: int = 3, plain: bool = False, feasible: bool = False, windows: int = 3) -> World:
    """`plain`: no lost work, no gang, all is known. `feasible`: on-demand at once would be in time. Longer than one window.

    The market is drawn by a generator of its own: drawn tick by tick by a strategy, hardly anything would happen in it.
    """
    luck = random.Random(draw(st.integers(0, 1 << 32)))
    tick_s = luck.randint(1, 12)
    changeover_s = luck.choice([0, luck.randint(1, 25), luck.randint(1, tick_s)])
    work_s = luck.randint(1, 90)
    deadline_s = work_s + luck.randint(
        changeover_s if feasible or luck.random() < 0.8 else -work_s + 1, 90 + changeover_s
    )
    horizon_s = 0 if plain or luck.random() < 0.5 else luck.randint(1, 250)
    ticks = -(-max(deadline_s, horizon_s) // tick_s) + windows - 1
    rows = luck.randint(1, pools)
    gang = 1 if plain else luck.randint(1, 3)
    machines = tuple(tuple(in_runs(luck, [0, gang, gang + luck.randint(0, 2), gang - 1], ticks)) for _ in range(rows))
    prices = tuple(tuple(in_runs(luck, PRICES, ticks)) for _ in range(rows))
    return World(
        tick_s=tick_s,
        machines=machines,
        prices=prices,
        on_demand=luck.choice([3_060_000, 3_060_000, luck.choice(PRICES)]),
        work_s=work_s,
        deadline_s=deadline_s,
        changeover_s=changeover_s,
        saves_every_s=0 if plain else luck.choice([0, luck.randint(1, 20)]),
        gang=gang,
        asks=not plain and luck.random() < 0.5,
        horizon_s=horizon_s,
        refund_within_s=0 if plain else luck.choice([0, luck.randint(1, 60)]),
        moves=_moves(luck, rows) if luck.random() < 0.4 else (),
    )


def _moves(luck: random.Random, pools: int) -> tuple[tuple[int, ...], ...]:
    """Distances between places on a line, and something for each, in the order of what the windows cost: no detour is cheaper."""
    places = [luck.choice([0, 300, 4000, 20_000]) for _ in range(pools)]
    flat = luck.choice([0, 1, 700])
    return tuple(tuple((abs(a - b) + flat) * (i != j) for j, b in enumerate(places)) for i, a in enumerate(places))


def in_runs(luck: random.Random, values: Sequence[int], ticks: int) -> list[int]:
    """Values that hold for a while, as markets do: single ticks would hardly ever let a changeover finish."""
    out: list[int] = []
    longest = luck.choice([2, 5, 12])
    while len(out) < ticks:
        out += [luck.choice(values)] * luck.randint(1, longest)
    return out[:ticks]


class HasMarket(Protocol):
    """What worlds of one job and of several nodes have in common: pool by tick."""

    @property
    def tick_s(self) -> int: ...
    @property
    def machines(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def prices(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def on_demand(self) -> int: ...


AnyWorld = TypeVar("AnyWorld", bound=HasMarket)


def window_of(world: AnyWorld, start: int) -> AnyWorld:
    rows = {"machines": world.machines, "prices": world.prices}
    cut = {name: tuple(row[start:] for row in of_pools) for name, of_pools in rows.items()}
    return replace(world, **cut)  # type: ignore[type-var]


def trace_of(world: HasMarket) -> Trace:
    return Trace(
        pools=tuple(f"pool-{number}" for number in range(len(world.machines))),
        tick_s=world.tick_s,
        capacity=np.array(world.machines, np.int32),
        microusd_h=np.array(world.prices, np.int64),
        on_demand_microusd_h=world.on_demand,
    )


def job_of(world: World) -> Job:
    return Job(
        work_s=world.work_s,
        deadline_s=world.deadline_s,
        changeover_s=world.changeover_s,
        max_lost_s=world.saves_every_s,
    )


def workload_of(world: World) -> Workload:
    return Workload(
        job=job_of(world),
        gang=world.gang,
        asks=world.asks,
        horizon_s=world.horizon_s or None,
        free_if_taken_within_s=world.refund_within_s,
        move_microusd=world.moves,
    )


@dataclass(frozen=True, slots=True)
class Erratic(MarketPolicy):
    """Does anything that is possible, and remembers something: a number that depends on all that it has seen."""

    seed: int

    name = "erratic"
    summary = "anything"
    keeps_deadline = False

    def first_memory(self, pools: int) -> tuple[float, ...]:
        return (float(self.seed), 0.0)

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        mixed = (
            memory[0].astype(np.int64) * 1103515245 + situation.now_s * 12345 + situation.work_left_s * 7919
        ) % 65521
        options = np.vstack(
            [situation.running, situation.running, np.full_like(mixed, NOTHING), np.full_like(mixed, ON_DEMAND)]
        )
        target = options[mixed % 4, np.arange(len(mixed))]
        for pool in range(len(situation.available)):
            likes = (situation.available[pool] != 0) & ((mixed >> 3) % (pool + 2) == 0)
            target = np.where(likes, pool, target)
        remembered = np.vstack([mixed.astype(np.float64), memory[1] + 1])
        return remembered, Choice(target, np.full(len(mixed), Why.WAIT_FOR_SPOT, np.int8))
