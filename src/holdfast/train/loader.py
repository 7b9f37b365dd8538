"""Batches of any loader, from any place of any epoch: how the loop continues at the exact next sample.

A DataLoader over a map-style dataset has one order per epoch, of which every rank takes its part: indices are computed or drawn,
and no sample is read to get to a place (`batch_order`). Of any other loader each rank reads its own (`own_sources`).

Reading and dropping is announced by a warning that says what it costs. Whatever draws random numbers in the main process on
behalf of the loader does so in isolation, under seeds of (seed, epoch, batch): the model's dropout sees the same stream whether
or not a batch had to be fetched, and a pass that starts at batch k draws what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data._utils.collate import default_convert

from holdfast.core.errors import UsageError
from holdfast.data.global_batch import Micro, check_global_batch
from holdfast.data.seeds import derive_seed, fold_in
from holdfast.train.grouping import StepGroup
from holdfast.train.loader_source import Circumstances, LoaderSource, Source, cannot_be_random, has_state
from holdfast.train.loader_twin import unwrapped
from holdfast.train.own_sources import IterableSource, OwnStateSource, PlainSource
from holdfast.train.sample_seeds import IsolatedRandomness, seed_all
from holdfast.train.sampler_parts import sampler_parts

__all__ = ["ResumableLoader"]

_END = object()


class ResumableLoader:
    """Wraps the user's loader, which is not changed. One pass at a time; used by one thread.

    `seed`: the run's seed, the same on all ranks. `warn`: told, once per resume, when going to a batch means reading the ones
    before it. `say`: told what is done differently than the script says.
    """

    def __init__(
        self,
        loader: object,
        *,
        seed: int,
        warn: Callable[[str], None],
        say: Callable[[str], None] = lambda _: None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._world_size = world_size
        self._source = _source_of(loader, Circumstances(seed, rank, world_size, warn, say))
        self._warn = warn
        # A loader that reads its own must shuffle in the same way on all ranks before it shards.
        apart = () if self._source.is_own or world_size == 1 else ("rank", rank)
        self._root = derive_seed(seed, "loader", *apart)
        self._group = StepGroup(self._source.is_over)
        self._piece = Micro()
        self.micro = Micro()
        """What there is to say about the newest batch handed out."""

    def group(self, batches_per_step: int) -> None:
        """From the next `iterate` on, a step has so many of the loader's batches, or what is left of the epoch."""
        self._group.resize(batches_per_step)

    def accumulate(self, global_batch: int | None) -> None:
        """From the next `iterate` on, a step has so many samples over all ranks; None: one batch of the loader on each rank.

        Raises UsageError where that cannot be.
        """
        self._source.accumulate(None if global_batch is None else check_global_batch(global_batch, self._world_size))

    def iterate(self, epoch: int, start_batch: int, start_sample: int | None = None) -> Iterator[Any]:
        """Micro-batches of steps start_batch, start_batch + 1, ... of the epoch, which begin at place start_sample of its order
        (default: where steps of the size that they have now end). Closing the iterator gives the pass up."""
        source = self._source
        if start_sample is None:
            start_sample = start_batch * (source.step_samples or 0)
        self._piece = self.micro = Micro()
        first = self._group.batches_in(start_batch, source.length() if self._group.size > 1 else None)
        self._group.begin(first, start_sample)
        stream, skip = source.open(epoch, first, start_sample)
        if skip:
            self._warn(
                f"going to batch {start_batch} of epoch {epoch} reads and drops {skip} batches: {source.why_skipping()}"
            )
        fetched = self._isolated(stream, fold_in(self._root, epoch), first - skip) if source.isolated else stream
        for _ in range(skip):
            if next(fetched, _END) is _END:
                return
        is_first = True
        while (batch := next(fetched, _END)) is not _END:
            if is_first:
                source.check_started()
                is_first = False
            self._piece = source.micro()
            self.micro = self._group.micro(self._piece)
            yield batch
            del batch

    def _isolated(self, stream: Iterator[Any], root: int, batch: int) -> Iterator[Any]:
        isolation = IsolatedRandomness()
        index = 0
        while True:
            seed = fold_in(root, batch)
            with isolation:
                seed_all(fold_in(seed, index) if index else seed)
                fetched = next(stream, _END)
            if fetched is _END:
                return
            yield fetched
            del fetched
            batch, index = (batch + 1, 0) if self._piece.last else (batch, index + 1)

    @property
    def batches_per_epoch(self) -> int | None:
        """How many steps an epoch has from its start; None where the loader does not say."""
        return self._group.steps_in(self._source.length())

    @property
    def step_samples(self) -> int | None:
        """How many samples a step has over all ranks; None where the loader does not say, or each is of another size."""
        samples = self._source.step_samples
        return None if samples is None else samples * self._group.size

    @property
    def is_own(self) -> bool:
        """Each rank reads its own, so a position holds for the same number of ranks only."""
        return self._source.is_own

    @property
    def draws_by_batch(self) -> bool:
        """Which sample is at a place depends on the size of batches."""
        return self._source.draws_by_batch

    def is_over(self, batch: int, sample: int) -> bool:
        """Whether the epoch has nothing after so many steps of so many samples."""
        return self._source.is_over(self._group.batches_in(batch, self._source.length()), sample)

    def state(self) -> dict[str, Any] | None:
        """What resuming needs beside the position, as of the newest batch handed out; None for loaders that need nothing."""
        return self._source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """The next `iterate` continues from `state`."""
        self._source.load_state(state)

    def describe(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint's metadata: two runs with other values here do not see the same batches."""
        grouped = {"batches_per_step": self._group.size} if self._group.size > 1 else {}
        return {
            "kind": self._source.kind,
            "batches_per_epoch": self.batches_per_epoch,
            **grouped,
            **self._source.describe(),
        }


def _source_of(loader: Any, under: Circumstances) -> Source:
    if isinstance(loader, DataLoader):
        base = unwrapped(loader)
        if base.num_workers and not getattr(base, "in_order", True):
            under.warn(
                "in_order=False makes the order of batches a race between workers: holdfast runs this loader in order"
            )
        if has_state(base):
            return OwnStateSource(loader, under)
        return IterableSource(loader, under) if isinstance(base.dataset, IterableDataset) else _MapSource(loader, under)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise UsageError(f"cannot take batches from a {type(loader).__name__}: it is not iterable")
    return PlainSource(loader)


class _MapSource(LoaderSource):
    """DataLoader over a map-style dataset: holdfast says which indices come, and seeds each sample."""

    def __init__(self, loader: Any, under: Circumstances) -> None:
        parts = sampler_parts(unwrapped(loader), rank=under.rank, world_size=under.world_size, say=under.say)
        super().__init__(loader, parts, under)
        self._alone = under.world_size == 1
        if parts.is_own:
            under.say(
                f"the loader's {type(parts.sampler).__name__} shards by itself, so every rank reads what it yields there; in the "
                "middle of an epoch such a run goes on with the same number of ranks only"
            )
        if self._twin.stock and self._order.bare:
            self.isolated = False

    def _is_bare(self) -> bool:
        base = self._base
        stock_collate = base.collate_fn is default_collate or base.collate_fn is default_convert
        return stock_collate and cannot_be_random(base.dataset)

    def _parts(self, under: Circumstances) -> dict[str, Any]:
        return self._sampler_part(self._order) if self._order.bare else self._seeded_parts(under, self._order)

    def open(self, epoch: int, start_batch: int, start_sample: int) -> tuple[Iterator[Any], int]:
        order = self._order
        order.epoch, order.batch, order.sample, order.asked = epoch, start_batch, start_sample, False
        return self._twin.open(epoch), 0

    def check_started(self) -> None:
        if not self._order.asked:
            name = type(self._loader).__name__
            raise UsageError(
                f"{name} does not take its batches from its batch_sampler when it is iterated (it keeps an iterator of its own), "
                f"so it cannot be resumed at a batch; give run.batches() a DataLoader, or a {name} whose __iter__ calls "
                "super().__iter__()"
            )

    def micro(self) -> Micro:
        # A class that iterates in its own way may yield more than it draws.
        return self._order.handed.popleft() if self._order.handed else Micro()

    def accumulate(self, global_batch: int | None) -> None:
        parts = self._order.parts
        if global_batch is not None and parts.size is None:
            why = (
                "automatic batching is off" if parts.one_by_one else f"{type(parts.sampler).__name__} makes its batches"
            )
            raise UsageError(
                f"global_batch={global_batch} is cut into micro-batches of the loader's batch_size, and this loader has none "
                f"({why}). Give the DataLoader batch_size=…, or leave global_batch out"
            )
        if parts.is_own:
            super().accumulate(global_batch)
        self._order.global_batch = global_batch

    @property
    def step_samples(self) -> int | None:
        return None if self._order.parts.ready else self._order.cut.global_batch

    def is_over(self, batch: int, sample: int) -> bool:
        return self._order.is_over(batch, sample)

    def length(self) -> int | None:
        as_it_is = self._alone and self._order.global_batch is None
        return super().length() if as_it_is else self._order.steps
