"""Batches of any loader, from any batch of any epoch: how the loop continues at the exact next sample.

    the user's loader                         how a pass starts at batch k
    -----------------------------------------------------------------------------------------------------------------------
    DataLoader over a map-style dataset       indices are computed or drawn, no sample is read (`batch_order`)
    StatefulDataLoader (torchdata)            its own state, as of the batches that the loop has consumed
    DataLoader over an iterable dataset       the dataset's state, if it has one and there are no workers; else reading and dropping
    list, tuple, range, array, tensor         indexing
    anything else that can be iterated again  reading and dropping
    an iterator                               cannot be started again: refused

Reading and dropping is announced by a warning that says what it costs. Whatever draws random numbers in the main process on
behalf of the loader does so in isolation, under seeds of (seed, epoch, batch): the model's dropout sees the same stream whether
or not a batch had to be fetched, and a pass that starts at batch k draws what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils.collate import default_convert

from holdfast.core.errors import UsageError
from holdfast.data.seeds import derive_seed, fold_in
from holdfast.train.batch_order import EpochOrder, NumberedSampler
from holdfast.train.loader_twin import LoaderTwin, unwrapped
from holdfast.train.sample_seeds import (
    IsolatedRandomness,
    SeededCollate,
    SeededDataset,
    StatefulSeededDataset,
    seed_all,
)

__all__ = ["ResumableLoader"]

_END = object()


class _Source(Protocol):
    """One kind of loader."""

    kind: str
    isolated: bool
    """Fetching may draw from the main process's generators, so it happens in isolation."""

    def open(self, epoch: int, start_batch: int) -> tuple[Iterator[Any], int]:
        """A pass, and how many batches must be taken from it and dropped to be at `start_batch`."""
        ...

    def check_started(self) -> None:
        """Called after the first batch of a pass."""
        ...

    def length(self) -> int | None: ...

    def state(self) -> dict[str, Any] | None: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]: ...

    def why_skipping(self) -> str:
        """The reason why batches must be read and dropped, and what would avoid it."""
        ...


class ResumableLoader:
    """Wraps the user's loader, which is not changed. One pass at a time; used by one thread.

    `seed`: the run's seed. `warn`: told, once per resume, when going to a batch means reading the ones before it.
    """

    def __init__(self, loader: object, *, seed: int, warn: Callable[[str], None]) -> None:
        self._source = _source_of(loader, seed, warn)
        self._warn = warn
        self._root = derive_seed(seed, "loader")

    def iterate(self, epoch: int, start_batch: int) -> Iterator[Any]:
        """Batches start_batch, start_batch + 1, ... of the epoch. Closing the iterator gives the pass up."""
        source = self._source
        stream, skip = source.open(epoch, start_batch)
        if skip:
            self._warn(
                f"going to batch {start_batch} of epoch {epoch} reads and drops {skip} batches: {source.why_skipping()}"
            )
        fetched = self._isolated(stream, fold_in(self._root, epoch), start_batch - skip) if source.isolated else stream
        for _ in range(skip):
            if next(fetched, _END) is _END:
                return
        first = next(fetched, _END)
        if first is _END:
            return
        source.check_started()
        yield first
        del first
        yield from fetched

    def _isolated(self, stream: Iterator[Any], root: int, batch: int) -> Iterator[Any]:
        isolation = IsolatedRandomness()
        while True:
            with isolation:
                seed_all(fold_in(root, batch))
                fetched = next(stream, _END)
            if fetched is _END:
                return
            yield fetched
            del fetched
            batch += 1

    @property
    def batches_per_epoch(self) -> int | None:
        """None where the loader does not say."""
        return self._source.length()

    def state(self) -> dict[str, Any] | None:
        """What resuming needs beside the position, as of the newest batch handed out; None for loaders that need nothing."""
        return self._source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """The next `iterate` continues from `state`."""
        self._source.load_state(state)

    def describe(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint's metadata: two runs with other values here do not see the same batches."""
        return {"kind": self._source.kind, "batches_per_epoch": self.batches_per_epoch, **self._source.describe()}


def _source_of(loader: Any, seed: int, warn: Callable[[str], None]) -> _Source:
    if isinstance(loader, DataLoader):
        base = unwrapped(loader)
        if base.num_workers and not getattr(base, "in_order", True):
            warn("in_order=False makes the order of batches a race between workers: holdfast runs this loader in order")
        if _has_state(base):
            return _OwnStateSource(loader, seed)
        return _IterableSource(loader, seed) if isinstance(base.dataset, IterableDataset) else _MapSource(loader, seed)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise UsageError(f"cannot take batches from a {type(loader).__name__}: it is not iterable")
    return _PlainSource(loader)


def _has_state(candidate: object) -> bool:
    return callable(getattr(candidate, "state_dict", None)) and callable(getattr(candidate, "load_state_dict", None))


def _cannot_be_random(dataset: object) -> bool:
    """Tensors that are indexed draw nothing, so seeding them would be a cost without a use. Exact types: a subclass may augment."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is ConcatDataset:
        return all(_cannot_be_random(part) for part in dataset.datasets)
    return type(dataset) is TensorDataset


def _length_or_none(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


class _LoaderSource:
    """What all DataLoaders have in common."""

    kind = "dataloader"

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self._base = unwrapped(loader)
        self._order = EpochOrder(self._base, seed, bare=False)
        self._twin = LoaderTwin(loader, seed, self._parts(seed))
        self.isolated = self._base.num_workers == 0 or not self._twin.stock

    def _parts(self, seed: int) -> dict[str, Any]:
        return {}

    def _seeded_parts(self, seed: int, sampler: Any) -> dict[str, Any]:
        base = self._base
        kind = StatefulSeededDataset if _has_state(base.dataset) else SeededDataset
        return {
            "sampler" if base.batch_sampler is None else "batch_sampler": sampler,
            "dataset": kind(base.dataset, seed, per_sample=not _cannot_be_random(base.dataset)),
            "collate_fn": SeededCollate(base.collate_fn, seed),
        }

    def check_started(self) -> None:
        return None

    def length(self) -> int | None:
        return _length_or_none(self._base)

    def state(self) -> dict[str, Any] | None:
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        raise UsageError(f"the checkpoint has a loader state, but this {type(self._loader).__name__} keeps none")

    def why_skipping(self) -> str:
        return "the loader has no state"

    def describe(self) -> dict[str, Any]:
        base, order = self._base, self._order
        return {
            "dataset": type(base.dataset).__name__,
            "samples": _length_or_none(base.dataset),
            "batch_size": base.batch_size if order.size is None else order.size,
            "drop_last": bool(base.drop_last or order.drop_last),
            "sampler": type(order.sampler).__name__,
            "num_workers": base.num_workers,
        }


class _MapSource(_LoaderSource):
    """DataLoader over a map-style dataset: holdfast says which indices come, and seeds each sample."""

    def _parts(self, seed: int) -> dict[str, Any]:
        base = self._base
        stock_collate = base.collate_fn is default_collate or base.collate_fn is default_convert
        if _cannot_be_random(base.dataset) and stock_collate:
            self._order = EpochOrder(base, seed, bare=True)
            return {"sampler" if base.batch_sampler is None else "batch_sampler": self._order}
        return self._seeded_parts(seed, self._order)

    def __init__(self, loader: Any, seed: int) -> None:
        super().__init__(loader, seed)
        if self._twin.stock and self._order.bare:
            self.isolated = False

    def open(self, epoch: int, start_batch: int) -> tuple[Iterator[Any], int]:
        self._order.epoch, self._order.start, self._order.asked = epoch, start_batch, False
        return self._twin.open(epoch), 0

    def check_started(self) -> None:
        if not self._order.asked:
            name = type(self._loader).__name__
            raise UsageError(
                f"{name} does not take its batches from its batch_sampler when it is iterated (it keeps an iterator of its own), "
                f"so it cannot be resumed at a batch; give run.batches() a DataLoader, or a {name} whose __iter__ calls "
                "super().__iter__()"
            )


class _OwnStateSource(_LoaderSource):
    """StatefulDataLoader: order and position are its own; where the dataset is map-style, samples are seeded as everywhere."""

    kind = "stateful-dataloader"
    _loaded = False

    def _parts(self, seed: int) -> dict[str, Any]:
        if isinstance(self._base.dataset, IterableDataset):
            return {}
        return self._seeded_parts(seed, NumberedSampler(self._order))

    def open(self, epoch: int, start_batch: int) -> tuple[Iterator[Any], int]:
        self._order.epoch = epoch
        loaded, self._loaded = self._loaded, False
        return self._twin.open(epoch), 0 if loaded else start_batch

    def state(self) -> dict[str, Any]:
        with IsolatedRandomness():
            return cast("dict[str, Any]", self._twin.face.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self._twin.load_state_dict(state)
        self._loaded = True

    def why_skipping(self) -> str:
        return "the checkpoint has no state of this loader (was it another kind of loader when it was saved?)"


class _IterableSource(_LoaderSource):
    """DataLoader over an iterable dataset."""

    kind = "iterable-dataloader"
    _loaded = False

    def __init__(self, loader: Any, seed: int) -> None:
        super().__init__(loader, seed)
        # With workers, the state is in their copies; a class that iterates in its own way may have read ahead.
        self._has_state = self._base.num_workers == 0 and self._twin.stock and _has_state(self._base.dataset)
        self._pass: Iterator[Any] = iter(())
        self._ended = False

    def open(self, epoch: int, start_batch: int) -> tuple[Iterator[Any], int]:
        loaded, self._loaded = self._loaded, False
        ended, self._ended = self._ended, False
        self._pass = iter(()) if ended else self._twin.open(epoch)
        return self._pass, 0 if loaded else start_batch

    def state(self) -> dict[str, Any] | None:
        if not self._has_state:
            return None
        # A last batch that is not full has met the dataset's end, after which many datasets are ready for the next epoch: their
        # state then says "at the start", and only the fetcher knows that this epoch is over.
        ended = bool(getattr(getattr(self._pass, "_dataset_fetcher", None), "ended", False))
        return {"dataset": self._base.dataset.state_dict(), "ended": ended}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._has_state and set(state) == {"dataset", "ended"}:
            self._base.dataset.load_state_dict(state["dataset"])
            self._loaded, self._ended = True, state["ended"]
        # Otherwise the position is still known: batches are read and dropped, with a warning.

    def why_skipping(self) -> str:
        return (
            f"{type(self._base.dataset).__name__} is an iterable dataset without a state that can be used here. Give it "
            "state_dict() and load_state_dict() (and num_workers=0), or use torchdata's StatefulDataLoader, or make it map-style"
        )


class _PlainSource:
    """No DataLoader: something that yields batches."""

    kind = "iterable"

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._one_shot = isinstance(batches, Iterator)
        self._used = False
        self._indexed = isinstance(batches, Sequence | np.ndarray | torch.Tensor) or not isinstance(batches, Iterable)
        self.isolated = type(batches) not in (list, tuple, range, np.ndarray, torch.Tensor)

    def open(self, epoch: int, start_batch: int) -> tuple[Iterator[Any], int]:
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

    def check_started(self) -> None:
        return None

    def length(self) -> int | None:
        return _length_or_none(self._batches)

    def state(self) -> dict[str, Any] | None:
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        raise UsageError(f"the checkpoint has a loader state, but a {type(self._batches).__name__} keeps none")

    def why_skipping(self) -> str:
        return (
            f"a {type(self._batches).__name__} can only be read from its start. A DataLoader over a map-style dataset, or a "
            "list of batches, is resumed without reading"
        )

    def describe(self) -> dict[str, Any]:
        return {"type": type(self._batches).__name__}
