"""Does the command hang? A pure state machine: readings of the progress page go in, a verdict with its reasons comes out.

A command that reports its steps is measured by itself: what counts as silence is a multiple of the longest silence that it has
broken before, phase by phase. Before the first of a kind there is nothing to measure by, and a generous limit holds (the first step
may compile for a long time). A command that reports nothing is never taken for hung, unless a limit has been declared.

    Reading ──→ observe(HangState, …) ──→ (HangState, Verdict)

Silence is counted only while somebody looked and the command was allowed to run: a suspended machine, an agent that was stopped,
or a command that a person has stopped (Ctrl-Z, a debugger) never looks like a hang.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from holdfast.core.config import format_duration
from holdfast.core.contract import Phase
from holdfast.core.errors import UsageError

__all__ = ["HangLimits", "HangState", "Reading", "Verdict", "observe"]

_MINUTE_S = 60.0
_MOST_DOUBLINGS = 4
_FIRST_OF_A_KIND_S: Mapping[Phase, float] = {
    Phase.STARTING: 60 * _MINUTE_S,
    Phase.RESTORING: 120 * _MINUTE_S,
    Phase.TRAINING: 60 * _MINUTE_S,
    Phase.EVALUATING: 120 * _MINUTE_S,
    Phase.LEAVING: 30 * _MINUTE_S,
    # What a script does after its training (an export, a last report) is not holdfast's to judge.
    Phase.FINISHED: math.inf,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HangLimits:
    """When silence is a hang. Durations in seconds."""

    factor: float = 10.0
    """How many times the longest silence that was broken in this phase before."""
    at_least_s: float = 30 * _MINUTE_S
    """No learned limit is shorter than this: an evaluation that the script has not declared looks like a hang until it has been
    seen once."""
    declared_s: Mapping[Phase, float] = field(default_factory=dict)
    """Limits that the user has set for a phase; they go before what is learned, in both directions."""
    always_s: float | None = None
    """One limit for every phase without a declared one, and for commands that report nothing (their output counts as life)."""
    longest_look_s: float = 60.0
    """Of the time between two readings, no more than this counts: nobody knows what happened in the rest."""

    def __post_init__(self) -> None:
        limits = (self.at_least_s, self.longest_look_s, *self.declared_s.values(), self.always_s or 1.0)
        if not self.factor >= 1 or not min(limits) > 0:
            raise UsageError("limits of silence are longer than zero, and the factor is one or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was seen at one moment. `sign_of_life` changes whenever the command shows life: its step; else what it has written."""

    now_s: float
    reports: bool
    """Whether the command reports its progress, as far as is known from this or an earlier attempt."""
    phase: Phase
    sign_of_life: int
    paused: bool = False
    """Somebody has stopped the command's main process."""


@dataclass(frozen=True, slots=True)
class HangState:
    """What is known so far. The longest silences outlive an attempt (`next_attempt`), the rest does not."""

    last: Reading | None = None
    silent_s: float = 0.0
    """How long the newest sign of life has not changed, as far as that counts."""
    signs: int = 0
    """Signs of life since the phase was entered."""
    longest_s: Mapping[Phase, float] = field(default_factory=dict)
    """Per phase, the longest silence that ended with a sign of life; for the phases without steps, the longest stay."""
    first_step_s: float | None = None
    """The longest that a first step has taken: it may compile."""
    hung_in: Phase | None = None
    """Where this attempt was taken for hung."""
    doublings: Mapping[Phase, int] = field(default_factory=dict)
    """Per phase, how many attempts were taken for hung there. A limit that is not declared doubles with each: it may have erred."""

    def next_attempt(self) -> HangState:
        doublings = self.doublings
        if self.hung_in is not None:
            doublings = {**doublings, self.hung_in: min(doublings.get(self.hung_in, 0) + 1, _MOST_DOUBLINGS)}
        return HangState(longest_s=self.longest_s, first_step_s=self.first_step_s, doublings=doublings)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether it hangs. `left_s` until it would be taken for hung if nothing moves; infinite where no limit holds."""

    hung: bool
    left_s: float
    reason: str


def observe(state: HangState, reading: Reading, limits: HangLimits) -> tuple[HangState, Verdict]:
    """Take one reading in."""
    last = state.last
    if last is None:
        state = replace(state, last=reading)
    else:
        passed_s = min(max(0.0, reading.now_s - last.now_s), limits.longest_look_s)
        silent_s = state.silent_s + (0.0 if reading.paused or last.paused else passed_s)
        if reading.phase is not last.phase:
            state = replace(_learned(state, last.phase, silent_s), last=reading, silent_s=0.0, signs=0)
        elif reading.sign_of_life != last.sign_of_life:
            state = replace(_learned(state, reading.phase, silent_s), last=reading, silent_s=0.0, signs=state.signs + 1)
        else:
            state = replace(state, last=reading, silent_s=silent_s)
    limit_s, why = _limit(state, reading, limits)
    hung = state.silent_s >= limit_s
    if hung:
        state = replace(state, hung_in=reading.phase)
    return state, Verdict(hung, max(0.0, limit_s - state.silent_s), _reason(state, reading, limit_s, why))


def _learned(state: HangState, phase: Phase, silent_s: float) -> HangState:
    if phase is Phase.TRAINING and state.signs == 0:
        return replace(state, first_step_s=max(silent_s, state.first_step_s or 0.0))
    return replace(state, longest_s={**state.longest_s, phase: max(silent_s, state.longest_s.get(phase, 0.0))})


def _limit(state: HangState, reading: Reading, limits: HangLimits) -> tuple[float, str]:
    declared_s = limits.declared_s.get(reading.phase) if reading.reports else None
    if declared_s is not None:
        return declared_s, "declared for this phase"
    if limits.always_s is not None:
        return limits.always_s, "declared"
    if not reading.reports:
        return math.inf, "the command reports no progress"
    limit_s, why = _learned_limit(state, reading, limits)
    return limit_s * 2.0 ** state.doublings.get(reading.phase, 0), why


def _learned_limit(state: HangState, reading: Reading, limits: HangLimits) -> tuple[float, str]:
    generous_s = _FIRST_OF_A_KIND_S[reading.phase]
    first_step = reading.phase is Phase.TRAINING and state.signs == 0
    longest_s = state.first_step_s if first_step else state.longest_s.get(reading.phase)
    if longest_s is None or math.isinf(generous_s):
        return generous_s, "nothing of the kind has been measured yet"
    if first_step:
        # The next one may compile more than the last.
        return max(generous_s, limits.factor * longest_s), f"the longest first step so far took {_text(longest_s)}"
    # One evaluation or restore says little about the next: a quick one may be followed by a thorough one.
    floor_s = limits.at_least_s if reading.phase is Phase.TRAINING else max(limits.at_least_s, generous_s / 4)
    learned_s = max(floor_s, limits.factor * longest_s)
    return learned_s, f"the longest so far took {_text(longest_s)}"


def _reason(state: HangState, reading: Reading, limit_s: float, why: str) -> str:
    missing = "no output" if not reading.reports else "no step" if reading.phase is Phase.TRAINING else "no end of it"
    where = f"{reading.phase.name.lower()}, " if reading.reports else ""
    limit = "no limit" if math.isinf(limit_s) else f"the limit is {_text(limit_s)}"
    return f"{where}{missing} for {_text(state.silent_s)}; {limit} ({why})"


def _text(seconds: float) -> str:
    return format_duration(seconds)
