"""What is known about how often preemptions come, and how many of them say so in time: a prior, and what was seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from holdfast.core.errors import UsageError

__all__ = ["PreemptionRate"]


@dataclass(frozen=True, slots=True)
class PreemptionRate:
    """What is known about how often preemptions come, from a prior and from what was seen.

    Preemptions are taken as a Poisson process whose unknown rate has a gamma distribution: before anything is seen it
    weighs as much as `prior_events` preemptions seen `prior_mean_s` apart (by default one in two hours, a middling
    spot pool). Each preemption adds one event, each second of spot capacity adds exposure, and the posterior mean
    rate is simply (prior events + events) / (prior exposure + exposure). So a run that has just started is neither
    careless nor panicked by its first preemption, and after a day or two the prior no longer matters. Observations
    add up in any order, so that the runs of one pool can share theirs.
    """

    preemptions: int = 0
    exposure_s: float = 0.0
    prior_mean_s: float = 7200.0
    prior_events: float = 1.0
    noticed: int = 0
    """Of the preemptions, those before which a last save became durable."""
    prior_noticed: float = 0.0
    """The same of `prior_events`: 0 where nothing is known; more where machines announce their end and a save fits in time."""

    def __post_init__(self) -> None:
        if not 0 <= self.noticed <= self.preemptions or not (self.exposure_s >= 0 and math.isfinite(self.exposure_s)):
            seen = f"{self.preemptions} preemptions in {self.exposure_s} s, {self.noticed} of them noticed in time"
            raise UsageError(f"not an observation: {seen}")
        if not (0 < self.prior_mean_s < math.inf and 0 < self.prior_events < math.inf):
            raise UsageError(f"not a prior: {self.prior_events} preemptions, {self.prior_mean_s} s apart")
        if not 0 <= self.prior_noticed <= self.prior_events:
            raise UsageError(f"not a prior: {self.prior_noticed} of {self.prior_events} preemptions noticed in time")

    def observed(self, preemptions: int, exposure_s: float, noticed: int = 0) -> PreemptionRate:
        """What is known after `preemptions` more were seen during `exposure_s` more seconds on spot capacity, and before `noticed`
        of them a last save became durable.
        """
        return replace(
            self,
            preemptions=self.preemptions + preemptions,
            exposure_s=self.exposure_s + exposure_s,
            noticed=self.noticed + noticed,
        )

    @property
    def mean_per_s(self) -> float:
        """Posterior mean of the rate."""
        return (self.prior_events + self.preemptions) / (self.prior_events * self.prior_mean_s + self.exposure_s)

    @property
    def mean_between_s(self) -> float:
        """Seconds between preemptions at that rate."""
        return 1 / self.mean_per_s

    @property
    def notice_share(self) -> float:
        """The share to count on. `mean_per_s * (1 - notice_share)` is the posterior mean of the rate of those that come without."""
        return (self.prior_noticed + self.noticed) / (self.prior_events + self.preemptions)
