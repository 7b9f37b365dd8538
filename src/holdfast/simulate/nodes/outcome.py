"""What became of simulated windows of several nodes: money, node-seconds and where they went, one array element per window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import Bools, Floats, Ints
from holdfast.policy.nodes.facts import NodeJob
from holdfast.simulate.market.outcome import UNFINISHED

__all__ = ["NodeOutcomes"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NodeOutcomes:
    """Every billed node-second is in one bucket: useful, lost, changeover or idle. Time in which no node is held is waiting.

    Money is in millionths of a dollar, time in seconds.
    """

    job: NodeJob
    starts: Ints
    """First tick of each window."""
    spot_microusd: Ints
    on_demand_microusd: Ints
    microusd: Ints
    """Spot and on-demand together, rounded once. Never above the budget."""
    finish_s: Ints
    """Since the window's start; UNFINISHED where the horizon or the end of the budget came first."""
    stopped_by_budget: Bools
    work_done: Ints
    """In the unit of `NodeJob.total_work`; what a preemption took back is not in it."""
    useful_node_s: Ints
    lost_node_s: Ints
    """Worked, and taken back by preemptions."""
    changeover_node_s: Ints
    """Launches and restarts."""
    idle_node_s: Ints
    """Ready nodes of a gang that had too few of them to work."""
    waiting_s: Ints
    """By the clock: nothing was held, nothing billed."""
    spot_node_s: Ints
    on_demand_node_s: Ints
    preemptions: Ints
    """Nodes that were taken away."""
    restarts: Ints
    """Gangs: how often it began to work again on other nodes. Divisible: how often a begun item was taken up again."""
    spot_launches: Ints
    on_demand_launches: Ints

    @property
    def missed(self) -> Bools:
        late: Bools = (self.finish_s == UNFINISHED) | (self.finish_s > self.job.deadline_s)
        return late

    @property
    def billed_node_s(self) -> Ints:
        return self.spot_node_s + self.on_demand_node_s

    @property
    def done_share(self) -> Floats:
        """Of the work."""
        share: Floats = self.work_done / self.job.total_work
        return share

    @property
    def goodput(self) -> Floats:
        """Useful by billed node-seconds; 0 where nothing was billed."""
        share: Floats = self.useful_node_s / np.maximum(self.billed_node_s, 1)
        return share
