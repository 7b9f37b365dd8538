"""`run.batches(loader, batches_per_step=…)`: steps of several batches, interrupted anywhere, on any loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from run_parts import Killed, Stores, seeded
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import holdfast
from holdfast import UsageError

SAMPLES, PER_STEP, EPOCHS = 22, 3, 2
fetched: list[int] = []


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        fetched.append(index)
        return torch.tensor([index, int(torch.randint(1000, ()))])


class Stream(IterableDataset[torch.Tensor]):
    """Knows its length, and where it is."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < SAMPLES:
            self.next += 1
            yield Numbers()[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


# Batches of 4: six, of which the last has 2; so two steps of 3 batches. Of 5: five, so a step of 3 and one of 2.
LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Numbers(), batch_size=5, shuffle=True),
    "whole steps": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Numbers(), batch_size=3, drop_last=True),
    "ready batches": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(SequentialSampler(range(SAMPLES)), 5, False)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=5),
}


def train(stores: Stores, make_loader: Callable[[], Any], stop_after: int | None = None) -> list[list[Any]]:
    """Returns [step, index in it, is it the last, values] of every batch, as the tracked record has it."""
    seeded()
    record: list[list[Any]] = []
    taken = 0
    with holdfast.Run("memory://run", save_every="1 step", open_store=stores, progress=False) as run:
        run.track(record=record)
        for _ in run.epochs(EPOCHS):
            for batch in run.batches(make_loader(), batches_per_step=PER_STEP):
                taken += 1
                if taken == stop_after:
                    raise Killed
                record.append([run.step, run.micro.index, run.micro.last, batch.tolist()])
    return record


@pytest.mark.parametrize("name", LOADERS)
def test_interrupted_at_every_batch(name: str) -> None:
    make_loader = LOADERS[name]
    reference = train(Stores(), make_loader)
    lengths = len(make_loader())
    steps = -(-lengths // PER_STEP)
    assert len(reference) == EPOCHS * lengths
    assert [entry[:3] for entry in reference[:lengths]] == [
        [batch // PER_STEP, batch % PER_STEP, batch % PER_STEP == PER_STEP - 1 or batch == lengths - 1]
        for batch in range(lengths)
    ]
    for stop_after in range(1, len(reference) + 1):
        stores = Stores()
        with pytest.raises(Killed):
            train(stores, make_loader, stop_after)
        epoch, batch = divmod(stop_after - 1, lengths)
        done = epoch * lengths + batch // PER_STEP * PER_STEP
        fetched.clear()
        assert train(stores, make_loader) == reference, f"interrupted in batch {stop_after}"
        assert len(fetched) == sum(len(entry[3]) for entry in reference[done:]), "only what is left is read"
        assert stores.checkpoints()[-1].step == EPOCHS * steps


def test_refused() -> None:
    run = holdfast.Run("memory://run", open_store=Stores(), progress=False)
    loader = LOADERS["shuffled"]()
    with pytest.raises(UsageError, match="give one of them"):
        next(run.batches(loader, epochs=1, global_batch=10, batches_per_step=2))
    with pytest.raises(UsageError, match="1 or more, not 0"):
        next(run.batches(loader, epochs=1, batches_per_step=0))
    run.close()


def test_another_number_in_the_middle_of_an_epoch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores()
    with pytest.raises(Killed):
        train(stores, LOADERS["shuffled"], stop_after=5)
    monkeypatch.setitem(globals(), "PER_STEP", 2)
    with pytest.raises(UsageError, match="batches_per_step 3 → 2"):
        train(stores, LOADERS["shuffled"])
