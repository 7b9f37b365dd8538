"""A trace: how much spot capacity each pool had, tick by tick, and what it cost. Readers and generators make them, the engine
plays them.

What was between two ticks nobody knows: a probe says how many machines could be had at its moment, and that is taken to hold
until the next one. So lifetimes shorter than a tick do not show, and "at least one" says nothing of sixteen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Bools, Ints
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, LONGEST_S

__all__ = ["Trace", "joined"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Spot capacity and prices of some pools on one clock. The arrays are not to be changed."""

    pools: tuple[str, ...]
    tick_s: int
    capacity: NDArray[np.int32]
    """Pool by tick: machines that can be had, or run on."""
    microusd_h: Ints
    """Pool by tick: spot price of one machine, in millionths of a dollar per hour."""
    on_demand_microusd_h: int
    """Price of one machine."""

    def __post_init__(self) -> None:
        if not self.pools or len(set(self.pools)) < len(self.pools):
            raise UsageError(f"a trace has at least one pool, and each once: {self.pools}")
        if not 0 < self.tick_s <= LONGEST_S // 8:
            raise UsageError(f"a tick lasts between 1 and {LONGEST_S // 8} s, not {self.tick_s}")
        shape = self.capacity.shape
        if len(shape) != 2 or shape != self.microusd_h.shape or shape[0] != len(self.pools) or not shape[1]:
            raise UsageError(
                f"capacity and prices have one row per pool and the same number of ticks, at least one: "
                f"{len(self.pools)} pools, {shape}, {self.microusd_h.shape}"
            )
        lowest, highest = int(self.microusd_h.min()), int(self.microusd_h.max())
        if min(lowest, self.on_demand_microusd_h) < 0 or max(highest, self.on_demand_microusd_h) > HIGHEST_MICROUSD_H:
            raise UsageError(f"prices lie between 0 and {HIGHEST_MICROUSD_H} millionths of a dollar per hour")
        if int(self.capacity.min()) < 0:
            raise UsageError("a capacity is zero machines or more")

    @property
    def ticks(self) -> int:
        return int(self.capacity.shape[1])

    def available(self, gang: int = 1) -> Bools:
        """Pool by tick: whether so many machines could be had at once."""
        there: Bools = self.capacity >= gang
        return there

    def only(self, *pools: str) -> Trace:
        """The same trace of some of its pools, in that order."""
        unknown = [pool for pool in pools if pool not in self.pools]
        if unknown:
            raise UsageError(f"the trace has no pool {unknown[0]}; it has {', '.join(self.pools)}")
        rows = [self.pools.index(pool) for pool in pools]
        return replace(self, pools=tuple(pools), capacity=self.capacity[rows], microusd_h=self.microusd_h[rows])

    def at_price(self, microusd_h: int, on_demand_microusd_h: int | None = None) -> Trace:
        """The same capacity at one spot price."""
        on_demand = self.on_demand_microusd_h if on_demand_microusd_h is None else on_demand_microusd_h
        return replace(self, microusd_h=np.full_like(self.microusd_h, microusd_h), on_demand_microusd_h=on_demand)

    def starts(self, horizon_s: int, every_s: int) -> Ints:
        """First ticks of all windows of that length, one every so often."""
        last = self.ticks - -(-horizon_s // self.tick_s)
        if last < 0:
            raise UsageError(
                f"a window of {horizon_s} s does not fit into a trace of {self.ticks} ticks of {self.tick_s} s"
            )
        return np.arange(0, last + 1, max(1, every_s // self.tick_s), dtype=np.int64)


def joined(traces: Sequence[Trace]) -> Trace:
    """Several traces of the same tick as one with all their pools; cut to the shortest. On-demand is bought where it is
    cheapest."""
    if len({trace.tick_s for trace in traces}) != 1:
        raise UsageError(f"traces of one tick can be joined, not of {sorted({trace.tick_s for trace in traces})} s")
    ticks = min(trace.ticks for trace in traces)
    return Trace(
        pools=tuple(pool for trace in traces for pool in trace.pools),
        tick_s=traces[0].tick_s,
        capacity=np.vstack([trace.capacity[:, :ticks] for trace in traces]),
        microusd_h=np.vstack([trace.microusd_h[:, :ticks] for trace in traces]),
        on_demand_microusd_h=min(trace.on_demand_microusd_h for trace in traces),
    )
