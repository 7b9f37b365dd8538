"""When silence is a hang: what is learned, what is declared, and that nobody is blamed for time in which nobody looked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.contract import Phase
from holdfast.core.errors import UsageError
from holdfast.policy.hang import HangLimits, HangState, Reading, Verdict, observe

LIMITS = HangLimits(factor=10, at_least_s=600, longest_look_s=60)


def seen(now_s: float, sign: int = 0, phase: Phase = Phase.TRAINING, *, reports: bool = True) -> Reading:
    return Reading(now_s=now_s, reports=reports, phase=phase, sign_of_life=sign)


def watch(
    readings: list[Reading], limits: HangLimits = LIMITS, state: HangState | None = None
) -> tuple[HangState, Verdict]:
    state = state or HangState()
    for reading in readings:
        state, verdict = observe(state, reading, limits)
    return state, verdict


def steps(count: int, every_s: float, start_s: float = 0.0) -> list[Reading]:
    return [seen(start_s + every_s * number, number) for number in range(count)]


def silence(after: Reading, length_s: float, every_s: float = 50.0) -> list[Reading]:
    counts = range(1, int(length_s / every_s) + 1)
    return [replace(after, now_s=after.now_s + every_s * count) for count in counts]


def test_the_limit_is_a_multiple_of_the_longest_silence_that_the_command_has_broken_itself() -> None:
    history = [*steps(50, 1.0), seen(170.0, 50), seen(171.0, 51)]
    # No reading of that silence was longer apart than a minute: 49 → 50 took 121 s, of which 60 count.
    _, verdict = watch([*history, *silence(history[-1], 550)])
    assert not verdict.hung
    _, verdict = watch([*history, *silence(history[-1], 600)])
    assert verdict.hung
    assert verdict.reason == "training, no step for 10 min; the limit is 10 min (the longest so far took 1 min)"

    slow = [
        reading for number in range(9) for reading in (seen(100.0 * number, number), seen(100.0 * number + 50, number))
    ]
    _, verdict = watch([*slow, *silence(slow[-1], 900)])
    assert (verdict.hung, verdict.left_s) == (False, 50)
    _, verdict = watch([*slow, *silence(slow[-1], 950)])
    assert verdict.hung


def test_the_first_step_may_compile_and_an_evaluation_has_its_own_measure() -> None:
    first = seen(0)
    assert not watch([first, *silence(first, 3550)])[1].hung
    assert watch([first, *silence(first, 3600)])[1].hung

    training = steps(10, 1.0)
    evaluation = seen(10, 9, Phase.EVALUATING)
    long_one = [*training, evaluation, *silence(evaluation, 5000)]
    state, verdict = watch(long_one)
    assert not verdict.hung
    after = seen(5020, 9)
    state, verdict = watch([after], state=state)
    assert state.longest_s[Phase.EVALUATING] == 5010
    state, verdict = watch(silence(replace(evaluation, now_s=5030), 20000), state=state)
    assert not verdict.hung, "evaluations of this command take long, as has been seen"
    # A training step after an evaluation may compile again.
    assert not watch([seen(30000, 9), *silence(seen(30000, 9), 3500)], state=state)[1].hung


def test_what_is_known_outlives_an_attempt_and_silence_does_not() -> None:
    state, verdict = watch([*steps(3, 1.0), *silence(seen(2, 2), 500)])
    assert not verdict.hung
    state = state.next_attempt()
    assert (state.silent_s, state.longest_s[Phase.TRAINING]) == (0, 1)


def test_a_hang_that_was_perhaps_none_is_given_twice_the_time_in_the_next_attempt() -> None:
    history = [*steps(9, 1.0), *silence(seen(8, 8), 600)]
    state, verdict = watch(history)
    assert verdict.hung
    state, verdict = watch([*steps(9, 1.0), *silence(seen(8, 8), 1150)], state=state.next_attempt())
    assert (verdict.hung, verdict.left_s) == (False, 50)
    declared = HangLimits(declared_s={Phase.TRAINING: 600})
    assert watch(history, declared, state.next_attempt())[1].hung, "what a person has declared holds"


def test_a_command_that_reports_nothing_is_never_hung_unless_a_limit_is_declared() -> None:
    quiet = seen(0, reports=False, phase=Phase.STARTING)
    _, verdict = watch([quiet, *silence(quiet, 1e6)])
    assert (verdict.hung, verdict.left_s) == (False, math.inf)
    declared = HangLimits(always_s=1800, declared_s={Phase.STARTING: 5})
    assert not watch([quiet, *silence(quiet, 1750)], declared)[1].hung
    _, verdict = watch([quiet, *silence(quiet, 1800)], declared)
    assert verdict.hung
    assert verdict.reason == "no output for 30 min; the limit is 30 min (declared)"


def test_a_declared_limit_goes_before_what_is_learned_in_both_directions() -> None:
    strict = HangLimits(declared_s={Phase.TRAINING: 30, Phase.FINISHED: 40})
    assert watch([*steps(9, 20.0), *silence(seen(160, 8), 30, every_s=10)], strict)[1].hung
    end = seen(0, phase=Phase.FINISHED)
    assert watch([end, *silence(end, 40, every_s=10)], strict)[1].hung
    assert not watch([end, *silence(end, 1e6)])[1].hung


limits_drawn = st.builds(
    HangLimits,
    factor=st.floats(1, 50),
    at_least_s=st.floats(0.1, 1e4),
    always_s=st.none() | st.floats(0.1, 1e4),
    declared_s=st.dictionaries(st.sampled_from(list(Phase)), st.floats(0.1, 1e4)),
    longest_look_s=st.floats(0.1, 100),
)
moves = st.tuples(st.floats(-10, 1e5), st.integers(0, 2), st.sampled_from(list(Phase)), st.booleans(), st.booleans())


@given(st.lists(moves, min_size=1, max_size=60), limits_drawn)
def test_silence_is_recounted_from_the_whole_history(
    history: list[tuple[float, int, Phase, bool, bool]], limits: HangLimits
) -> None:
    state, now_s, sign = HangState(), 0.0, 0
    readings: list[Reading] = []
    for passed_s, progress, phase, reports, paused in history:
        now_s, sign = now_s + passed_s, sign + progress
        readings.append(Reading(now_s=now_s, reports=reports, phase=phase, sign_of_life=sign, paused=paused))
        before = state
        state, verdict = observe(state, readings[-1], limits)

        changed = [
            number
            for number in range(1, len(readings))
            if (readings[number].sign_of_life, readings[number].phase)
            != (readings[number - 1].sign_of_life, readings[number - 1].phase)
        ]
        since = changed[-1] if changed else 0
        silent_s = sum(
            min(max(0.0, b.now_s - a.now_s), limits.longest_look_s)
            for a, b in zip(readings[since:], readings[since + 1 :], strict=False)
            if not a.paused and not b.paused
        )
        assert state.silent_s == pytest.approx(silent_s)
        assert verdict.hung == (verdict.left_s == 0)
        if verdict.hung:
            assert reports or limits.always_s is not None
            assert state.silent_s > 0
            assert not changed or changed[-1] != len(readings) - 1, "who has just moved does not hang"
        for kind, longest_s in before.longest_s.items():
            assert state.longest_s[kind] >= longest_s


@given(st.floats(0.01, 500), st.integers(3, 40), limits_drawn.filter(lambda drawn: drawn.always_s is None))
def test_a_steady_command_never_hangs_and_one_that_stops_always_does(
    every_s: float, count: int, drawn: HangLimits
) -> None:
    limits = replace(drawn, declared_s={}, longest_look_s=1000)
    state = HangState()
    for reading in steps(count, every_s):
        state, verdict = observe(state, reading, limits)
        assert not verdict.hung
    stopped = seen(every_s * (count - 1) + max(limits.at_least_s, limits.factor * every_s) * 1.01, count - 1)
    for reading in silence(seen(every_s * (count - 1), count - 1), stopped.now_s, every_s=900):
        state, verdict = observe(state, reading, limits)
    state, verdict = observe(state, replace(stopped, now_s=stopped.now_s + 1800), limits)
    assert verdict.hung


@pytest.mark.parametrize("fields", [{"factor": 0.5}, {"at_least_s": 0}, {"declared_s": {Phase.TRAINING: 0}}])
def test_limits_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        HangLimits(**fields)  # type: ignore[arg-type]
