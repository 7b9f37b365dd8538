"""Exact money: sums of price x seconds, and what they come to.

A price is millionths of a dollar per hour, a time is whole seconds; their product is kept as it is, in "hour-seconds" (`_hs`),
because sums of it are exact. Only the end of a calculation divides by 3600.
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import Ints

__all__ = ["NEVER_HS", "microusd"]

NEVER_HS = 1 << 61
"""More than any real sum; two of it still fit into 63 bits."""


def microusd(sum_hs: Ints) -> Ints:
    """Millionths of a dollar, to the nearest; halves to the even one."""
    whole, rest = np.divmod(sum_hs, 3600)
    up: Ints = whole + ((rest > 1800) | ((rest == 1800) & (whole % 2 == 1)))
    return up
