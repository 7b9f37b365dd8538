"""The cheapest that anybody could have done: exact offline optimum of a job on a trace that is known from beginning to end.

A lower bound for every market policy on every window, and therefore the measure of all of them. The world is that of the
simulator: spot capacity is there for whole ticks or not at all, on-demand always; a start costs the changeover in time and in
money and can be made at ticks only; the tick in which the work ends is paid for as far as it is used; a preemption loses no
work (a policy that loses some can only be dearer).

**Dynamic programming, backwards over ticks.** The state is (tick, slack, what is ready to work), where slack is the time left
less the work left. Slack is the better coordinate than work: working leaves it alone, waiting takes a tick from it, a start
takes the changeover. So a tick of work is one addition to a whole vector, and a wait or a start is a shift.

    ready[p](t, s) = what the rest costs at best with pool p (or on-demand) ready to work at tick t
    idle(t, s)     = min of  idle(t+1, s - tick),  and per p  price x n ticks + ready[p](t+n, s - changeover)
    ready[p](t, s) = min of  price x tick + ready[p](t+1, s),  idle(t, s)          (the second one is a stop, or a preemption)

A start is one jump of n = ⌈changeover / tick⌉ ticks: to order capacity and give it up before it works is never of use. A change
of pool is a stop and a start in the same tick. Where it costs something to bring the data from pool to pool, `idle` and on-demand
are told apart by the pool in which the job ran last. (Moves that are cheaper by way of a third pool are taken to cost that: a
lower bound.)

**Exact on its grid.** All slacks that can occur differ from the first one by ticks and changeovers, so a grid of their greatest
common divisor holds them all, and nothing is rounded. Where that grid would be too fine (`MOST_CELLS`), the changeover is
rounded down to a coarser one: still a lower bound, and `Optimum.exact` says so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Bools, Ints
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, Job
from holdfast.policy.market.money import NEVER_HS, microusd

__all__ = ["MOST_CELLS", "Optimum", "offline_optimum"]

MOST_CELLS = 1 << 17
"""Slacks that are told apart: a megabyte per vector."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """What a window costs at least."""

    microusd: int | None
    """None: not even on-demand from the first moment keeps the deadline."""
    exact: bool
    """False: the changeover or a move was rounded down, so that this is a lower bound that may not be reached."""


def offline_optimum(
    job: Job,
    tick_s: int,
    available: Bools,
    microusd_h: Ints,
    on_demand_microusd_h: int,
    first_tick: int = 0,
    move_microusd: Sequence[Sequence[int]] = (),
) -> Optimum:
    """The least cost of the job, if it starts at `first_tick` of a trace. `available` and `microusd_h` are pool x tick;
    `move_microusd` is what a move costs from pool to pool, nothing if there is none."""
    ticks = -(-job.deadline_s // tick_s)
    if available.shape != microusd_h.shape or available.shape[1] < first_tick + ticks:
        raise UsageError(f"the deadline is {ticks} ticks away; from tick {first_tick} on the trace has fewer")
    slack_s = job.deadline_s - job.work_s
    moves, direct = _moves_hs(move_microusd, len(available))
    grid = _Grid.of(slack_s, tick_s, job.changeover_s)
    if slack_s < grid.changeover_s:
        return Optimum(None, direct and grid.changeover_s == job.changeover_s)
    span = slice(first_tick, first_tick + ticks)
    prices = np.vstack([microusd_h[:, span], np.full((1, ticks), on_demand_microusd_h)])
    there = np.vstack([available[:, span], np.ones((1, ticks), np.bool_)])
    least_hs = _Backwards(job, tick_s, grid, there, prices, moves).run()
    return Optimum(int(microusd(np.array([least_hs]))[0]), direct and grid.changeover_s == job.changeover_s)


def _moves_hs(move_microusd: Sequence[Sequence[int]], pools: int) -> tuple[Ints, bool]:
    """What it costs to start in a pool (column) when the data is in another one (row), in hour-seconds; the last row: nowhere yet.
    One row where moves cost nothing. And whether no detour is cheaper."""
    moves = np.array(move_microusd, np.int64).reshape(-1, pools) if move_microusd else np.zeros((0, pools), np.int64)
    if not moves.any():
        return np.zeros((1, pools), np.int64), True
    if moves.shape != (pools, pools) or moves.min() < 0 or moves.max() > HIGHEST_MICROUSD_H or moves.diagonal().any():
        raise UsageError(
            f"moves cost between 0 and ${HIGHEST_MICROUSD_H / 1e6:,.0f} from each of {pools} pools to each, and 0 to itself"
        )
    least = moves.copy()
    for by in range(pools):
        np.minimum(least, least[:, by, None] + least[by], out=least)
    return np.vstack([least, np.zeros((1, pools), np.int64)]) * 3600, bool((least == moves).all())


@dataclass(frozen=True, slots=True)
class _Grid:
    """Slacks that can occur: cell k stands for the first slack less k x `cell_s`."""

    cell_s: int
    cells: int
    changeover_s: int

    @classmethod
    def of(cls, slack_s: int, tick_s: int, changeover_s: int) -> _Grid:
        cell_s = math.gcd(tick_s, changeover_s)
        if slack_s // cell_s >= MOST_CELLS:
            wide_enough = (s for s in range(cell_s, tick_s) if tick_s % s == 0 and slack_s // s < MOST_CELLS)
            cell_s = next(wide_enough, tick_s)
        return cls(cell_s, max(0, slack_s) // cell_s + 1, changeover_s // cell_s * cell_s)


class _Backwards:
    """One run over the ticks, from the deadline to the start. Costs are in hour-seconds (see `money`): home x slack, where home is
    the pool that holds the data; for a pool that is ready there is one home only."""

    def __init__(self, job: Job, tick_s: int, grid: _Grid, there: Bools, prices: Ints, moves: Ints) -> None:
        self.job, self.tick_s, self.grid = job, tick_s, grid
        self.prices: list[list[int]] = prices.tolist()
        self.there: list[list[bool]] = there.tolist()
        self.markets, self.ticks = prices.shape
        self.homes = len(moves)
        # On-demand, the last market, is where the data is.
        self.move_hs = np.hstack([moves, np.zeros((self.homes, 1), np.int64)])[:, :, None]
        self.home_of = [slice(each, each + 1) if self.homes > 1 else slice(0, 1) for each in range(self.markets - 1)]
        self.home_of.append(slice(0, self.homes))
        self.start_ticks = max(1, -(-grid.changeover_s // tick_s))
        self.cell_s = np.arange(grid.cells, dtype=np.int64) * grid.cell_s
        # Newest first: ready[p][i] belongs to tick t + 1 + i while tick t is being computed.
        self.ready: list[deque[Ints]] = [deque(maxlen=self.start_ticks) for _ in range(self.markets)]
        self.there_for = [0] * self.markets
        """Ticks in a row, from this one on, in which the market has capacity."""

    def run(self) -> int:
        idle = np.full((self.homes, self.grid.cells), NEVER_HS, np.int64)
        for tick in reversed(range(self.ticks)):
            for market in range(self.markets):
                self.there_for[market] = self.there_for[market] + 1 if self.there[market][tick] else 0
            idle = self._idle(tick, idle)
            for market in range(self.markets):
                self.ready[market].appendleft(self._ready(tick, market, idle[self.home_of[market]]))
        return int(idle[-1, 0])

    def _idle(self, tick: int, idle_after: Ints) -> Ints:
        cells = self.grid.cells
        idle = np.full((self.homes, cells), NEVER_HS, np.int64)
        wait = self.tick_s // self.grid.cell_s
        if wait < cells:
            idle[:, : cells - wait] = idle_after[:, wait:]
        for market in range(self.markets):
            if self.there_for[market] >= self.start_ticks:
                self._start(tick, market, idle)
        return idle

    def _start(self, tick: int, market: int, idle: Ints) -> None:
        """Lower `idle` to what it costs to start in this market now, where that is less."""
        changeover_s, count, tick_s = self.grid.changeover_s, self.start_ticks, self.tick_s
        shift = changeover_s // self.grid.cell_s
        reach = self.grid.cells - shift
        if reach <= 0:
            return
        prices, move_hs = self.prices[market][tick : tick + count], self.move_hs[:, market]
        # Cells whose work ends within the ticks of the changeover: the rest of the last of them is enough.
        ends = self._cells_ending(tick, count * tick_s - changeover_s, reach)
        if ends:
            used_s = self._left_s(tick, ends) + (changeover_s - (count - 1) * tick_s)
            cost = prices[-1] * used_s + sum(prices[:-1]) * tick_s
            np.minimum(idle[:, :ends], cost + move_hs, out=idle[:, :ends])
        if ends < reach and len(self.ready[market]) == count:
            cost = self.ready[market][-1][:, ends + shift :] + (sum(prices) * tick_s + move_hs)
            np.minimum(idle[:, ends:reach], cost, out=idle[:, ends:reach])

    def _ready(self, tick: int, market: int, idle: Ints) -> Ints:
        if not self.there[market][tick]:
            return idle
        price, cells = self.prices[market][tick], self.grid.cells
        ready = idle.copy()
        ends = self._cells_ending(tick, self.tick_s, cells)
        if ends:
            np.minimum(ready[:, :ends], price * self._left_s(tick, ends), out=ready[:, :ends])
        if ends < cells and self.ready[market]:
            cost = self.ready[market][0][:, ends:] + price * self.tick_s
            np.minimum(ready[:, ends:], cost, out=ready[:, ends:])
        return ready

    def _cells_ending(self, tick: int, within_s: int, most: int) -> int:
        """How many cells, from 0 on, have no more work left than `within_s`. In the last tick that is all: none has negative
        slack."""
        if tick == self.ticks - 1:
            return most
        spare_s = within_s - self.job.work_s + tick * self.tick_s
        return 0 if spare_s < 0 else min(most, spare_s // self.grid.cell_s + 1)

    def _left_s(self, tick: int, cells: int) -> Ints:
        """Work left per cell. Cells below zero stand for a job that is done already; nothing leads to them."""
        return np.maximum(self.cell_s[:cells] + (self.job.work_s - tick * self.tick_s), 0)
