"""What every way to go on is expected to cost where there are several pools: waiting, on-demand, and spot capacity in each of them.

    tracks, prices ──→ per market (the pools up to some price) a table ──→ the cheapest market decides what the rest costs
                  └──→ per pool: price x stay + the rest when it is taken ──→ the pool to start in, or to move to

A market is all pools up to a price. Which is the right one changes with the slack: much of it, and the cheapest pools are worth a
wait; none, and any spot capacity is better than on-demand. So each market has a table as if only it were used, and the least
counts. Where one is up that is not the cheapest, or a move is weighed, the next stay is counted by itself, and a table from
there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import NOTHING, Bools, Floats, Ints, Situation
from holdfast.policy.market.beliefs import AGES, UNSEEN_AGE_S, Beliefs, bucket_of
from holdfast.policy.market.tables import POINTS, START_DEMAND, START_SPOT, Table, Terms, solve
from holdfast.policy.pools.ranking import Tiers, could_pay, stay_s, tiers_of
from holdfast.policy.pools.tracks import Tracks

__all__ = ["PRICES", "Outlook", "look", "table_of"]

PRICES = 32
"""Prices that tables tell apart, as fractions of the on-demand price."""
_ELSEWHERE = 6
"""Chances of another pool that tables tell apart: 0, 1/2, 3/4, ..."""
_MOVE_HYSTERESIS = 0.1
"""What a move from pool to pool must bring at least, in changeovers on on-demand: expectations have errors."""
_BEHIND = 1e12
"""Pools that are left alone for a while come after all others."""
_OTHER = int(bucket_of(np.array(UNSEEN_AGE_S)))
"""How old capacity in another pool is taken to be when it is needed."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Per window."""

    costs: Floats
    """Action x window: what the rest costs, in seconds of on-demand capacity; nan where nobody asks."""
    go: Ints
    """The pool to start in or to move to; NOTHING where none has capacity."""
    moves: Bools
    """Whether a move to it from the pool where it runs pays."""


def table_of(beliefs: Beliefs, situation: Situation, price: int, elsewhere: float) -> Table:
    """The table of a market of this price, in units of 1/PRICES of the on-demand price."""
    job = situation.job
    terms = Terms(
        horizon_s=job.deadline_s,
        slack_s=max(0, job.deadline_s - job.work_s),
        tick_s=situation.tick_s,
        changeover_s=job.changeover_s,
        lost_s=job.max_lost_s,
        spot=price / PRICES,
        elsewhere=elsewhere,
    )
    return solve(beliefs, terms)


def look(
    beliefs: Beliefs, situation: Situation, tracks: Tracks, idle: Bools, may_move: Bools, egress_s: Floats
) -> Outlook:
    """`idle`: windows that want all costs. `may_move`: windows on spot capacity that could move. `egress_s`: pool x window."""
    price = situation.microusd_h / max(1, situation.on_demand_microusd_h)
    windows = len(situation.running)
    here = np.maximum(situation.running, 0)
    # Known to be there, or not known. Nobody is asked for a move who has refused lately.
    others = (situation.available != 0) & (price < 1) & (np.arange(len(price))[:, None] != situation.running)
    asleep = tracks.backs_off(situation.now_s) & (situation.available < 0)
    mine, work_s = price[here, np.arange(windows)], situation.work_left_s
    pays = could_pay(price, mine, work_s, situation.job.changeover_s, egress_s)
    may_move = may_move & (others & ~asleep & pays).any(axis=0)
    out = Outlook(np.full((4, windows), np.nan), np.full(windows, NOTHING, np.int64), np.zeros(windows, np.bool_))
    where = np.flatnonzero(idle | may_move)
    if not len(where):
        return out
    view = _View(beliefs, situation, tracks.at(where), where, price[:, where], egress_s[:, where])
    now, each = view.expect()
    rank = np.where(others[:, where], each + asleep[:, where] * _BEHIND, np.inf)
    best, some = rank.argmin(axis=0), np.arange(len(where))
    found = np.isfinite(rank[best, some])
    now[START_SPOT] = np.where(found, each[best, some], np.inf)
    gains = each[best, some] < each[here[where], some] - _MOVE_HYSTERESIS * situation.job.changeover_s
    out.costs[:, where] = now
    out.go[where] = np.where(found, best, NOTHING)
    out.moves[where] = may_move[where] & found & gains & ~asleep[best, where]
    return out


@dataclass(frozen=True, slots=True)
class _Market:
    """All pools that cost no more than this one, in the windows in which they share a table."""

    pool: int
    some: Ints
    table: Table
    price: float
    """Of the table, by the on-demand price."""


class _View:
    """The windows that ask, at one moment. Arrays are pool x window; times in seconds, costs in seconds of on-demand capacity."""

    def __init__(
        self, beliefs: Beliefs, situation: Situation, tracks: Tracks, where: Ints, price: Floats, egress_s: Floats
    ) -> None:
        self.beliefs, self.situation, self.tracks, self.price = beliefs, situation, tracks, price
        job, now_s = situation.job, situation.now_s
        self.work_s = situation.work_left_s[where].astype(np.float64)
        self.left_s = float(job.deadline_s - now_s)
        self.slack_s = self.left_s - self.work_s
        asleep = tracks.backs_off(now_s) & (situation.available[:, where] < 0)
        self.there = (situation.available[:, where] != 0) & (price < 1) & ~asleep
        self.ups = tracks.up_weights(POINTS)
        self.bucket = bucket_of(tracks.age_s(now_s))
        self.share = tracks.share()
        self.tiers: Tiers = tiers_of(price, self.share)
        self.downs = tracks.down_weights(POINTS)
        running = np.arange(len(price))[:, None] == situation.running[where]
        launch_s = np.where(running, situation.changeover_left_s[where], job.changeover_s)
        self.launch_s = launch_s
        self.stay_s = np.maximum(stay_s(beliefs.up, POINTS, self.ups, self.bucket, self.work_s + launch_s), 1.0)
        self.egress_s = np.where(running, 0.0, egress_s)

    def expect(self) -> tuple[Floats, Floats]:
        """Action x window now; pool x window, if it is gone on in each."""
        markets = [
            _Market(pool, some, table_of(self.beliefs, self.situation, price, elsewhere), price / PRICES)
            for pool in range(len(self.price))
            for some, elsewhere, price in self._markets(pool)
        ]
        each = self._until_taken(markets)
        for market in markets:
            self._until_cheaper(market, markets, each)
        now = np.full((4, len(self.work_s)), np.inf)
        for market in markets:
            self._now(market, each, now)
        return now, each

    def _until_taken(self, markets: list[_Market]) -> Floats:
        """Pool x window: what it costs to stay in each pool until its capacity goes, and the rest."""
        then = np.full(self.price.shape, np.inf)
        for market in markets:
            self._later(market, market.some, self.stay_s, then)
        cost: Floats = self.price * self.stay_s + self.egress_s + then
        return cost

    def _until_cheaper(self, market: _Market, markets: list[_Market], each: Floats) -> None:
        """Lower `each` to what it costs to stay in each pool until it goes or a cheaper market, that is down now, comes back."""
        some = market.some
        inside = self.price[:, some] <= self.price[market.pool, some]
        useful = ~(inside & self.there[:, some]).any(axis=0) & self.there[:, some].any(axis=0)
        some, inside = some[useful], inside[:, useful]
        if not len(some):
            return
        gone = bucket_of(self.tracks.down_age_s(self.situation.now_s)[market.pool, some])
        comes_s = stay_s(self.beliefs.down, POINTS, self.downs[market.pool, some], gone, self.work_s[some])
        back_s = np.maximum(comes_s, 1.0)
        stay = self.stay_s.copy()
        alone = self.stay_s[:, some]
        stay[:, some] = alone * back_s / (alone + back_s)
        taken = np.full(self.price.shape, np.inf)
        for other in markets:
            self._later(other, np.intersect1d(other.some, some), stay, taken)
        comes = self._rest(market, some, stay[:, some], 0)
        first = stay[:, some] / back_s
        cost = self.price[:, some] * stay[:, some] + self.egress_s[:, some]
        cost = cost + first * comes + (1 - first) * taken[:, some]
        each[:, some] = np.where(inside, each[:, some], np.minimum(each[:, some], cost))

    def _markets(self, pool: int) -> Iterator[tuple[Ints, float, int]]:
        """Windows that have a market whose dearest pool is this one, by table."""
        # Where all pools cost as much as on-demand there is no market; the first pool stands for one that is never there.
        none = ~self.tiers.head.any(axis=0) if pool == 0 else np.False_
        some = np.flatnonzero(self.tiers.head[pool] | none)
        if not len(some):
            return
        chance = self.tracks.elsewhere(self.tiers.others)[pool, some]
        level = np.clip(np.rint(-np.log2(np.maximum(1 - chance, 1e-9))), 0, _ELSEWHERE - 1).astype(np.int64)
        price = np.minimum(np.rint(self.tiers.price[pool, some] * PRICES), PRICES - 1).astype(np.int64)
        key = level * PRICES + price
        for each in np.unique(key).tolist():
            yield some[key == each], 1 - math.pow(0.5, each // PRICES), each % PRICES

    def _later(self, market: _Market, some: Ints, stay: Floats, then: Floats) -> None:
        """Lower `then` to what the rest costs in this market when the stay in each pool is over because it was taken."""
        if not len(some):
            return
        there, gone = (self._rest(market, some, stay[:, some], state) for state in (_OTHER, AGES))
        inside = self.price[:, some] <= self.price[market.pool, some]
        elsewhere = self.tracks.elsewhere(self.tiers.others)[market.pool, some]
        chance = np.where(inside, elsewhere, self.tracks.any_share()[market.pool, some])
        then[:, some] = np.minimum(then[:, some], chance * there + (1 - chance) * gone)

    def _rest(self, market: _Market, some: Ints, stay: Floats, state: int) -> Floats:
        """Pool x window: what the rest costs in this market after a stay in each pool, with nothing running."""
        then_s = (self.left_s - stay).ravel()
        lost_s = self.situation.job.max_lost_s / 2
        slack_s = (self.slack_s[some] - np.minimum(self.launch_s[:, some], stay) - lost_s).ravel()
        weights = self._weights(market.pool, some, self._usual(market.pool, some), market.table)
        weights = np.tile(weights, (len(stay), 1))
        costs = market.table.expect(then_s, slack_s, np.full(len(then_s), state), weights)
        off = np.tile(self.tiers.price[market.pool, some] - market.price, len(stay))
        costs += _correction(costs, np.maximum(then_s - slack_s, 0), off, market.price)
        rest: Floats = costs[:, : START_DEMAND + 1].min(axis=1).reshape(stay.shape)
        return rest

    def _now(self, market: _Market, each: Floats, now: Floats) -> None:
        """Lower `now` to what each action costs in this market."""
        pool, some, table, rounded = market.pool, market.some, market.table, market.price
        price, at = self.price[:, some], np.arange(len(some))
        rank = np.where((price <= price[pool]) & self.there[:, some], each[:, some], np.inf)
        best = rank.argmin(axis=0)
        is_up = np.isfinite(rank[best, at])
        ups = np.where(is_up[:, None], self.ups[best, some], self._usual(pool, some))
        down_bucket = bucket_of(self.tracks.down_age_s(self.situation.now_s)[pool, some])
        state = np.where(is_up, self.bucket[best, some], AGES + down_bucket)
        costs = table.expect(
            np.full(len(some), self.left_s), self.slack_s[some], state, self._weights(pool, some, ups, table)
        )
        costs += _correction(costs, self.work_s[some], self.tiers.price[pool, some] - rounded, rounded)
        # The table knows the next stay as one among many; what is known of this one moves all actions alike.
        costs += np.where(is_up, rank[best, at] - costs[:, START_SPOT], 0.0)[:, None]
        now[:, some] = np.minimum(now[:, some], costs.T)

    def _usual(self, pool: int, some: Ints) -> Floats:
        """Window x family of lifetimes: of the pools of the market, as often as each would be used."""
        price = self.price[:, some]
        share = np.where(price <= price[pool], self.tiers.used[:, some], 0.0)
        usual: Floats = np.einsum("pw,pwf->wf", share / share.sum(axis=0), self.ups[:, some])
        return usual

    def _weights(self, pool: int, some: Ints, ups: Floats, table: Table) -> Floats:
        """Window x family: how likely."""
        weights = (ups[:, :, None] * self.downs[pool, some][:, None, :]).reshape(len(some), -1)
        first = self.tracks.first[pool, some][:, None]
        weights = weights * np.where(first < 0, 1.0, np.where(first > 0, table.up_share, 1 - table.up_share))
        normal: Floats = weights / weights.sum(axis=1, keepdims=True)
        return normal


def _correction(costs: Floats, work_s: Floats, off: Floats, rounded: float) -> Floats:
    """What a price that differs by `off` from that of the table makes: it counts for the work that is done on spot capacity."""
    work = work_s[:, None]
    moved: Floats = off[:, None] * np.clip((work - costs) / (1 - rounded), 0, work)
    return moved
