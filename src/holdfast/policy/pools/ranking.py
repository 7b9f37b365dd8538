"""Which pool: what the rest of a job costs on average if it goes on in this one until that one's capacity is taken.

    price, age, lifetimes ──→ how long it stays (`stay_s`) ──→ price x stay + what the rest costs then (tables) ──→ the least

A pool that costs less an hour and one that lasts longer are weighed in one currency that way, and so is a move: it costs a
changeover at the new pool's price, the slack that the changeover takes, and the dollars of egress. It pays where that is less than
what is saved until the new pool's capacity is expected to go.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from holdfast.policy.market.arrays import Bools, Floats, Ints
from holdfast.policy.market.beliefs import AGE_EDGES_S, AGES, Hazard

__all__ = ["Tiers", "could_pay", "stay_s", "tiers_of"]

_HORIZONS_S = np.geomspace(300.0, 400 * 3600.0, 40)
_TIER = 1.05
"""Pools whose prices differ by less are one tier."""


def stay_s(hazard: Hazard, points: int, weights: Floats, bucket: Ints, horizon_s: Floats) -> Floats:
    """How long capacity of this age stays on average, counted up to the horizon. `weights` are those of `Hazard.posterior`."""
    lives = _lives(hazard, points)
    at = np.interp(np.log(np.maximum(horizon_s, 1.0)), np.log(_HORIZONS_S), np.arange(len(_HORIZONS_S)))
    low = np.minimum(at.astype(np.int64), len(_HORIZONS_S) - 2)
    share = (at - low)[..., None]
    each = lives[bucket, low] * (1 - share) + lives[bucket, low + 1] * share
    stay: Floats = np.minimum((each * weights).sum(axis=-1), horizon_s)
    return stay


@lru_cache(maxsize=64)
def _lives(hazard: Hazard, points: int) -> Floats:
    """Age bucket x horizon x family: mean of the shorter of what is left of the life, and the horizon."""
    middles_s = np.array([*((np.array(AGE_EDGES_S[:-1]) + AGE_EDGES_S[1:]) / 2), AGE_EDGES_S[-1]])
    steps_s = np.concatenate([[0.0], np.geomspace(10.0, _HORIZONS_S[-1], 600)])
    passed = hazard.expected(middles_s[:, None] + steps_s) - hazard.expected(middles_s)[:, :, None]
    alive = np.exp(-passed[:, None] * hazard.factors(points)[:, None, None])
    lived = np.cumsum((alive[..., 1:] + alive[..., :-1]) / 2 * np.diff(steps_s), axis=-1)
    families = lived.reshape(-1, AGES, len(steps_s) - 1)
    out = np.stack([np.interp(_HORIZONS_S, steps_s[1:], row) for row in families.reshape(-1, len(steps_s) - 1)])
    lives: Floats = out.reshape(len(families), AGES, len(_HORIZONS_S)).transpose(1, 2, 0)
    return np.ascontiguousarray(lives)


@dataclass(frozen=True, slots=True)
class Tiers:
    """Of each pool, seen as the dearest of a market: pool x window."""

    head: Bools
    """No other pool costs just a little more."""
    others: Ints
    """Pools that cost no more, besides itself."""
    price: Floats
    """What an hour costs on average in that market, if its cheapest pool that is there is taken; by the on-demand price."""
    used: Floats
    """How likely this pool is there and none that costs less."""


def tiers_of(price: Floats, share: Floats) -> Tiers:
    """`price` by the on-demand price, `share` of the time with capacity; pool x window. Only pools below 1 count."""
    order = price.argsort(axis=0, kind="stable")
    sorted_price = np.take_along_axis(price, order, axis=0)
    sorted_share = np.take_along_axis(share, order, axis=0)
    none = np.cumprod(1 - sorted_share, axis=0)
    first = np.concatenate([np.ones_like(none[:1]), none[:-1]]) * sorted_share
    mean = np.cumsum(first * sorted_price, axis=0) / np.maximum(np.cumsum(first, axis=0), 1e-12)
    after = np.concatenate([sorted_price[1:], np.full_like(sorted_price[:1], np.inf)])
    last = (sorted_price < 1) & ((after > _TIER * sorted_price) | (after >= 1))
    rank = np.broadcast_to(np.arange(len(price))[:, None], price.shape)
    back = order.argsort(axis=0)
    return Tiers(
        head=np.take_along_axis(last, back, axis=0),
        others=np.take_along_axis(rank, back, axis=0),
        price=np.take_along_axis(mean, back, axis=0),
        used=np.take_along_axis(first, back, axis=0),
    )


def could_pay(price: Floats, here: Floats, work_s: Ints, changeover_s: float, egress_s: Floats) -> Bools:
    """Pools for which it is worth counting what a move from a pool of price `here` brings: at best it saves the difference for all
    the work that is left."""
    pays: Bools = (here - price) * work_s > price * changeover_s + egress_s
    return pays
