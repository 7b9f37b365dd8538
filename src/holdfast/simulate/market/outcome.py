"""What became of simulated windows: money, time and where it went, one array element per window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import Bools, Floats, Ints

__all__ = ["UNFINISHED", "Outcomes"]

UNFINISHED = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """Every second of a window is in one bucket: waiting (nothing runs, nothing is billed), changeover, useful or lost work
    (all billed).

    Money is in millionths of a dollar, time in seconds.
    """

    deadline_s: int
    starts: Ints
    """First tick of each window."""
    spot_microusd: Ints
    on_demand_microusd: Ints
    egress_microusd: Ints
    """For the moves of data from pool to pool."""
    microusd: Ints
    """Spot, on-demand and egress together, rounded once."""
    refund_microusd: Ints
    """What would come back for spot machines that were taken early; not subtracted above."""
    finish_s: Ints
    """Since the window's start; UNFINISHED where the horizon came first."""
    useful_s: Ints
    lost_s: Ints
    """Work that preemptions took back."""
    changeover_s: Ints
    waiting_s: Ints
    spot_s: Ints
    """Billed time on spot, changeovers included."""
    on_demand_s: Ints
    preemptions: Ints
    spot_launches: Ints
    on_demand_launches: Ints

    @property
    def missed(self) -> Bools:
        late: Bools = (self.finish_s == UNFINISHED) | (self.finish_s > self.deadline_s)
        return late

    @property
    def billed_s(self) -> Ints:
        return self.spot_s + self.on_demand_s

    @property
    def goodput(self) -> Floats:
        """Useful time by billed time; 0 where nothing was billed."""
        share: Floats = self.useful_s / np.maximum(self.billed_s, 1)
        return share

    @property
    def ettr(self) -> Floats:
        """Useful time by wall time, waiting included."""
        share: Floats = self.useful_s / np.maximum(self.billed_s + self.waiting_s, 1)
        return share
