"""The offline optimum: against an exhaustive search, by hand, and as a bound that no policy passes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_market import World, cheapest
from worlds import Erratic, job_of, trace_of, worlds

from holdfast.core.errors import UsageError
from holdfast.policy import optimum
from holdfast.policy.market.facts import Job
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.optimum import Optimum, offline_optimum
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.workload import Workload

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
MINUTE, HOUR = 60, 3600


def least(world: World, start: int = 0) -> Optimum:
    trace = trace_of(world)
    return offline_optimum(
        job_of(world),
        world.tick_s,
        trace.available(world.gang),
        trace.microusd_h * world.gang,
        world.on_demand * world.gang,
        start,
        world.moves,
    )


@settings(max_examples=120 if LONG else 60)
@given(worlds(windows=1, plain=True))
def test_nothing_that_could_be_done_costs_less_and_something_costs_as_much(world: World) -> None:
    best = cheapest(world)
    assert least(world) == Optimum(None if best is None else round(best), exact=True)


@settings(max_examples=200 if LONG else 80)
@given(worlds(), st.sampled_from(sorted(POLICIES)) | st.integers(0, 9999))
def test_no_policy_beats_it(world: World, which: str | int) -> None:
    policy = POLICIES[which] if isinstance(which, str) else Erratic(which)
    starts = trace_of(world).starts(world.deadline_s, world.tick_s)
    workload = Workload(job=job_of(world), gang=world.gang, asks=world.asks, move_microusd=world.moves)
    outcomes = simulate(trace_of(world), policy, workload, starts)
    for window, start in enumerate(starts.tolist()):
        if not outcomes.missed[window]:
            best = least(world, start)
            assert best.exact
            assert best.microusd is not None
            assert best.microusd <= int(outcomes.microusd[window])


@settings(max_examples=100)
@given(worlds(windows=1, plain=True), st.integers(1, 20))
def test_on_a_grid_that_is_too_coarse_it_is_still_a_bound(world: World, cells: int) -> None:
    before = optimum.MOST_CELLS
    optimum.MOST_CELLS = cells
    try:
        coarse = least(world)
    finally:
        optimum.MOST_CELLS = before
    fine = least(world)
    if fine.microusd is not None:
        assert coarse.microusd is not None
        assert coarse.microusd <= fine.microusd
        assert not coarse.exact or coarse == fine


def hours(spot: str, *, work: float, deadline: float, changeover: float, price: int = 1_000_000) -> float | None:
    """Dollars, at $3 on-demand, for spot capacity that is there in ticks of six minutes marked 1."""
    there = np.array([[mark == "1" for mark in spot]])
    job = Job(work_s=round(work * HOUR), deadline_s=round(deadline * HOUR), changeover_s=round(changeover * HOUR))
    best = offline_optimum(job, 6 * MINUTE, there, np.full(there.shape, price), 3_000_000)
    return None if best.microusd is None else best.microusd / 1e6


def test_by_hand() -> None:
    assert hours("1" * 50, work=4, deadline=5, changeover=0.5) == 4.5
    assert hours("0" * 50, work=4, deadline=5, changeover=0.5) == 13.5
    assert hours("0" * 50, work=4, deadline=4.4, changeover=0.5) is None
    assert hours("1" * 44, work=4, deadline=4.4, changeover=0.4) == 4.4
    # It waits for the second stretch, which alone is enough: one changeover.
    assert hours("1" * 5 + "0" * 5 + "1" * 15, work=1, deadline=2.5, changeover=0.5) == 1.5
    # 0.7 h of spot would save 0.2 h of on-demand: not worth it.
    assert hours("1" * 7 + "0" * 43, work=4, deadline=5, changeover=0.5) == 13.5
    # 2 h of spot in the middle: with 1.5 h of slack there are three changeovers of half an hour, on-demand, spot, on-demand.
    assert hours("0" * 20 + "1" * 20 + "0" * 15, work=4, deadline=5.5, changeover=0.5) == 3 * (2 + 1.5) + 2


@pytest.mark.parametrize(("ticks", "worth_it"), [(6, False), (7, False), (8, True), (9, True)])
def test_from_nothing_spot_is_worth_it_when_it_lasts_longer_than_kd_over_k_minus_1(ticks: int, worth_it: bool) -> None:
    """d = 0.5 h and k = 3: 0.75 h. On-demand does the rest in either case."""
    assert (hours("1" * ticks + "0" * 52, work=4, deadline=5.5, changeover=0.5) or 0) == pytest.approx(
        13.5 - (3 * (ticks / 10 - 0.5) - ticks / 10 if worth_it else 0)
    )


@pytest.mark.parametrize(("ticks", "worth_it"), [(14, False), (15, False), (16, True), (17, True)])
def test_from_on_demand_it_must_last_twice_as_long(ticks: int, worth_it: bool) -> None:
    """1.5 h: the changeover back is paid too. Spot comes in the middle, and there is no slack to wait for it."""
    spot = "0" * 10 + "1" * ticks + "0" * 40
    gain = 3 * (ticks / 10 - 0.5) - ticks / 10 - 1.5
    assert hours(spot, work=4, deadline=5.5, changeover=0.5) == pytest.approx(13.5 - (gain if worth_it else 0))


def test_of_several_pools_it_takes_the_cheapest_way() -> None:
    """Moving to the cheaper pool costs half an hour there, and saves two."""
    there = np.array([[True] * 60, [False] * 10 + [True] * 50])
    prices = np.array([[2_000_000] * 60, [1_000_000] * 60])
    job = Job(work_s=4 * HOUR, deadline_s=6 * HOUR, changeover_s=HOUR // 2)
    assert offline_optimum(job, 6 * MINUTE, there, prices, 3_000_000).microusd == 4_500_000
    tight = Job(work_s=4 * HOUR, deadline_s=5 * HOUR, changeover_s=HOUR // 2)
    # One hour in the dear pool (half of it starts it), then the cheap one: 2 + 0.5 + 3.5.
    assert offline_optimum(tight, 6 * MINUTE, there, prices, 3_000_000).microusd == 6_000_000
    with pytest.raises(UsageError, match="has fewer"):
        offline_optimum(tight, 6 * MINUTE, there, prices, 3_000_000, first_tick=11)


def test_a_move_that_costs_more_than_it_saves_is_not_made() -> None:
    """The cheap pool comes after two and a half hours, of which half an hour started the dear one; two hours of work are left. They
    cost $4 there, and $2.50 after a move."""
    there = np.array([[True] * 60, [False] * 25 + [True] * 35, [False] * 60])
    prices = np.array([[2_000_000] * 60, [1_000_000] * 60, [1] * 60])
    job = Job(work_s=4 * HOUR, deadline_s=5 * HOUR, changeover_s=HOUR // 2)

    def best(*moves: tuple[int, ...]) -> Optimum:
        return offline_optimum(job, 6 * MINUTE, there[: len(moves)], prices[: len(moves)], 3_000_000, 0, moves)

    assert best((0, 0), (0, 0)) == Optimum(7_500_000, exact=True)
    assert best((0, 1_400_000), (0, 0)) == Optimum(8_900_000, exact=True)
    assert best((0, 1_600_000), (0, 0)) == Optimum(9_000_000, exact=True)
    # By way of a third pool it would be cheaper: that is a bound only.
    assert best((0, 1_600_000, 100_000), (0, 0, 0), (0, 100_000, 0)) == Optimum(7_700_000, exact=False)
    with pytest.raises(UsageError, match="2 pools to each"):
        best((0, 1), (1, 1))
