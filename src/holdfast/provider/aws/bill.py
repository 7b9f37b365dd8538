"""What one machine has cost, by AWS's prices and rules.

    seconds     from its launch until its end, 60 at least
    on demand   the list price, by the second
    spot        the zone's price at the beginning of each hour of the machine, by the second; nothing at all when AWS interrupts it
                within its first hour
    disk, public address   by the second, in any case; a subnet that decides about addresses is taken to give one

The tags say which disk it was born with: they are told of for about an hour after the machine is gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from holdfast.core.errors import ProviderError
from holdfast.provider.aws.prices import Prices
from holdfast.provider.base import Bill, Machine

__all__ = ["bill_of", "extras_microusd_h", "spot_microusd"]

_HOUR_S = 3600
_MINIMUM_S = 60


def bill_of(machine: Machine, extras: str, prices: Prices, now_unix_s: float) -> Bill:
    """`extras`: the tag of what comes beside the machine. ProviderError where a price is not known."""
    end = machine.gone_unix_s
    final = machine.state == "gone" and end is not None
    begin, until = machine.created_unix_s, now_unix_s if end is None else end
    billed_s = max(_MINIMUM_S, math.ceil(until - begin))
    pool = machine.pool
    if pool.market == "spot" and machine.ended_by == "provider" and billed_s < _HOUR_S:
        alone = Fraction(0)
    elif pool.market == "spot":
        history = prices.history(pool.region, pool.instance_type, pool.zone, begin, begin + billed_s, final=final)
        alone = spot_microusd(history, begin, billed_s)
    else:
        found, missing = prices.on_demand(pool.region, [pool.instance_type])
        if missing:
            raise ProviderError(missing[pool.instance_type])
        alone = Fraction(found[pool.instance_type] * billed_s, _HOUR_S)
    beside = Fraction(extras_microusd_h(extras, pool.region, prices) * billed_s, _HOUR_S)
    return Bill(billed_s=billed_s, microusd=math.ceil(alone + beside), final=final)


def spot_microusd(history: Sequence[tuple[float, int]], begin: float, billed_s: int) -> Fraction:
    """`history`: since when which price holds, oldest first; before the first one the first holds."""
    total = Fraction(0)
    hours = [*range(0, billed_s, _HOUR_S), billed_s]
    for start, stop in pairwise(hours):
        held = [price for since, price in history if since <= begin + start] or [history[0][1]]
        total += Fraction(held[-1] * (stop - start), _HOUR_S)
    return total


def extras_microusd_h(extras: str, region: str, prices: Prices) -> int:
    """At most, by the tag of what comes beside a machine."""
    total = 0
    for part in filter(None, extras.split("+")):
        kind, _, gib = part.partition(":")
        total += prices.disk_microusd_h(region, kind, int(gib)) if gib else prices.address_microusd_h(region)
    return total
