"""A process that makes one run after the other (a notebook, a sweep) keeps nothing of those that have ended, however they did."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import gc
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from run_parts import Killed
from torch.utils.data import DataLoader, TensorDataset
from waiting import eventually

import holdfast

WAYS = ("finished", "error", "killed", "interrupted")


def descriptors() -> Counter[str]:
    gc.collect()
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


def train(folder: Path, way: str) -> None:
    errors = {"error": ValueError("of the script"), "killed": Killed(), "interrupted": KeyboardInterrupt()}
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with holdfast.Run(str(folder / "run"), local=folder / "disk", save_every="1 step") as run:
        run.track(model=model, optimizer=optimizer)
        for _ in run.epochs(2):
            for (batch,) in run.batches(DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=2)):
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
                if run.step == 5 and way in errors:
                    raise errors[way]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are seen in /proc")
@pytest.mark.parametrize("way", WAYS)
def test_no_run_leaves_an_open_file(tmp_path: Path, way: str) -> None:
    def attempt(number: int) -> None:
        with suppress(ValueError, Killed, KeyboardInterrupt):
            train(tmp_path / str(number), way)

    attempt(0)
    before = descriptors()
    for number in range(1, 4):
        attempt(number)
    # Whoever presses Ctrl-C does not wait for the threads that save: they end by themselves.
    eventually(lambda: not descriptors() - before, lambda: str(descriptors() - before), give_up_s=60, every_s=0.05)
