"""What to measure on one instance before the whole job is trusted to a plan, and for how long: counted, not guessed.

The mean of n lives that scatter by c (standard deviation by mean) is known to ± 1.645·c / √n with 90 %. Lifetimes of spot machines
scatter by more than their mean, so a hazard within ± 50 % needs dozens of preemptions. To know that it is low enough needs far
less: no preemption in 3 times the break-even life says with 95 % that the mean life is longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.simulate.planner.assumed import Assumptions
from holdfast.simulate.planner.breakeven import BreakEven
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.terms import Terms

__all__ = ["Pilot", "Trial", "lives_for", "pilot_of"]

_Z90 = 1.645
_HAZARD_WITHIN = 0.5
_BANDWIDTH_WITHIN, _BANDWIDTH_SCATTER = 0.2, 0.5
_STEP_WITHIN, _STEP_SCATTER, _WARM_UP_STEPS = 0.02, 0.1, 20
_RESTARTS = 5
_NO_EVENT_95 = -math.log(0.05)


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure."""

    what: str
    count: int
    """How often it has to be seen."""
    of: str
    instance_s: float
    """Time of one instance; several at once share it."""
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    trials: tuple[Trial, ...]
    first_s: float
    """Instance time after which steps, saves and restarts are known, and, without a preemption, that the hazard is low enough."""
    first_usd: float
    hazard_s: float
    """Instance time until the hazard is known to ± 50 %, at the assumed life."""
    hazard_usd: float
    pool: str


def lives_for(within: float, scatter: float) -> int:
    """How many must be seen so that their mean is right to ± `within` with 90 %."""
    return math.ceil((_Z90 * scatter / within) ** 2)


def weibull_scatter(shape: float) -> float:
    """Standard deviation by mean."""
    return math.sqrt(max(0.0, math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1))


def pilot_of(terms: Terms, assumed: Assumptions, pool: Price, even: BreakEven) -> Pilot:
    """On one spot instance of that pool."""
    lives = lives_for(_HAZARD_WITHIN, weibull_scatter(assumed.shape.likely))
    hazard_s = lives * assumed.life_s.likely
    trials = []
    steps = lives_for(_STEP_WITHIN, _STEP_SCATTER) + _WARM_UP_STEPS
    steps_s = steps * assumed.step_s.likely
    trials.append(
        Trial("step time to ± 2 %", steps, "steps, warm-up included", steps_s, "holdfast run -- python train.py")
    )
    saves_s = 0.0
    if terms.interval is not None and terms.notice is not None:
        saves = lives_for(_BANDWIDTH_WITHIN, _BANDWIDTH_SCATTER)
        saves_s = saves * max(terms.notice.send_s, assumed.stall_s.likely)
        trials.append(
            Trial("stall and bandwidth to ± 20 %", saves, "saves, one after the other", saves_s, 'save_every="1 step"')
        )
    restarts_s = _RESTARTS * assumed.changeover_s.likely
    trials.append(
        Trial("changeover, restore included", _RESTARTS, "restarts", restarts_s, "holdfast drill -- python train.py")
    )
    enough_s = _NO_EVENT_95 * (even.life_s or 0.0)
    if enough_s:
        how = "no preemption in this time says so with 95 %"
        trials.append(Trial("that capacity lasts longer than the break-even", 0, "preemptions", enough_s, how))
    trials.append(
        Trial(
            "preemption rate to ± 50 %",
            lives,
            "preemptions",
            hazard_s,
            "holdfast report URL; holdfast plan --measured URL",
        )
    )
    first_s = max(steps_s + saves_s + restarts_s, enough_s)
    return Pilot(
        trials=tuple(trials),
        first_s=first_s,
        first_usd=first_s / 3600 * pool.spot_usd_h,
        hazard_s=hazard_s,
        hazard_usd=hazard_s / 3600 * pool.spot_usd_h,
        pool=pool.pool,
    )
