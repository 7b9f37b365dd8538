"""What befalls the machines of a run, drawn ahead: how long each lives, which notice it gets, how long its last save takes.

Drawn once, rules are compared on the very same machines. Lives, notices, last saves and gaps have generators of their own: with
another share of notices the machines live as long as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Floats, Ints
from holdfast.policy.spread import Spread
from holdfast.simulate.traces.lifetimes import Lifetimes

__all__ = ["NEVER_MS", "NO_NOTICE", "Conditions", "Fates", "Observed", "draw_fates"]

NEVER_MS = 1 << 60
NO_NOTICE = -1
_LONGEST_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What machines, state and store are like. Seconds, to the millisecond."""

    save_cost_s: float
    """For how long a save stops the loop, in effect: stall and slowdown."""
    commit_s: float = 0.0
    """From the moment when the loop goes on until the save is durable."""
    start_s: float = 0.0
    """The machine's start, image and imports included."""
    restore_s: float = 0.0
    """Claiming the run and reading its checkpoint; on the first machine, too."""
    last_save: Spread | None = None
    """How long a last save takes from its begin until it is durable, and how that scatters. None: as long as any other save."""
    confidence: float = 0.95
    """As `DeadlineContext.confidence`."""
    least_probability: float = 0.05
    """As `DeadlineContext.least_probability`."""

    def __post_init__(self) -> None:
        for name in ("save_cost_s", "commit_s", "start_s", "restore_s"):
            if not 0 <= getattr(self, name) < _LONGEST_S:
                raise UsageError(f"{name} is zero or more seconds, not {getattr(self, name)}")
        if not (0 < self.confidence < 1 and 0 < self.least_probability <= self.confidence):
            raise UsageError("confidence lies between 0 and 1, and least_probability above 0 and not above confidence")

    @property
    def save_cost_ms(self) -> int:
        return round(self.save_cost_s * 1000)

    @property
    def commit_ms(self) -> int:
        return round(self.commit_s * 1000)

    @property
    def start_ms(self) -> int:
        return round(self.start_s * 1000)

    @property
    def restore_ms(self) -> int:
        return round(self.restore_s * 1000)

    @property
    def ready_ms(self) -> int:
        """When work begins, by the machine's age."""
        return self.start_ms + self.restore_ms

    @property
    def last_save_spread(self) -> Spread:
        return Spread(self.save_cost_s + self.commit_s) if self.last_save is None else self.last_save


@dataclass(frozen=True, slots=True)
class Observed:
    """Lifetimes that were seen, to draw from with replacement."""

    lifetimes_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.lifetimes_s or not all(0 < each < _LONGEST_S for each in self.lifetimes_s):
            raise UsageError("lifetimes to draw from are longer than 0 s, and there is at least one")

    def draw(self, luck: np.random.Generator, count: int) -> Floats:
        drawn: Floats = luck.choice(np.array(self.lifetimes_s, np.float64), count)
        return drawn


Durations: TypeAlias = Lifetimes | float
"""A distribution, or always the same number of seconds."""


@dataclass(frozen=True, slots=True, eq=False)
class Fates:
    """Whole milliseconds; run by machine, or machines in a row. The arrays are not to be changed."""

    life_ms: Ints
    notice_ms: Ints
    """How long before the machine goes the notice comes; NO_NOTICE where none does. A machine that does not live as long gets it
    at its start."""
    last_save_ms: Ints
    """How long a last save would take on this machine."""
    gap_ms: Ints
    """Waiting for this machine."""

    def __post_init__(self) -> None:
        shapes = {each.shape for each in (self.life_ms, self.notice_ms, self.last_save_ms, self.gap_ms)}
        if len(shapes) > 1:
            raise UsageError(f"what befalls the machines is known of each of them: {shapes}")
        if not (self.life_ms > 0).all() or min(self.last_save_ms.min(), self.gap_ms.min()) < 0:
            raise UsageError("machines live longer than 0 ms, and no other duration is negative")

    @classmethod
    def of(
        cls,
        life_ms: Sequence[Sequence[int]] | Ints,
        notice_ms: Sequence[Sequence[int]] | Ints | int = NO_NOTICE,
        last_save_ms: Sequence[Sequence[int]] | Ints | int = 0,
        gap_ms: Sequence[Sequence[int]] | Ints | int = 0,
    ) -> Fates:
        """Known machines, run by machine; one number stands for all of them."""
        lives = np.array(life_ms, np.int64)
        others = (np.broadcast_to(np.array(each, np.int64), lives.shape) for each in (notice_ms, last_save_ms, gap_ms))
        return cls(lives, *others)


def draw_fates(
    lifetimes: Lifetimes,
    conditions: Conditions,
    *,
    runs: int,
    machines: int,
    seed: int,
    notice_share: float = 0.0,
    notice: Durations = 120.0,
    gap: Durations = 0.0,
) -> Fates:
    """The share `notice_share` of the preemptions comes with a notice. The same seed draws the same."""
    if runs < 1 or machines < 1 or not 0 <= notice_share <= 1:
        raise UsageError(f"at least one run and machine, and a share of 0 to 1: {runs}, {machines}, {notice_share}")
    shape = (runs, machines)
    of_lives, of_shares, of_notices, of_saves, of_gaps = np.random.default_rng(seed).spawn(5)
    has_notice = of_shares.random(shape) < notice_share
    return Fates(
        life_ms=np.maximum(_drawn_ms(lifetimes, of_lives, shape), 1),
        notice_ms=np.where(has_notice, _drawn_ms(notice, of_notices, shape), NO_NOTICE),
        last_save_ms=_scattered_ms(conditions.last_save_spread, of_saves, shape),
        gap_ms=_drawn_ms(gap, of_gaps, shape),
    )


def _drawn_ms(durations: Durations, luck: np.random.Generator, shape: tuple[int, int]) -> Ints:
    count = shape[0] * shape[1]
    drawn_s = np.full(count, 1.0 * durations) if isinstance(durations, int | float) else durations.draw(luck, count)
    if not ((drawn_s >= 0) & (drawn_s < _LONGEST_S)).all():
        raise UsageError(f"durations lie between 0 and {_LONGEST_S:.0f} s; these do not: {durations}")
    whole: Ints = np.rint(drawn_s * 1000).astype(np.int64).reshape(shape)
    return whole


def _scattered_ms(spread: Spread, luck: np.random.Generator, shape: tuple[int, int]) -> Ints:
    """Lognormal, as `Spread` has it."""
    growth = math.hypot(1, spread.relative_sd)
    factors = np.exp(math.sqrt(2 * math.log(growth)) * luck.standard_normal(shape)) / growth
    whole: Ints = np.rint(spread.mean * 1000 * factors).astype(np.int64)
    return whole
