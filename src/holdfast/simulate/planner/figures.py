"""A figure of a plan: how large it probably is, between what it may lie, and how anybody knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from holdfast.core.errors import UsageError

__all__ = ["Figure", "Origin", "fixed"]


class Origin(StrEnum):
    """Where a figure comes from; the first that there is counts."""

    GIVEN = "given"
    MEASURED = "measured"
    JOB_FILE = "job file"
    PRICES = "price table"
    COMPUTED = "computed"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True)
class Figure:
    """Half of all cases lie below `likely`, all between `low` and `high`."""

    likely: float
    low: float
    high: float
    origin: Origin
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.likely <= self.high:
            raise UsageError(
                f"a figure lies between its bounds and is zero or more: {self.low}, {self.likely}, {self.high}"
            )

    @property
    def is_known(self) -> bool:
        return self.low == self.high

    def at(self, share: float) -> float:
        """The value that this share of all cases stays below: straight lines of the logarithm, or of the value where one is 0."""
        if share <= 0.5:
            return _between(self.low, self.likely, 2 * share)
        return _between(self.likely, self.high, 2 * share - 1)

    def only(self, value: float) -> Figure:
        """The same figure, as if it were known."""
        return replace(self, likely=value, low=value, high=value)


def fixed(value: float, origin: Origin, note: str = "") -> Figure:
    """A figure that is taken as it is."""
    return Figure(value, value, value, origin, note)


def _between(begin: float, end: float, share: float) -> float:
    if begin <= 0:
        return begin + (end - begin) * share
    return float(begin * (end / begin) ** share)
