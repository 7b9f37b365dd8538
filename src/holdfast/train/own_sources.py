"""Loaders of which each rank reads its own: they keep a position of their own, or have none that could be shared out.

    StatefulDataLoader (torchdata)            its own state, as of the batches that the loop has consumed
    DataLoader over an iterable dataset       the dataset's state, if it has one and there are no workers; else reading and dropping
      prepared by accelerate, one process     the same: it reads one batch ahead, so the state after each batch is kept until then
    list, tuple, range, array, tensor         indexing
    anything else that can be iterated again  reading and dropping
    an iterator                               cannot be started again: refused

With more than one rank it is the loader's business to give every rank other samples. The seeds under which it iterates are the
same on all ranks, so that a shuffle before the sharding is the same everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset

from holdfast.core.errors import UsageError
from holdfast.data.global_batch import Micro
from holdfast.train.batch_order import NumberedSampler
from holdfast.train.loader_source import Circumstances, LoaderSource, Uncounted, has_state, length_or_none
from holdfast.train.loader_twin import unwrapped
from holdfast.train.read_ahead import ReadAhead, one_by_one, state_after
from holdfast.train.sample_seeds import IsolatedRandomness
from holdfast.train.sampler_parts import own_parts, shards_itself

__all__ = ["IterableSource", "OwnStateSource", "PlainSource"]


class OwnStateSource(LoaderSource):
    """StatefulDataLoader: order and position are its own; where the dataset is map-style, samples are seeded as everywhere."""

    kind = "stateful-dataloader"
    _loaded = _ended = False

    def __init__(self, loader: Any, under: Circumstances) -> None:
        base = unwrapped(loader)
        super().__init__(loader, own_parts(base), under)
        is_stream = isinstance(base.dataset, IterableDataset)
        self._ahead = ReadAhead(self._twin, None, under.seed) if is_stream and one_by_one(loader) else None
        if under.world_size > 1 and not is_stream and not shards_itself(self._order.parts.sampler):
            under.warn(
                f"every rank reads all samples of this {type(loader).__name__}: give it a DistributedSampler, or use torch's "
                "DataLoader, whose order is shared out among the ranks"
            )

    def _parts(self, under: Circumstances) -> dict[str, Any]:
        if isinstance(self._base.dataset, IterableDataset):
            return {}
        return self._seeded_parts(under, NumberedSampler(self._order))

    def open(self, epoch: int, start_batch: int, start_sample: int) -> tuple[Iterator[Any], int]:
        self._order.epoch = epoch
        loaded, self._loaded = self._loaded, False
        skip = 0 if loaded else start_batch
        if self._ahead is not None:
            self._ahead.begin(epoch, start_batch, skip)
        ended, self._ended = self._ended, False
        return iter(()) if ended else self._twin.open(epoch), skip

    def state(self) -> dict[str, Any]:
        with IsolatedRandomness():
            return cast("dict[str, Any]", self._twin.face.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self._twin.load_state_dict(state)
        # Read ahead, the loader knows of its last batch that it is the last: iterated again, it would begin the next epoch.
        self._loaded, self._ended = True, bool(state.get("_iterator_finished"))

    def why_skipping(self) -> str:
        return "the checkpoint has no state of this loader (was it another kind of loader when it was saved?)"


class IterableSource(LoaderSource):
    """DataLoader over an iterable dataset."""

    kind = "iterable-dataloader"
    _loaded = False

    def __init__(self, loader: Any, under: Circumstances) -> None:
        super().__init__(loader, own_parts(unwrapped(loader)), under)
        # With workers, the state is in their copies; a class that iterates in its own way may have read ahead.
        can_tell = self._base.num_workers == 0 and has_state(self._base.dataset)
        self._ahead = ReadAhead(self._twin, self._base.dataset, under.seed) if can_tell and one_by_one(loader) else None
        self._has_state = can_tell and (self._twin.stock or self._ahead is not None)
        self._pass: Iterator[Any] = iter(())
        self._ended = False

    def open(self, epoch: int, start_batch: int, start_sample: int) -> tuple[Iterator[Any], int]:
        loaded, self._loaded = self._loaded, False
        ended, self._ended = self._ended, False
        skip = 0 if loaded else start_batch
        if self._ahead is not None:
            self._ahead.begin(epoch, start_batch, skip)
        self._pass = iter(()) if ended else self._twin.open(epoch)
        return self._pass, skip

    def micro(self) -> Micro:
        if self._ahead is not None:
            self._ahead.consume()
        return super().micro()

    def state(self) -> dict[str, Any] | None:
        if not self._has_state:
            return None
        if self._ahead is not None:
            return self._ahead.state
        return state_after(self._pass, self._base.dataset)

    def load_state(self, state: dict[str, Any]) -> None:
        if self._has_state and set(state) == {"dataset", "ended"}:
            if self._ahead is not None:
                self._ahead.state = copy.deepcopy(state)
            self._base.dataset.load_state_dict(state["dataset"])
            self._loaded, self._ended = True, state["ended"]
        # Otherwise the position is still known: batches are read and dropped, with a warning.

    def why_skipping(self) -> str:
        return (
            f"{type(self._base.dataset).__name__} is an iterable dataset without a state that can be used here. Give it "
            "state_dict() and load_state_dict() (and num_workers=0), or use torchdata's StatefulDataLoader, or make it map-style"
        )


class PlainSource(Uncounted):
    """No DataLoader: something that yields batches."""

    kind = "iterable"
    is_own = True
    draws_by_batch = True

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._one_shot = isinstance(batches, Iterator)
        self._used = False
        self._indexed = isinstance(batches, Sequence | np.ndarray | torch.Tensor) or not isinstance(batches, Iterable)
        self.isolated = type(batches) not in (list, tuple, range, np.ndarray, torch.Tensor)

    def open(self, epoch: int, start_batch: int, start_sample: int) -> tuple[Iterator[Any], int]:
        if self._indexed:
            return self._from(start_batch), 0
        if self._one_shot and (self._used or start_batch):
            raise UsageError(
                f"a {type(self._batches).__name__} can be iterated once only, so it cannot continue at batch {start_batch} of "
                f"epoch {epoch}; give run.batches() something that can be iterated again: a DataLoader, a list, or an object "
                "with __iter__"
            )
        self._used = True
        with IsolatedRandomness():
            return iter(self._batches), start_batch

    def _from(self, start_batch: int) -> Iterator[Any]:
        for batch in range(start_batch, len(self._batches)):
            yield self._batches[batch]

    def accumulate(self, global_batch: int | None) -> None:
        if global_batch is not None:
            raise UsageError(
                f"global_batch={global_batch} needs samples that can be counted, and a {type(self._batches).__name__} yields ready "
                "batches. Use a DataLoader over a map-style dataset with batch_size=…, or leave global_batch out"
            )

    def length(self) -> int | None:
        return length_or_none(self._batches)

    def load_state(self, state: dict[str, Any]) -> None:
        raise UsageError(f"the checkpoint has a loader state, but a {type(self._batches).__name__} keeps none")

    def why_skipping(self) -> str:
        return (
            f"a {type(self._batches).__name__} can only be read from its start. A DataLoader over a map-style dataset, or a "
            "list of batches, is resumed without reading"
        )

    def describe(self) -> dict[str, Any]:
        return {"type": type(self._batches).__name__}
