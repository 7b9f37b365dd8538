"""Which samples of a step belong to which rank, and in which pieces: the arithmetic that makes a run independent of its world size.

    the order of an epoch   ──┬── global batch ──┬── global batch ──┬ … ┬── tail ──┤         one order, whatever the world size
    a global batch          ──┤ rank 0 │ rank 1 │ … │ rank W-1 ├──                          contiguous, equal but for one sample
    the stretch of a rank   ──┤ micro 0 │ micro 1 │ … │ micro A-1 ├──                         contiguous, equal but for one sample

Every rank has the same number of micro-batches, A = ceil(ceil(G / W) / most), since each of them is an entry into collectives. A
micro-batch without a sample of its own (in a tail, or where micro-batches are single samples) repeats the first sample of the
global batch with weight 0.

The weight of a micro-batch of m samples is m·W/G. Where a loss is the mean over its micro-batch, gradients of micro-batches are
added and gradients of ranks averaged, each sample then counts (m·W/G)·(1/m)·(1/W) = 1/G: the gradient is that of the global batch,
on any number of ranks. G is the size of *this* global batch, the tail's own where it is the tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from holdfast.core.errors import UsageError

__all__ = ["EpochCut", "Micro", "Piece", "check_global_batch", "micro_batches", "stretch"]


@dataclass(frozen=True, slots=True)
class Micro:
    """The micro-batch at hand: number `index` of `count` in this step.

    `samples`: how many of the step's samples it holds; 0 where it only keeps the rank in step with the others (it then holds one
    repeated sample, and its weight is 0). None for loaders whose samples nobody can count.
    `weight`: multiply the mean loss of this micro-batch by it, and every sample of the global batch counts the same.
    `batch_samples`: the size of this step's global batch, over all ranks.
    """

    index: int = 0
    count: int = 1
    samples: int | None = None
    weight: float = 1.0
    batch_samples: int | None = None

    @property
    def last(self) -> bool:
        """The optimizer steps after this one."""
        return self.index == self.count - 1

    @property
    def is_padding(self) -> bool:
        """It holds a repeated sample that must not count."""
        return self.samples == 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A micro-batch and its samples: start .. stop - 1, counted from the first sample of the global batch."""

    micro: Micro
    start: int
    stop: int


def stretch(samples: int, parts: int, part: int) -> tuple[int, int]:
    """Start and stop of one of `parts` contiguous parts of `samples`, equal but for one sample, the longer ones first."""
    short, longer = divmod(samples, parts)
    start = part * short + min(part, longer)
    return start, start + short + (part < longer)


@lru_cache(maxsize=256)
def micro_batches(batch_samples: int, *, rank: int, world_size: int, most: int) -> tuple[Piece, ...]:
    """The micro-batches of one rank, of at most `most` samples each."""
    first, end = stretch(batch_samples, world_size, rank)
    largest = -(-batch_samples // world_size)
    count = -(-largest // most)
    pieces = []
    for index in range(count):
        start, stop = stretch(end - first, count, index)
        samples = stop - start
        micro = Micro(index, count, samples, samples * world_size / batch_samples, batch_samples)
        pieces.append(Piece(micro, first + start, first + stop) if samples else Piece(micro, 0, 1))
    return tuple(pieces)


@dataclass(frozen=True, slots=True)
class EpochCut:
    """How an epoch's order is cut into global batches, from wherever the last one ended.

    `drop_last`: samples that do not fill a global batch are left out. `even`: the tail is cut to a multiple of this.
    """

    global_batch: int
    drop_last: bool = False
    even: int = 1

    def next_batch(self, epoch_samples: int, consumed: int) -> int:
        """The size of the global batch that follows `consumed` samples; 0 where the epoch is over."""
        left = max(epoch_samples - consumed, 0)
        if left >= self.global_batch:
            return self.global_batch
        return 0 if self.drop_last else left // self.even * self.even

    def batches(self, epoch_samples: int) -> int:
        """How many an epoch has, from its start."""
        full = epoch_samples // self.global_batch
        return full + (self.next_batch(epoch_samples, full * self.global_batch) > 0)


def check_global_batch(global_batch: object, world_size: int) -> int:
    """Raises UsageError for what cannot be the size of a global batch."""
    if type(global_batch) is not int:
        raise UsageError(
            f"global_batch is the number of samples of one step over all ranks: an integer, not {global_batch!r}"
        )
    if global_batch < world_size:
        raise UsageError(
            f"global_batch={global_batch}: a step takes at least one sample on each rank, and this job has {world_size}. Make it "
            f"{world_size} or more, or use fewer ranks"
        )
    return global_batch
