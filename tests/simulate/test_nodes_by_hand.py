"""Windows of several nodes that can be checked with a pencil, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.core.errors import UsageError
from holdfast.policy.nodes.facts import NodeJob
from holdfast.policy.nodes.registry import NODE_POLICIES
from holdfast.simulate.nodes.engine import NodeWorkload, simulate_nodes
from holdfast.simulate.nodes.outcome import NodeOutcomes
from holdfast.simulate.nodes.story import tell_nodes
from holdfast.simulate.traces.trace import Trace

HOUR = 3600
MINUTE = 60


def hourly(*counts: int) -> Trace:
    """Ticks of an hour; $1 spot, $3 on-demand."""
    return Trace(
        pools=("a",),
        tick_s=HOUR,
        capacity=np.array([counts], np.int32),
        microusd_h=np.full((1, len(counts)), 1_000_000),
        on_demand_microusd_h=3_000_000,
    )


def figures(outcomes: NodeOutcomes, *names: str) -> dict[str, int]:
    return {name: int(getattr(outcomes, name)[0]) for name in names}


def test_an_elastic_gang_by_hand() -> None:
    """4 nodes for 4 h, 16 node-hours in 9 h; launches take 12 minutes, restarts 6."""
    job = NodeJob.elastic(
        nodes=4,
        work_s=4 * HOUR,
        deadline_s=9 * HOUR,
        launch_s=12 * MINUTE,
        restart_s=6 * MINUTE,
        max_lost_s=30 * MINUTE,
    )
    outcomes, told = tell_nodes(
        hourly(2, 4, 4, 1, 0, 4, 4, 4, 4), NODE_POLICIES["elastic-greedy"], NodeWorkload(job=job), 0
    )
    # Hour 0: 2 nodes launch and restart: 42 minutes of work.          84 node-minutes, 84 in all
    # Hour 1: 2 more launch while 2 work for 12 minutes; all restart; 42 minutes of 4.    24 + 168, 276 in all
    # Hour 2: 60 minutes of 4.                                                            240, 516 in all
    # Hour 3: one is left. Since the restart 102 minutes were worked: 3 saves, 12 minutes of 4 are lost: 48. 468.
    #         It restarts and works for 54 minutes: 522.
    # Hour 4: it is gone, and 24 of its 54 minutes: 498. Slack is 5 h - 462 node-minutes / 4 = 184.5 minutes, and a tick leaves
    #         124.5, more than two changeovers and a save's interval (66): it waits.
    # Hour 5: 4 launch and restart: 42 minutes, 666. Hour 6: 906. Hour 7: 54 node-minutes are left: 13.5 minutes.
    spot_minutes = 2 * 60 + 4 * 60 + 4 * 60 + 60 + 4 * 60 + 4 * 60 + 4 * 13.5
    expected = {
        "microusd": round(spot_minutes / 60 * 1_000_000),
        "finish_s": 7 * HOUR + 13 * MINUTE + 30,
        "useful_node_s": 960 * MINUTE,
        "lost_node_s": 72 * MINUTE,
        "changeover_node_s": (2 * 18 + 2 * 12 + 4 * 6 + 6 + 4 * 18) * MINUTE,
        "idle_node_s": 0,
        "waiting_s": HOUR,
        "preemptions": 4,
        "restarts": 3,
        "spot_launches": 8,
        "on_demand_launches": 0,
    }
    assert figures(outcomes, *expected) == expected
    assert outcomes.done_share[0] == 1.0
    assert outcomes.goodput[0] == pytest.approx(960 / spot_minutes)
    wanted = [(each.facts.now_s // HOUR, each.decision.spot, each.decision.on_demand) for each in told]
    assert wanted == [(0, 2, 0), (1, 4, 0), (3, 1, 0), (4, 0, 0), (5, 4, 0), (8, 0, 0)][: len(wanted)]
    assert told[3].decision.reasons[0] == "not enough spot nodes to work with, and there is time to wait"
    assert "3 h 4 min to spare" in told[3].decision.reasons[2]


def test_a_rigid_gang_that_is_short_of_a_node_is_billed_for_nothing() -> None:
    """Two spot nodes and one on-demand node by the floor; a node that is lost idles the others until the policy gives them up."""
    job = NodeJob.rigid(nodes=3, work_s=2 * HOUR, deadline_s=30 * HOUR, launch_s=0, restart_s=0, on_demand_floor=1)
    outcomes = simulate_nodes(
        hourly(2, 1, 2, *[0] * 27), NODE_POLICIES["rigid-greedy"], NodeWorkload(job=job), np.array([0])
    )
    expected = {"microusd": 2 * 5_000_000, "finish_s": 3 * HOUR, "waiting_s": HOUR, "idle_node_s": 0, "restarts": 1}
    assert figures(outcomes, *expected) == expected


def test_items_by_hand() -> None:
    """5 items of 50 minutes on 2 nodes in 4 h; launch and restart take 10 minutes, saves come every 20 minutes of an item."""
    job = NodeJob.divisible(
        nodes=2,
        items=5,
        item_s=50 * MINUTE,
        deadline_s=4 * HOUR,
        launch_s=4 * MINUTE,
        restart_s=6 * MINUTE,
        max_lost_s=20 * MINUTE,
    )
    outcomes = simulate_nodes(hourly(2, 1, 2, 2), NODE_POLICIES["spot"], NodeWorkload(job=job), np.array([0]))
    # 1:00 two items are done, one node goes. The other takes the third item at 1:00 and the fourth at 1:50, of which 10 minutes
    # are done at 2:00. Then a node is ordered, takes the last item at 2:10 and ends it at 3:00. At 2:40 the first node is done
    # with the fourth and ends: there is nothing more to begin.
    expected = {
        "microusd": 2_000_000 + 1_000_000 + round((40 + 60) / 60 * 1_000_000),
        "finish_s": 3 * HOUR,
        "useful_node_s": 250 * MINUTE,
        "lost_node_s": 0,
        "changeover_node_s": 30 * MINUTE,
        "restarts": 0,
    }
    assert figures(outcomes, *expected) == expected
    # It goes at 2:00 as well, and the 10 minutes with it. At 3:10 two nodes are ready, and the last two items just fit.
    outcomes = simulate_nodes(hourly(2, 1, 0, 2), NODE_POLICIES["spot"], NodeWorkload(job=job), np.array([0]))
    expected = {"finish_s": 4 * HOUR, "lost_node_s": 10 * MINUTE, "restarts": 1, "waiting_s": HOUR}
    assert figures(outcomes, *expected) == expected
    # One minute less, and they could not be done any more: no node is ordered for them.
    shorter = NodeJob.divisible(
        nodes=2, items=5, item_s=50 * MINUTE, deadline_s=4 * HOUR - MINUTE, launch_s=4 * MINUTE, restart_s=6 * MINUTE,
        max_lost_s=20 * MINUTE,
    )  # fmt: skip
    outcomes = simulate_nodes(hourly(2, 1, 0, 2), NODE_POLICIES["spot"], NodeWorkload(job=shorter), np.array([0]))
    assert outcomes.missed[0]
    assert outcomes.work_done[0] == 3 * 50 * MINUTE
    assert outcomes.spot_node_s[0] == (2 * 60 + 60) * MINUTE


def test_a_budget_stops_at_the_last_second_that_is_paid_for() -> None:
    """4 spot nodes at $1 each: $10 last 2.5 h, of which 18 minutes launch and restart."""
    job = NodeJob.elastic(
        nodes=4, work_s=4 * HOUR, deadline_s=9 * HOUR, launch_s=12 * MINUTE, restart_s=6 * MINUTE, max_lost_s=1000
    )
    workload = NodeWorkload(job=job, budget_microusd=10_000_000)
    outcomes = simulate_nodes(hourly(*[4] * 9), NODE_POLICIES["elastic-greedy"], workload, np.array([0]))
    expected = {"microusd": 10_000_000, "stopped_by_budget": 1, "finish_s": -1, "lost_node_s": 0, "missed": 1}
    assert figures(outcomes, *expected) == expected
    assert outcomes.done_share[0] == 132 / 240
    one_less = NodeWorkload(job=job, budget_microusd=9_999_999)
    before = simulate_nodes(hourly(*[4] * 9), NODE_POLICIES["elastic-greedy"], one_less, np.array([0]))
    assert before.work_done[0] == outcomes.work_done[0] - 4000


def test_what_cannot_be_simulated_is_refused() -> None:
    job = NodeJob.rigid(nodes=2, work_s=HOUR, deadline_s=3 * HOUR, launch_s=0, restart_s=0)
    workload, trace = NodeWorkload(job=job), hourly(2, 2, 2)
    with pytest.raises(UsageError, match="3 ticks do not all lie in a trace of 3"):
        simulate_nodes(trace, NODE_POLICIES["rigid-greedy"], workload, np.array([1]))
    with pytest.raises(UsageError, match="no window"):
        simulate_nodes(trace, NODE_POLICIES["rigid-greedy"], workload, np.array([], np.int64))
    with pytest.raises(UsageError, match="elastic-greedy is not for rigid work"):
        simulate_nodes(trace, NODE_POLICIES["elastic-greedy"], workload, np.array([0]))
    with pytest.raises(UsageError, match="2 nodes cost more than"):
        simulate_nodes(trace.at_price(1 << 31), NODE_POLICIES["rigid-greedy"], workload, np.array([0]))
    with pytest.raises(UsageError, match="a budget lies between"):
        NodeWorkload(job=job, budget_microusd=-1)
    sweep = NodeJob.divisible(nodes=2, items=2, item_s=60, deadline_s=HOUR, launch_s=0, restart_s=0)
    with pytest.raises(UsageError, match="followed to its deadline"):
        NodeWorkload(job=sweep, horizon_s=2 * HOUR)
