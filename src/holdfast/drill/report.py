"""What a drill found: one verdict per scenario, as data for the table, for `--json` and for the fixture."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["DrillReport", "Status", "Verdict"]


class Status(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one scenario. `faults` say what is wrong, `notes` what else is to be known; a skipped one says why in its notes.

    Times in seconds: `notice_to_durable_s` the longest from the word to leave until the state was durable, `first_step_s` the
    longest from the start of a resumed process to its first step.
    """

    scenario: str
    status: Status
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    interruptions: int = 0
    exit_codes: tuple[int, ...] = ()
    same_state: bool | None = None
    lost_steps: int = 0
    notice_to_durable_s: float | None = None
    first_step_s: float | None = None
    took_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillReport:
    """The result. `tolerance` is what was allowed: 0 means bit by bit, None means that it was measured for each tensor."""

    command: tuple[str, ...]
    deterministic: bool
    tolerance: float | None
    steps: int
    run_s: float
    seed: int
    verdicts: tuple[Verdict, ...]
    folder: str | None
    took_s: float

    @property
    def passed(self) -> bool:
        return all(verdict.status is not Status.FAILED for verdict in self.verdicts)

    def check(self) -> None:
        """Raises AssertionError that lists every fault, so that a test fails with it."""
        __tracebackhide__ = True
        faults = [f"{verdict.scenario}: {fault}" for verdict in self.verdicts for fault in verdict.faults]
        if faults:
            raise AssertionError("the drill found faults:\n" + "\n".join(f"  {fault}" for fault in faults))
