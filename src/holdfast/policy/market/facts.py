"""What a market policy is told about one job at one moment, what it answers, and what it remembers. Frozen, and nothing but
facts.

Units. Time is in whole seconds, as clouds bill; money in whole millionths of a dollar per hour. Both are integers, so that sums
are exact and do not depend on their order. The bounds keep the product of two times, and of a time and a price, below 2**63.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum

from holdfast.core.errors import FormatError, UsageError

__all__ = [
    "HIGHEST_MICROUSD_H",
    "LONGEST_S",
    "Context",
    "Decision",
    "Job",
    "Market",
    "Offer",
    "PolicyState",
    "Running",
]

LONGEST_S = 1 << 30
"""34 years."""
HIGHEST_MICROUSD_H = 1 << 31
"""$2,147 per hour."""


class Market(Enum):
    """What a job runs on."""

    NOTHING = "nothing"
    SPOT = "spot"
    ON_DEMAND = "on-demand"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What must be done by when. Seconds."""

    work_s: int
    """Time that the work takes on capacity that is ready, without interruption."""
    deadline_s: int
    """From the start of the job's clock."""
    changeover_s: int
    """From the order of capacity until it works: launch, set-up, restore. Billed at the new instance's price."""
    max_lost_s: int = 0
    """The most work that one preemption can take back: the interval between saves, or 0 where every notice is long enough to
    save in."""

    def __post_init__(self) -> None:
        if not (0 < self.work_s <= LONGEST_S and 0 < self.deadline_s <= LONGEST_S):
            raise UsageError(
                f"work and deadline lie between 1 and {LONGEST_S} s, not at {self.work_s} and {self.deadline_s}"
            )
        most_s = LONGEST_S // 8
        if not (0 <= self.changeover_s <= most_s and 0 <= self.max_lost_s <= most_s):
            raise UsageError(
                f"changeover and lost work lie between 0 and {most_s} s, not at {self.changeover_s} and {self.max_lost_s}"
            )


@dataclass(frozen=True, slots=True)
class Offer:
    """Spot capacity in one pool, for the whole gang of machines that the job needs."""

    pool: str
    available: bool | None
    """None: nobody has asked yet."""
    microusd_h: int
    """Price of one hour of the gang."""


@dataclass(frozen=True, slots=True)
class Running:
    """What the job runs on at this moment. What has just been preempted does not run any more."""

    market: Market = Market.NOTHING
    pool: str | None = None
    """Named where `market` is SPOT."""
    changeover_left_s: int = 0
    """Until it works."""

    def __post_init__(self) -> None:
        if (self.market is Market.SPOT) != (self.pool is not None):
            raise UsageError("a pool is named where something runs on spot capacity, and only there")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a market policy may know about this moment."""

    job: Job
    now_s: int
    """Since the start of the job's clock."""
    tick_s: int
    """Until the policy is asked again, at the latest."""
    work_left_s: int
    running: Running
    offers: tuple[Offer, ...]
    """Every pool, always in the same order."""
    on_demand_microusd_h: int

    def __post_init__(self) -> None:
        times = (self.now_s, self.work_left_s, self.running.changeover_left_s)
        if not (min(times) >= 0 and max(times) <= LONGEST_S and 0 < self.tick_s <= LONGEST_S // 8):
            raise UsageError(f"times lie between 0 and {LONGEST_S} s, ticks are longer than 0: {times}, {self.tick_s}")
        prices = (self.on_demand_microusd_h, *(offer.microusd_h for offer in self.offers))
        if min(prices) < 0 or max(prices) > HIGHEST_MICROUSD_H:
            raise UsageError(f"prices lie between 0 and {HIGHEST_MICROUSD_H} millionths of a dollar per hour: {prices}")
        pools = [offer.pool for offer in self.offers]
        if len(set(pools)) < len(pools):
            raise UsageError("two offers are of the same pool: " + ", ".join(pools))
        if self.running.pool is not None and self.running.pool not in pools:
            raise UsageError(f"the job runs in pool {self.running.pool}, which is not among the offers")

    @property
    def time_left_s(self) -> int:
        return self.job.deadline_s - self.now_s

    @property
    def slack_s(self) -> int:
        """Time that need not be worked. Constant while work is done; every wait and every changeover takes from it."""
        return self.time_left_s - self.work_left_s


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run on until the next tick, and why."""

    market: Market
    pool: str | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a policy remembers. Numbers only, so that it can be written down, and a killed controller goes on where it was."""

    policy: str
    memory: tuple[float, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"format": 1, "policy": self.policy, "memory": list(self.memory)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PolicyState:
        try:
            fields = json.loads(text)
            format_, policy = fields["format"], fields["policy"]
            memory = tuple(float(number) for number in fields["memory"])
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(f"this is not a policy's state: {error!r}") from None
        if format_ != 1:
            raise FormatError(f"a policy's state of format {format_!r}: a newer holdfast has written it")
        if not isinstance(policy, str) or not all(map(math.isfinite, memory)):
            raise FormatError("this is not a policy's state: a name and finite numbers are expected")
        return cls(policy, memory)
