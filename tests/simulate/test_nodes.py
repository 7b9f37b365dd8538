"""The simulator of several nodes against a reference that goes second by second and node by node in fractions."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import worlds as old
from hypothesis import given, settings
from hypothesis import strategies as st
from node_rules import RULES, thrifty
from nodes_worlds import KINDS, Erratic, job_of, node_worlds, workload_of
from slow_market import World
from slow_nodes import NodesEnding, NodesWorld, Scene, Wanted, play_nodes
from worlds import trace_of, window_of, worlds

from holdfast.policy.market.registry import POLICIES
from holdfast.policy.nodes.facts import NodeChoice, NodeJob, NodeSituation
from holdfast.policy.nodes.registry import NODE_POLICIES
from holdfast.policy.nodes.thrifty import Thrifty
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.outcome import UNFINISHED
from holdfast.simulate.nodes.engine import NodeWorkload, simulate_nodes
from holdfast.simulate.nodes.outcome import NodeOutcomes
from holdfast.simulate.traces.trace import Trace

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


def windows_of(world: NodesWorld) -> int:
    return len(world.machines[0]) - -(-world.ends_s // world.tick_s) + 1


def compare(world: NodesWorld, outcomes: NodeOutcomes, window: int, end: NodesEnding) -> None:
    """Every figure, money to the last millionth of a dollar."""
    unit = 1 if world.kind == "divisible" else 1000
    expected = {
        "microusd": round(end.spot + end.on_demand),
        "spot_microusd": round(end.spot),
        "on_demand_microusd": round(end.on_demand),
        "finish_s": end.finish_s,
        "stopped_by_budget": end.stopped,
        "work_done": job_of(world).total_work - end.left * unit,
        "useful_node_s": end.worked_node_s - end.lost_node_s,
        "lost_node_s": end.lost_node_s,
        "changeover_node_s": end.changeover_node_s,
        "idle_node_s": end.idle_node_s,
        "waiting_s": end.waiting_s,
        "spot_node_s": end.spot_node_s,
        "on_demand_node_s": end.on_demand_node_s,
        "preemptions": end.preemptions,
        "restarts": end.restarts,
        "spot_launches": end.spot_launches,
        "on_demand_launches": end.on_demand_launches,
    }
    assert {name: getattr(outcomes, name)[window] for name in expected} == expected
    assert bool(outcomes.missed[window]) == (end.finish_s < 0 or end.finish_s > world.deadline_s)


@settings(max_examples=100 if LONG else 50)
@given(node_worlds(), st.integers(0, 9999), st.integers(1, 8))
def test_whatever_a_policy_wants_the_bill_is_what_the_slow_reference_says(
    world: NodesWorld, seed: int, keeps: int
) -> None:
    starts = np.arange(windows_of(world))
    seen: list[list[tuple[NodeSituation, NodeChoice]]] = []
    together = simulate_nodes(
        trace_of(world), Erratic(seed, keeps), workload_of(world), starts, lambda *tick: seen.append([tick])
    )
    for window, start in enumerate(starts.tolist()):
        ticks = iter(seen)

        def follow(scene: Scene, ticks: object = ticks, window: int = window) -> Wanted:
            [(situation, choice)] = next(ticks)  # type: ignore[call-overload]
            known = {
                "spot_ready": scene.count(spot=True, joined=True),
                "spot_launching": scene.count(spot=True, joined=False),
                "on_demand_ready": scene.count(spot=False, joined=True),
                "on_demand_launching": scene.count(spot=False, joined=False),
                "launch_left_s": scene.launch_left_s,
                "restart_left_s": scene.restart_s if scene.able and not scene.divisible else 0,
                "spot_capacity": scene.can_hold,
                "rest_s": scene.rest_s,
                "useful_nodes": scene.useful,
            }
            assert {name: int(getattr(situation, name)[window]) for name in known} == known
            return int(choice.spot[window]), int(choice.on_demand[window])

        compare(world, together, window, play_nodes(window_of(world, start), follow))
        alone = simulate_nodes(trace_of(world), Erratic(seed, keeps), workload_of(world), np.array([start]))
        assert all(
            getattr(alone, name)[0] == getattr(together, name)[window]
            for name in NodeOutcomes.__slots__
            if name not in ("job", "starts")
        )
    billed = together.useful_node_s + together.lost_node_s + together.changeover_node_s + together.idle_node_s
    assert (together.billed_node_s == billed).all()
    if world.budget is not None:
        assert (together.microusd <= world.budget).all()


def short_lived(scene: Scene) -> Wanted:
    return thrifty(scene, life_s=20)


CONTESTANTS = [
    *((NODE_POLICIES[name], rule) for name, rule in sorted(RULES.items())),
    (Thrifty(life_s=20.0), short_lived),
]


@settings(max_examples=150 if LONG else 60)
@given(node_worlds(), st.data())
def test_every_window_is_what_the_slow_reference_says(world: NodesWorld, data: st.DataObject) -> None:
    policy, rule = data.draw(st.sampled_from([each for each in CONTESTANTS if job_of(world).kind in each[0].kinds]))
    starts = np.arange(windows_of(world))
    chosen: list[NodeChoice] = []
    outcomes = simulate_nodes(
        trace_of(world), policy, workload_of(world), starts, lambda _, choice: chosen.append(choice)
    )
    for window, start in enumerate(starts.tolist()):
        end = play_nodes(window_of(world, start), rule)
        said = [(int(choice.spot[window]), int(choice.on_demand[window])) for choice in chosen]
        assert said[: len(end.decisions)] == end.decisions
        compare(world, outcomes, window, end)


@settings(max_examples=100 if LONG else 50)
@given(worlds(pools=1), st.sampled_from(sorted(POLICIES)), st.data())
def test_a_rigid_gang_in_one_pool_is_what_the_other_engine_says(world: World, name: str, data: st.DataObject) -> None:
    """Launch and restart together are its changeover, wherever one ends and the other begins."""
    world = replace(world, asks=False, refund_within_s=0)
    if name == "ours":
        # In a pool that is dearer than on-demand a market policy sees capacity, and learns from it; a node policy sees none.
        cheap = tuple(tuple(price % 900_000 for price in row) for row in world.prices)
        world = replace(world, prices=cheap, on_demand=3_060_000)
    job, workload = old.job_of(world), old.workload_of(world)
    launch_s = data.draw(st.integers(0, world.changeover_s))
    rigid = NodeJob.rigid(
        nodes=world.gang,
        work_s=job.work_s,
        deadline_s=job.deadline_s,
        launch_s=launch_s,
        restart_s=world.changeover_s - launch_s,
        max_lost_s=job.max_lost_s,
    )
    trace = trace_of(world)
    starts = np.arange(len(world.machines[0]) - -(-world.ends_s // world.tick_s) + 1)
    one = simulate(trace, POLICIES[name], workload, starts)
    other = simulate_nodes(
        trace, NODE_POLICIES[f"rigid-{name}"], NodeWorkload(job=rigid, horizon_s=workload.horizon_s), starts
    )
    for each in ("microusd", "spot_microusd", "on_demand_microusd", "finish_s", "waiting_s", "missed"):
        assert (getattr(one, each) == getattr(other, each)).all(), each
    for each in ("useful", "lost", "changeover", "spot", "on_demand"):
        assert (getattr(one, f"{each}_s") * world.gang == getattr(other, f"{each}_node_s")).all(), each
    assert (other.idle_node_s == 0).all()


KEEPERS = [policy for policy in (*NODE_POLICIES.values(), Thrifty(life_s=20.0)) if policy.keeps_deadline]


@settings(max_examples=150 if LONG else 60)
@given(node_worlds(feasible=True, budgets=False), st.data())
def test_a_policy_with_a_safety_rule_is_never_late(world: NodesWorld, data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from([each for each in KEEPERS if job_of(world).kind in each.kinds]))
    outcomes = simulate_nodes(trace_of(world), policy, workload_of(world), np.arange(windows_of(world)))
    assert not outcomes.missed.any()
    assert (outcomes.work_done == job_of(world).total_work).all()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_all_capacities_there_are_and_never_late(kind: str) -> None:
    """Every sequence of 0, 1 or 2 nodes over 7 ticks, as one window each, with every relation of tick, launch and restart."""
    ticks = 7
    patterns = np.arange(3**ticks)[:, None] // 3 ** np.arange(ticks) % 3
    capacity = patterns.reshape(1, -1).astype(np.int32)
    starts = np.arange(0, capacity.shape[1], ticks)
    trace = Trace(
        pools=("a",),
        tick_s=10,
        capacity=capacity,
        microusd_h=np.full(capacity.shape, 1_000_000),
        on_demand_microusd_h=3_000_000,
    )
    for launch_s, restart_s, max_lost_s, more_s in product((0, 4, 10, 13), (0, 3, 12), (0, 7), (0, 9, 21)):
        spare_s = launch_s + restart_s + more_s
        work_s = (ticks * 10 - spare_s) // 6 * 6
        shared = {
            "nodes": 2, "deadline_s": work_s + spare_s, "launch_s": launch_s, "restart_s": restart_s, "max_lost_s": max_lost_s,
        }  # fmt: skip
        job = {
            "rigid": lambda work_s=work_s, shared=shared: NodeJob.rigid(work_s=work_s, **shared),
            "elastic": lambda work_s=work_s, shared=shared: NodeJob.elastic(
                work_s=work_s, rates=(0, 1000, 1700), **shared
            ),
            "divisible": lambda work_s=work_s, shared=shared: NodeJob.divisible(items=6, item_s=work_s // 3, **shared),
        }[kind]()
        for policy in KEEPERS:
            if job.kind in policy.kinds and policy.name != "rigid-ours":
                outcomes = simulate_nodes(trace, policy, NodeWorkload(job=job), starts)
                assert not outcomes.missed.any(), (policy.name, job)
                assert (outcomes.lost_node_s == 0).all() or max_lost_s


@settings(max_examples=150 if LONG else 60)
@given(node_worlds(budgets=False), st.data())
def test_a_larger_budget_never_does_less_and_no_budget_is_exceeded(world: NodesWorld, data: st.DataObject) -> None:
    policies = [each for each in NODE_POLICIES.values() if job_of(world).kind in each.kinds]
    policy = data.draw(st.sampled_from(policies))
    starts = np.arange(windows_of(world))
    free = simulate_nodes(trace_of(world), policy, workload_of(world), starts)
    caps = sorted(data.draw(st.lists(st.integers(0, int(free.microusd.max()) + 1), min_size=2, max_size=4)))
    before = np.full(len(starts), -1)
    for cap in caps:
        capped = simulate_nodes(trace_of(world), policy, replace(workload_of(world), budget_microusd=cap), starts)
        assert (capped.microusd <= cap).all()
        assert (capped.stopped_by_budget | (capped.microusd == free.microusd)).all()
        assert not (capped.stopped_by_budget & (capped.finish_s >= 0)).any()
        if not world.saves_every_s:
            assert (capped.work_done >= before).all()
            assert (capped.work_done <= free.work_done).all()
        before = capped.work_done


@settings(max_examples=150 if LONG else 60)
@given(node_worlds(kinds=("elastic",), budgets=False, pools=2))
def test_elastic_is_never_later_than_rigid_where_changes_cost_nothing(world: NodesWorld) -> None:
    linear = tuple(range(0, 1000 * world.nodes + 1, 1000))
    elastic = replace(world, speeds=linear, launch_s=0, restart_s=0, saves_every_s=0, floor=0, fewest=1)
    rigid = replace(elastic, kind="rigid", fewest=world.nodes)
    starts = np.arange(windows_of(world))
    ends = [
        simulate_nodes(trace_of(each), NODE_POLICIES["spot"], workload_of(each), starts) for each in (elastic, rigid)
    ]
    assert ((ends[0].finish_s <= ends[1].finish_s) | (ends[1].finish_s == UNFINISHED)).all()
    assert ((ends[0].finish_s >= 0) | (ends[1].finish_s == UNFINISHED)).all()
    assert (ends[0].work_done >= ends[1].work_done).all()


@settings(max_examples=150 if LONG else 60)
@given(node_worlds(kinds=("elastic", "divisible"), budgets=False, pools=1, feasible=True), st.data())
def test_nothing_is_cheaper_than_all_the_spot_there_is_and_then_on_demand(
    world: NodesWorld, data: st.DataObject
) -> None:
    """With one price and linear work; what is left over after all spot node-seconds are used must be bought on-demand."""
    spot, demand = 1_000_000, 3_000_000
    linear = tuple(range(0, 1000 * world.nodes + 1, 1000))
    prices = tuple(tuple(spot for _ in row) for row in world.prices)
    world = replace(world, prices=prices, on_demand=demand, speeds=linear)
    policy = data.draw(st.sampled_from([each for each in KEEPERS if job_of(world).kind in each.kinds]))
    starts = np.arange(windows_of(world))
    outcomes = simulate_nodes(trace_of(world), policy, workload_of(world), starts)
    work_node_s = world.items * world.item_s or world.work_s * world.nodes
    for window, start in enumerate(starts.tolist()):
        row = window_of(world, start).machines[0]
        there = sum(min(world.nodes, row[now // world.tick_s]) for now in range(world.deadline_s))
        least = min(there, work_node_s) * spot + max(0, work_node_s - there) * demand
        assert outcomes.microusd[window] >= least // 3600


@settings(max_examples=150 if LONG else 60)
@given(node_worlds(budgets=False), st.data())
def test_the_on_demand_floor_holds_wherever_spot_is_held(world: NodesWorld, data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from([each for each in NODE_POLICIES.values() if job_of(world).kind in each.kinds]))
    floors: list[bool] = []

    def watch(situation: NodeSituation, choice: NodeChoice) -> None:
        least = np.minimum(world.floor, situation.useful_nodes)
        floors.append(bool(((choice.spot == 0) | (choice.on_demand >= least)).all()))

    simulate_nodes(trace_of(world), policy, workload_of(world), np.arange(windows_of(world)), watch)
    assert all(floors)
