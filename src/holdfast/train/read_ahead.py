"""Streams behind a loader that reads one batch ahead of what it yields, as those that accelerate has prepared do.

    the dataset   ── fetch k, state ── fetch k + 1, state ──          each fetch under seeds of its own number
    the face      ──────────────────── yields k ────────────          the state that belongs to k is the older one

Where a pass begins decides how many batches its first fetch takes, so what a batch is made of must depend on its number and on
nothing else: neither on what was read together with it nor on what has been read since.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from holdfast.data.seeds import derive_seed, fold_in
from holdfast.train.accelerate import is_from_accelerate
from holdfast.train.loader_twin import LoaderTwin
from holdfast.train.sample_seeds import IsolatedRandomness, seed_all

__all__ = ["ReadAhead", "one_by_one", "state_after"]


def one_by_one(loader: Any) -> bool:
    """Whether a wrapper yields each batch of its loader as one batch: accelerate's, unless rank 0 reads for several."""
    if not is_from_accelerate(loader) or getattr(loader, "skip_batches", 0) > 0:
        return False
    return type(loader).__name__ == "DataLoaderShard" or (
        type(loader).__name__ == "DataLoaderDispatcher" and loader.state.num_processes == 1
    )


def state_after(fetching: Any, dataset: Any) -> dict[str, Any]:
    """Where the dataset is, after what `fetching` has taken from it.

    A last batch that is not full has met the dataset's end, after which many datasets are ready for the next epoch: their state
    then says "at the start", and only the fetcher knows that this epoch is over.
    """
    ended = bool(getattr(getattr(fetching, "_dataset_fetcher", None), "ended", False))
    return {"dataset": dataset.state_dict(), "ended": ended}


class ReadAhead:
    """One pass at a time. `dataset`: the one with a state, or None where the loader keeps its own. `state` is as of the newest
    batch that was consumed."""

    def __init__(self, twin: LoaderTwin, dataset: Any, seed: int) -> None:
        self._dataset, self._root = dataset, derive_seed(seed, "fetch")
        self._epoch = self._number = self._skipped = 0
        self._fetched: deque[dict[str, Any]] = deque()
        self.state: dict[str, Any] | None = None
        twin.fetch_by(self._fetch)

    def begin(self, epoch: int, batch: int, skip: int) -> None:
        """A pass whose first batch to be consumed has this number, after `skip` that are dropped."""
        self._epoch, self._number, self._skipped = epoch, batch - skip, skip
        self._fetched.clear()

    def consume(self) -> None:
        """The face has yielded one more batch."""
        skipped, self._skipped = self._skipped, 0
        for _ in range(skipped + 1 if self._fetched else 0):
            self.state = self._fetched.popleft()

    def _fetch(self, inner: Iterator[Any]) -> Any:
        with IsolatedRandomness():
            seed_all(fold_in(fold_in(self._root, self._epoch), self._number))
            batch = next(inner)
        self._number += 1
        if self._dataset is not None:
            self._fetched.append(copy.deepcopy(state_after(inner, self._dataset)))
        return batch
