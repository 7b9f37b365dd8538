"""Where the training loop is in its data: what a checkpoint must remember so that the next attempt takes the exact next batch.

A position counts what the loop has *consumed*, not what loader workers have prefetched. It is two numbers, because the order
and the seeds are functions of (seed, epoch, index): nothing else about the past matters.

More than one rank: `batch` counts *global* batches. The order of an epoch is one global order that does not depend on the world
size; each rank takes its own stretch of every global batch, disjoint from the others'. So the position is the same on all
ranks, and as long as the global batch stays the same size, a job that resumes with another number of ranks skips and repeats
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.core.errors import FormatError, UsageError

__all__ = ["Position"]


@dataclass(frozen=True, slots=True)
class Position:
    """The next batch to consume is number `batch` (from 0) of epoch `epoch` (from 0).

    An epoch may hold several loops over batches, one after the other; `phase` numbers them from 0.
    """

    epoch: int = 0
    batch: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        for name, value in (("epoch", self.epoch), ("batch", self.batch), ("phase", self.phase)):
            if type(value) is not int or value < 0:
                raise UsageError(f"a position's {name} must be an integer that is not negative, got {value!r}")

    def after_batch(self) -> Position:
        """One more batch of the same loop has been consumed."""
        return Position(self.epoch, self.batch + 1, self.phase)

    def next_phase(self) -> Position:
        """The loop is over; another one follows in the same epoch."""
        return Position(self.epoch, 0, self.phase + 1)

    def next_epoch(self) -> Position:
        """The epoch is over; the next one starts at its first batch."""
        return Position(self.epoch + 1, 0)

    def to_json(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch, "phase": self.phase}

    @classmethod
    def from_json(cls, fields: object) -> Position:
        """Read what `to_json` wrote. Raises FormatError for anything else."""
        if not isinstance(fields, Mapping) or set(fields) != {"epoch", "batch", "phase"}:
            raise FormatError(f"not a position in the data: expected the fields epoch, batch and phase, got {fields!r}")
        try:
            return cls(fields["epoch"], fields["batch"], fields["phase"])
        except UsageError as error:
            raise FormatError(f"not a position in the data: {error}") from error
