"""The arithmetic that every "try again later" shares: how long a wait grows, and when spot is given up for on-demand.

A wait doubles with every failure in a row, up to a cap. Jitter, drawn by the caller, spreads it over its upper half, so that many
that failed together do not come back together, and none comes back much too early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError

__all__ = ["Backoff", "Fallback"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds."""

    first_s: float
    """After the first failure in a row; doubles with each further one."""
    longest_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.first_s <= self.longest_s < math.inf:
            raise UsageError(f"delays must keep 0 <= first <= longest, and be finite: {self.first_s}, {self.longest_s}")

    def delay_s(self, failures: int, jitter: float) -> float:
        """Before the next try, after so many failures in a row (1 or more); `jitter` lies in [0, 1)."""
        # The exponent is bounded first: 2.0 ** 1100 would raise OverflowError.
        whole_s = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 60))
        return whole_s * (0.5 + 0.5 * jitter)


@dataclass(frozen=True, slots=True)
class Fallback:
    """When a job that finds no spot capacity takes on-demand: after so many failed tries, or so long without any, whichever is
    first. None: that is no reason."""

    tries: int | None = 3
    after_s: int | None = 600

    def __post_init__(self) -> None:
        if (
            (self.tries is None and self.after_s is None)
            or (self.tries is not None and self.tries < 1)
            or (self.after_s or 0) < 0
        ):
            raise UsageError(
                f"a fallback comes after one try or more, or after a time: {self.tries} tries, {self.after_s} s"
            )

    def __str__(self) -> str:
        tries = [] if self.tries is None else ["1 try" if self.tries == 1 else f"{self.tries} tries"]
        return " or ".join(tries + ([] if self.after_s is None else [format_duration(self.after_s)]))
