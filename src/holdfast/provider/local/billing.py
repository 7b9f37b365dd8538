"""What one machine of a rehearsal has cost, by the rules that the cloud states and the prices that it tells: our own arithmetic,
to be held against the provider's bill."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from holdfast.provider.base import Bill, Machine
from holdfast.provider.local.wire import BillingRules, MachineFacts

__all__ = ["bill"]

_HOUR_S = 3600


def bill(
    machine: Machine, facts: MachineFacts, rules: BillingRules, prices: Sequence[tuple[int, int]], now_unix_s: int
) -> Bill:
    """`prices`: (from which second, per hour) ascending, the first at the machine's birth or before, to its end or now."""
    born, gone = int(machine.created_unix_s), machine.gone_unix_s
    lived_s = max(0, (now_unix_s if gone is None else int(gone)) - born)
    billed_s = max(lived_s, rules.minimum_s)
    microusd_s = _price_seconds(machine, facts, prices, born, lived_s, billed_s)
    taken = machine.pool.market == "spot" and machine.ended_by == "provider" and lived_s < _HOUR_S
    microusd = 0 if taken and rules.first_hour_free else -(-microusd_s // _HOUR_S)
    for extra in facts.extras:
        until = now_unix_s if extra.removed_unix_s is None else extra.removed_unix_s
        units = -(-max(0, until - extra.since_unix_s) // rules.extras_unit_s)
        rate = rules.address_microusd_h if extra.kind == "address" else extra.gib * rules.disk_microusd_gib_h
        microusd += -(-rate * units * rules.extras_unit_s // _HOUR_S)
    final = gone is not None and all(extra.removed_unix_s is not None for extra in facts.extras)
    return Bill(billed_s=billed_s, microusd=microusd, final=final)


def _price_seconds(
    machine: Machine, facts: MachineFacts, prices: Sequence[tuple[int, int]], born: int, lived_s: int, billed_s: int
) -> int:
    """Each second at its price, on spot never above the ceiling; what is missing to the minimum at the last one's."""
    ends = [second for second, _ in prices[1:]]
    at, total = born, 0
    while at < born + lived_s:
        index = bisect_right(ends, at)
        until = min(ends[index] if index < len(ends) else born + lived_s, born + lived_s)
        total += (until - at) * _capped(machine, facts, prices[index][1])
        at = until
    last = bisect_right(ends, max(born, born + lived_s - 1))
    return total + (billed_s - lived_s) * _capped(machine, facts, prices[last][1])


def _capped(machine: Machine, facts: MachineFacts, microusd_h: int) -> int:
    return min(microusd_h, facts.ceiling_microusd_h) if machine.pool.market == "spot" else microusd_h
