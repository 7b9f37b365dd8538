"""What a user allows, by the names of the job file, and what is left of the promise to be in time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from holdfast.core.errors import UsageError
from holdfast.policy.backoff import Fallback
from holdfast.policy.market.rules_week import ALWAYS, Weekly

__all__ = ["MILLION", "Promise", "Rules", "SpotPolicy"]

MILLION = 10**6


class SpotPolicy(Enum):
    """What may be bought."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a user allows. The names are those of the job file."""

    spot_policy: SpotPolicy = SpotPolicy.AUTO
    opportunistic: bool = False
    """Spot whenever there is some, and no deadline: the policy inside is not asked."""
    max_microusd_h: int | None = None
    """`max_price`: the most that one machine may cost per hour, spot or on-demand. A dearer pool is as good as not there."""
    floor_millionths: int = 0
    """`on_demand_floor` of a job of one machine: the share of its work that is done on on-demand or reserved capacity."""
    floor_nodes: int = 0
    """`on_demand_floor` of a job of several machines: so many of them always run on demand. That is no matter of when, so `Ruled`
    leaves it to whoever launches: it decides about the others."""
    fallback: Fallback | None = None
    """`fallback_after`. A try is a look at which no pool had capacity."""
    start_window: Weekly = ALWAYS
    """Hours at which something may be started; what runs goes on."""
    run_window: Weekly = ALWAYS
    """Hours at which something may run; at their end it is saved and stopped."""
    reserved: tuple[str, ...] = ()
    """Pools whose hours are paid already."""

    def __post_init__(self) -> None:
        if self.max_microusd_h is not None and self.max_microusd_h < 0:
            raise UsageError("max_price is zero or more")
        if not 0 <= self.floor_millionths <= MILLION or self.floor_nodes < 0:
            raise UsageError('on_demand_floor lies between 0 and 1 ("0 %" and "100 %"), or is a number of machines')
        spot_only = self.spot_policy is SpotPolicy.SPOT or self.opportunistic
        clashes = [
            (
                self.opportunistic and self.spot_policy is SpotPolicy.ON_DEMAND,
                "opportunistic",
                "spot_policy: on-demand",
            ),
            (spot_only and self.floor_millionths + self.floor_nodes > 0, "on_demand_floor", "spot only"),
            (spot_only and self.fallback is not None, "fallback_after", "spot only"),
            (not self.start_window.always and not self.run_window.always, "start_window", "run_window"),
        ]
        for clash, one, other in clashes:
            if clash:
                raise UsageError(f"{one} and {other} contradict each other: leave one of them out")

    @property
    def allow_on_demand(self) -> bool:
        """At some price."""
        return self.spot_policy is not SpotPolicy.SPOT and not self.opportunistic


@dataclass(frozen=True, slots=True)
class Promise:
    """Whether a job is in time whatever the spot market does."""

    kept: bool
    reasons: tuple[str, ...]
    """Why not; or with how much to spare."""
