"""Datasets, samplers and loaders of the loader tests: importable, so that spawned workers find them too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from holdfast.train.sample_seeds import sample_seed

SAMPLES = 23


def noise() -> list[float]:
    """One draw from each global generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand((), dtype=torch.float64))]


class Augmented(Dataset[torch.Tensor]):
    """Random per sample, and counts in shared memory how often each sample was read."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.reads = torch.zeros(samples, dtype=torch.int64)
        self.reads.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> torch.Tensor:
        info = get_worker_info()
        assert info is None or info.dataset is self, "a worker sees its own dataset"
        self.reads[index] += 1
        own = np.random.default_rng(sample_seed()).random()
        return torch.tensor([index, *noise(), own], dtype=torch.float64)


class AugmentedBatches(Augmented):
    """Fetches whole batches."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        shared = noise()
        return [self[index] + torch.tensor([0.0, *shared, 0.0], dtype=torch.float64) for index in indices]


def masking(samples: list[torch.Tensor]) -> torch.Tensor:
    """A collate function that draws: random masking, as language models use it."""
    batch = torch.stack(samples)
    keep = torch.rand(batch.shape[0], dtype=torch.float64) < 0.5
    extra = torch.tensor([0.0, *noise(), float(sample_seed() % 1000)], dtype=torch.float64).expand(batch.shape[0], -1)
    return torch.cat([batch, keep.double()[:, None], extra], dim=1)


class LazySampler(Sampler[int]):
    """Draws from every global generator and from its own, one index at a time, with replacement."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(5)
        self.generator = torch.Generator()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            drawn = sum(noise()) + self.own.random() + float(torch.rand((), generator=self.generator))
            yield (int(drawn * 1000) + self.epoch) % SAMPLES

    def __len__(self) -> int:
        return SAMPLES


class BucketBatches(Sampler[list[int]]):
    """A batch sampler with batches of random sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        left = list(range(SAMPLES))
        random.shuffle(left)
        while left:
            size = int(np.random.randint(2, 6))
            yield left[:size]
            left = left[size:]


class Mixing(DataLoader[torch.Tensor]):
    """A subclass with an `__iter__` of its own that draws, and that looks at its own parts."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.dataset, Augmented)
        for batch in super().__iter__():
            yield batch * random.random() + torch.rand((), dtype=torch.float64)


class Kept(DataLoader[torch.Tensor]):
    """Keeps one iterator for ever, made when it was built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = super().__iter__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from self.kept


class Stream(IterableDataset[torch.Tensor]):
    """Iterable, random, without a state."""

    reads = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, SAMPLES, stride):
            self.reads += 1
            yield torch.tensor([index, *noise()], dtype=torch.float64)


class Places:
    """An iterator with a state."""

    def __init__(self) -> None:
        info = get_worker_info()
        self.place, self.stride = (0, 1) if info is None else (info.id, info.num_workers)

    def __iter__(self) -> Places:
        return self

    def __next__(self) -> torch.Tensor:
        if self.place >= SAMPLES:
            raise StopIteration
        self.place += self.stride
        return torch.tensor([self.place - self.stride, *noise()], dtype=torch.float64)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class StreamOfPlaces(IterableDataset[torch.Tensor]):
    """Iterable; its iterators have the state, as torchdata recommends."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return Places()


class StatefulStream(Stream):
    """The same with a state."""

    place = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.place < SAMPLES:
            self.place += 1
            self.reads += 1
            yield torch.tensor([self.place - 1, *noise()], dtype=torch.float64)
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]
