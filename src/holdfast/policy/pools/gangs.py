"""How many machines of a gang to ask for in each pool: cheap, but not all of them where one outage takes them at once.

machines wanted, cost of a machine's hour per pool (price and what its preemptions cost), capacity ──→ machines per pool
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import Floats, Ints

__all__ = ["spread", "whole"]


def spread(machines: Ints, cost_h: Floats, capacity: Ints, most_together: int) -> Ints:
    """Machines per pool x window, of the wanted number per window: the cheapest pools first, no more than `most_together` in any.

    For gangs that can lose some machines and go on. `capacity` is the number that a pool has, or may have. Where there are not
    enough the rest is not placed. Of pools that cost the same the first goes first.
    """
    order = cost_h.argsort(axis=0, kind="stable")
    room = np.take_along_axis(np.clip(capacity, 0, most_together), order, axis=0)
    before = np.cumsum(room, axis=0) - room
    placed = np.clip(machines - before, 0, room)
    out: Ints = np.take_along_axis(placed, order.argsort(axis=0), axis=0)
    return out


def whole(machines: Ints, cost_h: Floats, capacity: Ints) -> Ints:
    """As `spread`, for gangs that work together or not at all, and near each other: all in the cheapest pool that has room."""
    fits = capacity >= machines
    best = np.where(fits, cost_h, np.inf).argmin(axis=0)
    chosen = (np.arange(len(cost_h))[:, None] == best) & fits
    out: Ints = chosen * machines
    return out
