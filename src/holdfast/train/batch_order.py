"""Which indices make up the next micro-batch of this rank: the batch sampler that runs in the main process in place of the user's.

Shuffling without replacement and sequential reading are computed from (seed, epoch, place), so starting anywhere costs nothing.
Any other sampler, and any batch sampler, is run from the start of the epoch under seeds derived from (seed, epoch, batch), and
its first *indices* are dropped: no sample is read. Draws happen when the loader asks for them and never touch the global
generators, nor leave a trace in generators that the sampler owns.

With more than one rank, all of them have the same order (computed, or drawn under the same seeds) and each takes its part of every
global batch (data/global_batch.py). A batch sampler of the user's own says itself what a global batch is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from holdfast.data.global_batch import EpochCut, Micro, Piece, micro_batches
from holdfast.data.order import Permutation
from holdfast.data.seeds import derive_seed
from holdfast.train.sample_seeds import BatchKey, IsolatedRandomness, owned_generators, seed_all
from holdfast.train.sampler_parts import LISTED_AT_ONCE, SamplerParts

__all__ = ["Draws", "EpochOrder", "NumberedSampler"]

Drawn = tuple[Micro, int, Any]
"""A micro-batch, the place of its first sample in the epoch's order, its indices."""
_BLOCK_SAMPLES = 4096
_CUSTOM_BATCH = 1 << 32
"""Places per batch where batches have no fixed size: more than any batch has samples."""
_END = object()


class Draws:
    """One pass over a sampler that holdfast does not compute itself. `size`: samples per batch; None: each draw is a ready key."""

    def __init__(self, sampler: Any, size: int | None, drop_last: bool, seed: int, epoch: int) -> None:
        self._sampler, self._size, self._drop_last = sampler, size, drop_last
        self._owned = owned_generators(sampler)
        self._root = (seed, "draw", epoch)
        self._epoch = epoch
        self._iterator: Iterator[Any] | None = None
        self._listed = type(sampler) in LISTED_AT_ONCE
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

    Mutable, and owned by the main process: where a pass begins is set before it and captured when it does, so workers need to
    know nothing of it and may live through many epochs. `asked` tells whether anybody has drawn from the newest pass; `handed`
    holds what there is to say about each batch that was drawn and has not been consumed, in order.
    """

    def __init__(self, parts: SamplerParts, seed: int, *, bare: bool, rank: int = 0, world_size: int = 1) -> None:
        self.parts, self._seed, self.bare = parts, seed, bare
        self._rank, self._world_size = (0, 1) if parts.is_own else (rank, world_size)
        self.epoch = self.batch = self.sample = 0
        self.global_batch: int | None = None
        """As the user chose it; None: what the loader's batches on all ranks make up."""
        self.asked = False
        self.handed: deque[Micro] = deque()

    # ---- figures

    @property
    def cut(self) -> EpochCut:
        """How the epoch's order is cut. Meaningless for ready batches."""
        follows = (self.parts.size or 1) * self._world_size
        even = self._world_size if self.parts.even else 1
        return EpochCut(self.global_batch or follows, self.parts.drop_last, even)

    @property
    def samples(self) -> int | None:
        """How many an epoch has; None where the sampler does not say, and for ready batches."""
        try:
            return None if self.parts.ready else len(self.parts.sampler)
        except (TypeError, NotImplementedError):
            return None

    @property
    def steps(self) -> int | None:
        """How many an epoch has."""
        try:
            return len(self.parts.sampler) if self.parts.ready else self.cut.batches(len(self.parts.sampler))
        except (TypeError, NotImplementedError):
            return None

    def is_over(self, batch: int, sample: int) -> bool:
        """Whether nothing follows so many steps of so many samples."""
        if self.parts.ready or self.samples is None:
            return batch == self.steps
        return self.cut.next_batch(self.samples, sample) == 0

    def __len__(self) -> int:
        """Of micro-batches."""
        if self.parts.ready:
            return len(self.parts.sampler)
        cut, samples = self.cut, len(self.parts.sampler)
        tail = cut.next_batch(samples, samples // cut.global_batch * cut.global_batch)
        full = samples // cut.global_batch * len(self._pieces(cut.global_batch))
        return full + (len(self._pieces(tail)) if tail else 0)

    # ---- a pass

    def draws(self, epoch: int) -> Draws:
        """As the sampler's own loader would draw, for those that keep their own state."""
        return Draws(self.parts.sampler, self.parts.size, self.parts.drop_last, self._seed, epoch)

    def key(self, epoch: int, first: int, indices: Any) -> Any:
        return indices if self.bare else BatchKey(epoch, first, indices)

    def __iter__(self) -> Iterator[Any]:
        return self._pass(self.epoch, self.batch, self.sample)

    def _pass(self, epoch: int, batch: int, sample: int) -> Iterator[Any]:
        self.asked, self.handed = True, deque()
        handed = self.handed
        order = self.parts.computed(self._seed, epoch)
        if self.parts.ready:
            found = self._from_batches(epoch, batch)
        elif order is not None:
            found = self._from_order(order, sample)
        else:
            found = self._from_samples(epoch, sample)
        for micro, first, indices in found:
            handed.append(micro)
            yield self.key(epoch, first, indices[0] if self.parts.one_by_one else indices)

    def _pieces(self, batch_samples: int) -> tuple[Piece, ...]:
        most = batch_samples if self.parts.ready else self.parts.size or 1
        return micro_batches(batch_samples, rank=self._rank, world_size=self._world_size, most=most)

    def _from_order(self, order: Permutation | range, sample: int) -> Iterator[Drawn]:
        """Only the indices of this rank are computed, many at a time."""
        cut, total = self.cut, len(order)
        over = False
        while not over:
            found: list[tuple[Piece, int]] = []
            places: list[int] = []
            while len(places) < _BLOCK_SAMPLES:
                batch_samples = cut.next_batch(total, sample)
                if over := batch_samples == 0:
                    break
                for piece in self._pieces(batch_samples):
                    found.append((piece, sample))
                    places.extend(range(sample + piece.start, sample + piece.stop))
                sample += batch_samples
            indices = places if isinstance(order, range) else order.at(np.array(places, dtype=np.int64)).tolist()
            used = 0
            for piece, first in found:
                size = piece.stop - piece.start
                yield piece.micro, first + piece.start, indices[used : used + size]
                used += size

    def _from_samples(self, epoch: int, sample: int) -> Iterator[Drawn]:
        """A sampler that is drawn from its start: every rank draws the same, and takes its part."""
        draws = Draws(self.parts.sampler, self.parts.size, False, self._seed, epoch)
        stream: Iterator[Any] = draws if self.parts.size is None else chain.from_iterable(draws)
        cut = self.cut
        stream = islice(stream, sample, None)
        while batch := list(islice(stream, cut.global_batch)):
            batch_samples = cut.next_batch(len(batch), 0)
            if batch_samples == 0:
                return
            for piece in self._pieces(batch_samples):
                yield piece.micro, sample + piece.start, batch[piece.start : piece.stop]
            sample += batch_samples

    def _from_batches(self, epoch: int, batch: int) -> Iterator[Drawn]:
        """Batches as a batch sampler of the user's makes them, each of which is a step."""
        draws = Draws(self.parts.sampler, None, False, self._seed, epoch)
        for number, indices in enumerate(islice(draws, batch, None), batch):
            place = number * _CUSTOM_BATCH
            size = len(indices) if hasattr(indices, "__len__") else None
            if self._world_size == 1 or not size:
                yield Micro(samples=size, batch_samples=size), place, indices
            else:
                for piece in self._pieces(size):
                    yield piece.micro, place + piece.start, indices[piece.start : piece.stop]


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
        self._places = 1 if order.parts.one_by_one else order.parts.size or _CUSTOM_BATCH

    def __iter__(self) -> NumberedPass:
        return self

    def __next__(self) -> Any:
        self._order.asked = True
        first = self._draws.drawn * self._places
        return self._order.key(self._epoch, first, next(self._draws))

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
