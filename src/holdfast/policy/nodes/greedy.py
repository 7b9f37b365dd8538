"""The simple node policies: on-demand only, spot only, greedy, and Uniform Progress carried over to nodes.

All but the first take all the spot nodes there are. They differ in when they top up: order on-demand nodes for those that are
missing. What is topped up stays, and spot nodes that come back take only places that are free: every exchange costs the gang a
restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.policy.market.arrays import Bools, Floats, Ints
from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeSituation, NodeWhy
from holdfast.policy.nodes.safety import roomy

__all__ = ["AllOnDemand", "AllSpot", "ElasticGreedy", "NodesUniformProgress", "Wish", "all_spot", "settle", "top_up"]


@dataclass(frozen=True, slots=True)
class Wish:
    """So many nodes where `holds`, for that reason."""

    holds: Bools
    spot: Ints
    on_demand: Ints
    why: NodeWhy


def settle(situation: NodeSituation, wishes: list[Wish]) -> NodeChoice:
    """For each window the first wish that holds; where none does, what is left: all on-demand while that is in time, and after that
    whatever stops nothing that runs."""
    full = situation.useful_nodes
    in_time = (situation.slack_s >= situation.job.changeover_s) | (situation.on_demand >= full)
    still = np.minimum(situation.spot, full)
    spot, on_demand = np.where(in_time, 0, still), np.where(in_time, full, full - still)
    why = np.where(in_time, NodeWhy.LAST_MOMENT, NodeWhy.TOO_LATE).astype(np.int8)
    for wish in reversed(wishes):
        np.copyto(spot, wish.spot, where=wish.holds)
        np.copyto(on_demand, wish.on_demand, where=wish.holds)
        np.copyto(why, np.int8(wish.why), where=wish.holds)
    return NodeChoice(spot, on_demand, why)


def all_spot(situation: NodeSituation) -> tuple[Ints, Ints]:
    """All spot nodes that there are and as few on-demand nodes as the floor allows. Nothing where they could not work."""
    job = situation.job
    on_demand = np.minimum(job.on_demand_floor, situation.useful_nodes)
    spot = np.minimum(situation.spot_capacity, situation.useful_nodes - on_demand)
    works = spot + on_demand >= np.minimum(job.min_nodes, situation.useful_nodes)
    return np.where(works, spot, 0), np.where(works, on_demand, 0)


def top_up(situation: NodeSituation) -> tuple[Ints, Ints]:
    """All nodes that are useful: the on-demand nodes that are there stay, spot takes what is free, on-demand the rest."""
    full = situation.useful_nodes
    fixed = np.minimum(np.maximum(situation.on_demand, situation.job.on_demand_floor), full)
    spot = np.minimum(situation.spot_capacity, full - fixed)
    return spot, full - spot


@dataclass(frozen=True, slots=True)
class AllOnDemand(NodePolicy):
    """All nodes on-demand from the first moment to the last."""

    name: ClassVar[str] = "on-demand"
    summary: ClassVar[str] = "all nodes on-demand"
    keeps_deadline: ClassVar[bool] = True

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        full = situation.useful_nodes
        return memory, NodeChoice(np.zeros_like(full), full, np.full(full.shape, NodeWhy.ON_DEMAND_ONLY, np.int8))


@dataclass(frozen=True, slots=True)
class AllSpot(NodePolicy):
    """All spot nodes there are; the deadline is a wish."""

    name: ClassVar[str] = "spot"
    summary: ClassVar[str] = "all spot nodes there are, however late it gets"
    keeps_deadline: ClassVar[bool] = False

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        spot, on_demand = all_spot(situation)
        why = np.where(spot + on_demand > 0, NodeWhy.ALL_SPOT, NodeWhy.WAIT).astype(np.int8)
        return memory, NodeChoice(spot, on_demand, why)


@dataclass(frozen=True, slots=True)
class ElasticGreedy(NodePolicy):
    """All spot nodes there are; topped up with on-demand when the deadline asks for it, and then to the end."""

    name: ClassVar[str] = "elastic-greedy"
    summary: ClassVar[str] = "all spot nodes there are, topped up at the last safe moment"
    keeps_deadline: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.ELASTIC, Kind.DIVISIBLE})

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        spot, on_demand = all_spot(situation)
        enough, idle = roomy(situation, spot, on_demand), spot + on_demand == 0
        topped = top_up(situation)
        wishes = [
            Wish(enough & idle, spot, on_demand, NodeWhy.WAIT),
            Wish(enough, spot, on_demand, NodeWhy.ALL_SPOT),
            Wish(roomy(situation, *topped), *topped, NodeWhy.TOPPED_UP),
        ]
        return memory, settle(situation, wishes)


@dataclass(frozen=True, slots=True)
class NodesUniformProgress(NodePolicy):
    """All spot nodes there are; topped up while the job is behind the line from start to deadline, and until it is two changeovers
    ahead of it."""

    name: ClassVar[str] = "elastic-uniform-progress"
    summary: ClassVar[str] = "all spot nodes there are, topped up while behind uniform progress"
    keeps_deadline: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.ELASTIC, Kind.DIVISIBLE})

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        job, now_s = situation.job, situation.now_s
        # In time on all nodes, so that the products fit into 63 bits. Progress ≥ t·C/R without a division: both sides times R.
        done = (job.full_s - situation.rest_s) * job.deadline_s
        behind = done < now_s * job.full_s
        keeps = (situation.on_demand > job.on_demand_floor) & (done < (now_s + 2 * job.changeover_s) * job.full_s)
        spot, on_demand = all_spot(situation)
        enough, idle = roomy(situation, spot, on_demand), spot + on_demand == 0
        topped = top_up(situation)
        topped_safe = roomy(situation, *topped)
        held_spot, held = self._held(situation)
        wishes = [
            Wish(behind & topped_safe, *topped, NodeWhy.BEHIND),
            Wish(keeps & roomy(situation, held_spot, held), held_spot, held, NodeWhy.KEPT_ON_DEMAND),
            Wish(enough & idle, spot, on_demand, NodeWhy.WAIT),
            Wish(enough, spot, on_demand, NodeWhy.ALL_SPOT),
            Wish(topped_safe, *topped, NodeWhy.TOPPED_UP),
        ]
        return memory, settle(situation, wishes)

    def _held(self, situation: NodeSituation) -> tuple[Ints, Ints]:
        """The on-demand nodes that are there, and spot where there is a place."""
        on_demand = np.minimum(situation.on_demand, situation.useful_nodes)
        return np.minimum(situation.spot_capacity, situation.useful_nodes - on_demand), on_demand
