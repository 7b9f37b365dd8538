"""Thrifty: an elastic gang that keeps enough slack to go on using spot nodes to the end.

Every preemption stops the whole gang for a restart, and that takes slack. A gang that has spent its slack on waiting must give
its spot nodes up, because the next loss would make it late, and pays on-demand for all of them to the end. So this policy tops
up while it still has a reserve: two changeovers (or ticks, where these are longer), and what preemptions are expected to take
in the rest of the work, at the pace at which they came so far. While there is more slack than that it holds spot nodes only.

A restart has a price too: a second in which the gang stands still is, at worst, a second of all nodes on-demand later. So nodes
are added, and on-demand nodes exchanged for spot nodes, only where what the new ones are likely to bring, in the lifetime that
spot nodes have had so far, is worth more than the restarts.

What it remembers: seconds with spot nodes and how often some were lost in them, spot node-seconds and how many were lost, what
it held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.policy.market.arrays import Bools, Floats, Ints
from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeSituation, NodeWhy
from holdfast.policy.nodes.greedy import Wish, all_spot, settle, top_up
from holdfast.policy.nodes.safety import roomy

__all__ = ["Thrifty"]

_SECONDS, _LOSSES, _NODE_SECONDS, _LOST_NODES, _HELD = range(5)


@dataclass(frozen=True, slots=True)
class Thrifty(NodePolicy):
    """Spot nodes while slack is plenty, topped up while there is still a reserve for preemptions; weighs restarts."""

    name: ClassVar[str] = "elastic-thrifty"
    summary: ClassVar[str] = "keeps a reserve of slack for preemptions, and weighs what restarts cost"
    keeps_deadline: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.ELASTIC, Kind.DIVISIBLE})

    life_s: float = 2 * 3600.0
    """How long a spot node lasts, and the time between two losses, as long as nothing is known."""

    def first_memory(self) -> tuple[float, ...]:
        """One loss of one node has been seen before anything has."""
        return (self.life_s, 1.0, self.life_s, 1.0, 0.0)

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        memory = self._learn(situation, memory)
        reserve_s = self._reserve_s(situation, memory)
        spot, on_demand = all_spot(situation)
        plenty = situation.slack_s >= reserve_s + 2 * situation.job.changeover_s * (situation.on_demand > on_demand)
        grown = self._worth(situation, memory, spot, on_demand)
        topped = top_up(situation)
        exchanged = self._exchanged(situation)
        kept = np.minimum(situation.spot, spot), on_demand
        idle = spot + on_demand == 0
        wishes = [
            Wish(plenty & idle & roomy(situation, spot, on_demand), spot, on_demand, NodeWhy.WAIT),
            Wish(plenty & ~grown & roomy(situation, *kept), *kept, NodeWhy.NOT_WORTH_A_RESTART),
            Wish(plenty & roomy(situation, spot, on_demand), spot, on_demand, NodeWhy.ALL_SPOT),
            Wish(
                self._worth_exchanging(situation, memory, exchanged[0], reserve_s) & roomy(situation, *exchanged),
                *exchanged,
                NodeWhy.EXCHANGED,
            ),
            Wish(roomy(situation, *topped), *topped, NodeWhy.TOPPED_UP),
        ]
        choice = settle(situation, wishes)
        memory[_HELD] = choice.spot
        return memory, choice

    def _learn(self, situation: NodeSituation, memory: Floats) -> Floats:
        lost = np.maximum(memory[_HELD] - situation.spot, 0)
        return np.vstack(
            [
                memory[_SECONDS] + situation.tick_s * (memory[_HELD] > 0),
                memory[_LOSSES] + (lost > 0),
                memory[_NODE_SECONDS] + situation.tick_s * memory[_HELD],
                memory[_LOST_NODES] + lost,
                memory[_HELD],
            ]
        )

    def _stop_s(self, situation: NodeSituation) -> int:
        """For how long a change stops the other nodes."""
        return 0 if situation.job.kind is Kind.DIVISIBLE else situation.job.restart_s

    def _reserve_s(self, situation: NodeSituation, memory: Floats) -> Floats:
        job = situation.job
        losses, lost_nodes = memory[_LOSSES] / memory[_SECONDS], memory[_LOST_NODES] / memory[_SECONDS]
        taken = losses * (self._stop_s(situation) + job.max_lost_s / 2) + lost_nodes * job.launch_s / job.nodes
        expected_s: Floats = situation.rest_s * np.minimum(taken, 1.0)
        least_s = job.changeover_s + max(job.changeover_s, situation.tick_s) + 2 * job.max_lost_s
        return least_s + expected_s

    def _life_s(self, situation: NodeSituation, memory: Floats) -> Floats:
        """How long a new spot node is likely to be of use."""
        life_s: Floats = np.minimum(memory[_NODE_SECONDS] / memory[_LOST_NODES], situation.rest_s)
        return life_s

    def _worth(self, situation: NodeSituation, memory: Floats, spot: Ints, on_demand: Ints) -> Bools:
        """Where more nodes than are there bring more than the restart takes. Both in work at full speed."""
        job = situation.job
        rates = np.array(job.rates, np.float64) / job.rates[-1]
        more = rates[np.minimum(spot + on_demand, job.nodes)] - rates[np.minimum(situation.spot + on_demand, job.nodes)]
        brings = more * (self._life_s(situation, memory) - job.launch_s)
        worth: Bools = (situation.spot == 0) | (brings > self._stop_s(situation))
        return worth

    def _exchanged(self, situation: NodeSituation) -> tuple[Ints, Ints]:
        """All spot nodes there are, and on-demand for the rest."""
        full = situation.useful_nodes
        spot = np.minimum(situation.spot_capacity, full - np.minimum(situation.job.on_demand_floor, full))
        return spot, full - spot

    def _worth_exchanging(self, situation: NodeSituation, memory: Floats, spot: Ints, reserve_s: Floats) -> Bools:
        """Where on-demand nodes may go for spot nodes: it saves more than two restarts cost, and the reserve stays whole."""
        job, price = situation.job, situation.on_demand_microusd_h
        stop_s = 2 * self._stop_s(situation)
        full = situation.useful_nodes
        count = np.maximum(spot + situation.on_demand - full, 0)
        saves = count * (price - situation.spot_microusd_h) * self._life_s(situation, memory)
        costs = price * (full * stop_s + count * job.launch_s)
        takes_s = stop_s + count * job.launch_s / job.nodes
        worth: Bools = (count > 0) & (saves > costs) & (situation.slack_s - takes_s >= reserve_s)
        return worth
