"""Streams, as far as their state can be relied on, and as several ranks read them.

    accelerate's IterableDatasetShard → the same parts, with the stream's own state: a resume reads nothing again
    a `datasets` stream with a shuffle buffer → without its state, which does not hold the buffer

Of several ranks, each reads all of the stream and takes its part of every global batch, as accelerate has it do. At the stream's
end the last global batch is filled up with samples of its own, so that all ranks have the same number of batches. (Accelerate
takes those of the epoch's first batch, which a resumed epoch has not read.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

from torch.utils.data import IterableDataset

from holdfast.train.loader_source import has_state

__all__ = ["has_lossy_state", "with_own_stream"]

_BUFFERS = "BufferShuffledExamplesIterable"


def with_own_stream(base: Any) -> Any:
    """A DataLoader like `base`, which is not changed; `base` itself where nothing is to be replaced."""
    dataset = base.dataset
    made: Any
    if type(dataset).__name__ == "IterableDatasetShard":
        stream = dataset.dataset
        made = _StatefulShard(dataset) if has_state(stream) and not has_lossy_state(stream) else _Shard(dataset)
    elif has_lossy_state(dataset):
        made = _WithoutState(dataset)
    else:
        return base
    twin = object.__new__(type(base))
    twin.__dict__.update(vars(base), dataset=made)
    return twin


def has_lossy_state(stream: Any) -> bool:
    """Whether samples wait in a shuffle buffer, where the state of a `datasets` stream does not reach them."""
    left = [getattr(stream, "_ex_iterable", None)]
    while left:
        part = left.pop()
        if type(part).__name__ == _BUFFERS:
            return True
        inner = [getattr(part, "ex_iterable", None), *(getattr(part, "ex_iterables", None) or ())]
        left += [each for each in inner if each is not None]
    return False


class _WithoutState(IterableDataset[Any]):
    """`stream`, which is read again up to its place."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __len__(self) -> int:
        """Raises TypeError where the stream does not know."""
        samples: int = len(self.stream)
        return samples

    def set_epoch(self, epoch: int) -> None:
        if callable(getattr(self.stream, "set_epoch", None)):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)


class _Shard(_WithoutState):
    """This rank's part of a stream."""

    def __init__(self, shard: Any) -> None:
        super().__init__(shard.dataset)
        self._drop_last = shard.drop_last
        ranks = shard.num_processes
        self._part: int = shard.batch_size // ranks if shard.split_batches else shard.batch_size
        self._global = self._part * ranks
        self._first = self._part * shard.process_index
        self._is_over = False

    def __len__(self) -> int:
        samples = super().__len__()
        steps: int = (samples if self._drop_last else samples + self._global - 1) // self._global
        return steps * self._part

    def __iter__(self) -> Iterator[Any]:
        if self._is_over:
            # Loaded so: the stream itself may be ready for its next pass.
            self._is_over = False
            return
        samples = iter(self.stream)
        while len(batch := list(islice(samples, self._global))) == self._global:
            yield from batch[self._first : self._first + self._part]
        self._is_over = True
        if batch and not self._drop_last:
            yield from islice(cycle(batch), self._first, self._first + self._part)
        self._is_over = False


class _StatefulShard(_Shard):
    """As of the newest global batch that was read; that is the one of which this rank's part has been handed out."""

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "over": self._is_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self._is_over = state["over"]
