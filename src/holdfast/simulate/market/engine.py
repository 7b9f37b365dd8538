"""Play a policy on many windows of a trace at once. The clock goes tick by tick, the windows side by side in arrays.

What a tick means, in this order:

1. **The market moves.** Capacity and prices of the tick hold from its first second to its last. A spot machine whose pool has
   less capacity now than its gang needs is preempted at this boundary; everything that it did until then counts as done, and
   work since its last save is lost (`Job.max_lost_s`: one save per so much work; a launch and a voluntary stop save too).
2. **The policy is asked**, after the preemption: it sees that nothing runs any more. With `Workload.asks` it knows of capacity
   only where the job runs; a pool that it wants is tried, and if there is none the policy is asked again in the same tick with
   that answer. A try takes no time. On-demand is always there.
3. **What it chose runs through the tick.** A launch begins with the changeover: nothing is done in it, and it is billed. A
   changeover goes on across ticks; a machine that is preempted or stopped within it has been paid for nothing. A change of pool
   or market is a stop and a launch. A launch in another spot pool than the last one brings the data there (`move_microusd`).
4. **The end.** Work that ends within a tick ends the bill at that second. A window ends at its horizon, which may lie within a
   tick.

The deadline is nothing special here: a job is late when its last second of work lies behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import (
    NOTHING,
    ON_DEMAND,
    Bools,
    Choice,
    Flags,
    Floats,
    Ints,
    Situation,
    cheapest_offer,
)
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H
from holdfast.policy.market.money import microusd
from holdfast.simulate.market.outcome import UNFINISHED, Outcomes
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

__all__ = ["Watch", "simulate"]

_Number = TypeVar("_Number", np.int64, np.int8)
Watch: TypeAlias = Callable[[Situation, Choice], None]
"""Told of every tick: what the policy was last told, and what it chose."""


def simulate(
    trace: Trace, policy: MarketPolicy, workload: Workload, starts: Ints, watch: Watch | None = None
) -> Outcomes:
    """Play `policy` on the windows that begin at these ticks. Deterministic; the arrays of the result are in the order of
    `starts`."""
    starts = np.asarray(starts, np.int64)
    market = _Market.of(trace, workload.gang)
    ticks = -(-workload.follow_s // trace.tick_s)
    if not len(starts):
        raise UsageError("there is no window to simulate")
    first, last = int(starts.min()), int(starts.max()) + ticks
    if first < 0 or last > trace.ticks:
        raise UsageError(
            f"windows of {ticks} ticks do not all lie in a trace of {trace.ticks}: they need {first} to {last}"
        )
    windows = _Windows(policy, workload, market, starts)
    for tick in range(ticks):
        if not windows.advance(tick, watch):
            break
    return windows.outcomes()


@dataclass(frozen=True, slots=True)
class _Market:
    """The trace as one gang sees it. Pool by tick."""

    tick_s: int
    there: Flags
    microusd_h: Ints
    on_demand_microusd_h: int
    cheapest: Ints
    """Per tick, as far as everything is known."""

    @classmethod
    def of(cls, trace: Trace, gang: int) -> _Market:
        there = trace.available(gang).astype(np.int8)
        microusd_h, on_demand = trace.microusd_h * gang, trace.on_demand_microusd_h * gang
        if max(int(microusd_h.max()), on_demand) > HIGHEST_MICROUSD_H:
            raise UsageError(
                f"a gang of {gang} costs more than ${HIGHEST_MICROUSD_H / 1e6:,.0f} an hour; simulate fewer"
            )
        return cls(trace.tick_s, there, microusd_h, on_demand, cheapest_offer(there, microusd_h, on_demand))


class _Windows:
    """All windows at one moment. Money is in hour-seconds (see `policy.market.money`) until the end."""

    def __init__(self, policy: MarketPolicy, workload: Workload, market: _Market, starts: Ints) -> None:
        self.policy, self.workload, self.market, self.starts = policy, workload, market, starts
        count, pools = len(starts), len(market.there)
        self.memory: Floats = np.repeat(np.array(policy.first_memory(pools), np.float64).reshape(-1, 1), count, axis=1)
        self.column = np.arange(count)
        self.left_s = np.full(count, workload.job.work_s, np.int64)
        self.running = np.full(count, NOTHING, np.int64)
        self.finish_s = np.full(count, UNFINISHED, np.int64)
        self.changeover_left_s, self.unsaved_s = np.zeros((2, count), np.int64)
        # Of the machine that runs now, since its launch: billed time, and money where it is a spot machine.
        self.machine_s, self.machine_hs = np.zeros((2, count), np.int64)
        self.spot_hs, self.refund_hs = np.zeros((2, count), np.int64)
        self.billed_s, self.on_demand_s, self.changeover_s, self.lost_s, self.waiting_s = np.zeros((5, count), np.int64)
        # The pool that holds the data, of the last launch on spot capacity; and what it cost to bring it from pool to pool.
        self.home = np.full(count, NOTHING, np.int64)
        self.egress_microusd = np.zeros(count, np.int64)
        self.moves = np.array(workload.move_microusd, np.int64)
        if self.moves.size and (self.moves.shape != (pools, pools) or self.moves.diagonal().any()):
            raise UsageError(f"moves cost something from each of the {pools} pools to each, and nothing to itself")
        self.preemptions, self.spot_launches, self.on_demand_launches = np.zeros((3, count), np.int64)

    def advance(self, tick: int, watch: Watch | None) -> bool:
        """One tick of every window. False when all are done."""
        market = self.market
        at = self.starts + tick
        there = np.take(market.there, at, axis=1)
        prices = np.take(market.microusd_h, at, axis=1)
        self._preempt(there)
        now_s = tick * market.tick_s
        situation = Situation(
            job=self.workload.job,
            now_s=now_s,
            tick_s=market.tick_s,
            work_left_s=self.left_s,
            running=self.running,
            changeover_left_s=self.changeover_left_s,
            available=there,
            microusd_h=prices,
            on_demand_microusd_h=market.on_demand_microusd_h,
            cheapest=market.cheapest[at],
        )
        choice = self._ask(situation, there, watch)
        target = np.where(self.left_s > 0, choice.target, NOTHING)
        self._launch(target)
        length_s = min(market.tick_s, self.workload.follow_s - now_s)
        self._run(now_s, length_s, prices)
        return bool((self.left_s > 0).any())

    def _of_pool(self, of: NDArray[_Number], pool: Ints) -> NDArray[_Number]:
        """Per window the value of its pool; of the first pool where it has none."""
        chosen: NDArray[_Number] = of[0] if len(of) == 1 else of[np.maximum(pool, 0), self.column]
        return chosen

    def _preempt(self, there: Flags) -> None:
        taken = (self.running >= 0) & (self._of_pool(there, self.running) == 0)
        if not taken.any():
            return
        self.running = np.where(taken, NOTHING, self.running)
        self.changeover_left_s = np.where(taken, 0, self.changeover_left_s)
        self.preemptions += taken
        if self.workload.free_if_taken_within_s:
            early = taken & (self.machine_s < self.workload.free_if_taken_within_s)
            self.refund_hs += early * self.machine_hs
        if self.workload.job.max_lost_s:
            lost_s = taken * self.unsaved_s
            self.lost_s += lost_s
            self.left_s = self.left_s + lost_s
            self.unsaved_s -= lost_s

    def _ask(self, situation: Situation, there: Flags, watch: Watch | None) -> Choice:
        if self.workload.asks:
            situation, memory, choice = self._ask_around(situation, there)
        else:
            memory, choice = self.policy.choose(situation, self.memory)
        if (((choice.target >= 0) & (self._of_pool(there, choice.target) == 0)) & (self.left_s > 0)).any():
            raise UsageError(f"policy {self.policy.name} has chosen a pool that it knew to have no capacity")
        self.memory = memory
        if watch is not None:
            watch(situation, choice)
        return choice

    def _ask_around(self, situation: Situation, there: Flags) -> tuple[Situation, Floats, Choice]:
        """Ask until every pool that is wanted has answered. Of each window at most one pool is tried per round."""
        pool_numbers = np.arange(len(there))[:, None]
        known = np.where(pool_numbers == self.running, there, np.int8(-1))
        while True:
            offer = cheapest_offer(known, situation.microusd_h, situation.on_demand_microusd_h)
            situation = replace(situation, available=known, cheapest=offer)
            memory, choice = self.policy.choose(situation, self.memory)
            tried = (pool_numbers == choice.target) & (known < 0)
            refused: Bools = tried & (there == 0)
            if not refused.any():
                return situation, memory, choice
            known = np.where(refused, np.int8(0), known)

    def _launch(self, target: Ints) -> None:
        changed = target != self.running
        if not changed.any():
            return
        spot, on_demand = changed & (target >= 0), changed & (target == ON_DEMAND)
        self.changeover_left_s = np.where(
            changed, (spot | on_demand) * self.workload.job.changeover_s, self.changeover_left_s
        )
        self.unsaved_s *= ~changed
        self.machine_s *= ~changed
        self.machine_hs *= ~changed
        self.spot_launches += spot
        self.on_demand_launches += on_demand
        self.running = target
        if self.moves.size:
            moved = spot & (self.home >= 0)
            self.egress_microusd += moved * self.moves[np.maximum(self.home, 0), np.maximum(target, 0)]
            self.home = np.where(spot, target, self.home)

    def _run(self, now_s: int, length_s: int, prices: Ints) -> None:
        busy, on_demand = self.running != NOTHING, self.running == ON_DEMAND
        warming_s = np.minimum(self.changeover_left_s, length_s)
        worked_s = np.minimum(length_s - warming_s, self.left_s) * busy
        billed_s = warming_s + worked_s
        on_demand_s = billed_s * on_demand
        spot_hs = (billed_s - on_demand_s) * self._of_pool(prices, self.running)
        self.spot_hs += spot_hs
        self.on_demand_s += on_demand_s
        self.billed_s += billed_s
        self.changeover_s += warming_s
        self.changeover_left_s = self.changeover_left_s - warming_s
        self.waiting_s += length_s * (~busy & (self.left_s > 0))
        self.left_s = self.left_s - worked_s
        done = busy & (self.left_s == 0)
        if done.any():
            self.finish_s = np.where(done, now_s + billed_s, self.finish_s)
            # Ended here and not at the next tick: what does not run any more cannot be preempted.
            self.running = np.where(done, NOTHING, self.running)
        if self.workload.free_if_taken_within_s:
            self.machine_s += billed_s
            self.machine_hs += spot_hs
        if self.workload.job.max_lost_s:
            self.unsaved_s = (self.unsaved_s + worked_s) % self.workload.job.max_lost_s

    def outcomes(self) -> Outcomes:
        on_demand_hs = self.on_demand_s * self.market.on_demand_microusd_h
        return Outcomes(
            deadline_s=self.workload.job.deadline_s,
            starts=self.starts,
            spot_microusd=microusd(self.spot_hs),
            on_demand_microusd=microusd(on_demand_hs),
            egress_microusd=self.egress_microusd,
            microusd=microusd(self.spot_hs + on_demand_hs) + self.egress_microusd,
            refund_microusd=microusd(self.refund_hs),
            finish_s=self.finish_s,
            useful_s=self.workload.job.work_s - self.left_s,
            lost_s=self.lost_s,
            changeover_s=self.changeover_s,
            waiting_s=self.waiting_s,
            spot_s=self.billed_s - self.on_demand_s,
            on_demand_s=self.on_demand_s,
            preemptions=self.preemptions,
            spot_launches=self.spot_launches,
            on_demand_launches=self.on_demand_launches,
        )
