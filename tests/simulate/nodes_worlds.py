"""Random small worlds for jobs of several nodes: windows of seconds to minutes, with everything in them that is simulated."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from slow_nodes import NodesWorld
from worlds import in_runs

from holdfast.policy.market.arrays import Floats
from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeJob, NodeSituation, NodeWhy
from holdfast.simulate.nodes.engine import NodeWorkload

KINDS = {"rigid": Kind.RIGID, "elastic": Kind.ELASTIC, "divisible": Kind.DIVISIBLE}
PRICES = (0, 1, 7, 900, 3599, 973_100, 1_100_000, 2_000_000, 3_060_000)


@st.composite
def node_worlds(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
    pools: int = 3,
    feasible: bool = False,
    budgets: bool = True,
    windows: int = 3,
) -> NodesWorld:
    """`feasible`: all nodes on-demand at once would be in time. Longer than one window.

    The market is drawn by a generator of its own: drawn tick by tick by a strategy, hardly anything would happen in it.
    """
    kind = draw(st.sampled_from(kinds))
    luck = random.Random(draw(st.integers(0, 1 << 32)))
    tick_s, nodes = luck.randint(1, 12), luck.randint(1, 5)
    launch_s = luck.choice([0, luck.randint(1, 20), luck.randint(1, tick_s), tick_s * luck.randint(1, 3)])
    restart_s = luck.choice([0, luck.randint(1, 10), luck.randint(1, tick_s)])
    item_s = luck.randint(1, 30) if kind == "divisible" else 0
    items = luck.randint(1, 3 * nodes) if kind == "divisible" else 0
    work_s = 0 if kind == "divisible" else luck.randint(1, 90)
    full_s = work_s or -(-items // nodes) * item_s
    spare_s = luck.randint(
        launch_s + restart_s if feasible or luck.random() < 0.8 else -full_s + 1, 120 + launch_s + restart_s
    )
    deadline_s = full_s + spare_s
    horizon_s = luck.randint(1, 250) if kind != "divisible" and not feasible and luck.random() < 0.5 else 0
    ticks = -(-max(deadline_s, horizon_s) // tick_s) + windows - 1
    rows = luck.randint(1, pools)
    machines = tuple(tuple(in_runs(luck, range(nodes + 2), ticks)) for _ in range(rows))
    prices = tuple(tuple(in_runs(luck, PRICES, ticks)) for _ in range(rows))
    on_demand = luck.choice([3_060_000, 3_060_000, luck.choice(PRICES)])
    speeds = _speeds(luck, nodes) if kind == "elastic" else tuple(range(0, 1000 * nodes + 1, 1000))
    return NodesWorld(
        kind=kind,
        tick_s=tick_s,
        machines=machines,
        prices=prices,
        on_demand=on_demand,
        nodes=nodes,
        fewest={"rigid": nodes, "elastic": luck.randint(1, nodes), "divisible": 1}[kind],
        speeds=speeds,
        work_s=work_s,
        items=items,
        item_s=item_s,
        deadline_s=deadline_s,
        launch_s=launch_s,
        restart_s=restart_s,
        saves_every_s=luck.choice([0, luck.randint(1, 20)]),
        floor=luck.choice([0, 0, luck.randint(0, nodes)]),
        horizon_s=horizon_s,
        budget=luck.randint(0, on_demand * nodes * deadline_s // 3600 + 1) if budgets and luck.random() < 0.4 else None,
    )


def _speeds(luck: random.Random, nodes: int) -> tuple[int, ...]:
    if luck.random() < 0.5:
        return tuple(range(0, 1000 * nodes + 1, 1000))
    return (0, *sorted([1000, *(luck.randint(1000, 1000 * nodes) for _ in range(nodes - 1))]))


def job_of(world: NodesWorld) -> NodeJob:
    divisible = world.kind == "divisible"
    return NodeJob(
        kind=KINDS[world.kind],
        nodes=world.nodes,
        min_nodes=world.fewest,
        rates=tuple(range(world.nodes + 1)) if divisible else world.speeds,
        total_work=world.items * world.item_s if divisible else world.work_s * world.speeds[-1],
        item_s=world.item_s,
        deadline_s=world.deadline_s,
        launch_s=world.launch_s,
        restart_s=world.restart_s,
        max_lost_s=world.saves_every_s,
        on_demand_floor=world.floor,
    )


def workload_of(world: NodesWorld) -> NodeWorkload:
    return NodeWorkload(job=job_of(world), horizon_s=world.horizon_s or None, budget_microusd=world.budget)


@dataclass(frozen=True, slots=True)
class Erratic(NodePolicy):
    """Wants anything that is possible, and remembers something: a number that depends on all that it has seen."""

    seed: int
    keeps: int = 4
    """The higher, the rarer it changes its mind."""

    name = "erratic"
    summary = "anything"
    keeps_deadline = False

    def first_memory(self) -> tuple[float, ...]:
        return (float(self.seed), 0.0)

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        seen = situation.now_s * 12345 + situation.work_left * 7919 + situation.rest_s * 31 + situation.useful_nodes
        mixed = (memory[0].astype(np.int64) * 1103515245 + seen) % 65521
        nodes = situation.job.nodes
        stays = (mixed % self.keeps != 0) & (situation.spot + situation.on_demand <= nodes)
        spot = np.where(stays, situation.spot, np.minimum((mixed >> 3) % (nodes + 1), situation.spot_capacity))
        on_demand = np.where(stays, situation.on_demand, np.minimum((mixed >> 6) % (nodes + 1), nodes - spot))
        remembered = np.vstack([mixed.astype(np.float64), memory[1] + 1])
        return remembered, NodeChoice(spot, on_demand, np.full(len(mixed), NodeWhy.WAIT, np.int8))
