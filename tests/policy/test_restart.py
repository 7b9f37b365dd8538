"""Start again or stop: what endings mean, and histories of random endings checked against a recount from scratch."""

from __future__ import annotations

import math
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.contract import (
    EXIT_FENCED,
    EXIT_INFRASTRUCTURE,
    EXIT_LIMIT,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
)
from holdfast.core.errors import UsageError
from holdfast.policy.restart import (
    AttemptEnded,
    Ending,
    Restart,
    RestartLimits,
    RestartState,
    Stop,
    classify,
    decide,
    describe_exit,
    exit_code_of,
)


def ended(exit_code: int, progress: bool | None = None, *, lasted_s: float = 1.0, **evidence: object) -> AttemptEnded:
    return AttemptEnded(exit_code=exit_code, progress_made=progress, lasted_s=lasted_s, **evidence)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exit_code", "evidence", "ending"),
    [
        (0, {}, Ending.DONE),
        (0, {"stop_asked": True}, Ending.DONE),
        (75, {}, Ending.PREEMPTED),
        (75, {"stop_asked": True}, Ending.ASKED),
        (76, {}, Ending.FENCED),
        (76, {"stop_asked": True}, Ending.FENCED),
        (77, {}, Ending.NO_PROGRESS),
        (2, {}, Ending.USAGE),
        (130, {}, Ending.INTERRUPTED),
        (-signal.SIGINT, {}, Ending.INTERRUPTED),
        (-signal.SIGINT, {"stop_asked": True}, Ending.ASKED),
        (-signal.SIGTERM, {}, Ending.PREEMPTED),
        (143, {}, Ending.PREEMPTED),
        (143, {"stop_asked": True}, Ending.ASKED),
        (-signal.SIGKILL, {}, Ending.PREEMPTED),
        (-signal.SIGKILL, {"oom_killed": False}, Ending.PREEMPTED),
        (-signal.SIGKILL, {"oom_killed": True}, Ending.ERROR),
        (137, {"oom_killed": True}, Ending.ERROR),
        (137, {}, Ending.PREEMPTED),
        (1, {}, Ending.ERROR),
        (1, {"oom_killed": True}, Ending.ERROR),
        (-signal.SIGSEGV, {}, Ending.ERROR),
        (1, {"stop_asked": True}, Ending.ASKED),
        (69, {}, Ending.INFRASTRUCTURE),
        (1, {"infrastructure": "Xid 79"}, Ending.INFRASTRUCTURE),
        (75, {"infrastructure": "Xid 79", "hang": "no step"}, Ending.INFRASTRUCTURE),
        (0, {"infrastructure": "Xid 79"}, Ending.DONE),
        (76, {"infrastructure": "Xid 79"}, Ending.FENCED),
        (1, {"infrastructure": "Xid 79", "stop_asked": True}, Ending.ASKED),
        (69, {"infrastructure": "no GPU", "started": False}, Ending.INFRASTRUCTURE),
        (75, {"hang": "no step"}, Ending.ERROR),
        (-signal.SIGKILL, {"hang": "no step"}, Ending.ERROR),
        (0, {"hang": "no step"}, Ending.DONE),
        (75, {"limit": "time", "stop_asked": True}, Ending.LIMIT),
        (0, {"limit": "time", "stop_asked": True}, Ending.DONE),
    ],
)
def test_what_an_ending_means(exit_code: int, evidence: dict[str, object], ending: Ending) -> None:
    assert classify(AttemptEnded(exit_code=exit_code, progress_made=None, lasted_s=1, **evidence)) is ending  # type: ignore[arg-type]


def test_endings_in_words_and_in_a_shells_numbers() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(143) == "exit code 143 (as after SIGTERM)"
    assert describe_exit(-99) == "killed by signal 99"
    assert [exit_code_of(code) for code in (0, 75, -9, -2)] == [0, 75, 137, 130]


def run(limits: RestartLimits, *attempts: AttemptEnded, jitter: float = 0.0) -> list[Restart | Stop]:
    state, decisions = RestartState(), []
    for attempt in attempts:
        state, decision = decide(state, attempt, limits, jitter)
        decisions.append(decision)
        if isinstance(decision, Stop):
            break
    return decisions


@pytest.mark.parametrize("exit_code", [1, -signal.SIGKILL, EXIT_PREEMPTED])
def test_two_attempts_in_a_row_without_progress_stop_the_run_whatever_ended_them(exit_code: int) -> None:
    stuck = ended(exit_code, False)
    decisions = run(RestartLimits(), stuck, ended(exit_code, True), stuck, stuck, stuck)
    assert [type(decision) for decision in decisions] == [Restart, Restart, Restart, Stop]
    assert isinstance(decisions[-1], Stop)
    assert decisions[-1].exit_code == EXIT_NO_PROGRESS
    assert decisions[-1].reasons[-1] == "2 attempts in a row committed no new checkpoint"
    assert len(run(RestartLimits(no_progress_limit=3), *[stuck] * 9)) == 3
    switched_off = run(RestartLimits(no_progress_limit=0, max_errors=5, max_preemptions=5), *[stuck] * 9)
    assert len(switched_off) == 6


def test_an_attempt_that_dies_before_it_opens_the_page_made_no_progress_if_others_did_open_it() -> None:
    limits = RestartLimits()
    decisions = run(limits, ended(1, True), ended(1, None), ended(1, None))
    assert isinstance(decisions[-1], Stop)
    assert decisions[-1].exit_code == EXIT_NO_PROGRESS
    unknown = run(limits, *[ended(1, None)] * 9)
    assert len(unknown) == limits.max_errors + 1
    assert isinstance(unknown[-1], Stop)
    assert unknown[-1].exit_code == 1, "a command that knows no progress page ends by the budget of errors"


def test_delays_double_up_to_the_cap_and_start_again_after_progress_or_a_long_life() -> None:
    limits = RestartLimits(max_errors=99, max_errors_total=99, first_delay_s=1, max_delay_s=5)

    def delays(*attempts: AttemptEnded, jitter: float) -> list[float]:
        return [d.after_s for d in run(limits, *attempts, jitter=jitter) if isinstance(d, Restart)]

    error, killed = ended(1), ended(-9)
    assert delays(*[error] * 5, jitter=0.0) == [0.5, 1, 2, 2.5, 2.5]
    assert delays(*[error] * 5, jitter=math.nextafter(1, 0)) == pytest.approx([1, 2, 4, 5, 5])
    assert delays(error, error, ended(1, lasted_s=600), error, jitter=0.0) == [0.5, 1, 0.5, 1]
    assert delays(*[ended(1, True)] * 4, jitter=0.0) == [0.5] * 4
    assert delays(*[ended(75, True)] * 4, jitter=0.0) == [0] * 4, "a preemption is answered at once"
    assert delays(killed, killed, killed, jitter=0.0) == [0, 0.5, 1], "but not one that strikes again and again at once"


def test_delays_stay_finite_after_very_many_failures() -> None:
    limits = RestartLimits(no_progress_limit=0)
    _, decision = decide(RestartState(short_in_a_row=10**6), ended(-9), limits, 0.5)
    assert isinstance(decision, Restart)
    assert decision.after_s == pytest.approx(0.75 * limits.max_delay_s)


attempts = st.builds(
    AttemptEnded,
    exit_code=st.sampled_from([1, 75, -9, -15, -11, 143, 0, EXIT_FENCED, 2, 130]),
    progress_made=st.sampled_from([True, False, None]),
    lasted_s=st.floats(0, 1e5),
    stop_asked=st.sampled_from([False, False, False, False, True]),
    oom_killed=st.sampled_from([None, False, True]),
    hang=st.sampled_from([None, None, "no step"]),
    infrastructure=st.sampled_from([None, None, None, "Xid 79"]),
)
limits_drawn = st.builds(
    RestartLimits,
    max_errors=st.integers(0, 4),
    max_errors_total=st.integers(0, 8),
    max_preemptions=st.none() | st.integers(0, 4),
    max_infrastructure=st.integers(0, 3),
    no_progress_limit=st.integers(0, 3),
)


def recount(history: list[AttemptEnded], limits: RestartLimits) -> int | None:
    """The exit code with which the last attempt ends the run, or None: from the whole history, without a state."""
    last = exit_code_of(history[-1].exit_code)
    endings = [classify(attempt) for attempt in history]
    if endings[-1] not in (Ending.ERROR, Ending.PREEMPTED, Ending.INFRASTRUCTURE):
        return last
    known = [attempt.progress_made is not None for attempt in history]
    first_known = known.index(True) if any(known) else len(history)
    made = [
        a.progress_made if k or i < first_known else False for i, (a, k) in enumerate(zip(history, known, strict=True))
    ]
    # A machine that failed says nothing about progress, unless there was some.
    telling = [m for m, e in zip(made, endings, strict=True) if e is not Ending.INFRASTRUCTURE or m]
    stuck = next((i for i, progress in enumerate(reversed(telling)) if progress is not False), len(telling))
    if limits.no_progress_limit and stuck >= limits.no_progress_limit:
        return EXIT_NO_PROGRESS
    since = max((i for i, progress in enumerate(made) if progress), default=0)
    if endings[-1] is Ending.INFRASTRUCTURE:
        return EXIT_INFRASTRUCTURE if endings[since:].count(endings[-1]) > limits.max_infrastructure else None
    if endings[-1] is Ending.PREEMPTED:
        many = limits.max_preemptions is not None and endings.count(Ending.PREEMPTED) > limits.max_preemptions
        return last if many else None
    in_a_row = endings[since:].count(Ending.ERROR)
    return last if in_a_row > limits.max_errors or endings.count(Ending.ERROR) > limits.max_errors_total else None


def test_a_failing_machine_has_a_budget_of_its_own_and_says_nothing_about_the_command() -> None:
    limits = RestartLimits(max_errors=0, max_infrastructure=2)
    broken = ended(1, False, infrastructure="Xid 79")
    decisions = run(limits, *[broken] * 5)
    assert [type(decision) for decision in decisions] == [Restart, Restart, Stop]
    assert isinstance(decisions[-1], Stop)
    assert decisions[-1].exit_code == EXIT_INFRASTRUCTURE, "nobody shall look for a mistake in the command"
    refilled = run(limits, broken, broken, ended(1, True, infrastructure="Xid 79"), broken, broken)
    assert [type(decision) for decision in refilled] == [Restart] * 4 + [Stop]


def test_a_machine_that_is_not_fit_is_not_tried_again() -> None:
    (decision,) = run(RestartLimits(), ended(EXIT_INFRASTRUCTURE, infrastructure="no usable GPU", started=False))
    assert decision == Stop(EXIT_INFRASTRUCTURE, ("the machine has failed: no usable GPU",))


@pytest.mark.parametrize(("exit_code", "left_with"), [(75, EXIT_LIMIT), (-15, EXIT_LIMIT), (137, EXIT_LIMIT), (1, 1)])
def test_a_used_up_limit_never_asks_for_another_start(exit_code: int, left_with: int) -> None:
    (decision,) = run(RestartLimits(), ended(exit_code, True, limit="$5 are spent", stop_asked=True))
    assert decision == Stop(left_with, ("$5 are spent",))


@given(st.lists(attempts, min_size=1, max_size=30), limits_drawn, st.floats(0, 1, exclude_max=True))
def test_the_state_machine_agrees_with_a_recount_of_the_whole_history(
    history: list[AttemptEnded], limits: RestartLimits, jitter: float
) -> None:
    state = RestartState()
    for count in range(1, len(history) + 1):
        state, decision = decide(state, history[count - 1], limits, jitter)
        expected = recount(history[:count], limits)
        assert decision.reasons
        if expected is None:
            assert isinstance(decision, Restart)
            assert 0 <= decision.after_s <= limits.max_delay_s
        else:
            assert isinstance(decision, Stop)
            assert decision.exit_code == expected
            break


@pytest.mark.parametrize(
    "fields",
    [
        {"max_errors": -1},
        {"max_preemptions": -1},
        {"max_infrastructure": -1},
        {"first_delay_s": 9, "max_delay_s": 1},
        {"first_delay_s": -1},
    ],
)
def test_limits_that_make_no_sense_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        RestartLimits(**fields)
