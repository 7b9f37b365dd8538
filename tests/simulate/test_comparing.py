"""Comparisons: every figure is what the engine says, bands are as wide as the days differ, and lanes are what was billed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_market import World
from worlds import Erratic, trace_of, workload_of, worlds

from holdfast.core.errors import UsageError
from holdfast.policy.market.facts import Job, Market
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.optimum import offline_optimum
from holdfast.simulate.market.bands import Days
from holdfast.simulate.market.bounds import bounds_here, bounds_on
from holdfast.simulate.market.comparing import Given, Ground, Request, compare, policy_on, windows_of
from holdfast.simulate.market.comparison_json import COLUMNS, rows_of, to_json
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.lane import lane_of
from holdfast.simulate.market.outcome import Outcomes
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.scenarios import SCENARIOS

HOUR, DAY = 3600, 86400
JOB = Job(work_s=6 * HOUR, deadline_s=8 * HOUR, changeover_s=360, max_lost_s=600)
SIMPLE = ("uniform-progress", "on-demand", "spot")


def asked(*names: str, policies: Sequence[str] = SIMPLE, **settings: object) -> Request:
    """The pools of these scenarios, each by itself."""
    traces = [(name, SCENARIOS[name].trace(seed=4, days=9)) for name in names or ("bursty", "correlated")]
    grounds = [Ground(name, trace.only(pool)) for name, trace in traces for pool in trace.pools]
    return replace(
        Request(grounds=grounds, policies=policies, workloads=[Workload(job=JOB)], every_s=12 * HOUR), **settings
    )


def test_every_figure_is_what_the_engine_says() -> None:
    later = Workload(job=replace(JOB, deadline_s=12 * HOUR), horizon_s=14 * HOUR, free_if_taken_within_s=HOUR)
    done = compare(asked(workloads=[Workload(job=JOB), later]))
    assert [(section.group, section.workload.job.deadline_s // HOUR) for section in done.sections] == [
        ("bursty", 8), ("correlated", 8), ("bursty", 12), ("correlated", 12),
    ]  # fmt: skip
    for section in done.sections:
        assert [line.policy for line in section.lines] == list(SIMPLE)
        for line in section.lines:
            ends: list[Outcomes] = []
            least: list[int] = []
            greedy: list[int] = []
            for ground in (played.ground for played in section.played):
                trace, job = ground.trace, section.workload.job
                starts = trace.starts(section.workload.follow_s, 12 * HOUR)
                ends.append(simulate(trace, POLICIES[line.policy], section.workload, starts))
                greedy += simulate(trace, POLICIES["greedy"], section.workload, starts).microusd.tolist()
                for start in starts.tolist():
                    best = offline_optimum(
                        job, trace.tick_s, trace.available(), trace.microusd_h, trace.on_demand_microusd_h, start
                    )
                    least.append(best.microusd or 0)
            paid = sum(int(each.microusd.sum()) for each in ends)
            assert line.windows == len(least)
            assert line.mean_usd == paid / 1e6 / line.windows
            assert line.misses == sum(int(each.missed.sum()) for each in ends)
            assert line.refund_usd == pytest.approx(
                sum(int(e.refund_microusd.sum()) for e in ends) / 1e6 / line.windows
            )
            assert line.goodput == sum(e.useful_s.sum() for e in ends) / sum(e.billed_s.sum() for e in ends)
            assert line.spot_share == sum(e.spot_s.sum() for e in ends) / sum(e.billed_s.sum() for e in ends)
            assert line.preemptions == sum(e.preemptions.sum() for e in ends) / line.windows
            assert section.optimum_usd == pytest.approx(sum(least) / 1e6 / line.windows)
            if line.misses:
                assert line.gap_closed is line.above_optimum is None
            else:
                assert line.gap_closed == pytest.approx((sum(greedy) - paid) / (sum(greedy) - sum(least)))
                assert line.above_optimum == pytest.approx(paid / sum(least) - 1)
                assert line.band_usd is not None
                assert line.band_usd.low - 1e-9 <= line.mean_usd <= line.band_usd.high + 1e-9
    assert any(line.misses for section in done.sections for line in section.lines)
    assert any(line.refund_usd for section in done.sections for line in section.lines)


def test_its_data_add_up_to_its_lines() -> None:
    done = compare(asked(policies=[*SIMPLE, "ours"]))
    document, rows = to_json(done), [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(done)]
    for section in document["sections"]:
        for line in section["policies"]:
            mine = [r for r in rows if (r["group"], r["policy"]) == (section["group"], line["policy"])]
            assert len(mine) == line["windows"] == len(section["windows"])
            costs = [window["cost_usd"][line["policy"]] for window in section["windows"]]
            assert costs == [row["cost_usd"] for row in mine]
            assert line["mean_usd"] == pytest.approx(sum(costs) / len(costs))
            assert line["misses"] == sum(line["policy"] in window["late"] for window in section["windows"])
            for row in mine:
                assert row["spot_s"] + row["on_demand_s"] == row["useful_s"] + row["lost_s"] + row["changeover_s"]
                assert row["late"] or row["optimum_usd"] <= row["cost_usd"]


def test_without_the_optimum_nothing_is_said_of_it_and_windows_are_spread_evenly() -> None:
    heard: list[tuple[int, int]] = []
    done = compare(
        asked("steady", policies=["on-demand"], with_optimum=False, most_windows=5),
        told=lambda done, total: heard.append((done, total)),
    )
    section = done.sections[0]
    assert section.optimum_usd is section.lines[0].gap_closed is section.least_usd() is None
    all_starts = windows_of(section.played[0].ground, section.workload, 12 * HOUR)
    assert section.played[0].starts.tolist() == all_starts[[0, 4, 8, 13, 17]].tolist()
    # The baseline is played beside the one policy.
    assert heard == [(0, 10), (5, 10), (10, 10)]


def test_the_most_telling_window_is_where_policies_in_time_differ_most() -> None:
    done = compare(asked("bursty", policies=["greedy", "on-demand", "spot"], with_optimum=False))
    section = done.sections[0]
    spread, played, number = section.most_telling()
    spot, greedy = played.outcomes["spot"], played.outcomes["greedy"]
    # On-demand costs the same in every window; a policy that was late does not count.
    apart = np.where(spot.missed, 0, abs(greedy.microusd - spot.microusd))
    assert (spread, number) == (int(apart.max()), int(apart.argmax()))
    assert spread > 0
    alone = compare(asked("bursty", policies=["on-demand"], with_optimum=False)).sections[0]
    assert alone.most_telling() == (0, alone.played[0], 0)


def test_processes_find_the_same_bounds() -> None:
    trace, workload = SCENARIOS["correlated"].trace(seed=2, days=3), Workload(job=JOB, gang=3)
    starts, done = trace.starts(JOB.deadline_s, 12 * HOUR), []
    with bounds_on(2) as bounds:
        side_by_side = bounds(trace, workload, starts, lambda: done.append(1))
    assert side_by_side == bounds_here(trace, workload, starts, lambda: None)
    assert len(done) == len(starts) > 3


# ---- what a policy is given


def test_the_past_is_what_lies_before_the_windows_and_nothing_else() -> None:
    trace = SCENARIOS["bursty"].trace(seed=4, days=9)
    ground = Ground("bursty", trace, history_ticks=4 * 288)
    changed = replace(trace, capacity=np.where(np.arange(trace.ticks) < 4 * 288, trace.capacity, 0).astype(np.int32))
    workload = Workload(job=JOB)
    ours, cold = POLICIES["ours"], policy_on("ours", ground, workload, Given.COLD)
    learned = policy_on("ours", ground, workload, Given.PAST)
    assert learned == policy_on("ours", replace(ground, trace=changed), workload, Given.PAST)
    assert cold == ours
    assert isinstance(learned, Ours)
    assert learned != ours
    assert policy_on("greedy", ground, workload, Given.PAST) == POLICIES["greedy"]
    assert windows_of(ground, workload, DAY).min() == 4 * 288


def test_what_cannot_be_played_is_refused_with_the_way_out() -> None:
    trace = SCENARIOS["steady"].trace(seed=1, days=2)
    with pytest.raises(UsageError, match="later deadline or less work"):
        asked(workloads=[Workload(job=replace(JOB, deadline_s=JOB.work_s + JOB.changeover_s - 1))])
    with pytest.raises(UsageError, match="lies before the deadline"):
        asked(workloads=[Workload(job=JOB, horizon_s=7 * HOUR)])
    with pytest.raises(UsageError, match="keep a part of the trace as history"):
        asked(given=Given.PAST)
    with pytest.raises(UsageError, match="history is longer"):
        Ground("steady", trace, history_ticks=trace.ticks)
    with pytest.raises(
        UsageError, match="no window of 2 d 12 h fits into the 2 d of the trace: take a longer trace or"
    ):
        windows_of(Ground("steady", trace), Workload(job=replace(JOB, deadline_s=60 * HOUR)), HOUR)
    with pytest.raises(UsageError, match="after its history of 1 d 20 h: take a longer trace, a shorter history"):
        windows_of(Ground("steady", trace, 44 * 12), Workload(job=JOB), HOUR)


# ---- bands


def test_a_band_is_that_of_drawing_days() -> None:
    luck = np.random.default_rng(3)
    day = np.repeat(np.arange(20), 2)
    values = luck.normal(10, 2, (3, 40))
    days = Days.of(day)
    drawn = np.random.default_rng(1).integers(0, 20, (2000, 20))
    sums = np.array([values[:, day == each].sum() for each in range(20)])[drawn].sum(axis=1)
    found = days.mean(values)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(sums / 120, (0.05, 0.95))))
    # Its width is that of a mean of 120 draws, not of 40 or of one.
    assert found.high - found.low == pytest.approx(2 * 1.645 * 2 / np.sqrt(120), rel=0.25)


def test_days_that_are_alike_in_a_row_make_a_band_wider_when_they_are_drawn_together() -> None:
    day = np.arange(60)
    values = np.repeat(np.random.default_rng(2).normal(0, 1, 20), 3)
    apart, together = Days.of(day).mean(values), Days.of(day, block_days=3).mean(values)
    assert apart is not None
    assert together is not None
    assert together.high - together.low > 1.3 * (apart.high - apart.low)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_each_draw_has_as_many_days_as_there_are_and_few_days_have_no_band(count: int, block: int, gap: int) -> None:
    days = Days.of(np.arange(count) * (gap + 1) + gap, block_days=block, draws=30)
    assert days.drawn.shape == (30, count)
    assert days.drawn.min() >= 0
    assert days.drawn.max() < count
    assert (days.mean(np.ones(count)) is None) == (count // block < 3)
    # A figure that is the same in all windows is known for sure.
    if count // block >= 3:
        found = days.mean(np.full(count, 7.0))
        assert found is not None
        assert found.low == found.high == 7


# ---- lanes


@settings(max_examples=200)
@given(worlds(), st.integers(0, 9999))
def test_a_lane_is_what_was_billed(world: World, seed: int) -> None:
    trace, workload, policy = trace_of(world), workload_of(world), Erratic(seed)
    lane = lane_of(trace, policy, workload, 0)
    outcomes = simulate(trace, policy, workload, np.array([0]))
    spent = dict.fromkeys(Market, 0)
    changeover_s, end_s = 0, 0
    for stretch in lane.stretches:
        assert stretch.begin_s == end_s < stretch.end_s
        end_s = stretch.end_s
        spent[stretch.market] += stretch.end_s - stretch.begin_s
        changeover_s += min(stretch.ready_s, stretch.end_s) - stretch.begin_s
    launches = [stretch.market for stretch in lane.stretches if stretch.market is not Market.NOTHING]
    assert {
        "spot_s": spent[Market.SPOT],
        "on_demand_s": spent[Market.ON_DEMAND],
        "waiting_s": spent[Market.NOTHING],
        "changeover_s": changeover_s,
        "preemptions": len(lane.preempted_s),
        "spot_launches": launches.count(Market.SPOT),
        "on_demand_launches": launches.count(Market.ON_DEMAND),
        "microusd": lane.microusd,
        "useful_s": lane.progress[-1][1],
        "finish_s": -1 if lane.finish_s is None else lane.finish_s,
    } == {
        name: int(getattr(outcomes, name)[0])
        for name in (
            "spot_s", "on_demand_s", "waiting_s", "changeover_s", "preemptions", "spot_launches", "on_demand_launches", "microusd",
            "useful_s", "finish_s",
        )
    }  # fmt: skip
    assert end_s == (workload.follow_s if lane.finish_s is None else lane.finish_s)
    times = [at_s for at_s, _ in lane.progress]
    assert times == sorted(times)


# ---- scenarios


def test_scenarios_are_what_they_say() -> None:
    up = {name: each.trace(seed=7, days=400).available().mean(axis=1) for name, each in SCENARIOS.items()}
    assert up["steady"] > 0.9
    assert 0.55 < up["bursty"][0] < 0.65
    assert 0.15 < up["scarce"][0] < 0.25
    diurnal = SCENARIOS["diurnal"].trace(seed=7, days=400).available()[0].reshape(400, -1)
    by_hour = diurnal.mean(axis=0).reshape(24, -1).mean(axis=1)
    assert by_hour[[1, 2, 3]].mean() > by_hour[[13, 14, 15, 16]].mean() + 0.3
    together = SCENARIOS["correlated"].trace(seed=7, days=400).available()
    down = ~together
    assert down.all(axis=0).mean() > 1.3 * np.prod(down.mean(axis=1))
    prices = SCENARIOS["correlated"].trace(seed=7, days=400).microusd_h
    assert prices.min() >= 800_000
    assert prices.max() <= 1_250_000
    assert prices.std() > 40_000
    for name, each in SCENARIOS.items():
        assert (each.trace(seed=7, days=3).capacity == each.trace(seed=7, days=3).capacity).all()
        assert each.trace(seed=7, days=30).available(8).any(), name
