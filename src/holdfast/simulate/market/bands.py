"""How sure a mean over windows is: a bootstrap that draws days, not windows.

Windows overlap, and pools of one cloud have their bad days together, so windows are no independent draws. All windows that
start on one day stay together, in all pools; and `block_days` days in a row are drawn as one, because a window of 60 hours that
starts today looks much like one that starts tomorrow. The days are taken as a ring, so that each is as likely as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Floats, Ints

__all__ = ["DAY_S", "FEWEST_BLOCKS", "Band", "Days"]

DAY_S = 86400
DRAWS = 2000
FEWEST_BLOCKS = 3
"""With fewer stretches of days that do not overlap, a band would say nothing."""


@dataclass(frozen=True, slots=True)
class Band:
    """From the 5th to the 95th percentile."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Days:
    """Windows by the day on which they start, and the days of each draw. Every figure of one comparison uses the same draws, so
    that differences and ratios of two policies are as sure as they are."""

    day: Ints
    """Per window the row of its day."""
    drawn: Ints
    """Draw x day: rows of days."""
    blocks: int
    """Stretches of `block_days` that do not overlap: what there is of independent evidence, at most."""

    @classmethod
    def of(cls, day: Floats | Ints, *, block_days: int = 1, draws: int = DRAWS, seed: int = 1) -> Days:
        """`day` is any number per window that is the same for all windows of a day, and grows with time."""
        if not len(day) or block_days < 1:
            raise UsageError("a bootstrap draws blocks of one day or more, of at least one window")
        days, row = np.unique(day, return_inverse=True)
        count = len(days)
        blocks = -(-count // block_days)
        begins = np.random.default_rng(seed).integers(0, count, (draws, blocks))
        drawn = (begins[:, :, None] + np.arange(block_days)) % count
        return cls(row.astype(np.int64), drawn.reshape(draws, -1)[:, :count], count // block_days)

    def sums(self, values: Floats | Ints) -> Floats:
        """Per draw the sum over its windows. `values` is one per window, or pool x window."""
        each = np.asarray(values, np.float64)
        per_window = each.sum(axis=0) if each.ndim == 2 else each
        by_day = np.bincount(self.day, weights=per_window, minlength=int(self.day.max()) + 1)
        summed: Floats = by_day[self.drawn].sum(axis=1)
        return summed

    def mean(self, values: Floats | Ints) -> Band | None:
        """Of the mean per window. None: too few days."""
        return self.ratio(self.sums(values), self.sums(np.ones(np.shape(values))))

    def ratio(self, above: Floats, below: Floats) -> Band | None:
        """Of a ratio of two sums over windows, each as `sums` gives it. None: too few days, or draws in which there is nothing
        below."""
        if self.blocks < FEWEST_BLOCKS or not (below > 0).all():
            return None
        low, high = np.quantile(above / below, (0.05, 0.95)).tolist()
        return Band(low, high)
