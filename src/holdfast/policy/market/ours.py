"""Ours: the action of which the rest of the job is expected to cost least, by what has been learned so far.

    history ──→ Beliefs ──→ tables, solved once ──────────────────────┐
    ticks ──→ memory: ends seen, ends believed, ages ──→ posterior ──→ expected cost of waiting, spot, on-demand ──→ the least

What it believes of the market is in `beliefs`, what it makes of it in `tables`; the limits of `safety` come before both, so it is
never late, however wrong the beliefs are. What it sees counts less as it gets older (`forget_s`): pools change.

Several pools: which one, and whether to move, is in `holdfast.policy.pools`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from holdfast.core.errors import UsageError
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
from holdfast.policy.market.beliefs import AGES, COLD, Beliefs, bucket_of
from holdfast.policy.market.safety import last_resort, on_spot, spot_is_safe, wait_is_safe
from holdfast.policy.market.tables import POINTS, START_DEMAND, START_SPOT, STAY, WAIT, Table
from holdfast.policy.pools.outlook import PRICES, Outlook, look, table_of
from holdfast.policy.pools.tracks import Tracks, as_past, first_rows, learn

__all__ = ["Ours"]

_PAST_S = 10 * 86400.0
"""Time in which what was seen before the job counts for 1/e."""
_HYSTERESIS_S = 15.0
"""A move away from on-demand must be worth so many seconds of it: expectations have errors."""


@dataclass(frozen=True, slots=True)
class Ours(MarketPolicy):
    """Weighs waiting, spot and on-demand by what the rest is expected to cost."""

    name: ClassVar[str] = "ours"
    summary: ClassVar[str] = "what is expected to cost least, by what it learns about the market"
    keeps_deadline: ClassVar[bool] = True

    beliefs: Beliefs = COLD
    """`simulate.traces.fit.fit_beliefs` makes them of a history."""
    forget_s: float = 48 * 3600.0
    """Time in which what was seen counts for 1/e."""
    past: tuple[float, ...] = ()
    """What is remembered before the first tick: what `fit_ours` has seen of these very pools. Empty: nothing."""
    egress_microusd: tuple[tuple[int, ...], ...] = ()
    """What it costs to bring the job's data from the pool where it ran last (row) to another one (column). Empty: nothing."""

    def first_memory(self, pools: int) -> tuple[float, ...]:
        """Of every pool, row by row, what `pools.tracks` says; then what was chosen last time, and the pool that holds the data, if
        any: not below zero."""
        rows = [value for value in first_rows(self.beliefs) for _ in range(max(1, pools))]
        if self.past and len(self.past) != len(rows):
            raise UsageError(
                f"the past is one of {len(self.past) * pools // len(rows)} pools or of other beliefs, not of {pools}"
            )
        return (*(self.past or rows), -1.0, -1.0)

    def after(self, looks: Iterable[Situation]) -> Ours:
        """The same policy with a past: what it has seen in these looks at all the pools, one window and one tick each."""
        if self.past:
            raise UsageError("this policy has a past already")
        memory, last_s, pools = np.zeros((0, 1)), 0, 1
        for look_ in looks:
            if not len(memory):
                pools = len(look_.available)
                memory = np.array(self.first_memory(pools)).reshape(-1, 1)
            memory, last_s = replace(self, forget_s=_PAST_S)._learn(look_, memory), look_.now_s
        watched_s = _PAST_S * -math.expm1(-last_s / _PAST_S)
        past = as_past(self.beliefs, self._rows(memory), max(1.0, watched_s), self.forget_s)
        return replace(self, past=tuple(past.ravel().tolist()))

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        memory = self._learn(situation, memory)
        may_start = (situation.cheapest >= 0) & spot_is_safe(situation)
        may_wait = wait_is_safe(situation)
        on_demand = situation.running == ON_DEMAND
        asked = (situation.running < 0) & (situation.work_left_s > 0) & (may_start | may_wait)
        outlook = self._expect(situation, memory, asked, may_start)
        costs, go = outlook.costs, outlook.go
        costs[START_SPOT, ~may_start] = np.inf
        costs[WAIT, ~may_wait] = np.inf
        leaving = np.minimum(costs[WAIT], costs[START_SPOT]) < costs[STAY] - _HYSTERESIS_S
        waits, starts = costs[WAIT] < costs[START_SPOT], costs[START_SPOT] <= costs[START_DEMAND]
        clauses = [
            Clause(on_demand & asked & leaving & may_wait & waits, NOTHING, Why.WAITING_IS_CHEAPEST),
            Clause(on_demand & asked & leaving & may_start, go, Why.SPOT_IS_CHEAPEST),
            Clause(on_demand & asked, ON_DEMAND, Why.STAYING_IS_CHEAPEST),
            Clause(on_demand, ON_DEMAND, Why.ON_DEMAND_TO_THE_END),
            Clause(outlook.moves, go, Why.MOVING_IS_CHEAPEST),
            *on_spot(situation),
            Clause(asked & may_start & ~waits & starts, go, Why.SPOT_IS_CHEAPEST),
            *last_resort(situation),
            Clause(costs[START_DEMAND] < costs[WAIT], ON_DEMAND, Why.DEMAND_IS_CHEAPEST),
        ]
        choice = first_of(clauses, (NOTHING, Why.WAITING_IS_CHEAPEST))
        memory[-2] = choice.target
        memory[-1] = np.where(choice.target >= 0, choice.target, memory[-1])
        return memory, replace(choice, costs=_dollars(situation, costs, on_demand))

    def _learn(self, situation: Situation, memory: Floats) -> Floats:
        """The memory with this tick in it."""
        if not len(situation.available):
            return memory.copy()
        # Nobody says that capacity is gone where all must be asked for; that it does not run any more says it.
        pools = np.arange(len(situation.available))[:, None]
        taken = (situation.available < 0) & (memory[-2] == pools) & (situation.running == NOTHING)
        seen = replace(situation, available=np.where(taken, np.int8(0), situation.available))
        rows = learn(self.beliefs, seen, self._rows(memory), self.forget_s)
        return np.concatenate([rows.reshape(-1, memory.shape[1]), memory[-2:]])

    def _rows(self, memory: Floats) -> Floats:
        """Rows x pool x window."""
        return memory[:-2].reshape(len(first_rows(self.beliefs)), -1, memory.shape[1])

    def _expect(self, situation: Situation, memory: Floats, asked: Bools, may_start: Bools) -> Outlook:
        """What the rest costs by each way to go on."""
        tracks = Tracks.of(self.beliefs, self._rows(memory))
        if len(situation.available) > 1:
            may_move = (situation.running >= 0) & (situation.work_left_s > 0) & spot_is_safe(situation)
            outlook = look(self.beliefs, situation, tracks, asked, may_move, self._egress_s(situation, memory[-1]))
        else:
            outlook = self._of_one_pool(situation, tracks, asked)
        outlook.costs[STAY] += situation.changeover_left_s
        return outlook

    def _egress_s(self, situation: Situation, home: Floats) -> Floats:
        """Pool x window: what it costs to bring the data there, in seconds of on-demand capacity."""
        if not self.egress_microusd:
            return np.zeros(situation.available.shape)
        dollars = np.array(self.egress_microusd, np.float64)[np.maximum(home, 0).astype(np.int64)].T
        return np.where(home < 0, 0.0, dollars) * (3600 / max(1, situation.on_demand_microusd_h))

    def _of_one_pool(self, situation: Situation, tracks: Tracks, asked: Bools) -> Outlook:
        costs = np.full((4, len(asked)), np.nan)
        prices = _prices(situation)
        for price in np.unique(prices[asked]).tolist():
            where = np.flatnonzero(asked & (prices == price))
            table = table_of(self.beliefs, situation, price, 0.0)
            weights, state = _market(situation.now_s, tracks.at(where), situation.cheapest[where], table)
            left_s = np.full(len(where), situation.job.deadline_s - situation.now_s)
            costs[:, where] = table.expect(left_s, situation.slack_s[where], state, weights).T
        return Outlook(costs, situation.cheapest, np.zeros_like(asked))


def _market(now_s: int, tracks: Tracks, cheapest: Ints, table: Table) -> tuple[Floats, Ints]:
    """Window x family: how likely; and per window the state of spot capacity by age."""
    is_up = cheapest >= 0
    ups, downs = tracks.up_weights(POINTS)[0], tracks.down_weights(POINTS)[0]
    weights = (ups[:, :, None] * downs[:, None, :]).reshape(len(cheapest), -1)
    # Capacity at the first look speaks for families that have much of it.
    first = tracks.first[0][:, None]
    weights = weights * np.where(first < 0, 1.0, np.where(first > 0, table.up_share, 1 - table.up_share))
    weights /= weights.sum(axis=1, keepdims=True)
    age_s = np.where(is_up, tracks.age_s(now_s)[0], tracks.down_age_s(now_s)[0])
    return weights, bucket_of(age_s) + np.where(is_up, 0, AGES)


def _prices(situation: Situation) -> Ints:
    """Per window the price of spot capacity in units of the tables."""
    on_demand = max(1, situation.on_demand_microusd_h)
    if not len(situation.microusd_h):
        return np.full(situation.running.shape, PRICES - 1, np.int64)
    units: Ints = np.clip((2 * PRICES * situation.microusd_h[0] + on_demand) // (2 * on_demand), 0, PRICES - 1)
    return units


def _dollars(situation: Situation, costs: Floats, on_demand: Bools) -> Floats:
    """Waiting, spot, on-demand; nan for what is not to be had."""
    chosen = np.vstack([costs[WAIT], costs[START_SPOT], np.where(on_demand, costs[STAY], costs[START_DEMAND])])
    in_dollars: Floats = np.where(np.isfinite(chosen), chosen, np.nan) * (situation.on_demand_microusd_h / 3.6e9)
    return in_dollars
