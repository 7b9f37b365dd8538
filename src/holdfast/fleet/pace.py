"""How often a controller looks at what. Seconds on the machine's own clock."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["USUAL_PACE", "FleetPace", "Pace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """For one run."""

    step_s: float = 1.0
    """What machines say is read: one list of a prefix, on S3 about $0.43 a day."""
    records_s: float = 15.0
    """What other controllers and people have written."""
    list_s: float = 15.0
    offers_s: float = 60.0
    meter_s: float = 60.0
    """What a machine has cost so far is asked for. Until then the dearest is reserved for the time since."""
    longest_s: float = 60.0
    """Between two looks, whatever is waited for."""


USUAL_PACE = Pace()


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPace:
    """For all runs of a fleet."""

    run: Pace = field(default_factory=Pace)
    hear_s: float = 1.0
    """The inbox: one list for all runs."""
    roll_s: float = 15.0
    """Which runs there are."""
    beat_s: float = 30.0
    reads_per_s: float = 5.0
    """Runs whose records are read in full without any news, at most: every `round_s`, a run has its turn."""
    keep_news_s: float = 300.0
    """News stays in the inbox so long after it was first seen: other controllers may want it too."""
    longest_back_off_s: float = 60.0
    """A run whose step fails is tried again after one second, two, four, and so on up to this."""

    def round_s(self, runs: int) -> float:
        """Between two full reads of the same run."""
        return max(self.run.records_s, runs / self.reads_per_s)
