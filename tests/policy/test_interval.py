"""When to save: the formulas against published figures and against what they claim to minimise, the words, the
bounds."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.policy.interval import (
    Auto,
    AutoContext,
    EveryDuration,
    EveryEpoch,
    EverySteps,
    LoopState,
    LostShare,
    LostTime,
    PreemptionRate,
    auto_interval,
    daly_s,
    due,
    exact_s,
    hazard_s,
    lambert_w0,
    max_lost_work_s,
    parse_max_lost_work,
    parse_save_every,
    with_notice_s,
    young_s,
)

costs_s = st.floats(1e-3, 1e4)
mtbfs_s = st.floats(30, 1e7)


def expected_overhead(work_s: float, cost_s: float, mtbf_s: float) -> float:
    """Expected wall time per second of work under exponential lifetimes; the restart time only scales it."""
    return math.expm1((work_s + cost_s) / mtbf_s) * mtbf_s / work_s


@pytest.mark.parametrize(("mtbf_h", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_published_optima_for_saves_of_five_minutes(mtbf_h: float, minutes: float) -> None:
    assert exact_s(300, mtbf_h * 3600) / 60 == pytest.approx(minutes, rel=0.01)
    assert daly_s(300, mtbf_h * 3600) / 60 == pytest.approx(minutes, rel=0.01)


@given(costs_s, mtbfs_s, st.floats(0.01, 0.99))
def test_the_exact_interval_minimises_the_expected_time(cost_s: float, mtbf_s: float, away: float) -> None:
    assume(cost_s < 100 * mtbf_s)
    best_s = exact_s(cost_s, mtbf_s)
    least = expected_overhead(best_s, cost_s, mtbf_s)
    for other_s in (best_s * away, best_s / away):
        assume(other_s < 100 * mtbf_s)
        assert expected_overhead(other_s, cost_s, mtbf_s) >= least * (1 - 1e-9)


@given(costs_s, mtbfs_s, st.floats(1, 100))
@example(1.0, 1e6 - 1, 1.1)  # across the change from the series to Lambert's W
def test_the_exact_interval_grows_with_cost_and_with_time_between_preemptions(
    cost_s: float, mtbf_s: float, factor: float
) -> None:
    interval_s = exact_s(cost_s, mtbf_s) * (1 - 1e-7)
    assert exact_s(cost_s * factor, mtbf_s) >= interval_s
    assert exact_s(cost_s, mtbf_s * factor) >= interval_s


@given(costs_s, mtbfs_s)
def test_the_exact_interval_lies_below_youngs_and_below_the_time_between_preemptions(
    cost_s: float, mtbf_s: float
) -> None:
    exact = exact_s(cost_s, mtbf_s)
    assert 0 < exact <= min(mtbf_s, young_s(cost_s, mtbf_s)) * (1 + 1e-9)
    if cost_s < mtbf_s / 2:
        assert daly_s(cost_s, mtbf_s) == pytest.approx(exact, rel=0.01)


def test_limits() -> None:
    assert exact_s(1e-9, 1e6) == pytest.approx(young_s(1e-9, 1e6), rel=1e-6)
    assert exact_s(1e9, 10) == daly_s(1e9, 10) == 10
    assert exact_s(0, 3600) == young_s(0, 3600) == daly_s(0, 3600) == young_s(0, math.inf) == 0
    assert exact_s(5, math.inf) == young_s(5, math.inf) == math.inf


@given(st.floats(-1 / math.e, 1e300))
@example(-1 / math.e)
@example(math.nextafter(-1 / math.e, 0))
@example(0.0)
@example(-5e-324)
@example(-0.25)
@example(math.e)
def test_lambert_w0_solves_its_definition(x: float) -> None:
    w = lambert_w0(x)
    assert w >= -1
    assert w * math.exp(w) == pytest.approx(x, rel=1e-12, abs=1e-15)


@given(st.floats(-1, 600))
def test_lambert_w0_is_the_inverse(w: float) -> None:
    # The inverse is infinitely steep at the branch point w = -1: half of the digits are lost there, by nature.
    assert lambert_w0(max(w * math.exp(w), -1 / math.e)) == pytest.approx(w, rel=1e-9, abs=1e-7)


@given(costs_s, mtbfs_s, st.floats(0, 0.99))
def test_notice_and_hazard_forms_agree_with_youngs(cost_s: float, mtbf_s: float, share: float) -> None:
    assert hazard_s(cost_s, 1 / mtbf_s) == pytest.approx(young_s(cost_s, mtbf_s))
    expected = young_s(cost_s, mtbf_s) / math.sqrt(1 - share)
    assert with_notice_s(cost_s, mtbf_s, share) == pytest.approx(expected)
    assert with_notice_s(cost_s, mtbf_s, 1) == hazard_s(cost_s, 0) == math.inf


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(-1, 10), (math.nan, 10), (math.inf, 10), (1, 0), (1, math.nan)])
def test_figures_outside_the_domain_are_refused(cost_s: float, mtbf_s: float) -> None:
    for formula in (young_s, daly_s, exact_s):
        with pytest.raises(UsageError):
            formula(cost_s, mtbf_s)
    with pytest.raises(UsageError):
        lambert_w0(-0.4)
    with pytest.raises(UsageError):
        hazard_s(1, -1)
    with pytest.raises(UsageError):
        with_notice_s(1, 10, 1.1)


# What users write.


@pytest.mark.parametrize(
    ("spec", "triggers"),
    [
        ("500 steps", (EverySteps(500),)),
        ("1 step", (EverySteps(1),)),
        ("Every 500 Steps", (EverySteps(500),)),
        (500, (EverySteps(500),)),
        ("10 min", (EveryDuration(600),)),
        (timedelta(hours=1), (EveryDuration(3600),)),
        ("epoch", (EveryEpoch(),)),
        ("auto", (Auto(),)),
        (["epoch", "10 min", "600 s"], (EveryEpoch(), EveryDuration(600))),
        (("auto", 500, EveryEpoch()), (Auto(), EverySteps(500), EveryEpoch())),
    ],
)
def test_save_every_in_the_words_of_users(spec: object, triggers: tuple[object, ...]) -> None:
    assert parse_save_every(spec) == triggers  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    ["", "500", "0 steps", 0, -5, True, 1.5, None, [], [["epoch"]], "2 epochs", "0 s", "often", "-3 steps", "10 min!"],
)
def test_save_every_that_makes_no_sense_shows_the_forms(spec: object) -> None:
    with pytest.raises(UsageError, match=r'"500 steps".*"10 min".*"epoch".*"auto"'):
        parse_save_every(spec)  # type: ignore[arg-type]


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=100))
def test_saves_by_steps_stand_on_the_same_multiples_wherever_other_saves_fall(
    count: int, strides: list[tuple[int, bool]]
) -> None:
    """Strides of several steps, and saves in between for other reasons: each multiple is followed by a save at once."""
    triggers = (EverySteps(count),)
    step = saved_at = 0
    for stride, saved_for_another_reason in strides:
        crossed = (step + stride) // count > step // count
        step += stride
        reason = due(triggers, LoopState(step, step - saved_at, 0.0), math.inf)
        assert (reason == f"every {count} steps") == crossed
        if reason or saved_for_another_reason:
            saved_at = step


def test_the_first_trigger_that_is_due_gives_the_reason() -> None:
    triggers = parse_save_every(["epoch", "10 min", "auto"])
    assert due(triggers, LoopState(7, 7, 599.0), interval_s=700) is None
    assert due(triggers, LoopState(7, 7, 600.0), interval_s=700) == "every 10 min"
    assert due(triggers, LoopState(7, 7, 300.0), interval_s=300) == "automatic interval"
    assert due(triggers, LoopState(7, 7, 600.0, epoch_ended=True), interval_s=1) == "end of epoch"
    assert due(triggers, LoopState(7, 0, 9e9, epoch_ended=True), interval_s=1) is None, "nothing new to save"


def test_max_lost_work_as_time_or_share() -> None:
    assert parse_max_lost_work("10 min") == parse_max_lost_work(600) == LostTime(600)
    assert parse_max_lost_work("2 %") == parse_max_lost_work("2%") == LostShare(0.02)
    assert max_lost_work_s(LostShare(0.02), expected_runtime_s=36000) == 720
    assert max_lost_work_s(LostShare(0.02), expected_runtime_s=None) == 600
    assert max_lost_work_s(LostTime(42), expected_runtime_s=36000) == 42
    for nonsense in ("0 s", "0 %", "101 %", "-2 %", "", "2 percent", None, 0):
        with pytest.raises(UsageError, match='"2 %"'):
            parse_max_lost_work(nonsense)  # type: ignore[arg-type]


# The rate and the automatic interval.


def test_the_rate_starts_at_the_prior_and_ends_at_what_was_seen() -> None:
    assert PreemptionRate().mean_between_s == pytest.approx(7200)
    calm = PreemptionRate().observed(0, 86400)
    assert calm.mean_between_s == pytest.approx(7200 + 86400)
    assert calm.observed(1000, 1000 * 1800 - 86400).mean_between_s == pytest.approx(1800, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1e6))))
def test_observations_add_up_in_any_order(seen: list[tuple[int, float]]) -> None:
    one = other = PreemptionRate()
    for preemptions, exposure_s in seen:
        one = one.observed(preemptions, exposure_s)
    for preemptions, exposure_s in reversed(seen):
        other = other.observed(preemptions, exposure_s)
    assert one.mean_per_s == pytest.approx(other.mean_per_s)
    assert one.observed(1, 0).mean_per_s > one.mean_per_s > one.observed(0, 60).mean_per_s


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1e6), st.floats(0.1, 9), st.floats(0, 1))
def test_noticed_preemptions_leave_the_rate_of_the_others(
    noticed: int, others: int, exposure_s: float, events: float, share: float
) -> None:
    """As if two independent processes were observed: the prior's events and its exposure are shared out between them."""
    prior = PreemptionRate(prior_events=events, prior_noticed=events * share)
    rate = prior.observed(noticed, exposure_s / 2, noticed).observed(others, exposure_s / 2)
    assert 0 <= rate.notice_share <= 1
    expected = (events * (1 - share) + others) / (events * 7200 + exposure_s)
    assert rate.mean_per_s * (1 - rate.notice_share) == pytest.approx(expected, abs=1e-12)


def test_rates_that_make_no_sense_are_refused() -> None:
    for nonsense in (
        {"preemptions": 1, "noticed": 2},
        {"noticed": -1},
        {"prior_noticed": 1.5},
        {"exposure_s": math.inf},
    ):
        with pytest.raises(UsageError):
            PreemptionRate(**nonsense)
    with pytest.raises(UsageError):
        PreemptionRate().observed(0, 0, 1)


contexts = st.builds(
    AutoContext,
    save_cost_s=st.floats(0, 1e4),
    commit_s=st.floats(0, 1e4),
    rate=st.builds(PreemptionRate, st.integers(0, 1000), st.floats(0, 1e7)),
    notice_share=st.floats(0, 1),
    max_lost_work_s=st.none() | st.floats(0.1, 1e5),
    min_interval_s=st.floats(0, 600),
    max_save_share=st.floats(0.01, 1),
)


@given(contexts)
def test_the_automatic_interval_keeps_its_bounds_in_their_order(context: AutoContext) -> None:
    decision = auto_interval(context)
    interval_s = decision.interval_s
    assert interval_s > 0 or context.save_cost_s == context.min_interval_s == context.commit_s == 0
    assert math.isfinite(interval_s)
    assert interval_s >= context.commit_s
    worst_loss_s = interval_s + context.commit_s
    # Nobody has set a bound: the default, or as much as makes saves take 1 % of the time.
    unasked_s = max(600, 99 * context.save_cost_s + context.commit_s)
    bound_s = unasked_s if context.max_lost_work_s is None else context.max_lost_work_s
    kept = worst_loss_s <= bound_s * (1 + 1e-9)
    assert kept or interval_s == context.commit_s
    assert kept != any("cannot be kept" in reason for reason in decision.reasons)
    save_share = context.save_cost_s / (interval_s + context.save_cost_s) if interval_s else 0
    loss_bound = any("loses at most" in reason for reason in decision.reasons)
    assert save_share <= context.max_save_share * (1 + 1e-9) or loss_bound
    assert interval_s >= context.min_interval_s or loss_bound


def test_the_automatic_interval_in_a_quiet_case_is_the_optimum() -> None:
    decision = auto_interval(AutoContext(save_cost_s=2, commit_s=5))
    assert decision.interval_s == exact_s(2, 7200)
    assert decision.reasons == ("a save costs 2 s, a preemption comes about every 2 h: best every 2 min 48 s",)
    noticed = auto_interval(AutoContext(save_cost_s=2, commit_s=5, notice_share=0.75))
    assert noticed.interval_s == exact_s(2, 4 * 7200)
    always_noticed = auto_interval(AutoContext(save_cost_s=2, commit_s=5, notice_share=1))
    assert always_noticed.interval_s == 600 - 5


def test_a_bound_that_nobody_asked_for_gives_way_where_it_would_be_dear() -> None:
    """Saves of two minutes on machines that live for ten hours: every ten minutes they would take a sixth of the time."""
    rate = PreemptionRate(prior_mean_s=36000)
    assert auto_interval(AutoContext(save_cost_s=120, rate=rate)).interval_s == exact_s(120, 36000)
    asked = auto_interval(AutoContext(save_cost_s=120, rate=rate, max_lost_work_s=600))
    assert asked.interval_s == 600
    assert "loses at most 10 min" in asked.reasons[-1]
    # Where saves are cheap it stands.
    assert auto_interval(AutoContext(save_cost_s=1, rate=PreemptionRate(prior_mean_s=1e7))).interval_s == 600
    # Where machines live for a few saves only, the optimum stands, too.
    assert auto_interval(AutoContext(save_cost_s=30, rate=PreemptionRate(prior_mean_s=300))).interval_s == exact_s(
        30, 300
    )


@pytest.mark.parametrize(
    "fields",
    [{"save_cost_s": -1}, {"notice_share": 2}, {"max_lost_work_s": 0}, {"commit_s": math.inf}, {"max_save_share": 0}],
)
def test_a_context_that_makes_no_sense_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        AutoContext(**{"save_cost_s": 1, **fields})  # type: ignore[arg-type]
