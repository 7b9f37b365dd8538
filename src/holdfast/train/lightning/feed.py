"""What Lightning iterates in place of the train dataloader: the batches of a holdfast run.

    begin_epoch        iter() → the batches that are left        end_batches → end of the epoch        finish

Lightning asks for a batch when everything that belongs to the one before it is done: its update, the hooks, what is logged, an
evaluation in the middle of the epoch. There is the step boundary. The epoch's last one comes sooner: see driving.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

from holdfast.train.loader import ResumableLoader
from holdfast.train.run import Run

__all__ = ["Epochs", "Feed"]

_END = object()
_OWN_STATE = ("state_dict", "load_state_dict")


class Feed:
    """Whatever else is asked of it, the loader answers; but for its state, which is the run's business.

    `ranks`: this one, of how many.
    """

    def __init__(self, run: Run, loader: Any, ranks: tuple[int, int]) -> None:
        self._run, self._loader, self._ranks = run, loader, ranks
        self._batches: Generator[Any] | None = None
        self._handed = 0
        self._known_length: tuple[int | None] | None = None

    @property
    def loader(self) -> Any:
        return self._loader

    def __getattr__(self, name: str) -> Any:
        if name in (*_OWN_STATE, "_loader") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def _length(self) -> int | None:
        """Batches that each rank gets in an epoch."""
        if self._known_length is None:
            rank, world_size = self._ranks
            made = ResumableLoader(self._loader, seed=0, warn=_ignore, rank=rank, world_size=world_size)
            self._known_length = (made.batches_per_epoch,)
        return self._known_length[0]

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self._loader).__name__} has no length")
        return self._length

    # ---- batches

    def begin_epoch(self, batches_per_step: int) -> None:
        length = self._length
        done = self._run.batch * batches_per_step
        self._handed = done if length is None else min(done, length)
        self._batches = cast("Generator[Any]", self._run.batches(self._loader, batches_per_step=batches_per_step))

    def __iter__(self) -> Iterator[Any]:
        while self._batches is not None and (batch := next(self._batches, _END)) is not _END:
            self._handed += 1
            yield batch
            del batch

    def end_batches(self) -> None:
        """Lightning takes no more of this epoch. Where the loader has no more either, this is the last step's boundary; an epoch
        that ends before its loader has none here."""
        batches, self._batches = self._batches, None
        if batches is None:
            return
        if self._handed == self._length:
            next(batches, _END)
        batches.close()

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None


class Epochs:
    """The run's epochs, one at a time. Lightning decides when they are enough: `total` is asked for a guess."""

    def __init__(self, run: Run, total: Callable[[], int]) -> None:
        self._run, self._total = run, total
        self._epochs: Generator[int] | None = None

    def next(self) -> None:
        """Ends the one before, if there was one: an epoch's end is a boundary."""
        if self._epochs is None:
            self._open(self._total())
        assert self._epochs is not None
        if next(self._epochs, None) is None:
            self._open(0)
            next(self._epochs)

    def _open(self, total: int) -> None:
        self._epochs = cast("Generator[int]", self._run.epochs(max(total, self._run.epoch + 1)))

    @property
    def has_begun(self) -> bool:
        return self._epochs is not None

    def finish(self) -> None:
        """The last one is complete, maybe since an attempt before."""
        if self._epochs is None:
            self._epochs = cast("Generator[int]", self._run.epochs(self._run.epoch))
        next(self._epochs, None)

    def close(self) -> None:
        if self._epochs is not None:
            self._epochs.close()
        self._epochs = None


def _ignore(_: str) -> None:
    """It is said when the loader is iterated."""
