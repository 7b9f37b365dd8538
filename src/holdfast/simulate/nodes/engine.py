"""Play a node policy on many windows of a trace at once: jobs of several nodes, on a mix of spot and on-demand.

    trace (counts per pool) ──→ Fleet: which nodes a window holds ──→ work: a gang (`nodes_gang`) or items (`nodes_items`)
                                        ↑ wanted nodes                       │ what is left
                                        policy ←─────────────────────────────┘            Purse: what it costs, the cap

What a tick means, in this order:

1. **The market moves.** Capacity and prices hold through the tick. Where a pool has fewer nodes than are held there, the newest
   of them are preempted (of one age, that with the highest number). What they lose is up to the work. Nodes that have just been
   launched join.
2. **The policy is asked**, and sees that they are gone. Then nodes that are too many are given up, the newest first, after a
   save. New spot nodes come from the cheapest pools that have some left below the on-demand price; on-demand is always there. A
   new node gets the lowest free number.
3. **The tick runs.** A node that was ordered joins when it has been launched, within a tick if need be: all nodes are ordered
   at ticks, so all of them join at the same moment of a tick, and a tick has two stretches at most in which nothing changes.
4. **The end.** Work that ends within a tick ends all bills at that second. So does the budget: the job stops at the last second
   that is paid for, saved.

Bills are per second and node, from its order on. A tick and a second are the engine's as in `engine`; a rigid gang in one pool
comes out as there, to the last millionth of a dollar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Bools, Floats, Ints
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, LONGEST_S
from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeJob, NodeSituation
from holdfast.simulate.nodes.fleet import Fleet
from holdfast.simulate.nodes.gang import GangWork
from holdfast.simulate.nodes.items import ItemWork
from holdfast.simulate.nodes.outcome import NodeOutcomes
from holdfast.simulate.nodes.purse import Purse
from holdfast.simulate.traces.trace import Trace

__all__ = ["NodeWatch", "NodeWorkload", "simulate_nodes"]

NodeWatch: TypeAlias = Callable[[NodeSituation, NodeChoice], None]
"""Told of every tick: what the policy was told, and what it chose."""
_MOST_CAP_MICROUSD = (1 << 61) // 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWorkload:
    """One job in the simulator."""

    job: NodeJob
    horizon_s: int | None = None
    """How long a job that is late is followed; None: to its deadline. Divisible work is never begun for later than the deadline."""
    budget_microusd: int | None = None
    """The job stops, saved, at the last moment at which everything it holds is still paid for."""

    def __post_init__(self) -> None:
        if not 0 < self.follow_s <= LONGEST_S:
            raise UsageError(f"a horizon lies between 1 and {LONGEST_S} s")
        if self.job.kind is Kind.DIVISIBLE and self.follow_s != self.job.deadline_s:
            raise UsageError("divisible work is followed to its deadline: no item is begun that would end later")
        if self.budget_microusd is not None and not 0 <= self.budget_microusd <= _MOST_CAP_MICROUSD:
            raise UsageError(f"a budget lies between $0 and ${_MOST_CAP_MICROUSD / 1e6:,.0f}")

    @property
    def follow_s(self) -> int:
        return self.job.deadline_s if self.horizon_s is None else self.horizon_s


def simulate_nodes(
    trace: Trace, policy: NodePolicy, workload: NodeWorkload, starts: Ints, watch: NodeWatch | None = None
) -> NodeOutcomes:
    """Play `policy` on the windows that begin at these ticks. Deterministic; the arrays of the result are in the order of
    `starts`."""
    job, starts = workload.job, np.asarray(starts, np.int64)
    ticks = -(-workload.follow_s // trace.tick_s)
    if not len(starts):
        raise UsageError("there is no window to simulate")
    if int(starts.min()) < 0 or int(starts.max()) + ticks > trace.ticks:
        raise UsageError(f"windows of {ticks} ticks do not all lie in a trace of {trace.ticks}")
    if job.kind not in policy.kinds:
        raise UsageError(f"policy {policy.name} is not for {job.kind.name.lower()} work")
    if max(int(trace.microusd_h.max()), trace.on_demand_microusd_h) * job.nodes > HIGHEST_MICROUSD_H:
        raise UsageError(f"{job.nodes} nodes cost more than ${HIGHEST_MICROUSD_H / 1e6:,.0f} an hour; simulate fewer")
    windows = _Windows(trace, policy, workload, starts)
    for tick in range(ticks):
        if not windows.advance(tick, watch):
            break
    return windows.outcomes()


class _Windows:
    """All windows at one moment."""

    def __init__(self, trace: Trace, policy: NodePolicy, workload: NodeWorkload, starts: Ints) -> None:
        self.trace, self.policy, self.workload, self.starts = trace, policy, workload, starts
        job, count = workload.job, len(starts)
        first = np.array(policy.first_memory(), np.float64).reshape(-1, 1)
        self.memory: Floats = np.repeat(first, count, axis=1)
        self.fleet = Fleet(job.nodes, count)
        cap = None if workload.budget_microusd is None else workload.budget_microusd * 3600
        self.purse = Purse(count, trace.on_demand_microusd_h, cap)
        self.work: GangWork | ItemWork = (ItemWork if job.kind is Kind.DIVISIBLE else GangWork)(
            job, self.fleet, self.purse
        )
        self.preemptions, self.spot_launches, self.on_demand_launches = np.zeros((3, count), np.int64)

    def advance(self, tick: int, watch: NodeWatch | None) -> bool:
        """One tick of every window. False when all are over."""
        trace, fleet, work = self.trace, self.fleet, self.work
        at = self.starts + tick
        now_s = tick * trace.tick_s
        capacity = np.take(trace.capacity, at, axis=1).astype(np.int64)
        prices = np.take(trace.microusd_h, at, axis=1)
        self._preempt(capacity)
        work.join(fleet.join(now_s))
        held = fleet.held(len(capacity))
        below = prices < trace.on_demand_microusd_h
        room = np.where(below, capacity - held, 0)
        situation = self._situation(now_s, held.sum(axis=0) + room.sum(axis=0), capacity, prices, below)
        self.memory, choice = self.policy.choose(situation, self.memory)
        self._check(situation, choice)
        if watch is not None:
            watch(situation, choice)
        self._follow(choice, situation, room, prices, now_s)
        self._run(now_s, min(trace.tick_s, self.workload.follow_s - now_s), prices)
        return not work.over.all()

    def _preempt(self, capacity: Ints) -> None:
        held = self.fleet.held(len(capacity))
        for pool, (has, there) in enumerate(zip(held, capacity, strict=True)):
            if (has > there).any():
                gone = self.fleet.newest(self.fleet.place == pool, np.maximum(has - there, 0))
                self.preemptions += gone.sum(axis=0)
                self.work.lose(gone)
                self.fleet.drop(gone)

    def _situation(self, now_s: int, spot_capacity: Ints, capacity: Ints, prices: Ints, below: Bools) -> NodeSituation:
        trace, fleet, work, job = self.trace, self.fleet, self.work, self.workload.job
        spot_ready, spot_launching, on_demand_ready, on_demand_launching = fleet.counts()
        on_demand = trace.on_demand_microusd_h
        has = below & (capacity > 0)
        return NodeSituation(
            job=job,
            now_s=now_s,
            tick_s=trace.tick_s,
            work_left=work.left,
            rest_s=work.rest_s(),
            useful_nodes=work.useful_nodes(now_s),
            spot_ready=spot_ready,
            spot_launching=spot_launching,
            on_demand_ready=on_demand_ready,
            on_demand_launching=on_demand_launching,
            launch_left_s=fleet.launch_left_s(now_s),
            restart_left_s=work.restart_left_s,
            spot_capacity=np.minimum(spot_capacity, job.nodes),
            spot_microusd_h=np.where(has.any(axis=0), np.where(has, prices, on_demand), prices).min(axis=0),
            on_demand_microusd_h=on_demand,
        )

    def _check(self, situation: NodeSituation, choice: NodeChoice) -> None:
        too_many = (choice.spot > situation.spot_capacity) | (choice.spot + choice.on_demand > self.workload.job.nodes)
        if ((too_many | (np.minimum(choice.spot, choice.on_demand) < 0)) & ~self.work.over).any():
            raise UsageError(f"policy {self.policy.name} wants more nodes than there are, or than the job may have")

    def _follow(self, choice: NodeChoice, situation: NodeSituation, room: Ints, prices: Ints, now_s: int) -> None:
        """Give up what is too many, order what is missing."""
        fleet, over = self.fleet, self.work.over
        more_spot = np.where(over, 0, choice.spot - situation.spot)
        more_on_demand = np.where(over, 0, choice.on_demand - situation.on_demand)
        if (np.minimum(more_spot, more_on_demand) < 0).any():
            gone = fleet.newest(fleet.on_spot, np.maximum(-more_spot, 0))
            gone |= fleet.newest(fleet.on_demand, np.maximum(-more_on_demand, 0))
            self.work.give_up(gone)
            fleet.drop(gone)
        new_spot, new_on_demand = np.maximum(more_spot, 0), np.maximum(more_on_demand, 0)
        if (new_spot + new_on_demand > 0).any():
            fleet.order(new_spot, new_on_demand, room, prices, now_s + self.work.joins_after_s)
            self.spot_launches += new_spot
            self.on_demand_launches += new_on_demand

    def _run(self, now_s: int, length_s: int, prices: Ints) -> None:
        """The stretches before and after the moment of the tick at which nodes join."""
        join_s = self.work.joins_after_s % self.trace.tick_s
        moments = [0, join_s, length_s] if 0 < join_s < length_s else [0, length_s]
        for begin_s, end_s in pairwise(moments):
            self.work.join(self.fleet.join(now_s + begin_s))
            self.work.run(now_s + begin_s, end_s - begin_s, prices)

    def outcomes(self) -> NodeOutcomes:
        work, purse, job = self.work, self.purse, self.workload.job
        return NodeOutcomes(
            job=job,
            starts=self.starts,
            spot_microusd=purse.spot_microusd,
            on_demand_microusd=purse.on_demand_microusd,
            microusd=purse.microusd,
            finish_s=work.finish_s,
            stopped_by_budget=work.stopped,
            work_done=job.total_work - work.left,
            useful_node_s=work.worked_node_s - work.lost_node_s,
            lost_node_s=work.lost_node_s,
            changeover_node_s=work.changeover_node_s,
            idle_node_s=work.idle_node_s,
            waiting_s=work.waiting_s,
            spot_node_s=purse.spot_node_s,
            on_demand_node_s=purse.on_demand_node_s,
            preemptions=self.preemptions,
            restarts=work.restarts,
            spot_launches=self.spot_launches,
            on_demand_launches=self.on_demand_launches,
        )
