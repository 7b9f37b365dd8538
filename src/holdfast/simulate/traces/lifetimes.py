"""How long spot capacity lasts, and how long it stays away: distributions to draw from, and to fit to what was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Bools, Floats

__all__ = ["Bathtub", "Lifetimes", "Weibull", "fit_weibull"]


class Lifetimes(Protocol):
    """A distribution of durations, in seconds."""

    def draw(self, luck: np.random.Generator, count: int) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Weibull:
    """Shape 1 is exponential; below 1 the hazard falls with age, as on public traces of spot machines (0.57 to 0.79)."""

    shape: float
    mean_s: float

    def __post_init__(self) -> None:
        if not (0.05 <= self.shape <= 50 and 0 < self.mean_s < math.inf):
            raise UsageError(
                f"a Weibull has a shape between 0.05 and 50 and a positive mean, not {self.shape} and {self.mean_s}"
            )

    @property
    def scale_s(self) -> float:
        return self.mean_s / math.gamma(1 + 1 / self.shape)

    def draw(self, luck: np.random.Generator, count: int) -> Floats:
        drawn: Floats = self.scale_s * luck.weibull(self.shape, count)
        return drawn


@dataclass(frozen=True, slots=True)
class Bathtub:
    """Some die young, some at a hard edge, the rest at random in between, as GCP's legacy preemptible machines with their 24 h."""

    early_share: float
    """Of all, those that die young."""
    early_mean_s: float
    edge_s: float
    at_edge_share: float
    """Of all, those that reach the edge and end there."""

    def __post_init__(self) -> None:
        shares = (self.early_share, self.at_edge_share, 1 - self.early_share - self.at_edge_share)
        if min(shares) < 0 or not 0 < self.early_mean_s < self.edge_s < math.inf:
            raise UsageError("a bathtub has shares that add up to at most 1, and 0 < early_mean_s < edge_s")

    def draw(self, luck: np.random.Generator, count: int) -> Floats:
        kind = luck.random(count)
        early = np.minimum(luck.exponential(self.early_mean_s, count), self.edge_s)
        between = luck.random(count) * self.edge_s
        drawn: Floats = np.where(
            kind < self.early_share, early, np.where(kind < 1 - self.at_edge_share, between, self.edge_s)
        )
        return drawn


def fit_weibull(lengths_s: Sequence[float] | Floats, ended: Sequence[bool] | Bools) -> Weibull:
    """Maximum likelihood. Where `ended` is False the duration was cut off by the end of the observation, and lasted at least so
    long.

    The shape k solves  Σ x^k ln x / Σ x^k - 1/k = mean of ln x over those that ended. The left side grows with k: bisection.
    """
    lengths, over = np.asarray(lengths_s, np.float64), np.asarray(ended, np.bool_)
    if lengths.shape != over.shape or len(lengths) == 0 or not (lengths > 0).all():
        raise UsageError("durations are longer than 0, and of each it is known whether it ended")
    if over.sum() < 2:
        raise UsageError(f"{int(over.sum())} durations ended: too few for a fit")
    # Relative to the longest, so that no power overflows.
    longest = float(lengths.max())
    logs = np.log(lengths / longest)
    mean_log = float(logs[over].mean())

    def gap(shape: float) -> float:
        powers = np.exp(shape * logs)
        return float((powers * logs).sum() / powers.sum()) - 1 / shape - mean_log

    low, high = 0.05, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    shape = (low + high) / 2
    scale_s = longest * float(np.exp(shape * logs).sum() / over.sum()) ** (1 / shape)
    return Weibull(min(max(shape, 0.05), 50.0), scale_s * math.gamma(1 + 1 / shape))
