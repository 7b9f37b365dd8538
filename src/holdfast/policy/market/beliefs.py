"""How soon spot capacity goes away, and how soon it comes back: hazards by age, and how sure one is of them.

Capacity is up and down in turn. What matters for a decision is the hazard: the chance per hour that the present state ends,
given how long it has lasted. On public traces it falls with age, in both states: what has just come is likely to go, what has
lasted for hours lasts. So a belief is one hazard per bucket of age and state.

A pool may be a calmer or a rougher one than believed. That is one factor per state, unknown, with a Gamma distribution of mean 1
whose shape is the `certainty`: as if so many ends of the state had been seen already. What a job sees itself sharpens it
(`posterior`): with N ends seen where H were believed, the factor has shape certainty + N and rate certainty + H. States that
have not ended yet are in H and not in N, which is all that censoring asks for.

    history ──→ Sightings ──→ Beliefs.learned ──→ a policy            N, H of the job itself ──→ posterior ──→ weights of tables
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Bools, Floats, Ints

__all__ = ["AGES", "AGE_EDGES_S", "COLD", "UNSEEN_AGE_S", "Beliefs", "Hazard", "Sightings", "bucket_of", "mean_h"]

AGE_EDGES_S = (0, 600, 1800, 3600, 7200, 14400, 28800, 57600)
"""Lower edges of the buckets of age; the last one is open."""
AGES = len(AGE_EDGES_S)
UNSEEN_AGE_S = 7200
"""How old a state is taken to be whose beginning was not seen: old states fill more of the time than young ones."""
_WIDTHS_S = (*np.diff(AGE_EDGES_S).tolist(), math.inf)
_CERTAINTIES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0, 22.0, 30.0)
_PIECE_S = 2.5 * 86400
"""A history is cut into pieces about as long as a job: how much they differ says how sure one can be of the next one."""
_ROUNDS = 5
_SHRINK = 10.0
"""Ends of a state that the general shape is worth in each bucket of age."""


@dataclass(frozen=True, slots=True)
class Hazard:
    """Of one state: ends per hour by age, and how sure that is."""

    per_h: tuple[float, ...]
    certainty: float
    or_per_h: tuple[tuple[float, ...], ...] = ()
    """Other shapes that are as likely."""

    def __post_init__(self) -> None:
        lengths = {len(curve) for curve in self.curves}
        lowest, highest = min(map(min, self.curves), default=0), max(map(max, self.curves), default=0)
        if lengths != {AGES} or not (lowest > 0 and highest < 1e6 and 0 < self.certainty < 1e6):
            raise UsageError(f"a belief has {AGES} hazards and a certainty, all above 0, not {self}")

    @property
    def curves(self) -> tuple[tuple[float, ...], ...]:
        """All shapes."""
        return (self.per_h, *self.or_per_h)

    def expected(self, age_s: Floats) -> Floats:
        """Ends that are believed to happen between age 0 and this age, if the state began anew at once: curve x ..."""
        edges = np.array([*AGE_EDGES_S, AGE_EDGES_S[-1] + 1e9])
        steps = np.array(self.curves) * np.diff(edges) / 3600
        sums = np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)], axis=1)
        ends: Floats = np.stack([np.interp(age_s, edges, each) for each in sums])
        return ends

    def log_rate(self, age_s: Floats) -> Floats:
        """Logarithm of the hazard at this age: curve x ..."""
        rates: Floats = np.log(np.array(self.curves))[:, bucket_of(age_s)]
        return rates

    def factors(self, points: int) -> Floats:
        """Factors for which it pays to be prepared: evenly spaced logarithms around 0, farther where the belief is less sure."""
        reach = min(2.6, 2.2 / math.sqrt(self.certainty))
        return np.exp(np.linspace(-1.3 * reach, reach, points))

    def families(self, points: int) -> list[tuple[float, ...]]:
        """Every curve times every factor."""
        factors = self.factors(points).tolist()
        return [tuple(factor * rate for rate in curve) for curve in self.curves for factor in factors]

    def posterior(self, points: int, seen: Floats, expected: Floats, log_rates: Floats) -> Floats:
        """Weights of `families`, window x family, after `seen` ends where `expected` (curve x window) were believed.
        `log_rates` (curve x window) is the sum of `log_rate` over the ages of those ends: it tells the curves apart.

        Between two factors the weight is shared, so that the sharpest posterior still lies where it should.
        """
        logs = np.log(self.factors(points))
        fine = np.linspace(logs[0], logs[-1], 4 * (points - 1) + 1)
        shape, rate = (self.certainty + seen)[:, None, None], (self.certainty + expected).T[:, :, None]
        likely = shape * fine - rate * np.exp(fine) + log_rates.T[:, :, None]
        likely = np.exp(likely - likely.max(axis=(1, 2), keepdims=True))
        share = np.maximum(0, 1 - np.abs(fine[:, None] - logs) / (logs[1] - logs[0]))
        weights = (likely[..., None] * share).sum(axis=2).reshape(len(seen), -1)
        normal: Floats = weights / weights.sum(axis=1, keepdims=True)
        return normal


def bucket_of(age_s: Floats | Ints) -> Ints:
    """The bucket of age."""
    bucket: Ints = np.searchsorted(AGE_EDGES_S, age_s, side="right") - 1
    return bucket


def mean_h(per_h: tuple[float, ...]) -> float:
    """How long a state of these hazards lasts on average."""
    alive, hours = 1.0, 0.0
    for rate, width_s in zip(per_h, _WIDTHS_S, strict=True):
        survives = math.exp(-rate * width_s / 3600)
        hours += alive * (1 - survives) / rate
        alive *= survives
    return hours


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What a policy believes before it has seen anything itself."""

    up: Hazard
    down: Hazard

    @classmethod
    def learned(cls, sightings: Sightings) -> Beliefs:
        """From a history."""
        return cls(
            _learned(sightings.up_ends, sightings.up_h, COLD.up),
            _learned(sightings.down_ends, sightings.down_h, COLD.down),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sightings:
    """A history, counted: piece x age bucket. Ends of each state that were seen, and hours spent in it."""

    up_ends: Floats
    up_h: Floats
    down_ends: Floats
    down_h: Floats

    @classmethod
    def of(cls, there: Bools, tick_s: int) -> Sightings:
        """Of one pool, tick by tick."""
        ticks = len(there)
        number = np.arange(ticks)
        starts = np.concatenate([[True], there[1:] != there[:-1]])
        since = np.maximum.accumulate(np.where(starts, number, 0))
        age_s = (number - since) * tick_s + np.where(since == 0, UNSEEN_AGE_S, 0)
        bucket = bucket_of(age_s)
        piece = (number * tick_s // _PIECE_S).astype(np.int64)
        place = (piece * AGES + bucket)[:-1]
        cells = int(piece[-1] + 1) * AGES
        ends, up = starts[1:], there[:-1]

        def count(where: Bools, each: float) -> Floats:
            counted: Floats = np.multiply(np.bincount(place[where], minlength=cells), each, dtype=np.float64)
            return counted.reshape(-1, AGES)

        hours = tick_s / 3600
        return cls(count(up & ends, 1), count(up, hours), count(~up & ends, 1), count(~up, hours))

    def and_of(self, other: Sightings) -> Sightings:
        """Two histories."""
        return Sightings(
            np.vstack([self.up_ends, other.up_ends]),
            np.vstack([self.up_h, other.up_h]),
            np.vstack([self.down_ends, other.down_ends]),
            np.vstack([self.down_h, other.down_h]),
        )


def _learned(ends: Floats, hours: Floats, general: Hazard) -> Hazard:
    """Hazards as seen, drawn to the general shape where little was seen; as sure as the pieces agree.

    Each piece has a factor of its own. Without that, rough and calm pieces together would look like hazards that fall with age.
    """
    shape = np.array(general.per_h)
    shape = shape * (ends.sum() + general.certainty) / ((hours * shape).sum() + general.certainty)
    factors = np.ones((len(ends), 1))
    for _ in range(_ROUNDS):
        per_h = (ends.sum(axis=0) + _SHRINK) / ((factors * hours).sum(axis=0) + _SHRINK / shape)
        seen, expected = ends.sum(axis=1), (hours * per_h).sum(axis=1)
        pairs = list(zip(seen.tolist(), expected.tolist(), strict=True))
        certainty = max(_CERTAINTIES, key=lambda sure: _likely(sure, pairs))
        factors = ((certainty + seen) / (certainty + expected))[:, None]
    return Hazard(tuple(per_h.tolist()), certainty)


def _likely(certainty: float, pairs: list[tuple[float, float]]) -> float:
    """Logarithm of how likely so many ends are where so many were believed, up to a constant; each pair draws its own factor."""
    start = certainty * math.log(certainty) - math.lgamma(certainty)
    return sum(
        start + math.lgamma(certainty + ends) - (certainty + ends) * math.log(certainty + expected)
        for ends, expected in pairs
    )


def _weibull(shape: float, mean_h: float) -> tuple[float, ...]:
    """Mean hazard of each bucket; the open one as if it were as wide as it is old."""
    edges_h = np.array([*AGE_EDGES_S, 2 * AGE_EDGES_S[-1]]) / 3600
    passed = (edges_h / (mean_h / math.gamma(1 + 1 / shape))) ** shape
    return tuple((np.diff(passed) / np.diff(edges_h)).tolist())


COLD = Beliefs(
    up=Hazard(_weibull(0.65, 2.0), 1.0, or_per_h=(_weibull(1.0, 2.0),)), down=Hazard(_weibull(0.65, 2.0), 1.0)
)
"""Without a history: lifetimes as published for spot machines (Weibull, shape 0.57 to 0.79, mean 0.75 to 5 h) or without age;
hardly believed."""
