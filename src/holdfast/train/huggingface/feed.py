"""What the Trainer iterates in place of its DataLoader: the batches of a holdfast run.

    on_epoch_begin → begin_epoch        iter() → the batches that are left        on_epoch_end → end_epoch        finish

The Trainer takes all batches of an optimizer step before it trains on the first, and asks for the next step's when everything that
belongs to this one is done: the update, what it logs, an evaluation, a checkpoint of its own. So a step is over when the first
batch of the next one is asked for, and there is the step boundary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, cast

from holdfast.train.huggingface.streams import with_own_stream
from holdfast.train.loader import ResumableLoader
from holdfast.train.loader_twin import unwrapped
from holdfast.train.run import Run

__all__ = ["Feed"]

_END = object()


class Feed:
    """`loader`: as the Trainer has prepared it; whatever else is asked of the feed, it answers. Its own way of iterating is left
    out: it only moves batches to the device, which the Trainer does as well, and reads one batch ahead. How many batches an epoch
    has is the run's to say, since it shares them out among the ranks."""

    def __init__(self, run: Run, loader: Any, batches_per_step: int, *, rank: int, world_size: int) -> None:
        self._run, self._loader, self._batches_per_step = run, loader, batches_per_step
        self.base = with_own_stream(unwrapped(loader))
        figures = ResumableLoader(self.base, seed=0, warn=lambda _: None, rank=rank, world_size=world_size)
        self._length = figures.batches_per_epoch
        self._epochs: Generator[int] | None = None
        self._batches: Generator[Any] | None = None
        self._handed = 0
        self._is_epoch_over = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self.base.dataset).__name__} has no length")
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """For the dataset, which may shuffle by it. The run knows the epoch."""
        dataset = self.base.dataset
        if callable(getattr(dataset, "set_epoch", None)):
            dataset.set_epoch(epoch)

    @property
    def batches_done(self) -> int:
        """Of the epoch that the run is in."""
        done = self._run.batch * self._batches_per_step
        return done if self._length is None else min(done, self._length)

    def open(self, total_epochs: int) -> None:
        """Before the first epoch, which is the one that the run is in."""
        self._epochs = cast("Generator[int]", self._run.epochs(total_epochs))

    def begin_epoch(self) -> None:
        """Ends the one before."""
        if self._epochs is not None:
            next(self._epochs)
        self._handed, self._is_epoch_over = self.batches_done, False
        self._batches = cast("Generator[Any]", self._run.batches(self.base, batches_per_step=self._batches_per_step))

    def __iter__(self) -> Iterator[Any]:
        batches = self._batches
        while batches is not None and (batch := next(batches, _END)) is not _END:
            self._handed += 1
            yield batch
            del batch

    def end_epoch(self, *, cut: bool) -> None:
        """The Trainer takes no more batches of this epoch. `cut`: it may have stopped before its end."""
        batches, self._batches = self._batches, None
        if batches is None:
            return
        if self._handed == self._length or not cut:
            # The last step's own boundary, before anything is done about the epoch's end.
            self._is_epoch_over = next(batches, _END) is _END
        batches.close()

    def finish(self) -> None:
        """The Trainer is done with its epochs."""
        if self._epochs is not None and self._is_epoch_over:
            next(self._epochs, None)

    def close(self) -> None:
        for stream in (self._batches, self._epochs):
            if stream is not None:
                stream.close()
        self._batches = self._epochs = None
