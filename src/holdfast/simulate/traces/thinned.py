"""Capacity for many nodes, from traces that only say whether there was capacity for one.

A probe that starts one machine says nothing of sixteen. So this makes traces of more nodes from assumptions, and says which: a
pool is taken as so many places, each of which comes and goes like the measured one. With correlation 0 each place follows the
trace from another moment (it is turned by a random time, so lifetimes and outages stay what they were). With correlation 1 all
places follow it as it was, and are there or not there together. In between each place does both in turn: for a stretch of time
(`stretch_s`) it follows the common trace with the probability that gives the wanted correlation of two places, else its own
turn of it. Where it changes over it may come or go a little oftener than measured.

Cut a trace before it is thinned: the turns wrap around, so what lay later in it would get into what lies earlier.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.nodes.facts import MOST_NODES
from holdfast.simulate.traces.trace import Trace

__all__ = ["thinned"]


def thinned(trace: Trace, nodes: int, *, seed: int, correlation: float = 0.0, stretch_s: int = 12 * 3600) -> Trace:
    """The same pools and prices with room for so many nodes. The same seed makes the same trace; what a pool does depends on the
    seed, its place in the list and what was measured in it."""
    if not 0 < nodes <= MOST_NODES or not 0 <= correlation <= 1 or stretch_s < 1:
        raise UsageError(
            f"a pool is thinned to 1 to {MOST_NODES} nodes, with a correlation between 0 and 1, in stretches of time"
        )
    share = math.sqrt(correlation)
    stretch = max(1, stretch_s // trace.tick_s)
    capacity = np.zeros(trace.capacity.shape, np.int32)
    for pool, there in enumerate(trace.available()):
        luck = np.random.default_rng([seed, pool])
        for _ in range(nodes):
            own = np.roll(there, int(luck.integers(trace.ticks)))
            first = int(luck.integers(stretch))
            follows = luck.random((trace.ticks + first) // stretch + 1) < share
            common = follows[(np.arange(trace.ticks) + first) // stretch]
            capacity[pool] += np.where(common, there, own)
    return replace(trace, capacity=capacity)
