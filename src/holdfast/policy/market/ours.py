"""Ours: the action of which the rest of the job is expected to cost least, by what has been learned so far.

    history ──→ Beliefs ──→ tables, solved once ──────────────────────┐
    ticks ──→ memory: ends seen, ends believed, ages ──→ posterior ──→ expected cost of waiting, spot, on-demand ──→ the least

What it believes of the market is in `beliefs`, what it makes of it in `tables`; the limits of `safety` come before both, so it is
never late, however wrong the beliefs are. What it sees counts less as it gets older (`forget_s`): pools change.

Several pools are one market that is up while any of them is; the cheapest that is there is taken, and kept. That a move from pool
to pool costs a changeover too is not in the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from holdfast.policy.market.arrays import (
    NOTHING,
    ON_DEMAND,
    Bools,
    Choice,
    Clause,
    Floats,
    Ints,
    Situation,
    Why,
    first_of,
)
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.beliefs import AGES, COLD, UNSEEN_AGE_S, Beliefs, Hazard, bucket_of
from holdfast.policy.market.safety import last_resort, on_spot, spot_is_safe, wait_is_safe
from holdfast.policy.market.tables import POINTS, START_DEMAND, START_SPOT, STAY, WAIT, Table, Terms, solve

__all__ = ["Ours"]

# What is remembered of one state, up or down: rows of the memory. After these, per curve of the belief, the ends
# that were believed, and then the logarithms of the hazards at the ages of the ends that were seen.
_LAST, _SINCE, _AT, _ENDS, _EXPECTED = range(5)
_PRICES = 32
"""Prices that tables tell apart, as fractions of the on-demand price."""
_HYSTERESIS_S = 15.0
"""A move away from on-demand must be worth so many seconds of it: expectations have errors."""


@dataclass(frozen=True, slots=True)
class Ours(MarketPolicy):
    """Weighs waiting, spot and on-demand by what the rest is expected to cost."""

    name: ClassVar[str] = "ours"
    summary: ClassVar[str] = "what is expected to cost least, by what it learns about the market"
    keeps_deadline: ClassVar[bool] = True

    beliefs: Beliefs = COLD
    """`simulate.fit.fit_beliefs` makes them of a history."""
    forget_s: float = 48 * 3600.0
    """Time in which what was seen counts for 1/e."""

    def first_memory(self, pools: int) -> tuple[float, ...]:
        """The state of the market at the first look (-1: none yet); then what is known of its downs, then of its ups."""
        down, up = ((-1.0,) + (0.0,) * (_rows(hazard) - 1) for hazard in (self.beliefs.down, self.beliefs.up))
        return (-1.0, *down, *up)

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        memory = self._learn(situation, memory)
        may_start = (situation.cheapest >= 0) & spot_is_safe(situation)
        may_wait = wait_is_safe(situation)
        on_demand = situation.running == ON_DEMAND
        asked = (situation.running < 0) & (situation.work_left_s > 0) & (may_start | may_wait)
        costs = self._expect(situation, memory, asked)
        costs[START_SPOT, ~may_start] = np.inf
        costs[WAIT, ~may_wait] = np.inf
        moving = np.minimum(costs[WAIT], costs[START_SPOT]) < costs[STAY] - _HYSTERESIS_S
        waits, starts = costs[WAIT] < costs[START_SPOT], costs[START_SPOT] <= costs[START_DEMAND]
        clauses = [
            Clause(on_demand & asked & moving & may_wait & waits, NOTHING, Why.WAITING_IS_CHEAPEST),
            Clause(on_demand & asked & moving & may_start, situation.cheapest, Why.SPOT_IS_CHEAPEST),
            Clause(on_demand & asked, ON_DEMAND, Why.STAYING_IS_CHEAPEST),
            Clause(on_demand, ON_DEMAND, Why.ON_DEMAND_TO_THE_END),
            *on_spot(situation),
            Clause(asked & may_start & ~waits & starts, situation.cheapest, Why.SPOT_IS_CHEAPEST),
            *last_resort(situation),
            Clause(costs[START_DEMAND] < costs[WAIT], ON_DEMAND, Why.DEMAND_IS_CHEAPEST),
        ]
        choice = first_of(clauses, (NOTHING, Why.WAITING_IS_CHEAPEST))
        return memory, replace(choice, costs=_dollars(situation, costs, on_demand))

    def _learn(self, situation: Situation, memory: Floats) -> Floats:
        """The memory with this tick in it."""
        known = situation.available
        cheap = situation.microusd_h < situation.on_demand_microusd_h
        is_up = ((known == 1) & cheap).any(axis=0)
        unknown = ((known < 0) & cheap).any(axis=0) & ~is_up
        market = np.where(unknown, -1, is_up).astype(np.float64)
        before, down, up = self._parted(memory)
        first = np.where(before < 0, market, before)
        down = self._track(down, market, situation.now_s, 0, self.beliefs.down)
        up = self._track(up, market, situation.now_s, 1, self.beliefs.up)
        return np.vstack([first, down, up])

    def _parted(self, memory: Floats) -> tuple[Floats, Floats, Floats]:
        """The first look; what is remembered of the downs; of the ups."""
        begin = 1 + _rows(self.beliefs.down)
        return memory[0], memory[1:begin], memory[begin:]

    def _track(self, before: Floats, seen: Floats, now_s: int, counted: int, hazard: Hazard) -> Floats:
        """Count how often and against which odds the state `counted` ended."""
        last, since, at = before[_LAST], before[_SINCE], before[_AT]
        known, first, counts = seen >= 0, last < 0, (seen >= 0) & (last == counted)
        changed = known & ~first & (seen != last)
        passed = hazard.expected(now_s - since) - hazard.expected(at - since)
        kept = np.where(known, np.exp((at - now_s) / self.forget_s), 1.0)
        logs = _EXPECTED + len(hazard.curves)
        out = np.empty_like(before)
        out[_LAST] = np.where(known, seen, last)
        out[_SINCE] = np.where(changed, now_s, np.where(known & first, now_s - UNSEEN_AGE_S, since))
        out[_AT] = np.where(known, now_s, at)
        out[_ENDS:] = before[_ENDS:] * kept
        out[_ENDS] += counts & changed
        out[_EXPECTED:logs] += counts * passed
        out[logs:] += (counts & changed) * hazard.log_rate(at - since)
        return out

    def _expect(self, situation: Situation, memory: Floats, asked: Bools) -> Floats:
        """Action x window: what the rest costs on average, in seconds of on-demand capacity; nan where nobody asks."""
        costs = np.full((4, len(asked)), np.nan)
        prices = _prices(situation)
        for price in np.unique(prices[asked]).tolist():
            where = np.flatnonzero(asked & (prices == price))
            table = self._table(situation, price)
            weights, state = self._market(situation, memory[:, where], situation.cheapest[where], table)
            left_s = np.full(len(where), situation.job.deadline_s - situation.now_s)
            costs[:, where] = table.expect(left_s, situation.slack_s[where], state, weights).T
        costs[STAY] += situation.changeover_left_s
        return costs

    def _market(self, situation: Situation, memory: Floats, cheapest: Ints, table: Table) -> tuple[Floats, Ints]:
        """Window x family: how likely; and per window the state of spot capacity by age."""
        first, down, up = self._parted(memory)
        is_up = cheapest >= 0
        ups, downs = _posterior(self.beliefs.up, up), _posterior(self.beliefs.down, down)
        weights = (ups[:, :, None] * downs[:, None, :]).reshape(len(cheapest), -1)
        # Capacity at the first look speaks for families that have much of it.
        first = first[:, None]
        weights = weights * np.where(first < 0, 1.0, np.where(first > 0, table.up_share, 1 - table.up_share))
        weights /= weights.sum(axis=1, keepdims=True)
        # A pool whose capacity was not known of before may have come just now.
        since = np.where(is_up, np.where(up[_LAST] == 1, up[_SINCE], situation.now_s), down[_SINCE])
        return weights, bucket_of(situation.now_s - since) + np.where(is_up, 0, AGES)

    def _table(self, situation: Situation, price: int) -> Table:
        job = situation.job
        terms = Terms(
            horizon_s=job.deadline_s,
            slack_s=max(0, job.deadline_s - job.work_s),
            tick_s=situation.tick_s,
            changeover_s=job.changeover_s,
            lost_s=job.max_lost_s,
            spot=price / _PRICES,
        )
        return solve(self.beliefs, terms)


def _rows(hazard: Hazard) -> int:
    return _EXPECTED + 2 * len(hazard.curves)


def _posterior(hazard: Hazard, track: Floats) -> Floats:
    logs = _EXPECTED + len(hazard.curves)
    return hazard.posterior(POINTS, track[_ENDS], track[_EXPECTED:logs], track[logs:])


def _prices(situation: Situation) -> Ints:
    """Per window the price of spot capacity in units of the tables: of the cheapest pool that is there, else of the cheapest."""
    on_demand = max(1, situation.on_demand_microusd_h)
    if not len(situation.microusd_h):
        return np.full(situation.running.shape, _PRICES - 1, np.int64)
    column = np.arange(len(situation.running))
    offered = situation.microusd_h[np.maximum(situation.cheapest, 0), column]
    spot = np.where(situation.cheapest >= 0, offered, situation.microusd_h.min(axis=0))
    units: Ints = np.clip((2 * _PRICES * spot + on_demand) // (2 * on_demand), 0, _PRICES - 1)
    return units


def _dollars(situation: Situation, costs: Floats, on_demand: Bools) -> Floats:
    """Waiting, spot, on-demand; nan for what is not to be had."""
    chosen = np.vstack([costs[WAIT], costs[START_SPOT], np.where(on_demand, costs[STAY], costs[START_DEMAND])])
    in_dollars: Floats = np.where(np.isfinite(chosen), chosen, np.nan) * (situation.on_demand_microusd_h / 3.6e9)
    return in_dollars
