"""Each verdict is reached by a case that anybody would expect it of, and only by such."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planning import HOUR_S, given, job, known, machine

from holdfast.simulate.planner.case import Case, Known
from holdfast.simulate.planner.checklist import State
from holdfast.simulate.planner.plan import Plan, Sampling, make_plan
from holdfast.simulate.planner.verdict import Against

QUICK = Sampling(30, with_levers=False)
GOOD: dict[str, Any] = {"work_h": 40.0, "deadline_s": 60 * HOUR_S, "budget_usd": 115.0}


def planned(**more: Any) -> Plan:
    return make_plan(job(**GOOD | more), QUICK)


def kinds(made: Plan) -> set[Against]:
    return {each.kind for each in made.verdict.because}


def test_worth_it() -> None:
    made = planned()
    assert made.verdict.worth
    assert made.verdict.headline.startswith("Spot is worth it: ")
    assert made.best is not None
    assert not made.best.is_on_demand
    assert made.best.p_both >= 0.95
    assert made.meets()
    assert made.verdict.because == ()
    assert made.verdict.saved_usd is not None
    assert made.verdict.saved_usd > 30
    assert made.verdict.on_demand_usd == pytest.approx(3 * (40 + 300 / 3600))


def test_a_short_job() -> None:
    made = planned(work_h=0.5, deadline_s=5 * HOUR_S, budget_usd=None)
    assert not made.verdict.worth
    assert Against.SHORT_JOB in kinds(made)
    assert "short job: 30 min of work" in made.verdict.headline


def test_a_hard_deadline() -> None:
    made = planned(deadline_s=40.1 * HOUR_S, budget_usd=None)
    assert Against.NO_SLACK in kinds(made)
    assert "leaves 6 min of slack" in made.verdict.headline
    assert made.best is not None
    assert made.best.is_on_demand
    assert made.meets()
    # Too late anyhow: then what is done first.
    late = planned(deadline_s=39 * HOUR_S, budget_usd=None)
    assert "shorter than the work" in late.verdict.headline
    assert not late.meets()
    assert late.best is not None
    assert late.best.finish_s.middle == min(option.finish_s.middle for option in late.options)


def test_no_checkpoint() -> None:
    made = planned(saves=False, known=replace(known(), checkpoint_bytes=None), budget_usd=None)
    assert Against.NO_CHECKPOINT in kinds(made)
    assert "takes back all work so far" in made.verdict.headline
    assert {option.mix for option in made.options} == {"on-demand", "spot"}
    assert made.best is not None
    assert made.best.is_on_demand


def test_a_coupled_gang() -> None:
    made = planned(machines=64, known=known(life_s=0.5 * HOUR_S, changeover_s=600.0), budget_usd=None)
    assert Against.COUPLED_GANG in kinds(made)
    assert "64 machines stop when one of them goes" in " ".join(each.says for each in made.verdict.because)
    # On-demand is not made to save as often as spot would have to.
    slow = planned(machines=64, known=known(life_s=0.5 * HOUR_S, stall_s=30.0), budget_usd=None)
    assert slow.verdict.on_demand_usd == pytest.approx(64 * 3 * 40, rel=0.03)
    # The same machines with work of their own do not wait for each other.
    free = planned(
        work_h=10.0, machines=8, tasks=True, task_s=300.0, saves=False, known=known(life_s=0.5 * HOUR_S), budget_usd=None,
        deadline_s=40 * HOUR_S,
    )  # fmt: skip
    assert free.verdict.worth


def test_serving() -> None:
    made = make_plan(job(1.0, serving=True), QUICK)
    assert kinds(made) == {Against.SERVING}
    assert "latency-critical" in made.verdict.headline
    assert made.best is None
    assert not made.meets()


def test_engineering_eats_it_once() -> None:
    made = planned(engineering_usd=1000.0)
    assert kinds(made) == {Against.ENGINEERING}
    assert made.verdict.runs_to_pay is not None
    assert made.verdict.runs_to_pay > 10
    cheap = planned(engineering_usd=20.0)
    assert cheap.verdict.worth
    assert cheap.verdict.net_usd is not None
    assert cheap.verdict.saved_usd is not None
    assert cheap.verdict.net_usd == pytest.approx(cheap.verdict.saved_usd - 20.0)


def test_little_is_saved() -> None:
    made = planned(pools=(machine(spot=2.95),), budget_usd=None)
    assert Against.LITTLE_SAVED in kinds(made)


def test_nothing_fits() -> None:
    made = planned(budget_usd=20.0)
    assert Against.NOTHING_FITS in kinds(made)
    assert not made.meets()
    assert not made.verdict.worth
    # Too little for on-demand, and too little to be sure of spot: better odds are named as what they are.
    odds = planned(budget_usd=55.0)
    assert odds.verdict.headline.startswith("Nothing meets the deadline and the budget with 95%: ")
    assert odds.verdict.headline.endswith("on-demand with 0%.")


def test_floors_ceilings_and_wishes() -> None:
    floor = planned(machines=2, floor=2, budget_usd=None)
    assert {option.mix for option in floor.options} == {"on-demand"}
    assert not floor.verdict.worth
    under = planned(ceiling_usd_h=2.0)
    assert {option.mix for option in under.options} == {"spot"}
    wished = planned(must_be_spot=True, budget_usd=None)
    assert wished.best is not None
    assert wished.best.mix == "spot"
    half = planned(machines=2, floor=1, budget_usd=None)
    assert half.verdict.worth
    spot = next(each for each in half.options if each.mix == "spot")
    # Half of it at $3 and half at $1 an hour, or more, since work is lost.
    assert 160 <= spot.cost_usd.mean < 240


def test_the_checklist_says_what_is_known() -> None:
    made = planned()
    states = {point.what: point.state for point in made.points}
    assert states["a save fits into the notice"] is State.YES
    assert states["the deadline has slack"] is State.YES
    assert states["restores work"] is State.OPEN
    big = planned(known=known(checkpoint_bytes=1e12))
    states = {point.what: point.state for point in big.points}
    assert states["a save fits into the notice"] is State.NO
    seen = Known(restores_seen=3, notice_was_heard=True, life_s=given(4 * HOUR_S))
    after = planned(known=seen)
    states = {point.what: point.state for point in after.points}
    assert states["restores work"] is states["notices are heard"] is State.YES


def test_two_kinds_of_hardware_are_weighed_by_their_work() -> None:
    slow = job(**GOOD)
    fast = replace(slow.hardware[0], work_s=10 * HOUR_S, pools=(machine(spot=2.0, on_demand=6.0, region="fast"),))
    both: Case = replace(slow, hardware=(*slow.hardware, fast))
    made = make_plan(both, QUICK)
    assert made.best is not None
    assert made.best.pools == ("cloud/fast/box",)
    assert {option.pools for option in made.options if option.is_on_demand} == {
        ("cloud/here/box",),
        ("cloud/fast/box",),
    }
