"""When to save: what the user asked for, what the arithmetic says, and whether it is time now.

`parse_save_every` turns the user's words into triggers once. `auto_interval` turns measurements (what a save costs,
how often capacity is taken away) into an interval, now and then. `due` is asked after every step and only compares
numbers.

The formulas live in `formulas.py`, what is known about preemptions in `preemptions.py`; both are offered here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple, TypeAlias

from holdfast.core.config import Duration, format_duration, parse_duration_s
from holdfast.core.errors import UsageError
from holdfast.policy.formulas import (
    check_cost_and_mtbf,
    check_share,
    daly_s,
    exact_s,
    hazard_s,
    lambert_w0,
    with_notice_s,
    young_s,
)
from holdfast.policy.preemptions import PreemptionRate

__all__ = [
    "DEFAULT_MAX_LOST_WORK_S",
    "Auto",
    "AutoContext",
    "EveryDuration",
    "EveryEpoch",
    "EverySteps",
    "IntervalDecision",
    "LoopState",
    "LostShare",
    "LostTime",
    "PreemptionRate",
    "SaveEvery",
    "Trigger",
    "auto_interval",
    "daly_s",
    "due",
    "exact_s",
    "hazard_s",
    "lambert_w0",
    "max_lost_work_s",
    "parse_max_lost_work",
    "parse_save_every",
    "with_notice_s",
    "young_s",
]

DEFAULT_MAX_LOST_WORK_S = 600.0
_SHARE_FOR_DEFAULT = 0.01
"""What keeping to the default may cost. A user's own bound is kept at any price; one that nobody asked for is not worth more."""


class LoopState(NamedTuple):
    """Where the loop is at a step boundary. A tuple, because one is made at every step."""

    step: int
    """Steps completed by the run, over all attempts."""
    steps_since_save: int
    """Steps completed since the newest snapshot (or since the restore)."""
    seconds_since_save: float
    epoch_ended: bool = False
    """This boundary is the last one of an epoch."""


@dataclass(frozen=True, slots=True)
class EverySteps:
    """At the steps that are multiples of `count`, wherever the run was interrupted before: 500, 1000, 1500."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"a save every {self.count} steps is not possible; {_SAVE_EVERY_FORMS}")

    def is_due(self, state: LoopState, interval_s: float) -> bool:
        # Crossing a multiple, not standing on one: a loop whose boundaries are several steps apart never misses a save.
        return state.step // self.count > (state.step - state.steps_since_save) // self.count

    def __str__(self) -> str:
        return f"every {self.count} steps"


@dataclass(frozen=True, slots=True)
class EveryDuration:
    """When `seconds` have passed since the newest snapshot."""

    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UsageError(f"a save every {self.seconds} s is not possible; {_SAVE_EVERY_FORMS}")

    def is_due(self, state: LoopState, interval_s: float) -> bool:
        return state.seconds_since_save >= self.seconds

    def __str__(self) -> str:
        return f"every {format_duration(self.seconds)}"


@dataclass(frozen=True, slots=True)
class EveryEpoch:
    """At the end of every epoch."""

    def is_due(self, state: LoopState, interval_s: float) -> bool:
        return state.epoch_ended

    def __str__(self) -> str:
        return "end of epoch"


@dataclass(frozen=True, slots=True)
class Auto:
    """When the interval that `auto_interval` chose has passed since the newest snapshot."""

    def is_due(self, state: LoopState, interval_s: float) -> bool:
        return state.seconds_since_save >= interval_s

    def __str__(self) -> str:
        return "automatic interval"


Trigger: TypeAlias = EverySteps | EveryDuration | EveryEpoch | Auto
SaveEvery: TypeAlias = str | int | timedelta | Trigger | Sequence[str | int | timedelta | Trigger]
"""What a user may write for `save_every`."""

_SAVE_EVERY_FORMS = (
    'save_every is written like "500 steps", 500 (steps), "10 min", "epoch" or "auto", '
    'or several at once: ["epoch", "10 min"]'
)
_STEPS = re.compile(r"(\d{1,18})\s*steps?", re.ASCII)


def parse_save_every(spec: SaveEvery) -> tuple[Trigger, ...]:
    """The triggers that `spec` names, in its order and without repetition. Raises UsageError that shows the accepted
    forms.
    """
    parts = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else (spec,)
    triggers = tuple(dict.fromkeys(_one_trigger(part) for part in parts))
    if not triggers:
        raise UsageError(f"save_every is empty; {_SAVE_EVERY_FORMS}")
    return triggers


def _one_trigger(spec: object) -> Trigger:
    if isinstance(spec, (EverySteps, EveryDuration, EveryEpoch, Auto)):
        return spec
    if isinstance(spec, timedelta):
        return EveryDuration(spec.total_seconds())
    if isinstance(spec, int) and not isinstance(spec, bool):
        return EverySteps(spec)
    if not isinstance(spec, str):
        raise UsageError(f"cannot save every {spec!r}; {_SAVE_EVERY_FORMS}")
    text = spec.strip().lower().removeprefix("every ").strip()
    if text == "auto":
        return Auto()
    if text == "epoch":
        return EveryEpoch()
    if steps := _STEPS.fullmatch(text):
        return EverySteps(int(steps[1]))
    if not any(character.isalpha() for character in text):
        raise UsageError(f"cannot save every {spec!r}: steps or seconds? {_SAVE_EVERY_FORMS}")
    try:
        return EveryDuration(parse_duration_s(text))
    except UsageError as error:
        raise UsageError(f"cannot save every {spec!r}: {error}; {_SAVE_EVERY_FORMS}") from None


def due(triggers: Sequence[Trigger], state: LoopState, interval_s: float) -> str | None:
    """Why a save is due at this step boundary, or None. `interval_s` is what `auto_interval` last decided.

    Never due when no step was made since the newest snapshot: it would hold nothing new.
    """
    if state.steps_since_save <= 0:
        return None
    for trigger in triggers:
        if trigger.is_due(state, interval_s):
            return str(trigger)
    return None


# How much lost work a user accepts.


@dataclass(frozen=True, slots=True)
class LostTime:
    """At most this much work may be lost by one preemption."""

    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UsageError(f"losing at most {self.seconds} s is not possible; {_LOST_WORK_FORMS}")


@dataclass(frozen=True, slots=True)
class LostShare:
    """At most this share (0 to 1) of the run's expected duration may be lost by one preemption."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"losing at most {self.share:.3%} of the run is not possible; {_LOST_WORK_FORMS}")


_LOST_WORK_FORMS = 'max_lost_work is a time ("10 min") or a share of the expected runtime ("2 %")'
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})\s*%", re.ASCII)


def parse_max_lost_work(spec: Duration | LostTime | LostShare) -> LostTime | LostShare:
    """`"10 min"`, 600 (seconds) or `"2 %"`. Raises UsageError that shows the accepted forms."""
    if isinstance(spec, (LostTime, LostShare)):
        return spec
    if isinstance(spec, str) and (percent := _PERCENT.fullmatch(spec.strip())):
        return LostShare(float(percent[1]) / 100)
    try:
        seconds = parse_duration_s(spec)
    except UsageError as error:
        raise UsageError(f"{error}; {_LOST_WORK_FORMS}") from None
    return LostTime(seconds)


def max_lost_work_s(bound: LostTime | LostShare, expected_runtime_s: float | None) -> float:
    """The bound in seconds. A share of a runtime that nobody knows yet counts as the default, 10 minutes."""
    if isinstance(bound, LostTime):
        return bound.seconds
    if expected_runtime_s is None or not expected_runtime_s > 0:
        return DEFAULT_MAX_LOST_WORK_S
    return bound.share * expected_runtime_s


# The automatic interval.


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoContext:
    """What `auto_interval` needs to know. Durations in seconds."""

    save_cost_s: float
    """What one save costs the loop: stall plus slowdown, as measured."""
    commit_s: float = 0.0
    """How long a snapshot takes to become durable, in the background, as measured."""
    rate: PreemptionRate = field(default_factory=PreemptionRate)
    notice_share: float = 0.0
    """Share of the preemptions that come with a notice in which a save commits: those lose next to nothing."""
    max_lost_work_s: float | None = None
    """The most work that one preemption without a notice may cost. None: nobody has said, so the default counts as far as it
    costs next to nothing."""
    min_interval_s: float = 10.0
    """Shorter intervals gain nothing worth their store requests."""
    max_save_share: float = 0.25
    """The most of the loop's time that saves may take, whatever the rate is thought to be. The optimum comes near that only where
    machines live for less than about five times what a save costs.
    """

    def __post_init__(self) -> None:
        check_cost_and_mtbf(self.save_cost_s, self.rate.mean_between_s)
        check_share(self.notice_share)
        if self.max_lost_work_s is not None:
            LostTime(self.max_lost_work_s)
        if not (0 <= self.commit_s < math.inf and 0 <= self.min_interval_s < math.inf):
            raise UsageError(
                f"commit_s ({self.commit_s}) and min_interval_s ({self.min_interval_s}) must be zero or more seconds"
            )
        if not 0 < self.max_save_share <= 1:
            raise UsageError(f"max_save_share lies above 0 and up to 1, not at {self.max_save_share}")


@dataclass(frozen=True, slots=True)
class IntervalDecision:
    """Seconds of work between two snapshots, and why."""

    interval_s: float
    reasons: tuple[str, ...]


def auto_interval(context: AutoContext) -> IntervalDecision:
    """The interval that costs least in expectation, within bounds; a later bound outranks an earlier one.

    1. The optimum for the preemptions that come without a usable notice.
    2. Not shorter than `min_interval_s`, and not so short that saves take more than `max_save_share` of the loop's time.
    3. Not longer than `max_lost_work_s` less `commit_s`: a preemption just before a commit loses everything since the snapshot
       before, one interval and one commit ago. Where nobody has set that bound, the default gives way before it makes saves take
       more than 1 % of the time.
    4. Not shorter than `commit_s`: snapshots that come faster than the store takes them only replace each other. This is physics,
       so it outranks the user's bound on lost work; the reasons say so when they collide.
    """
    interval_s, why = _optimum(context)
    reasons = [why]
    cost_s, share = context.save_cost_s, context.max_save_share
    for floor_s, reason in (
        (context.min_interval_s, f"no shorter than {format_duration(context.min_interval_s)}"),
        (_interval_for(cost_s, share), f"no shorter, so that saves take at most {share:.3g} of the time"),
    ):
        if interval_s < floor_s:
            interval_s = floor_s
            reasons.append(reason)
    bound_s = context.max_lost_work_s
    if bound_s is None:
        bound_s = max(DEFAULT_MAX_LOST_WORK_S, _interval_for(cost_s, _SHARE_FOR_DEFAULT) + context.commit_s)
    limit = format_duration(bound_s)
    longest_s = bound_s - context.commit_s
    if interval_s > longest_s:
        interval_s = longest_s
        reasons.append(f"no longer, so that a preemption loses at most {limit}, a commit in flight included")
    if interval_s < context.commit_s:
        interval_s = context.commit_s
        reasons.append(f"no shorter than the {format_duration(context.commit_s)} that a save takes to become durable")
        if interval_s > longest_s:
            worst = format_duration(2 * context.commit_s)
            reasons.append(f"lost work cannot be kept below {limit} with this store: up to {worst} may be lost")
    return IntervalDecision(interval_s, tuple(reasons))


def _interval_for(cost_s: float, share: float) -> float:
    """At which saves take that share of the time."""
    return cost_s * (1 - share) / share


def _optimum(context: AutoContext) -> tuple[float, str]:
    between = format_duration(context.rate.mean_between_s)
    if context.notice_share == 1:
        return math.inf, f"preemptions come about every {between}, and a save fits into the notice of all of them"
    unnoticed_s = context.rate.mean_between_s / (1 - context.notice_share)
    best_s = exact_s(context.save_cost_s, unnoticed_s)
    why = f"a save costs {format_duration(context.save_cost_s)}, a preemption comes about every {between}"
    if context.notice_share:
        why += f" ({context.notice_share:.0%} with a notice in which a save fits)"
    return best_s, f"{why}: best every {format_duration(best_s)}"
