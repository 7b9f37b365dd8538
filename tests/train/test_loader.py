"""Resuming at any batch gives, bit for bit, the rest of the uninterrupted epoch, without reading what was skipped."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_parts import (
    SAMPLES,
    Augmented,
    AugmentedBatches,
    BucketBatches,
    Kept,
    LazySampler,
    Mixing,
    StatefulStream,
    Stream,
    StreamOfPlaces,
    masking,
)
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast.core.errors import UsageError
from holdfast.train.loader import ResumableLoader
from holdfast.train.sample_seeds import sample_seed

Make = Callable[[Any], DataLoader[Any]]

WITHOUT_WORKERS: dict[str, Make] = {
    "sequential": lambda data: DataLoader(data, batch_size=4),
    "shuffled": lambda data: DataLoader(data, batch_size=4, shuffle=True, collate_fn=masking),
    "shuffled-drop-last": lambda data: DataLoader(data, batch_size=4, shuffle=True, drop_last=True),
    "one-by-one": lambda data: DataLoader(data, batch_size=None, shuffle=True),
    "own-generator": lambda data: DataLoader(data, 4, shuffle=True, generator=torch.Generator()),
    "replacement": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, replacement=True, num_samples=17)),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler([0.1] * 5 + [5.0] * 18, 19)),
    "subset-sampler": lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler(range(3, 20))),
    "list-sampler": lambda data: DataLoader(data, 4, sampler=[3, 1, 4, 1, 5, 9, 2, 6], collate_fn=masking),
    "lazy-sampler": lambda data: DataLoader(data, 3, sampler=LazySampler(), drop_last=True),
    "explicit-batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 5, True)),
    "bucket-batches": lambda data: DataLoader(data, batch_sampler=BucketBatches(), collate_fn=masking),
    "subset": lambda data: DataLoader(Subset(data, range(2, 20)), 4, shuffle=True),
    "concatenated": lambda data: DataLoader(ConcatDataset([data, data]), 8, shuffle=True),
    "subclass": lambda data: Mixing(data, 4, shuffle=True, collate_fn=masking),
}
WITH_WORKERS: dict[str, Make] = {
    "workers": lambda data: DataLoader(data, 4, shuffle=True, num_workers=2, collate_fn=masking),
    "workers-bucket-batches": lambda data: DataLoader(
        data, batch_sampler=BucketBatches(), num_workers=2, prefetch_factor=4, persistent_workers=True
    ),
    "workers-subclass": lambda data: Mixing(data, 4, sampler=LazySampler(), num_workers=1, persistent_workers=True),
}


def no_warning(message: str) -> None:
    raise AssertionError(message)


def resumable(loader: object, warn: Callable[[str], None] = no_warning) -> ResumableLoader:
    return ResumableLoader(loader, seed=11, warn=warn)


def global_state() -> list[Any]:
    numpy_state = np.random.get_state(legacy=False)
    return [
        random.getstate(),
        numpy_state["state"]["key"].tobytes(),
        numpy_state["state"]["pos"],
        torch.get_rng_state().tolist(),
    ]


def taken(batches: Iterator[Any], disturb: int = 0) -> list[torch.Tensor]:
    """All batches, from a loop that uses the global generators itself; fails if fetching a batch moved them."""
    random.seed(disturb)
    np.random.seed(disturb)
    torch.manual_seed(disturb)
    result = []
    before = global_state()
    for batch in batches:
        assert global_state() == before, "fetching a batch consumed the loop's random numbers"
        result.append(batch)
        random.random(), np.random.rand(), torch.rand(1)
        before = global_state()
    assert global_state() == before
    return result


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def reads_of(batches: list[torch.Tensor]) -> list[int]:
    indices = [int(row[0]) for batch in batches for row in batch.reshape(-1, batch.shape[-1])]
    return np.bincount(indices, minlength=SAMPLES).tolist()


@pytest.mark.parametrize("name", WITHOUT_WORKERS)
@pytest.mark.parametrize("kind", [Augmented, AugmentedBatches])
def test_every_position_resumes_exactly(name: str, kind: type[Augmented]) -> None:
    make = WITHOUT_WORKERS[name]
    uninterrupted = resumable(make(kind()))
    epochs = [taken(uninterrupted.iterate(epoch, 0), disturb=epoch) for epoch in (0, 1)]
    if name not in ("sequential", "list-sampler"):
        assert [batch[..., 0].tolist() for batch in epochs[0]] != [batch[..., 0].tolist() for batch in epochs[1]]
    assert not any(torch.equal(batch[..., 1:], other[..., 1:]) for batch, other in zip(*epochs, strict=False))
    for start in range(len(epochs[1]) + 1):
        data = kind()
        tail = taken(resumable(make(data)).iterate(1, start), disturb=100 + start)
        assert same(tail, epochs[1][start:])
        if name != "subclass":  # its batches do not show the indices any more
            assert data.reads.tolist() == reads_of(epochs[1][start:])


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_every_position_resumes_exactly_with_workers(name: str) -> None:
    make = WITH_WORKERS[name]
    uninterrupted = resumable(make(Augmented()))
    epochs = [taken(uninterrupted.iterate(epoch, 0), disturb=epoch) for epoch in (0, 1)]
    for start in (1, len(epochs[1]) - 2):
        data = Augmented()
        again = resumable(make(data))
        assert same(taken(again.iterate(1, start), disturb=start), epochs[1][start:])
        if name != "workers-subclass":
            assert data.reads.tolist() == reads_of(epochs[1][start:])
        if "bucket" in name:
            assert same(taken(again.iterate(0, 2)), epochs[0][2:])  # the same workers, another epoch


def test_workers_or_not_gives_the_same_batches() -> None:
    alone, with_workers = (DataLoader(Augmented(), 4, shuffle=True, num_workers=n, collate_fn=masking) for n in (0, 2))
    assert same(taken(resumable(alone).iterate(3, 1)), taken(resumable(with_workers).iterate(3, 1)))


def test_tensors_are_not_seeded_and_stay_exact() -> None:
    tensors = TensorDataset(torch.arange(40.0))
    loader = resumable(DataLoader(ConcatDataset([tensors, Subset(tensors, range(9))]), 4, shuffle=True))
    whole = [batch[0] for batch in loader.iterate(0, 0)]
    assert sorted(torch.cat(whole).tolist()) == sorted([*range(40), *range(9)])
    before = global_state()
    assert same([batch[0] for batch in loader.iterate(0, 5)], whole[5:])
    assert global_state() == before
    with pytest.raises(UsageError, match="only while"):
        sample_seed()


def test_the_users_loader_is_left_alone() -> None:
    loader = DataLoader(Augmented(), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    parts = dict(vars(loader))
    state = loader.generator.get_state()
    list(resumable(loader).iterate(0, 0))
    assert vars(loader) == parts
    assert torch.equal(loader.generator.get_state(), state)


def test_a_failing_sample_gives_the_random_numbers_back() -> None:
    class Failing(Augmented):
        def __getitem__(self, index: int) -> torch.Tensor:
            raise OSError(f"disk gone at {index}")

    before = global_state()
    with pytest.raises(OSError, match="disk gone"):
        next(resumable(DataLoader(Failing(), 4, shuffle=True)).iterate(0, 0))
    assert global_state() == before


def test_a_loader_that_never_asks_is_refused() -> None:
    with pytest.raises(UsageError, match="keeps an iterator of its own"):
        next(resumable(Kept(Augmented(4), 2, collate_fn=list)).iterate(0, 0))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shuffled", "lazy-sampler", "stream"])
def test_stateful_loader_resumes_from_its_state(workers: int, kind: str) -> None:
    def make() -> ResumableLoader:
        options: dict[str, Any] = {"num_workers": workers, "collate_fn": masking}
        if kind == "stream":
            # Its samples get no seeds: it is iterated, so nobody knows which sample comes. Only the indices can be compared.
            return resumable(StatefulDataLoader(StreamOfPlaces(), 4, num_workers=workers))
        if kind == "shuffled":
            return resumable(StatefulDataLoader(Augmented(), 4, shuffle=True, **options))
        return resumable(StatefulDataLoader(Augmented(), 4, sampler=LazySampler(), **options))

    def shown(batches: list[torch.Tensor]) -> list[torch.Tensor]:
        return [batch[:, 0] for batch in batches] if kind == "stream" and workers else batches

    uninterrupted = make()
    states, batches = [], []
    for epoch in (0, 1):
        for batch in uninterrupted.iterate(epoch, 0):
            batches.append((epoch, batch))
            before = global_state()
            states.append(uninterrupted.state())
            assert global_state() == before
    first = sum(epoch == 0 for epoch, _ in batches)
    last = len(batches)
    for consumed in (2, first - 1, first, first + 1, last - 1) if workers == 0 else (2, first, last - 3):
        resumed = make()
        state = states[consumed - 1]
        assert state is not None
        resumed.load_state(state)
        tail = []
        if consumed <= first:
            tail += taken(resumed.iterate(0, consumed), disturb=consumed)
            tail += taken(resumed.iterate(1, 0))
        else:
            tail += taken(resumed.iterate(1, consumed - first), disturb=consumed)
        assert same(shown(tail), shown([batch for _, batch in batches[consumed:]]))


def test_iterable_dataset_continues_from_its_state() -> None:
    uninterrupted = resumable(DataLoader(StatefulStream(), 4))
    whole, states = [], []
    for batch in uninterrupted.iterate(0, 0):
        whole.append(batch)
        states.append(uninterrupted.state())
    for start in range(1, len(whole) + 1):
        data = StatefulStream()
        resumed = resumable(DataLoader(data, 4))
        state = states[start - 1]
        assert state is not None
        resumed.load_state(state)
        assert same(taken(resumed.iterate(0, start), disturb=start), whole[start:])
        assert data.reads == max(SAMPLES - 4 * start, 0)
        assert [batch[:, 0].tolist() for batch in resumed.iterate(1, 0)] == [batch[:, 0].tolist() for batch in whole]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_dataset_without_state_is_skipped_with_a_warning(workers: int) -> None:
    whole = taken(resumable(DataLoader(Stream(), 4, num_workers=workers)).iterate(0, 0))
    warnings: list[str] = []
    resumed = resumable(DataLoader(Stream(), 4, num_workers=workers), warnings.append)
    assert same(taken(resumed.iterate(0, 3), disturb=9), whole[3:])
    assert len(warnings) == 1
    assert "reads and drops 3 batches" in warnings[0]
    assert "StatefulDataLoader" in warnings[0]


class Again:
    """Can be iterated again, and draws while it is."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.rand(2) for _ in range(5))


def test_plain_iterables() -> None:
    batches = [torch.tensor([number]) for number in range(6)]
    assert same(taken(resumable(batches).iterate(0, 4)), batches[4:])
    assert [int(row) for row in resumable(torch.arange(6)).iterate(2, 4)] == [4, 5]
    whole = taken(resumable(Again()).iterate(0, 0))
    warnings: list[str] = []
    assert same(taken(resumable(Again(), warnings.append).iterate(0, 2), disturb=4), whole[2:])
    assert "reads and drops 2 batches" in warnings[0]
    once = resumable(iter(batches))
    assert same(taken(once.iterate(0, 0)), batches)
    for epoch, start in ((1, 0), (0, 1)):
        with pytest.raises(UsageError, match="once only"):
            next(once.iterate(epoch, start))
    with pytest.raises(UsageError, match="not iterable"):
        resumable(3)


def test_racing_workers_are_put_in_order_with_a_warning() -> None:
    warnings: list[str] = []
    loader = DataLoader(Augmented(), 4, shuffle=True, num_workers=2, in_order=False)
    batches = taken(resumable(loader, warnings.append).iterate(0, 0))
    assert same(batches, taken(resumable(DataLoader(Augmented(), 4, shuffle=True)).iterate(0, 0)))
    assert "in_order" in warnings[0]


def test_it_says_what_it_is() -> None:
    assert resumable(DataLoader(Augmented(), 4, shuffle=True, drop_last=True)).describe() == {
        "kind": "dataloader",
        "batches_per_epoch": 5,
        "dataset": "Augmented",
        "samples": SAMPLES,
        "batch_size": 4,
        "drop_last": True,
        "sampler": "RandomSampler",
        "num_workers": 0,
    }
    assert resumable(DataLoader(Stream(), 4)).batches_per_epoch is None
    assert resumable([1, 2]).describe() == {"kind": "iterable", "batches_per_epoch": 2, "type": "list"}


SIGNALLED = """
import multiprocessing, os, signal, sys
from torch.utils.data import DataLoader
from holdfast.train.loader import ResumableLoader
from loader_parts import Augmented, masking

if __name__ == "__main__":
    method = sys.argv[1]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    loader = DataLoader(Augmented(), 4, shuffle=True, num_workers=1, collate_fn=masking, persistent_workers=True,
                        multiprocessing_context=method)
    batches = ResumableLoader(loader, seed=11, warn=print).iterate(0, 0)
    seen = [next(batches)]
    for _ in range(3):
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGINT)
        seen.append(next(batches))
    (worker,) = multiprocessing.active_children()
    print(sum(batch.sum().item() for batch in seen), worker.pid, flush=True)
    sys.stdin.readline()
    sys.exit(0)  # with a pass begun and a worker alive: it must not hang
"""


@pytest.mark.parametrize(
    ("method", "killed"),
    [
        ("fork", True),
        pytest.param("spawn", False, marks=pytest.mark.long),
        ("forkserver", False),
        pytest.param("forkserver", True, marks=pytest.mark.long),
    ],
)
def test_workers_survive_group_signals_and_end_with_the_main_process(method: str, killed: bool, tmp_path: Path) -> None:
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, str(script), method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        total, worker = process.stdout.readline().split()
        ended = os.pidfd_open(int(worker))
        try:
            if killed:
                process.kill()
            else:
                process.stdin.write("\n")
                process.stdin.flush()
            assert process.wait(timeout=60) == (-signal.SIGKILL if killed else 0)
            exits = select.poll()
            exits.register(ended, select.POLLIN)
            assert exits.poll(30_000), "the worker outlived the main process"
        finally:
            os.close(ended)
    expected = taken(resumable(DataLoader(Augmented(), 4, shuffle=True, collate_fn=masking)).iterate(0, 0))[:4]
    assert float(total) == sum(batch.sum().item() for batch in expected)
