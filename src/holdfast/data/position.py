"""Where the training loop is in its data: what a checkpoint must remember so that the next attempt takes the exact next batch.

A position counts what the loop has *consumed*, not what loader workers have prefetched. The order and the seeds are functions of
(seed, epoch, place), so nothing else about the past matters.

More than one rank: `batch` counts steps, of one *global* batch each, and `samples` what these held, over all ranks. The order of an
epoch is one global order that does not depend on the world size; each rank takes its own stretch of every global batch, disjoint
from the others' (`global_batch.py`). So the position is the same on all ranks, and since it is a number of samples, nothing is
skipped or repeated when the number of ranks, the batch size or the global batch changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.core.errors import FormatError, UsageError

__all__ = ["Position"]

_FIELDS = ("epoch", "batch", "phase", "samples")


@dataclass(frozen=True, slots=True)
class Position:
    """The next batch to consume is number `batch` (from 0) of epoch `epoch` (from 0), and begins at place `samples` of its order.

    An epoch may hold several loops over batches, one after the other; `phase` numbers them from 0. `samples` stays 0 for loaders
    whose samples nobody can count: lists of batches, streams.
    """

    epoch: int = 0
    batch: int = 0
    phase: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UsageError(f"a position's {name} must be an integer that is not negative, got {value!r}")

    def after_batch(self, samples: int = 0) -> Position:
        """One more batch of the same loop has been consumed, of that many samples over all ranks."""
        return Position(self.epoch, self.batch + 1, self.phase, self.samples + samples)

    def next_phase(self) -> Position:
        """The loop is over; another one follows in the same epoch."""
        return Position(self.epoch, 0, self.phase + 1)

    def next_epoch(self) -> Position:
        """The epoch is over; the next one starts at its first batch."""
        return Position(self.epoch + 1, 0)

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_json(cls, fields: object) -> Position:
        """Read what `to_json` wrote, also before positions counted samples. Raises FormatError for anything else."""
        if not isinstance(fields, Mapping) or set(fields) not in (set(_FIELDS), set(_FIELDS) - {"samples"}):
            raise FormatError(f"not a position in the data: expected the fields {', '.join(_FIELDS)}, got {fields!r}")
        try:
            return cls(**fields)
        except UsageError as error:
            raise FormatError(f"not a position in the data: {error}") from error
