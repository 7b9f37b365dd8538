"""The simulator against a reference that goes second by second in fractions: every window to the last millionth of a dollar."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_market import DEMAND, RULES, WAIT, Target, View, World, play
from worlds import Erratic, job_of, trace_of, window_of, workload_of, worlds

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Situation
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Context, Decision, Job, Market, Offer, PolicyState, Running
from holdfast.policy.market.registry import POLICIES
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.outcome import Outcomes
from holdfast.simulate.market.story import tell
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
HOUR = 3600


def microusd(amount: Fraction) -> int:
    return round(amount)


@settings(max_examples=200)
@given(worlds(), st.sampled_from(sorted(RULES)), st.data())
def test_every_window_is_what_the_slow_reference_says(world: World, name: str, data: st.DataObject) -> None:
    windows = len(world.machines[0]) - -(-world.ends_s // world.tick_s) + 1
    starts = np.array(data.draw(st.lists(st.integers(0, windows - 1), min_size=1, max_size=4)), np.int64)
    chosen: list[list[int]] = [[] for _ in starts]

    def watch(situation: Situation, choice: Choice) -> None:
        for window, targets in enumerate(chosen):
            if situation.work_left_s[window]:
                targets.append(int(choice.target[window]))

    outcomes = simulate(trace_of(world), POLICIES[name], workload_of(world), starts, watch)
    for window, start in enumerate(starts.tolist()):
        end = play(window_of(world, start), RULES[name])
        assert chosen[window] == [_number(target) for target in end.decisions]
        assert _figures(outcomes, window) == {
            "microusd": microusd(end.spot + end.on_demand) + end.egress,
            "egress_microusd": end.egress,
            "spot_microusd": microusd(end.spot),
            "on_demand_microusd": microusd(end.on_demand),
            "refund_microusd": microusd(end.refund),
            "finish_s": end.finish_s,
            "useful_s": world.work_s - end.left_s,
            "lost_s": end.lost_s,
            "changeover_s": end.changeover_s,
            "waiting_s": end.waiting_s,
            "spot_s": end.spot_s,
            "on_demand_s": end.on_demand_s,
            "preemptions": end.preemptions,
            "spot_launches": end.spot_launches,
            "on_demand_launches": end.on_demand_launches,
        }
        assert bool(outcomes.missed[window]) == (end.finish_s < 0 or end.finish_s > world.deadline_s)


def _number(target: Target) -> int:
    return target if isinstance(target, int) else {WAIT: NOTHING, DEMAND: ON_DEMAND}[target]


def _figures(outcomes: Outcomes, window: int) -> dict[str, int]:
    names = [name for name in Outcomes.__slots__ if name not in ("deadline_s", "starts")]
    return {name: int(getattr(outcomes, name)[window]) for name in names}


class Controller:
    """Drives one policy as a fleet would, tick by tick, from `Context`s; it is killed after every tick and comes back from text."""

    def __init__(self, policy: MarketPolicy, world: World) -> None:
        self.policy, self.world = policy, world
        self.written = policy.start(len(world.machines)).to_json()
        self.said: list[Decision] = []
        self.tick: tuple[int, str] = (-1, "")

    def __call__(self, view: View) -> Target:
        if view.now_s != self.tick[0]:
            self.tick = (view.now_s, self.written)
            self.said.append(Decision(Market.NOTHING, None, ()))
        # Asked again in the same tick: with the state from before.
        state = PolicyState.from_json(self.tick[1])
        market = {WAIT: Market.NOTHING, DEMAND: Market.ON_DEMAND}.get(str(view.on), Market.SPOT)
        context = Context(
            job=job_of(self.world),
            now_s=view.now_s,
            tick_s=self.world.tick_s,
            work_left_s=view.left_s,
            running=Running(market, f"pool-{view.on}" if market is Market.SPOT else None, view.warming_s),
            offers=tuple(
                Offer(f"pool-{pool}", known, price)
                for pool, (known, price) in enumerate(zip(view.known, view.prices, strict=True))
            ),
            on_demand_microusd_h=self.world.on_demand * self.world.gang,
        )
        state, decision = self.policy.decide(context, state)
        self.written, self.said[-1] = state.to_json(), decision
        assert decision.reasons
        if decision.market is Market.SPOT:
            assert decision.pool is not None
            return int(decision.pool.removeprefix("pool-"))
        return DEMAND if decision.market is Market.ON_DEMAND else WAIT


@settings(max_examples=100)
@given(worlds(windows=1), st.sampled_from(sorted(POLICIES)) | st.integers(0, 9999))
def test_a_controller_that_is_killed_every_tick_does_what_was_simulated(world: World, which: str | int) -> None:
    policy = POLICIES[which] if isinstance(which, str) else Erratic(which)
    controller = Controller(policy, world)
    end = play(world, controller)
    outcomes, told = tell(trace_of(world), policy, workload_of(world), 0, every_tick=True)
    assert [each.decision for each in told][: len(controller.said)] == controller.said
    assert int(outcomes.microusd[0]) == microusd(end.spot + end.on_demand) + end.egress


@settings(max_examples=100)
@given(worlds(), st.integers(0, 9999))
def test_every_second_is_in_one_bucket_whatever_a_policy_does(world: World, seed: int) -> None:
    windows = len(world.machines[0]) - -(-world.ends_s // world.tick_s) + 1
    together = simulate(trace_of(world), Erratic(seed), workload_of(world), np.arange(windows))
    for window in range(windows):
        alone = simulate(trace_of(world), Erratic(seed), workload_of(world), np.array([window]))
        assert _figures(alone, 0) == _figures(together, window)
    wall_s = np.where(together.finish_s < 0, workload_of(world).follow_s, together.finish_s)
    assert (together.billed_s + together.waiting_s == wall_s).all()
    assert (together.billed_s == together.changeover_s + together.useful_s + together.lost_s).all()
    assert ((together.goodput >= 0) & (together.goodput <= 1)).all()
    assert (together.ettr <= together.goodput).all()


def test_all_availabilities_there_are_and_never_late() -> None:
    """Every on-off pattern of 12 ticks, as one window each, for ticks shorter and longer than the changeover."""
    ticks = 12
    patterns = (np.arange(1 << ticks)[:, None] >> np.arange(ticks)) & 1
    capacity = patterns.reshape(1, -1).astype(np.int32)
    starts = np.arange(0, capacity.shape[1], ticks)
    for tick_s, changeover_s, max_lost_s, spare_s in [
        (10, 0, 0, 5),
        (10, 10, 0, 25),
        (10, 3, 0, 9),
        (10, 14, 0, 28),
        (10, 14, 0, 53),
        (10, 25, 0, 25),
        (10, 4, 7, 31),
        (10, 4, 23, 55),
        (3, 4, 5, 17),
    ]:
        deadline_s = ticks * tick_s - 1
        job = Job(work_s=deadline_s - spare_s, deadline_s=deadline_s, changeover_s=changeover_s, max_lost_s=max_lost_s)
        trace = Trace(
            pools=("a",),
            tick_s=tick_s,
            capacity=capacity,
            microusd_h=np.full(capacity.shape, 1_000_000),
            on_demand_microusd_h=3_000_000,
        )
        for policy in POLICIES.values():
            if policy.keeps_deadline:
                outcomes = simulate(trace, policy, Workload(job=job), starts)
                assert not outcomes.missed.any(), (policy.name, job)
                assert (outcomes.lost_s == 0).all() or max_lost_s


@settings(max_examples=200 if LONG else 80)
@given(
    worlds(feasible=True), st.sampled_from(sorted(name for name, policy in POLICIES.items() if policy.keeps_deadline))
)
def test_a_policy_with_a_safety_rule_is_never_late(world: World, name: str) -> None:
    workload = Workload(job=job_of(world), gang=world.gang, asks=world.asks)
    starts = trace_of(world).starts(world.deadline_s, world.tick_s)
    assert not simulate(trace_of(world), POLICIES[name], workload, starts).missed.any()


def test_a_window_by_hand() -> None:
    """Ticks of an hour; spot for three hours, then never. 0.2 h of changeover; 4 h of work in 6.5 h."""
    capacity = np.array([[4, 4, 4, 3, 0, 0, 0, 0]], np.int32)
    trace = Trace(
        pools=("a",),
        tick_s=HOUR,
        capacity=capacity,
        microusd_h=np.full((1, 8), 250_000),
        on_demand_microusd_h=1_000_000,
    )
    job = Job(work_s=4 * HOUR, deadline_s=6 * HOUR + 1800, changeover_s=720, max_lost_s=900)
    workload = Workload(job=job, gang=4, free_if_taken_within_s=3 * HOUR + 1)
    outcomes, told = tell(trace, POLICIES["greedy"], workload, 0)
    # On spot 3 h, of which 12 min start it: 2 h 48 min done, of which the 3 min since the last save are lost.
    # So 1 h 15 min are left at 3:00.
    # It may wait while slack ≥ changeover + tick (1.2 h): at 3:00 there is 3.5 - 1.25 = 2.25 h, at 4:00 1.25 h, at 5:00 0.25 h.
    assert _figures(outcomes, 0) == {
        "microusd": 3 * 1_000_000 + 4 * 1_000_000 * (720 + 75 * 60) // HOUR,
        "spot_microusd": 3_000_000,
        "on_demand_microusd": 4 * 1_000_000 * (720 + 75 * 60) // HOUR,
        "refund_microusd": 3_000_000,
        "egress_microusd": 0,
        "finish_s": 5 * HOUR + 720 + 75 * 60,
        "useful_s": 4 * HOUR,
        "lost_s": 180,
        "changeover_s": 1440,
        "waiting_s": 2 * HOUR,
        "spot_s": 3 * HOUR,
        "on_demand_s": 720 + 75 * 60,
        "preemptions": 1,
        "spot_launches": 1,
        "on_demand_launches": 1,
    }
    markets = [(each.context.now_s // HOUR, each.decision.market) for each in told]
    assert markets == [
        (0, Market.SPOT),
        (1, Market.SPOT),
        (3, Market.NOTHING),
        (5, Market.ON_DEMAND),
        (6, Market.ON_DEMAND),
    ]
    assert "the last moment" in told[3].decision.reasons[0]
    assert told[0].decision.reasons[-1] == "a at $1.0000 an hour; on-demand costs $4.0000"


def test_what_cannot_be_simulated_is_refused() -> None:
    trace = Trace(
        pools=("a",),
        tick_s=10,
        capacity=np.ones((1, 5), np.int32),
        microusd_h=np.ones((1, 5), np.int64),
        on_demand_microusd_h=2,
    )
    workload = Workload(job=Job(work_s=10, deadline_s=41, changeover_s=0))
    with pytest.raises(UsageError, match="5 ticks do not all lie in a trace of 5"):
        simulate(trace, POLICIES["greedy"], workload, np.array([0, 1]))
    with pytest.raises(UsageError, match="no window"):
        simulate(trace, POLICIES["greedy"], workload, np.array([], np.int64))
    with pytest.raises(UsageError, match="does not fit"):
        trace.starts(51, 10)
    with pytest.raises(UsageError, match="no pool b; it has a"):
        trace.only("b")
    for moves in (((0, 1),), ((1,),), ((0, 1), (1, 0))):
        with pytest.raises(UsageError, match="from each of the 1 pools"):
            simulate(trace, POLICIES["greedy"], Workload(job=workload.job, move_microusd=moves), np.array([0]))
