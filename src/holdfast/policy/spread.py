"""A measured quantity and how far it scatters: what "fits" means when bandwidth and step times are never the same twice.

Bandwidths and durations are positive and skewed, so they are taken as lognormal. A mean and a relative standard deviation go in,
quantiles and probabilities come out; all are monotone in the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from holdfast.core.errors import UsageError

__all__ = ["Spread"]

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Spread:
    """`mean` in the quantity's own unit (bytes per second, seconds), zero or more; `relative_sd` is the standard deviation as a
    share of the mean: 0 for a figure that never varies."""

    mean: float
    relative_sd: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mean < math.inf:
            raise UsageError(f"a measured mean is zero or more and finite, not {self.mean}")
        if not 0 <= self.relative_sd < math.inf:
            raise UsageError(f"a relative standard deviation is zero or more and finite, not {self.relative_sd}")

    def quantile(self, share: float) -> float:
        """The value that the share `share` (above 0 and below 1) of all measurements stays below."""
        if self.mean == 0 or self._sigma == 0:
            return self.mean
        return self._median * math.exp(_NORMAL.inv_cdf(share) * self._sigma)

    def share_at_least(self, value: float) -> float:
        """How probable `value` or more is."""
        if value <= 0:
            return 1.0
        if self.mean == 0 or self._sigma == 0:
            return 1.0 if self.mean >= value else 0.0
        if math.isinf(value):
            return 0.0
        return 1.0 - _NORMAL.cdf(math.log(value / self._median) / self._sigma)

    @property
    def _sigma(self) -> float:
        # 0 for a spread below what a float can tell from none.
        return math.sqrt(2 * math.log(math.hypot(1, self.relative_sd)))

    @property
    def _median(self) -> float:
        return self.mean / math.hypot(1, self.relative_sd)
