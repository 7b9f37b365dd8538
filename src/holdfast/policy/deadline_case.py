"""The words of the decision at a deadline: what is known (`DeadlineContext`), and what comes out (`DeadlineDecision`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from holdfast.core.errors import UsageError
from holdfast.policy.spread import Spread

__all__ = [
    "UNMEASURED_BANDWIDTH",
    "DeadlineAction",
    "DeadlineContext",
    "DeadlineDecision",
    "InFlightSave",
    "LocalTier",
    "MemorySnapshot",
    "Tier",
]

UNMEASURED_BANDWIDTH = Spread(100 * 1024**2, 1.0)
"""What is assumed of a store before anything has been sent to it, bytes per second: 100 MiB/s, give or take as much again.
Planned at 95 % that is 14 MiB/s, which the object stores of all clouds exceed by far from a machine beside them."""


class DeadlineAction(Enum):
    """What to do now."""

    TRAIN_ON = "train on"
    """Go on to the next boundary and ask again there. A save in flight goes on as well."""
    SAVE_NOW = "save now"
    """Copy the state at this boundary and send it to the store."""
    FINISH_IN_FLIGHT = "finish the save in flight"
    """Start nothing; wait for the save that is being sent, then leave."""
    COMMIT_NEWEST_SNAPSHOT = "commit the newest snapshot"
    """Send the complete snapshot that already lies in memory."""
    SAVE_LOCALLY = "save locally"
    """Copy the state at this boundary to the local tier that outlives the machine."""
    NOTHING = "nothing"
    """Nothing can or need be made durable any more: leave."""


class Tier(Enum):
    """Where a save goes."""

    STORE = "the store"
    LOCAL = "the local tier"


@dataclass(frozen=True, slots=True)
class InFlightSave:
    """A save that is being sent. `can_abandon`: the writer is able to drop it for a newer one. `latency_left_s`: what is left of
    the commit's fixed time, once the bytes are sent; None for all of it."""

    step: int
    left_bytes: int
    can_abandon: bool = False
    latency_left_s: float | None = None


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """A complete snapshot in memory, newer than the save in flight, and what it would have to send after deduplication."""

    step: int
    send_bytes: int


@dataclass(frozen=True, slots=True)
class LocalTier:
    """Storage that outlives the machine and that the next attempt finds (a persistent disk). Bytes per second."""

    bandwidth: Spread
    commit_latency_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineContext:
    """What is known now. All times are seconds from now or durations in seconds, all sizes bytes."""

    seconds_left: float | None
    """Until the machine goes; None when nobody knows, negative when it should be gone already."""
    step: int
    """The last completed step."""
    send_bytes: int
    """What a new save would have to send after deduplication."""
    durable_step: int | None = None
    """The step of the newest committed checkpoint."""
    in_flight: InFlightSave | None = None
    snapshot: MemorySnapshot | None = None
    bandwidth: Spread | None = None
    """Measured bytes per second to the store; None before anything was sent: UNMEASURED_BANDWIDTH."""
    commit_latency_s: float = 1.0
    """What every commit takes whatever its size: part, root, head."""
    snapshot_s: float = 0.0
    """How long copying the state stops the loop."""
    step_time: Spread | None = None
    """Seconds per step; None when unknown (then training never goes on at the expense of a save)."""
    boundary_in_s: float | None = 0.0
    """Until the state may be copied, estimated high: 0 at a boundary or in an evaluation, None when nobody knows (a compile)."""
    leave_s: float = 2.0
    """Flushing logs and figures, and the end of the process."""
    margin_s: float = 2.0
    """Machines go a little early, and clocks differ."""
    local: LocalTier | None = None
    insured: bool = False
    """A save has been begun or committed since the notice came."""
    confidence: float = 0.95
    least_probability: float = 0.05

    def __post_init__(self) -> None:
        local_latency_s = self.local.commit_latency_s if self.local else 0.0
        durations = {
            "commit_latency_s": self.commit_latency_s, "snapshot_s": self.snapshot_s, "leave_s": self.leave_s,
            "margin_s": self.margin_s, "boundary_in_s": self.boundary_in_s or 0.0, "local commit_latency_s": local_latency_s,
        }  # fmt: skip
        for name, value in durations.items():
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} is zero or more seconds, not {value}")
        sizes = [self.send_bytes, *(saved.left_bytes for saved in [self.in_flight] if saved)]
        if min([*sizes, *(taken.send_bytes for taken in [self.snapshot] if taken)]) < 0 or self.step < 0:
            raise UsageError("steps and bytes are zero or more")
        if self.seconds_left is not None and not math.isfinite(self.seconds_left):
            raise UsageError(f"seconds_left is finite, or None when nobody knows, not {self.seconds_left}")
        if not (0 < self.confidence < 1 and 0 < self.least_probability <= self.confidence):
            raise UsageError("confidence lies between 0 and 1, and least_probability above 0 and not above confidence")
        if self.step_time is not None and self.step_time.mean == 0:
            raise UsageError("a step takes longer than 0 s; leave step_time out when it is unknown")


@dataclass(frozen=True, slots=True)
class DeadlineDecision:
    """What to do now, and what will come of it."""

    action: DeadlineAction
    reasons: tuple[str, ...]
    save_at_latest_s: float | None = None
    """The latest safe moment for the last save to begin, seconds from now; None when there is none (any more), or no deadline."""
    save_again: bool = False
    """The save of now is the insurance: train on, and save last at the latest safe moment."""
    durable_step: int | None = None
    """The step that will be durable in the end, with at least the probability `confidence` of the context."""
    tier: Tier = Tier.STORE
    """Where the action's save goes; for TRAIN_ON, the last one."""
    last_tier: Tier = Tier.STORE
    """Where the last save goes. It differs from `tier` where the save of now is only the insurance."""
    fits: bool = False
    """Whether the action's save finishes in time at the planned quantiles."""
    probability: float | None = 0.0
    """That what the action makes durable is durable in time; for TRAIN_ON that the last save will be. None without a deadline."""
    abandon_in_flight: bool = False
    """Drop the save in flight: the new one fits only without it."""
