"""How often to save, as rules that `uptime.play` asks: the formulas, the best fixed interval in hindsight, and the trainer's own.

`Automatic` asks `policy.interval.auto_interval`, the function that decides in training, with what a trainer would know at that
moment. The others know the distribution that the lifetimes were drawn from, or the very lifetimes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.ledger.goodput import Bucket
from holdfast.policy.formulas import daly_s, exact_s, with_notice_s, young_s
from holdfast.policy.interval import AutoContext, PreemptionRate, auto_interval
from holdfast.policy.market.arrays import Floats
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.uptime.engine import Seen, play
from holdfast.simulate.uptime.fates import Conditions, Fates

__all__ = [
    "FIRST_GUESS_S",
    "Automatic",
    "Fixed",
    "HazardAware",
    "best_fixed",
    "daly",
    "exact",
    "weibull_aware",
    "with_notice",
    "young",
]

FIRST_GUESS_S = 1.0
"""What a trainer takes a save to cost before it has measured one."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same interval."""

    interval_s: float
    name: str = "fixed"
    learns = False

    def next_interval_s(self, seen: Seen) -> Floats:
        return np.full(len(seen.age_s), self.interval_s, np.float64)


def young(conditions: Conditions, mean_life_s: float) -> Fixed:
    return Fixed(young_s(conditions.save_cost_s, mean_life_s), "young")


def daly(conditions: Conditions, mean_life_s: float) -> Fixed:
    return Fixed(daly_s(conditions.save_cost_s, mean_life_s), "daly")


def exact(conditions: Conditions, mean_life_s: float) -> Fixed:
    return Fixed(exact_s(conditions.save_cost_s, mean_life_s), "exact")


def with_notice(conditions: Conditions, mean_life_s: float, notice_share: float) -> Fixed:
    return Fixed(with_notice_s(conditions.save_cost_s, mean_life_s, notice_share), "with notice")


@dataclass(frozen=True, slots=True, eq=False)
class HazardAware:
    """Saves per second of √(h / 2·cost), h the hazard at that age: √(2·cost / h) apart where the hazard hardly changes meanwhile.

    The next save comes where the integral of that density has grown by one. So a hazard that is infinite at age 0 does no harm.
    """

    ages_s: Floats
    """Edges of buckets of age, from 0 on."""
    counts: Floats
    """Saves from age 0 to each of these."""
    name: str = "hazard-aware"
    learns = False

    def next_interval_s(self, seen: Seen) -> Floats:
        ages_s, counts = self.ages_s, self.counts
        last_per_s = (counts[-1] - counts[-2]) / (ages_s[-1] - ages_s[-2])
        beyond_s = np.maximum(seen.age_s - ages_s[-1], 0)
        due = np.interp(seen.age_s, ages_s, counts) + beyond_s * last_per_s + 1
        due_s = np.interp(due, counts, ages_s) + np.maximum(due - counts[-1], 0) / last_per_s
        interval_s: Floats = due_s - seen.age_s
        return interval_s


def weibull_aware(conditions: Conditions, lifetimes: Weibull) -> HazardAware:
    """For lifetimes that are known to be these. The hazard of a bucket of age is its average there."""
    if conditions.save_cost_s == 0:
        raise UsageError("saves that cost nothing have no best interval")
    ages_s = np.concatenate(([0.0], np.geomspace(1e-4, 1e3, 800) * lifetimes.scale_s))
    width_s = np.diff(ages_s)
    hazard_per_s = np.diff((ages_s / lifetimes.scale_s) ** lifetimes.shape) / width_s
    counts = np.cumsum(np.sqrt(hazard_per_s / (2 * conditions.save_cost_s)) * width_s)
    return HazardAware(ages_s, np.concatenate(([0.0], counts)))


@dataclass(frozen=True, slots=True)
class Automatic:
    """`auto_interval`, asked as a trainer asks it: when work begins, and after saves.

    Not after each: when the first one has been measured, and when the machine has become a fifth older. What it is asked with
    hardly changes in between.
    """

    keeps_cost: bool = True
    """What earlier machines measured a save to cost is known from the start. If not, each machine begins with a guess."""
    counts_age: bool = True
    """For how long work has gone on here counts as exposure, and not only how long it did on the machines before."""
    counts_notices: bool = True
    """How many preemptions came with a notice in which a save became durable is known."""
    prior: PreemptionRate = PreemptionRate()  # noqa: RUF009  (frozen)
    max_lost_work_s: float | None = None
    """What the user accepts; None: nothing was said."""
    name: str = "automatic"
    learns = True

    def next_interval_s(self, seen: Seen) -> Floats:
        interval_s = seen.interval_s.copy()
        asks = seen.saves <= 1
        if self.counts_age:
            before_s = seen.age_s - seen.interval_s - seen.conditions.save_cost_s
            asks |= _fifths(seen.age_s) > _fifths(np.where(asks, seen.age_s, before_s))
        for row in np.flatnonzero(asks).tolist():
            interval_s[row] = auto_interval(self._context(seen, row)).interval_s
        return interval_s

    def _context(self, seen: Seen, row: int) -> AutoContext:
        here, before = int(seen.saves[row]), int(seen.saves_before[row])
        is_measured = here > 0 or (self.keeps_cost and before > 0)
        exposure_s = float(seen.exposure_s[row]) + (float(seen.at_work_s[row]) if self.counts_age else 0.0)
        noticed = int(seen.noticed[row]) if self.counts_notices else 0
        rate = self.prior.observed(int(seen.preemptions[row]), exposure_s, noticed)
        return AutoContext(
            save_cost_s=seen.conditions.save_cost_s if is_measured else FIRST_GUESS_S,
            commit_s=seen.conditions.commit_s if is_measured else 0.0,
            rate=rate,
            notice_share=rate.notice_share,
            max_lost_work_s=self.max_lost_work_s,
        )


def _fifths(age_s: Floats) -> Floats:
    """How often a second has to grow by a fifth."""
    grown: Floats = np.floor(np.log(np.maximum(age_s, 1e-3)) / math.log(1.2))
    return grown


def best_fixed(conditions: Conditions, fates: Fates, around_s: float) -> Fixed:
    """The one interval that leaves most useful time on these very machines; infinity where none is best.

    Looked for between a quarter and 14 times `around_s`, first in steps of a quarter, then of a twentieth.
    """

    def useful_ms(interval_s: float) -> int:
        return int(play(Fixed(interval_s), conditions, fates).buckets[Bucket.USEFUL].sum())

    def best(candidates: Sequence[float]) -> float:
        return max(candidates, key=useful_ms)

    coarse_s = best([around_s * 1.25**power for power in range(-6, 13)] + [math.inf])
    if math.isinf(coarse_s):
        return Fixed(coarse_s, "best fixed")
    return Fixed(best([coarse_s * 1.05**power for power in range(-4, 5)]), "best fixed")
