"""What the user's loader says about its order: the sampler underneath, the size of batches, who cuts it up for the ranks.

A script that was written for many ranks cuts the order up itself, with torch's DistributedSampler or accelerate's
BatchSamplerShard. What they would do with the order is known, so holdfast takes the order from below them and cuts it up in a way
that does not depend on the number of ranks. Samplers of other makes that shard by themselves stay as they are; then each rank
reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from holdfast.core.errors import UsageError
from holdfast.data.order import Permutation

__all__ = ["LISTED_AT_ONCE", "SamplerParts", "own_parts", "sampler_parts", "shards_itself"]

LISTED_AT_ONCE = (RandomSampler, WeightedRandomSampler, SubsetRandomSampler, DistributedSampler)
"""torch's own finite samplers: their draws depend on nothing that happens during the epoch, nor on the size of batches."""
_RANKS = ("num_replicas", "num_processes")
"""Attributes in which samplers keep the number of ranks: those that have one shard by themselves."""
_DEEPEST_SAMPLER = 5
_DistributedSampler: type[Any] = DistributedSampler


@dataclass(frozen=True, slots=True)
class SamplerParts:
    """`size`: samples per batch of one rank; None where the loader does not batch, or the batches are ready.

    `ready`: the sampler yields whole batches. `one_by_one`: automatic batching is off. `even`: the tail has the same number of
    samples on all ranks. `is_own`: the sampler yields only what is this rank's.
    """

    sampler: Any
    size: int | None = None
    drop_last: bool = False
    ready: bool = False
    one_by_one: bool = False
    even: bool = False
    is_own: bool = False

    @property
    def draws_by_batch(self) -> bool:
        """The order depends on the size of batches: the generators are seeded anew before each of them is drawn."""
        return type(self.sampler) not in (*LISTED_AT_ONCE, SequentialSampler)

    def computed(self, seed: int, epoch: int) -> Permutation | range | None:
        """The epoch's order, where it is arithmetic."""
        sampler = self.sampler
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        if type(sampler) is RandomSampler and not sampler.replacement:
            length = len(sampler.data_source)
            if sampler.num_samples == length:
                return Permutation(length, seed, epoch)
        return None


def own_parts(base: Any) -> SamplerParts:
    """As they are: for loaders of which each rank reads its own."""
    return replace(_plain_parts(base.batch_sampler, base.sampler), is_own=True)


def sampler_parts(base: Any, *, rank: int, world_size: int, say: Callable[[str], None]) -> SamplerParts:
    """The parts of the one order that all ranks share. `say` is told what was replaced.

    Raises UsageError where the loader was made for other ranks than these.
    """
    batches = base.batch_sampler
    parts = _plain_parts(batches, base.sampler)
    if type(batches).__name__ == "BatchSamplerShard" and type(batches.batch_sampler) is BatchSampler:
        # Accelerate's: a rank takes every so many-th batch, or its part of every batch.
        _check(batches, batches.process_index, batches.num_processes, rank, world_size)
        parts = _plain_parts(batches.batch_sampler, None)
        if batches.split_batches and parts.size is not None:
            parts = replace(parts, size=max(parts.size // world_size, 1))
    sampler = parts.sampler
    if type(sampler).__name__ == "SeedableRandomSampler" and not sampler.replacement:
        # Accelerate's, in place of a RandomSampler of which it has made the seed a function of the epoch: so does holdfast.
        length = len(sampler.data_source)
        if length and sampler.num_samples == length:
            return replace(parts, sampler=RandomSampler(sampler.data_source))
    if type(sampler) is _DistributedSampler:
        _check(sampler, sampler.rank, sampler.num_replicas, rank, world_size)
        say(
            "the loader's DistributedSampler is replaced by holdfast's order, which is the same on any number of ranks "
            f"(shuffle={sampler.shuffle} and drop_last={sampler.drop_last} as it says; set_epoch() is not needed)"
        )
        whole = RandomSampler if sampler.shuffle and len(sampler.dataset) else SequentialSampler
        return replace(parts, sampler=whole(sampler.dataset), even=sampler.drop_last)
    return replace(parts, is_own=shards_itself(sampler))


def shards_itself(sampler: object) -> bool:
    """Whether a sampler of a make that is not known here, or one that it wraps, keeps the number of ranks, and there are
    several."""
    return any(
        isinstance(count := getattr(part, name, None), int) and count > 1 for part in _chain(sampler) for name in _RANKS
    )


def _chain(sampler: object) -> Iterator[object]:
    for _ in range(_DEEPEST_SAMPLER):
        yield sampler
        attributes = getattr(sampler, "__dict__", {})
        sampler = attributes.get("batch_sampler", attributes.get("sampler"))


def _plain_parts(batches: Any, sampler: Any) -> SamplerParts:
    if batches is None:
        return SamplerParts(sampler, one_by_one=True)
    if type(batches) is BatchSampler:
        return SamplerParts(batches.sampler, size=batches.batch_size, drop_last=batches.drop_last)
    return SamplerParts(batches, ready=True)


def _check(sampler: object, its_rank: int, its_world_size: int, rank: int, world_size: int) -> None:
    if (its_rank, its_world_size) != (rank, world_size):
        raise UsageError(
            f"the loader's {type(sampler).__name__} was made for rank {its_rank} of {its_world_size}, but this process is rank "
            f"{rank} of {world_size}. Make it after torch.distributed.init_process_group() and let it find out both by itself, or "
            "leave it out: run.batches() gives every rank its part"
        )
