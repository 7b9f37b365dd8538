"""Which indices make up batch k of epoch e: the batch sampler that runs in the main process in place of the user's.

Shuffling without replacement and sequential reading are computed from (seed, epoch, position), so starting at batch k costs
nothing. Any other sampler, and any batch sampler, is run from the start of the epoch under seeds derived from (seed, epoch,
batch), and its first k batches of *indices* are dropped: no sample is read. Draws happen when the loader asks for them and
never touch the global generators, nor leave a trace in generators that the sampler owns.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from holdfast.data.order import Permutation
from holdfast.data.seeds import derive_seed
from holdfast.train.sample_seeds import BatchKey, IsolatedRandomness, owned_generators, seed_all

__all__ = ["Draws", "EpochOrder", "NumberedSampler"]

_BLOCK_SAMPLES = 4096
_CUSTOM_BATCH = 1 << 32
"""Places per batch where batches have no fixed size: more than any batch has samples."""
_LISTED_AT_ONCE = (RandomSampler, WeightedRandomSampler, SubsetRandomSampler, DistributedSampler)
"""torch's own finite samplers: their draws depend on nothing that happens during the epoch."""
_END = object()


class Draws:
    """One pass over a sampler that holdfast does not compute itself. `size`: samples per batch; None: each draw is a ready key."""

    def __init__(self, sampler: Any, size: int | None, drop_last: bool, seed: int, epoch: int) -> None:
        self._sampler, self._size, self._drop_last = sampler, size, drop_last
        self._owned = owned_generators(sampler)
        self._root = (seed, "draw", epoch)
        self._epoch = epoch
        self._iterator: Iterator[Any] | None = None
        self._listed = type(sampler) in _LISTED_AT_ONCE
        self.drawn = 0

    def __iter__(self) -> Draws:
        return self

    def __next__(self) -> Any:
        if self._listed and self._iterator is not None:
            drawn = self._draw(self._iterator)
        else:
            with IsolatedRandomness(self._owned):
                seed_all(derive_seed(*self._root, self.drawn), self._owned)
                drawn = self._draw(self._started())
        if drawn is _END:
            raise StopIteration
        self.drawn += 1
        return drawn

    def _started(self) -> Iterator[Any]:
        if self._iterator is None:
            sampler = self._sampler
            for part in (sampler, getattr(sampler, "batch_sampler", None), getattr(sampler, "sampler", None)):
                set_epoch = getattr(part, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(self._epoch)
            self._iterator = iter(list(sampler)) if self._listed else iter(sampler)
        return self._iterator

    def _draw(self, iterator: Iterator[Any]) -> Any:
        if self._size is None:
            return next(iterator, _END)
        batch = list(islice(iterator, self._size))
        return _END if not batch or (self._drop_last and len(batch) < self._size) else batch

    def state_dict(self) -> dict[str, Any]:
        """Where this pass is, with what sampler and iterator say of themselves."""
        if self._iterator is None:
            return {"drawn": 0}
        parts = {"sampler": self._sampler, "iterator": self._iterator}
        return {"drawn": self.drawn, **{name: part.state_dict() for name, part in parts.items() if _stateful(part)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was: by the sampler's own state, or by drawing and dropping indices."""
        if state["drawn"] == 0:
            return
        if not {"sampler", "iterator"} & set(state):
            for _ in islice(self, state["drawn"]):
                pass
            return
        with IsolatedRandomness(self._owned):
            seed_all(derive_seed(*self._root, 0), self._owned)
            if "sampler" in state:
                self._sampler.load_state_dict(state["sampler"])
            iterator = self._started()
            if "iterator" in state:
                iterator.load_state_dict(state["iterator"])  # type: ignore[attr-defined]
        self.drawn = state["drawn"]


def _stateful(part: object) -> bool:
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


class EpochOrder:
    """The batch sampler (or the sampler, where automatic batching is off) of the loader that really runs.

    Mutable, and owned by the main process: `epoch` and `start` are set before each pass and captured when the pass begins, so
    workers need to know neither and may live through many epochs. `asked` tells whether anybody has drawn from the newest pass.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, *, bare: bool) -> None:
        self._seed, self.bare = seed, bare
        self.epoch = self.start = 0
        self.asked = False
        self.sampler: Any = loader.sampler
        self.size: int | None = None
        self.drop_last = False
        batches: Any = loader.batch_sampler
        if type(batches) is BatchSampler:
            self.sampler, self.size, self.drop_last = batches.sampler, batches.batch_size, batches.drop_last
        elif batches is not None:
            self.sampler = batches
        self._one_by_one = batches is None

    def __iter__(self) -> Iterator[Any]:
        return self._pass(self.epoch, self.start)

    def __len__(self) -> int:
        samples = len(self.sampler)
        if self.size is None:
            return samples
        return samples // self.size if self.drop_last else -(-samples // self.size)

    def draws(self, epoch: int) -> Draws:
        return Draws(self.sampler, self.size, self.drop_last, self._seed, epoch)

    def key(self, epoch: int, batch: int, indices: Any) -> Any:
        if self.bare:
            return indices
        if self._one_by_one:
            return BatchKey(epoch, batch, batch, indices)
        return BatchKey(epoch, batch, batch * (self.size or _CUSTOM_BATCH), indices)

    def _pass(self, epoch: int, start: int) -> Iterator[Any]:
        self.asked = True
        for batch, indices in enumerate(self._indices(epoch, start), start):
            yield self.key(epoch, batch, indices)

    def _indices(self, epoch: int, start: int) -> Iterator[Any]:
        order = self._computed(epoch)
        if order is not None and (self.size is not None or self._one_by_one):
            return self._slices(order, start)
        return islice(self.draws(epoch), start, None)

    def _computed(self, epoch: int) -> Permutation | range | None:
        sampler = self.sampler
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        if type(sampler) is RandomSampler and not sampler.replacement:
            length = len(sampler.data_source)
            if sampler.num_samples == length:
                return Permutation(length, self._seed, epoch)
        return None

    def _slices(self, order: Permutation | range, start: int) -> Iterator[Any]:
        size = self.size or 1
        samples = len(order) // size * size if self.drop_last else len(order)
        block_samples = max(_BLOCK_SAMPLES // size, 1) * size
        for block_start in range(start * size, samples, block_samples):
            stop = min(block_start + block_samples, samples)
            block = (
                list(order[block_start:stop]) if isinstance(order, range) else order.take(block_start, stop).tolist()
            )
            if self.size is None:
                yield from block
            else:
                for offset in range(0, len(block), size):
                    yield block[offset : offset + size]


class NumberedSampler:
    """For loaders that keep their own state: the user's sampler, unchanged in order and state, but drawn in isolation and with
    keys."""

    def __init__(self, order: EpochOrder) -> None:
        self._order = order

    def __iter__(self) -> NumberedPass:
        return NumberedPass(self._order)

    def __len__(self) -> int:
        return len(self._order)


class NumberedPass:
    """One pass over a `NumberedSampler`; torchdata asks it for its state."""

    def __init__(self, order: EpochOrder) -> None:
        self._order, self._epoch = order, order.epoch
        self._draws = order.draws(order.epoch)

    def __iter__(self) -> NumberedPass:
        return self

    def __next__(self) -> Any:
        self._order.asked = True
        batch = self._draws.drawn
        return self._order.key(self._epoch, batch, next(self._draws))

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
