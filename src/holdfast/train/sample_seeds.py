"""Randomness of the data path: what makes augmentation and random collation the same after a kill.

Worker seeds that are stable do not suffice: a worker that starts at batch 100 has not drawn the numbers of batches 0 to 99. So
nothing is drawn from a stream that outlives a sample: before each sample, python's, numpy's and torch's global generators are
seeded from (run seed, epoch, place of the sample in the epoch's order), and before each collation from (run seed, epoch, place of
the first sample). The place and not the dataset's index: a sampler with replacement then gives a repeated sample a fresh
augmentation. The place and not the rank: a sample is augmented in the same way whichever rank it falls to.

What flows: the batch sampler of the main process sends a `BatchKey` instead of a bare list of indices; `SeededDataset` (in the
worker, or in the main process when there are none) turns it into a `FetchedBatch`; `SeededCollate` turns that into what the
user's collate function returns. In the main process the caller wraps the whole fetch in `IsolatedRandomness`.

Not reachable from here: generators that a dataset owns (`numpy.random.default_rng()`, `torch.Generator()`). Such a dataset
seeds them itself from `sample_seed()`.
"""

from __future__ import annotations

import os
import random
import select
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset, get_worker_info

from holdfast.core.errors import UsageError
from holdfast.data.seeds import derive_seed, fold_in

__all__ = [
    "BatchKey",
    "IsolatedRandomness",
    "SeededCollate",
    "SeededDataset",
    "StatefulSeededDataset",
    "WorkerStart",
    "owned_generators",
    "sample_seed",
    "seed_all",
]

_current_seed: int | None = None
_DEEPEST_SAMPLER = 5
_OwnedGenerator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def sample_seed() -> int:
    """The 64-bit seed of the sample (in a dataset) or batch (in a collate function) that is being made right now.

    For code with generators of its own: `rng = numpy.random.default_rng(holdfast.sample_seed())`. In a dataset that fetches whole
    batches (`__getitems__`) or is iterated, the seed is the batch's. Outside of a fetch made through holdfast it raises UsageError.
    """
    if _current_seed is None:
        raise UsageError(
            "sample_seed() has a value only while a dataset's __getitem__ or a collate function runs under run.batches(loader)"
        )
    return _current_seed


def seed_all(seed: int, owned: Sequence[_OwnedGenerator] = ()) -> None:
    """Seed the global generators, and those in `owned`. numpy and torch are both MT19937: they get different halves of the seed."""
    global _current_seed
    _current_seed = seed
    random.seed(seed)
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed)
    for generator in owned:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(seed >> 32)
        else:
            generator.seed(seed)


def owned_generators(sampler: object) -> list[_OwnedGenerator]:
    """Generators that a sampler keeps as attributes, itself or in the sampler that it wraps."""
    found: list[_OwnedGenerator] = []
    for _ in range(_DEEPEST_SAMPLER):
        attributes = getattr(sampler, "__dict__", {})
        found.extend(value for value in attributes.values() if isinstance(value, _OwnedGenerator))
        sampler = attributes.get("batch_sampler", attributes.get("sampler"))
    return found


class IsolatedRandomness:
    """A `with` block whose draws leave no trace: the global generators (and `owned`) come out as they went in. Not reentrant."""

    __slots__ = ("_owned", "_saved")

    def __init__(self, owned: Sequence[_OwnedGenerator] = ()) -> None:
        self._owned = owned
        self._saved: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        own = [_state_of(generator) for generator in self._owned]
        torch_state = torch.default_generator.get_state()
        self._saved = (_current_seed, random.getstate(), np.random.get_state(legacy=False), torch_state, own)

    def __exit__(self, *_: object) -> None:
        global _current_seed
        _current_seed, python_state, numpy_state, torch_state, own = self._saved
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
        for generator, state in zip(self._owned, own, strict=True):
            _restore(generator, state)


def _state_of(generator: _OwnedGenerator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _restore(generator: _OwnedGenerator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


class BatchKey(NamedTuple):
    """What travels to the worker instead of a list of indices. `first`: place of the batch's first sample in the epoch's order."""

    epoch: int
    first: int
    indices: Any
    """A list of indices, or one index where automatic batching is off."""


@dataclass(frozen=True, slots=True)
class FetchedBatch:
    """Samples on their way from `SeededDataset` to `SeededCollate`, which runs in the same process."""

    samples: Any
    epoch: int
    first: int


class SeededDataset:
    """The user's map-style dataset, seeded before each sample. `per_sample` is False where the dataset cannot be random."""

    def __init__(self, dataset: Any, seed: int, *, per_sample: bool) -> None:
        self.dataset = dataset
        self._root = derive_seed(seed, "sample")
        self._per_sample = per_sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: BatchKey) -> FetchedBatch:
        if self._per_sample:
            seed_all(fold_in(fold_in(self._root, key.epoch), key.first))
        return FetchedBatch(self.dataset[key.indices], key.epoch, key.first)

    def __getitems__(self, key: BatchKey) -> FetchedBatch:
        stream = fold_in(self._root, key.epoch)
        if _fetches_batches(self.dataset):
            seed_all(fold_in(stream, key.first))
            samples = self.dataset.__getitems__(key.indices)
        elif self._per_sample:
            samples = []
            for place, index in enumerate(key.indices, key.first):
                seed_all(fold_in(stream, place))
                samples.append(self.dataset[index])
        else:
            samples = [self.dataset[index] for index in key.indices]
        return FetchedBatch(samples, key.epoch, key.first)


class StatefulSeededDataset(SeededDataset):
    """For loaders that ask the dataset for its state (torchdata looks for these two methods)."""

    def state_dict(self) -> Any:
        return self.dataset.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.dataset.load_state_dict(state)


def _fetches_batches(dataset: Any) -> bool:
    """`Subset` always has `__getitems__`, but fetches one by one when the dataset below does: each sample gets its seed."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


class SeededCollate:
    """The user's collate function, seeded before each batch."""

    def __init__(self, collate: Callable[[Any], Any], seed: int) -> None:
        self._collate = collate
        self._root = derive_seed(seed, "collate")

    def __call__(self, fetched: FetchedBatch) -> Any:
        seed_all(fold_in(fold_in(self._root, fetched.epoch), fetched.first))
        return self._collate(fetched.samples)


class WorkerStart:
    """Runs first in each worker. Signals that reach the whole process group (a notice, Ctrl-C) are the main process's business:
    a worker that dies first would take the loop down before it has saved. `main_pid` is whose end the worker follows: torch's
    own watch looks at the parent, which is not the main process under forkserver, and only between two batches."""

    def __init__(self, user_init: Callable[[int], None] | None) -> None:
        self._user_init = user_init
        self.main_pid = os.getpid()

    def __call__(self, worker_id: int) -> None:
        threading.Thread(target=_end_with, args=(self.main_pid,), daemon=True).start()
        slurm = (signal.SIGUSR1,) if os.environ.get("SLURM_JOB_ID") else ()
        for number in (signal.SIGTERM, signal.SIGINT, *slurm):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededDataset):
            # The documented way to reach the worker's copy of the dataset must lead to the user's own object; the record is frozen.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._user_init is not None:
            self._user_init(worker_id)


def _end_with(main_pid: int) -> None:
    """Wait until the main process is gone, then end this one without any cleaning up, whatever it is doing."""
    try:
        main = os.pidfd_open(main_pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        return  # a kernel or sandbox without pidfd: torch's own watch remains
    ended = select.poll()  # not select(): it refuses descriptors above 1023
    ended.register(main, select.POLLIN)
    ended.poll()
    os._exit(1)
