"""Dollars for time: whole micro-dollars, so that what is added up is exact and a bill's parts make the bill.

A price is per hour of the machine. The cost of a whole is rounded once, half to even; its parts are rounded so that they add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from holdfast.core.errors import UsageError
from holdfast.ledger.timeline import AttemptRecord

__all__ = ["Prices", "Rate", "parse_price", "rate_of", "shares", "usd"]

_HOUR_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """What the user says an hour costs; None: as recorded."""

    spot: Decimal | None = None
    on_demand: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """Micro-dollars per hour: what was paid, and what the same machine costs on demand (None: not known)."""

    paid: Fraction
    on_demand: Fraction | None
    assumed: str | None = None
    """What had to be assumed, in words."""


def parse_price(text: str) -> Decimal:
    """Dollars per hour. Raises UsageError that shows the form."""
    try:
        price = Decimal(text.strip().removeprefix("$"))
    except InvalidOperation:
        price = Decimal("NaN")
    if not price.is_finite() or not 0 <= price < 1_000_000:
        raise UsageError(f'not a price: {text!r}; a price is dollars per hour, like "1.10"')
    return price


def rate_of(attempt: AttemptRecord, prices: Prices) -> Rate | None:
    """What an hour of this attempt cost: the user's word for its market, else what was recorded; None where neither is known.

    An attempt whose market is not recorded is taken for spot where a spot price is given.
    """
    on_demand = prices.on_demand if prices.on_demand is not None else attempt.on_demand_price_per_hour
    is_on_demand = attempt.market == "on-demand"
    said = prices.on_demand if is_on_demand else prices.spot if attempt.market in ("spot", None) else None
    paid = said if said is not None else attempt.price_per_hour
    assumed = None
    if paid is None and attempt.market is None and prices.on_demand is not None:
        paid, assumed = prices.on_demand, "market not recorded, taken for on-demand"
    elif attempt.market is None and said is not None:
        assumed = "market not recorded, taken for spot"
    if paid is None:
        return None
    if on_demand is None and is_on_demand:
        on_demand = paid
    return Rate(_micro(paid), None if on_demand is None else _micro(on_demand), assumed)


def shares(parts_us: Sequence[int], micro_usd_per_hour: Fraction) -> list[int]:
    """What each part of a time costs, in micro-dollars. The sum is the cost of the whole, rounded once; no part is negative."""
    costs, whole_us, before = [], 0, 0
    for part_us in parts_us:
        whole_us += part_us
        so_far = round(micro_usd_per_hour * whole_us / _HOUR_US)
        costs.append(so_far - before)
        before = so_far
    return costs


def usd(micro_usd: int) -> float:
    """For printing: six decimals, which is all that it has."""
    return micro_usd / 1_000_000


def _micro(price: Decimal) -> Fraction:
    return Fraction(price) * 1_000_000
