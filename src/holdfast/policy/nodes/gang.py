"""Market policies for rigid gangs: spot or on-demand, for all nodes at once.

A gang that works with all its nodes or not at all is one machine to a market policy: there is spot capacity where there is
enough for all, a changeover is a launch and a restart, a price is that of the gang. So every market policy is a node policy,
with its safety rules. An on-demand floor makes part of the "spot" gang on-demand; it comes and goes with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Floats, Situation, cheapest_offer
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Job
from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeSituation, NodeWhy

__all__ = ["RigidGang"]


@dataclass(frozen=True, slots=True)
class RigidGang(NodePolicy):
    """All nodes in the market that a market policy names."""

    market: MarketPolicy

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.RIGID})

    @property
    def name(self) -> str:  # type: ignore[override]  # one class for all market policies
        return f"rigid-{self.market.name}"

    @property
    def summary(self) -> str:  # type: ignore[override]
        return f"the whole gang: {self.market.summary}"

    @property
    def keeps_deadline(self) -> bool:  # type: ignore[override]
        return self.market.keeps_deadline

    def first_memory(self) -> tuple[float, ...]:
        return self.market.first_memory(1)

    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        job = situation.job
        floor, spot_nodes = job.on_demand_floor, job.nodes - job.on_demand_floor
        memory, choice = self.market.choose(self._as_market(situation, floor, spot_nodes), memory)
        spot = np.where(choice.target >= 0, spot_nodes, 0)
        on_demand = np.where(choice.target == ON_DEMAND, job.nodes, np.where(choice.target >= 0, floor, 0))
        return memory, NodeChoice(spot, on_demand, np.full(spot.shape, NodeWhy.MARKET, np.int8))

    def _as_market(self, situation: NodeSituation, floor: int, spot_nodes: int) -> Situation:
        """What a market policy would see. A gang of which a node is gone does not run any more."""
        job = situation.job
        on_spot = (situation.spot >= spot_nodes) & (situation.on_demand == floor) & (spot_nodes > 0)
        running = np.where(on_spot, 0, np.where(situation.on_demand == job.nodes, ON_DEMAND, NOTHING))
        launching = situation.launch_left_s + job.restart_s * (situation.launch_left_s > 0)
        changeover_left_s = np.where(running == NOTHING, 0, np.maximum(launching, situation.restart_left_s))
        there = ((situation.spot_capacity >= spot_nodes) & (spot_nodes > 0)).astype(np.int8).reshape(1, -1)
        price = (situation.spot_microusd_h * spot_nodes + situation.on_demand_microusd_h * floor).reshape(1, -1)
        on_demand_price = situation.on_demand_microusd_h * job.nodes
        return Situation(
            job=Job(
                work_s=job.full_s, deadline_s=job.deadline_s, changeover_s=job.changeover_s, max_lost_s=job.max_lost_s
            ),
            now_s=situation.now_s,
            tick_s=situation.tick_s,
            work_left_s=situation.rest_s,
            running=running,
            changeover_left_s=changeover_left_s,
            available=there,
            microusd_h=price,
            on_demand_microusd_h=on_demand_price,
            cheapest=cheapest_offer(there, price, on_demand_price),
        )
