"""The planner's figures: checked by hand where a hand can, by order where it cannot."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import HOUR_S, job, known, machine, play_one, steady

from holdfast.core.errors import UsageError
from holdfast.simulate.planner.assumed import assume
from holdfast.simulate.planner.breakeven import break_even
from holdfast.simulate.planner.case import Case
from holdfast.simulate.planner.figures import Figure, Origin
from holdfast.simulate.planner.markets import make_worlds, strata
from holdfast.simulate.planner.montecarlo import band_of
from holdfast.simulate.planner.pilot import lives_for, pilot_of, weibull_scatter
from holdfast.simulate.planner.plan import Sampling, make_plan
from holdfast.simulate.planner.sensitivity import sensitivity
from holdfast.simulate.planner.terms import terms_of

FOREVER_S = 50_000 * HOUR_S


def test_on_demand_costs_price_times_hours() -> None:
    case = job(6.0, known=known(changeover_s=0.0))
    terms, option = play_one(case, "on-demand")
    assert terms.job.work_s == 6 * 3600
    assert (option.cost_usd.mean, option.cost_usd.low, option.cost_usd.high) == (18.0, 18.0, 18.0)
    assert (option.finish_s.low, option.finish_s.high, option.preemptions) == (6 * HOUR_S, 6 * HOUR_S, 0)


def test_spot_that_stays_costs_price_times_hours_and_one_changeover() -> None:
    case = job(6.0, known=known(life_s=FOREVER_S, outage_s=1.0))
    _, option = play_one(case, "spot")
    # A market may begin with an outage; it is not paid for.
    assert option.cost_usd.high == pytest.approx(6 + 300 / 3600)
    assert option.preemptions == 0


def test_saves_and_machines_are_paid_for() -> None:
    case = job(6.0, machines=3, save_every="10 min", known=known(changeover_s=0.0, stall_s=6.0))
    terms, option = play_one(case, "on-demand")
    assert terms.job.work_s == 6 * 3600 * 1.01
    assert option.cost_usd.mean == pytest.approx(3 * 18 * 1.01)
    each = job(
        6.0,
        machines=3,
        tasks=True,
        task_s=60.0,
        saves=False,
        known=known(changeover_s=0.0, life_s=FOREVER_S, outage_s=1.0),
    )
    assert play_one(each, "spot")[1].cost_usd.mean == pytest.approx(3 * 6.0)


def test_what_a_preemption_takes_back() -> None:
    """By the mean of the interval and one upload; where it fits into a notice that is heard, by the upload alone."""
    case = job(6.0, save_every="10 min", known=known(checkpoint_bytes=60e9, bandwidth=1e9))
    hardware = case.hardware[0]
    for notice_s, heard in ((120.0, 1.0), (120.0, 0.5), (30.0, 1.0)):
        assumed = assume(case, hardware)
        assumed = replace(assumed, heard=assumed.heard.only(heard))
        terms = terms_of(case, hardware, (machine(notice_s=notice_s),), assumed)
        assert terms.notice is not None
        assert terms.notice.fits == (notice_s == 120.0)
        assert (terms.notice.probability >= 0.95) if terms.notice.fits else (terms.notice.probability == 0.0)
        saved = heard * terms.notice.probability
        assert terms.lost_mean_s == pytest.approx(61.0 + (1 - saved) * 300.0)
        assert terms.job.max_lost_s == math.ceil(2 * terms.lost_mean_s)


def test_without_checkpoints_all_is_lost_and_tasks_lose_a_task() -> None:
    case = job(6.0, saves=False)
    assert play_one(case, "on-demand")[0].job.max_lost_s == 6 * 3600
    case = job(6.0, saves=False, tasks=True, task_s=600.0)
    assert play_one(case, "on-demand")[0].job.max_lost_s == 600


def test_a_job_that_never_ends_does_not_look_cheap() -> None:
    case = job(6.0, saves=False, known=known(life_s=0.5 * HOUR_S))
    _, option = play_one(case, "spot")
    assert option.p_finished < 0.2
    assert option.cost_usd.low > 18.0
    _, gone = play_one(job(6.0, known=known(life_s=60.0, outage_s=1000 * HOUR_S)), "spot")
    assert gone.p_finished < 0.2
    assert gone.cost_usd.mean == pytest.approx(18.0, rel=0.1)


@pytest.mark.parametrize(
    ("spot", "changeover_s"),
    [
        pytest.param(1.0, 600.0, marks=pytest.mark.long),
        pytest.param(2.0, 300.0, marks=pytest.mark.long),
        (0.5, 1200.0),
    ],
)
def test_break_even_is_the_closed_form_where_all_lives_are_equal(spot: float, changeover_s: float) -> None:
    case = job(200.0, pools=(machine(spot=spot),), known=known(changeover_s=changeover_s))
    hardware = case.hardware[0]
    terms = terms_of(case, hardware, hardware.pools, steady(assume(case, hardware)))
    terms = replace(terms, job=replace(terms.job, max_lost_s=0))
    even = break_even(terms, hardware.pools, 50.0, samples=20, seed=1)
    k = 3.0 / spot
    assert even.closed_form_s == pytest.approx(k * changeover_s / (k - 1))
    assert even.life_s == pytest.approx(even.closed_form_s, rel=0.03)
    # Exponential lives: what comes of one is m·e^(-d/m), so they break even at d / ln k.
    memoryless = break_even(terms, hardware.pools, 1.0, samples=60, seed=1)
    assert memoryless.life_s == pytest.approx(changeover_s / math.log(k), rel=0.12)


def test_break_even_at_its_ends() -> None:
    case = job(20.0, pools=(machine(spot=3.0),))
    hardware = case.hardware[0]
    terms = terms_of(case, hardware, hardware.pools, assume(case, hardware))
    assert break_even(terms, hardware.pools, 1.0, samples=20, seed=1).life_s is None
    free = replace(terms, job=replace(terms.job, changeover_s=0, max_lost_s=0))
    assert break_even(free, (machine(spot=1.0),), 1.0, samples=20, seed=1).life_s == 0.0
    lost = break_even(
        replace(terms, job=replace(terms.job, max_lost_s=1200)), (machine(spot=1.0),), 1.0, samples=20, seed=1
    )
    none = break_even(
        replace(terms, job=replace(terms.job, max_lost_s=0)), (machine(spot=1.0),), 1.0, samples=20, seed=1
    )
    assert lost.life_s is not None
    assert none.life_s is not None
    assert lost.life_s > none.life_s


@settings(max_examples=12)
@given(st.floats(0.3, 20.0), st.floats(1.5, 6.0), st.integers(1, 5))
def test_more_preemptions_are_never_cheaper(life_h: float, factor: float, seed: int) -> None:
    """On the same luck, within the standard errors."""
    rare, often = (
        play_one(job(5.0, known=known(life_s=life * HOUR_S)), "spot", seed=seed)[1].cost_usd
        for life in (life_h * factor, life_h)
    )
    assert often.mean >= rare.mean - 2 * (often.error + rare.error)


@settings(max_examples=4)
@given(st.floats(1.1, 2.0), st.floats(1.1, 1.6), st.integers(1, 3))
def test_a_looser_deadline_is_never_dearer_for_ours(first: float, factor: float, seed: int) -> None:
    tight, loose = (
        play_one(job(5.0, deadline_s=5.0 * HOUR_S * share), "ours", seed=seed)[1] for share in (first, first * factor)
    )
    assert loose.cost_usd.mean <= tight.cost_usd.mean + 2 * (loose.cost_usd.error + tight.cost_usd.error)
    assert tight.p_deadline == loose.p_deadline == 1.0


@settings(max_examples=20)
@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(0, 1), st.floats(0, 1))
def test_a_figure_grows_with_its_share(one: float, two: float, three: float, share: float, other: float) -> None:
    low, likely, high = sorted((one, two, three))
    figure = Figure(likely, low, high, Origin.ASSUMED)
    assert figure.at(0.0) == low
    assert figure.at(0.5) == pytest.approx(likely)
    assert figure.at(1.0) == pytest.approx(high)
    less, more = sorted((share, other))
    assert low * (1 - 1e-9) <= figure.at(less) <= figure.at(more) * (1 + 1e-9) <= high * (1 + 1e-8)


def test_a_figure_outside_its_bounds_is_refused() -> None:
    with pytest.raises(UsageError, match="between its bounds"):
        Figure(1.0, 2.0, 3.0, Origin.ASSUMED)


def test_strata_cover_the_range() -> None:
    shares = strata(50, 7, 0)
    assert sorted((shares * 50).astype(int).tolist()) == list(range(50))
    assert not np.array_equal(shares, strata(50, 7, 1))


def test_markets_differ_as_much_as_assumed_and_luck_does_not_depend_on_the_figures() -> None:
    case = job(10.0)
    hardware = case.hardware[0]
    assumed = assume(replace(case, known=replace(case.known, life_s=None)), hardware)
    terms = terms_of(case, hardware, hardware.pools, assumed)
    worlds = make_worlds(terms, assumed, hardware.pools, 40, 3)
    again = make_worlds(terms, assumed, hardware.pools, 40, 3)
    assert np.array_equal(worlds.trace.capacity, again.trace.capacity)
    assert worlds.price.min() < 0.85 < 1.2 < worlds.price.max() <= 1.5
    share_up = worlds.trace.available()[0].reshape(40, -1).mean(axis=1)[worlds.likeness]
    assert share_up[20:].mean() > share_up[:20].mean()
    # Never above on-demand, and a floor's part never moves.
    dear = make_worlds(terms, assumed, (machine(spot=2.5),), 40, 3)
    assert dear.price.max() == pytest.approx(3.0 / 2.5)
    half = replace(terms, machines=2, floor=1)
    assert make_worlds(half, assumed, hardware.pools, 40, 3).price.max() < worlds.price.max()


def test_bands() -> None:
    band = band_of(np.array([*range(1, 100), math.inf], dtype=np.float64))
    assert (band.low, band.middle, band.high, band.mean) == (5.0, 50.0, 95.0, math.inf)
    assert list(band.curve) == sorted(band.curve)


def test_the_same_seed_makes_the_same_plan() -> None:
    case = job(3.0, known=replace(known(), life_s=None))
    one, two, other = (make_plan(case, Sampling(20, seed)) for seed in (4, 4, 5))
    assert one == two
    assert one.options != other.options


def test_levers_move_what_they_should() -> None:
    told: list[int] = []
    case = job(4.0, known=known(checkpoint_bytes=1e9), deadline_s=6 * HOUR_S)
    case = replace(case, known=replace(case.known, life_s=None, bandwidth=None, stall_s=None))
    base, levers = sensitivity(
        case, case.hardware[0], case.hardware[0].pools, "spot", samples=30, seed=1, tell=lambda: told.append(1)
    )
    by_name = {lever.name: lever for lever in levers}
    assert base > 0
    assert by_name["spot_price"].low.cost_usd == pytest.approx(base * 0.7, rel=0.2)
    assert by_name["work"].low.cost_usd < base < by_name["work"].high.cost_usd
    assert by_name["life_s"].low.cost_usd > by_name["life_s"].high.cost_usd
    assert "step_s" not in by_name
    assert [lever.swing_usd for lever in levers] == sorted((lever.swing_usd for lever in levers), reverse=True)
    assert len(told) % 2 == 0


def test_pilots_are_counted() -> None:
    assert lives_for(0.5, 1.0) == 11
    assert weibull_scatter(1.0) == pytest.approx(1.0)
    assert weibull_scatter(0.6) == pytest.approx(1.76, abs=0.01)
    case = job(20.0)
    hardware = case.hardware[0]
    assumed = assume(case, hardware)
    terms = terms_of(case, hardware, hardware.pools, assumed)
    even = break_even(terms, hardware.pools, 0.6, samples=20, seed=1)
    pilot = pilot_of(terms, assumed, hardware.pools[0], even)
    assert even.life_s is not None
    assert pilot.first_s >= 2.99 * even.life_s
    assert pilot.hazard_s == 34 * 4 * HOUR_S
    assert pilot.hazard_usd == pytest.approx(34 * 4 * 1.0)


def test_a_plan_refuses_what_it_cannot_play() -> None:
    with pytest.raises(UsageError, match="one minute to 90 days"):
        job(1e-3)
    with pytest.raises(UsageError, match="1 to 4096 machines"):
        job(1.0, machines=2, floor=3)
    with pytest.raises(UsageError, match="20 to 5,000 samples"):
        Sampling(3)
    with pytest.raises(UsageError, match="more than the ceiling"):
        make_plan(job(1.0, ceiling_usd_h=0.5), Sampling(20))
    with pytest.raises(UsageError, match="no hardware"):
        Case(name="x", hardware=())
