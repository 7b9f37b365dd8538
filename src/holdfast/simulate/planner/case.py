"""What is asked of a plan: the facts as they were said, before anything is assumed."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.core.errors import UsageError
from holdfast.core.jobfile import Accelerator
from holdfast.policy.interval import SaveEvery
from holdfast.simulate.planner.figures import Figure
from holdfast.simulate.planner.prices import Price

__all__ = ["MIXES", "Case", "Hardware", "Known"]

MIXES = ("on-demand", "spot", "uniform-progress", "ours")
"""Market policies that a plan compares, the plainest first."""
LONGEST_WORK_S = 90 * 86400.0
SHORTEST_WORK_S = 60.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of machine that would do, and how long all of them together work on the job, uninterrupted."""

    accelerator: Accelerator
    work_s: float
    pools: tuple[Price, ...]
    """Where it is to be had."""

    def __post_init__(self) -> None:
        if not SHORTEST_WORK_S <= self.work_s <= LONGEST_WORK_S:
            raise UsageError(f"a plan is for work of one minute to 90 days, not {self.work_s:g} s")
        if not self.pools:
            raise UsageError(f"no pool of {self.accelerator} is left to plan with")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Figures that somebody gave or measured; None: to be assumed. Of one machine, unless said otherwise."""

    life_s: Figure | None = None
    """How long spot capacity for one machine lasts, on average."""
    outage_s: Figure | None = None
    changeover_s: Figure | None = None
    stall_s: Figure | None = None
    bandwidth: Figure | None = None
    """Bytes per second to the store."""
    checkpoint_bytes: Figure | None = None
    """Of the whole job."""
    step_s: Figure | None = None
    notice_s: Figure | None = None
    preemptions_seen: int | None = None
    """How many the pilot had; None: there was none."""
    notice_was_heard: bool | None = None
    restores_seen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One job, and what its owner wants of it."""

    name: str
    hardware: tuple[Hardware, ...]
    machines: int = 1
    floor: int = 0
    """Of the machines, those that always run on demand."""
    deadline_s: float | None = None
    budget_usd: float | None = None
    ceiling_usd_h: float | None = None
    """Most that one machine may cost in an hour."""
    must_be_spot: bool = False
    tasks: bool = False
    """The machines do not wait for each other."""
    task_s: float | None = None
    serving: bool = False
    saves: bool = True
    """Whether there are checkpoints at all."""
    save_every: SaveEvery = "auto"
    max_lost_work: str | int | None = None
    known: Known = field(default_factory=Known)
    engineering_usd: float = 0.0
    confidence: float = 0.95
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.hardware:
            raise UsageError("there is no hardware to plan for")
        if not (1 <= self.machines <= 4096 and 0 <= self.floor <= self.machines):
            raise UsageError(
                f"a plan is for 1 to 4096 machines and a floor within them, not {self.machines}, {self.floor}"
            )
        if self.deadline_s is not None and not 0 < self.deadline_s <= 365 * 86400:
            raise UsageError("a deadline lies within a year")
        if not 0 < self.confidence < 1:
            raise UsageError(f"a confidence lies between 0 and 1, not at {self.confidence}")
        if self.engineering_usd < 0 or (self.budget_usd is not None and self.budget_usd < 0):
            raise UsageError("dollars are zero or more")
