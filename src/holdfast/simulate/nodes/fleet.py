"""Which nodes each window holds: where they run, how old they are, and whether they take part in the work yet.

Arrays are slot by window: a window has as many slots as its job has nodes at most, and a node's slot is its number.
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Bools, Ints

__all__ = ["Fleet"]


class Fleet:
    """The nodes of all windows. `place` and `member` are read by the work; only the methods here change them."""

    def __init__(self, slots: int, windows: int) -> None:
        self.place: Ints = np.full((slots, windows), NOTHING, np.int64)
        """The pool's number, ON_DEMAND or NOTHING."""
        self.ready_s: Ints = np.zeros((slots, windows), np.int64)
        """When the node has been launched, by the window's clock."""
        self.member: Bools = np.zeros((slots, windows), np.bool_)
        """Whether it has joined."""
        self._slot = np.arange(slots, dtype=np.int64).reshape(-1, 1)

    @property
    def on_spot(self) -> Bools:
        there: Bools = self.place >= 0
        return there

    @property
    def on_demand(self) -> Bools:
        there: Bools = self.place == ON_DEMAND
        return there

    def held(self, pools: int) -> Ints:
        """Pool by window."""
        return np.vstack([(self.place == pool).sum(axis=0) for pool in range(pools)])

    def counts(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Spot nodes that have joined and that have not, on-demand nodes likewise."""
        on_spot, on_demand = self.on_spot, self.on_demand
        spot_ready, on_demand_ready = (on_spot & self.member).sum(axis=0), (on_demand & self.member).sum(axis=0)
        return spot_ready, on_spot.sum(axis=0) - spot_ready, on_demand_ready, on_demand.sum(axis=0) - on_demand_ready

    def launch_left_s(self, now_s: int) -> Ints:
        """Of the newest node of each window."""
        launching = (self.place != NOTHING) & ~self.member
        left_s: Ints = np.where(launching, self.ready_s - now_s, 0).max(axis=0)
        return left_s

    def newest(self, among: Bools, count: Ints) -> Bools:
        """So many of these nodes per window: those that were ordered last, and of one age those with the highest numbers."""
        out = np.zeros_like(among)
        columns = np.flatnonzero(count)
        if len(columns):
            slots = len(among)
            rank = self._rank(np.where(among[:, columns], self.ready_s[:, columns] * slots + self._slot, -1))
            out[:, columns] = among[:, columns] & (rank < count[columns])
        return out

    def _rank(self, key: Ints) -> Ints:
        """Place of each in its column, the highest first."""
        order = np.argsort(-key, axis=0, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(self._slot, order.shape), axis=0)
        return rank

    def drop(self, gone: Bools) -> None:
        self.place[gone] = NOTHING
        self.member[gone] = False

    def order(self, spot: Ints, on_demand: Ints, room: Ints, prices: Ints, ready_s: int) -> None:
        """New nodes in the lowest free slots: first the spot nodes, from the cheapest pools that have room, then on-demand."""
        columns = np.flatnonzero(spot + on_demand)
        spot, room, prices = spot[columns], room[:, columns], prices[:, columns]
        place = self.place[:, columns]
        free = place == NOTHING
        number = free.cumsum(axis=0) - 1
        new = free & (number < spot + on_demand[columns])
        by_price = np.argsort(prices, axis=0, kind="stable")
        filled = np.take_along_axis(np.maximum(room, 0), by_price, axis=0).cumsum(axis=0)
        pool = np.full_like(place, ON_DEMAND)
        for rank in reversed(range(len(prices))):
            pool = np.where(number < np.minimum(filled[rank], spot), by_price[rank], pool)
        self.place[:, columns] = np.where(new, pool, place)
        self.ready_s[:, columns] = np.where(new, ready_s, self.ready_s[:, columns])

    def join(self, now_s: int) -> Bools:
        """Nodes that have been launched by now and had not joined yet; they have now."""
        new: Bools = (self.place != NOTHING) & ~self.member & (self.ready_s <= now_s)
        self.member |= new
        return new
