"""What is simulated besides the trace: the job, how many machines it needs at once, and how the market is asked and billed."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.errors import UsageError
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, LONGEST_S, Job

__all__ = ["Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One job in the simulator. `job.max_lost_s` is the interval between its saves, in work; 0: a preemption loses nothing."""

    job: Job
    gang: int = 1
    """Machines that work together: all of them or none. A pool with fewer is a pool with none."""
    asks: bool = False
    """Whether a policy learns that a pool has capacity only by asking for it."""
    horizon_s: int | None = None
    """How long a job that is late is followed; None: to its deadline."""
    free_if_taken_within_s: int = 0
    """A spot machine that is taken this early is refunded (3600 at AWS). Counted apart, since no policy may count on it."""
    move_microusd: tuple[tuple[int, ...], ...] = ()
    """What it costs to bring the job's data from the pool in which it ran last (row) to the one in which it is launched (column),
    in millionths of a dollar. Empty: nothing. On-demand is bought where the data is."""

    def __post_init__(self) -> None:
        if not 0 < self.gang <= 1 << 12:
            raise UsageError(f"a gang has between 1 and {1 << 12} machines, not {self.gang}")
        if any(not 0 <= each <= HIGHEST_MICROUSD_H for row in self.move_microusd for each in row):
            raise UsageError(f"a move costs between $0 and ${HIGHEST_MICROUSD_H / 1e6:,.0f}")
        if not 0 < self.follow_s <= LONGEST_S or self.free_if_taken_within_s < 0:
            raise UsageError(f"a horizon lies between 1 and {LONGEST_S} s, a refund within 0 s or more")

    @property
    def follow_s(self) -> int:
        return self.job.deadline_s if self.horizon_s is None else self.horizon_s
