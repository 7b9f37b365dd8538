"""Node policies as a controller meets them: one job, tick by tick, killed in between; and facts that make no sense."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.policy.market.facts import PolicyState
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeFacts, NodeJob, NodeSituation, floor_of, scaling
from holdfast.policy.nodes.registry import NODE_POLICIES, node_policy_named
from holdfast.policy.nodes.safety import slack_after_s
from holdfast.policy.nodes.thrifty import Thrifty
from holdfast.simulate.nodes.engine import NodeWorkload, simulate_nodes
from holdfast.simulate.traces.trace import Trace

SHARED = {"nodes": 4, "deadline_s": 700, "launch_s": 40, "restart_s": 15, "max_lost_s": 20}
JOBS = {
    Kind.RIGID: NodeJob.rigid(work_s=400, **SHARED),
    Kind.ELASTIC: NodeJob.elastic(work_s=400, rates=scaling(4, exponent=0.9), **SHARED),
    Kind.DIVISIBLE: NodeJob.divisible(items=16, item_s=100, **SHARED),
}


def market(seed: int) -> Trace:
    luck = random.Random(seed)
    counts = [count for _ in range(20) for count in [luck.randint(0, 6)] * luck.randint(1, 6)][:20]
    return Trace(
        pools=("a",),
        tick_s=35,
        capacity=np.array([counts], np.int32),
        microusd_h=np.full((1, 20), 1_000_000),
        on_demand_microusd_h=3_000_000,
    )


@settings(max_examples=60)
@given(st.sampled_from(sorted(NODE_POLICIES)), st.integers(0, 1 << 20), st.data())
def test_a_controller_that_is_killed_every_tick_decides_what_was_simulated(
    name: str, seed: int, data: st.DataObject
) -> None:
    policy = NODE_POLICIES[name]
    job = JOBS[data.draw(st.sampled_from(sorted(policy.kinds, key=str)))]
    written = policy.start().to_json()

    def controller(situation: NodeSituation, choice: NodeChoice) -> None:
        nonlocal written
        facts = NodeFacts.of(situation, 0)
        state, decision = policy.decide(facts, PolicyState.from_json(written))
        written = state.to_json()
        assert (decision.spot, decision.on_demand) == (int(choice.spot[0]), int(choice.on_demand[0]))
        assert all(decision.reasons)
        assert f"wants {decision.spot} spot and {decision.on_demand} on-demand nodes" in decision.reasons[1]

    simulate_nodes(market(seed), policy, NodeWorkload(job=job), np.array([0]), controller)


@settings(max_examples=150)
@given(st.integers(0, 1 << 20), st.sampled_from(sorted(JOBS, key=str)), st.integers(1, 9))
def test_the_bound_on_slack_is_one_whatever_is_chosen(seed: int, kind: Kind, keeps: int) -> None:
    """Slack at a tick, before preemptions, is never less than the bound that was computed at the tick before it."""
    job, luck = JOBS[kind], random.Random(seed)
    policy = NODE_POLICIES["spot"]
    least: list[int] = []

    class Whims(type(policy)):  # type: ignore[misc]
        __slots__ = ()

        def choose(self, situation: NodeSituation, memory: object) -> tuple[object, NodeChoice]:
            lost = int(situation.spot[0]) < self.wanted
            if least and not lost and least[-1] >= job.changeover_s:
                assert int(situation.slack_s[0]) >= least[-1]
            if luck.randrange(keeps):
                spot, on_demand = int(situation.spot[0]), int(situation.on_demand[0])
            else:
                spot = luck.randint(0, int(situation.spot_capacity[0]))
                on_demand = luck.randint(0, job.nodes - spot)
            type(self).wanted = spot
            wanted = np.array([spot]), np.array([on_demand])
            least.append(int(slack_after_s(situation, *wanted)[0]))
            return memory, NodeChoice(*wanted, np.zeros(1, np.int8))

    Whims.wanted = 0
    simulate_nodes(market(seed), Whims(), NodeWorkload(job=job), np.array([0]))
    assert least


def test_a_thrifty_controller_learns_how_long_nodes_last() -> None:
    """What it remembers: with every tick that spot nodes are held, and every one that is lost."""
    policy = Thrifty(life_s=100.0)
    job = JOBS[Kind.ELASTIC]
    facts = NodeFacts(
        job=job, now_s=0, tick_s=35, work_left=job.total_work, rest_s=400, useful_nodes=4, spot_ready=0, spot_launching=0,
        on_demand_ready=0, on_demand_launching=0, launch_left_s=0, restart_left_s=0, spot_capacity=3, spot_microusd_h=1_000_000,
        on_demand_microusd_h=3_000_000,
    )  # fmt: skip
    state, decision = policy.decide(facts, policy.start())
    assert (decision.spot, decision.on_demand) == (3, 0)
    assert state.memory == (100.0, 1.0, 100.0, 1.0, 3.0)
    state, _ = policy.decide(NodeFacts.of(facts.as_situation(), 0), state)
    assert state.memory[:4] == (135.0, 2.0, 205.0, 4.0)
    with pytest.raises(UsageError, match="remembers 5 numbers; this state is of other and has 1"):
        policy.decide(facts, PolicyState("other", (1.0,)))


def test_how_work_scales() -> None:
    assert scaling(4) == (0, 1000, 2000, 3000, 4000)
    assert scaling(4, exponent=0.5) == (0, 1000, 1414, 1732, 2000)
    assert scaling(3, overhead=0.5) == (0, 1000, 1333, 1500)
    elastic = NodeJob.elastic(
        nodes=4, work_s=10, deadline_s=20, launch_s=0, restart_s=0, rates=scaling(4, exponent=0.5)
    )
    assert (elastic.total_work, elastic.full_s) == (20_000, 10)
    sweep = NodeJob.divisible(nodes=4, items=9, item_s=7, deadline_s=30, launch_s=1, restart_s=2)
    assert (sweep.total_work, sweep.items, sweep.full_s, sweep.changeover_s) == (63, 9, 21, 3)
    for wrong in ({"exponent": 0.0}, {"exponent": 1.1}, {"overhead": 1.0}):
        with pytest.raises(UsageError, match="exponent"):
            scaling(4, **wrong)


def test_a_floor_in_nodes_or_as_a_share() -> None:
    assert [floor_of(each, 10) for each in (0, 3, "3", "25%", "100%", "0%")] == [0, 3, 3, 3, 10, 0]
    for unreadable in ("a", "2.5%", "%"):
        with pytest.raises(UsageError, match="whole percentage"):
            floor_of(unreadable, 10)
    for beyond in (11, -1, "101%"):
        with pytest.raises(UsageError, match="between 0 and the job's 10 nodes"):
            floor_of(beyond, 10)


def test_jobs_that_make_no_sense_are_refused() -> None:
    good: dict[str, Any] = {"nodes": 2, "work_s": 10, "deadline_s": 20, "launch_s": 1, "restart_s": 1}
    for change, says in (
        ({"nodes": 0}, "exponent|nodes"),
        ({"nodes": 5000}, "4096 nodes"),
        ({"work_s": 0}, "work and deadline"),
        ({"deadline_s": 0}, "work and deadline"),
        ({"launch_s": -1}, "launch, restart"),
        ({"on_demand_floor": 3}, "floor"),
        ({"rates": (0, 2000, 1000)}, "never do less|rate for"),
        ({"rates": (0, 1000)}, "rate for 0 to 2"),
        ({"min_nodes": 3}, "at least one"),
    ):
        with pytest.raises(UsageError, match=says):
            NodeJob.elastic(**{**good, **change})
    with pytest.raises(UsageError, match="there are on-demand, spot, rigid-greedy"):
        node_policy_named("greedy")
    assert node_policy_named("elastic-greedy").name == "elastic-greedy"
    assert json.loads(node_policy_named("rigid-greedy").start().to_json())["policy"] == "rigid-greedy"
