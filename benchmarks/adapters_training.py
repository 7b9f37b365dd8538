"""What the trainings of adapters.py have in common: the data, the model, and how they say what they do.

A job is what one process is asked for. It writes lines to `<folder>/steps`: [step, samples used, samples read so far, time], the
first one when it begins; `<folder>/log` holds what was logged and `<folder>/outcome` how it ended. A job that is to be killed sends
the signal to itself, at the end of a step and before anything is saved for it.
"""

# mypy: ignore-errors
from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

__all__ = [
    "ACCUMULATION",
    "BATCH",
    "EPOCH_STEPS",
    "LOG_STEPS",
    "LONG_EPOCH",
    "Job",
    "Model",
    "Say",
    "make_data",
    "prepare",
]

EPOCH_STEPS, BATCH, ACCUMULATION, LENGTH, LOG_STEPS = 25, 4, 2, 16, 4
LONG_EPOCH, SAMPLE_S = 40_000, 0.002
"""An epoch of the restarts, and what a sample costs there."""
STEP_S = 0.05
"""What a step of the small trainings takes, so that there is time between them as in real ones."""
WIDTH = 1024


@dataclass
class Job:
    """`how`: "own", "holdfast", or a variant of a framework's. `data`: plain, augmented (small), map, stream (slow samples), big (a
    state of 150 MB). `save_steps`: 0 never saves. `strike`: [step, signal]; step -1 is
    the first that this process makes.
    """

    how: str
    folder: str
    data: str
    steps: int
    save_steps: int
    strike: list | None = None

    @property
    def accumulation(self) -> int:
        return ACCUMULATION if self.data in ("plain", "augmented") else 1

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def save_every(self) -> str:
        return f"{self.save_steps or 1_000_000} steps"


read = [0]


def _sample(index: int, data: str) -> dict:
    read[0] += 1
    if data in ("map", "stream"):
        time.sleep(SAMPLE_S)
    ids = torch.randint(0, 32, (LENGTH,)) if data == "augmented" else (torch.arange(LENGTH) * index) % 32
    return {"input_ids": ids, "labels": ids, "index": index}


class Map(Dataset):
    def __init__(self, data: str) -> None:
        self.data = data

    def __len__(self) -> int:
        return LONG_EPOCH if self.data in ("map", "big") else EPOCH_STEPS * BATCH * ACCUMULATION

    def __getitem__(self, index: int) -> dict:
        return _sample(index, self.data)


class Stream(IterableDataset):
    """Slow to read, and able to go on where it was."""

    next = 0

    def __iter__(self):
        while True:
            self.next += 1
            yield _sample(self.next - 1, "stream")

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]


def make_data(data: str) -> Dataset:
    return Stream() if data == "stream" else Map(data)


class Model(nn.Module):
    """Embedding, dropout, head; the big one has 12 million weights more, which take part in every step."""

    def __init__(self, data: str) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(32, 32), nn.Dropout(0.1), nn.Linear(32, 32)
        layers = 12 if data == "big" else 0
        self.big = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        self.used: list[int] = []

    def forward(self, input_ids=None, labels=None, index=None) -> dict:
        self.used.extend(index.tolist())
        hidden = self.drop(self.embed(input_ids))
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.big:
            wide = hidden.flatten(1).repeat(1, WIDTH // (32 * LENGTH)).repeat(16, 1)
            for layer in self.big:
                wide = layer(wide).tanh()
            loss = loss + wide.square().mean()
        return {"loss": loss}


class Say:
    """What a job says while it trains."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.path.mkdir(parents=True, exist_ok=True)

    def ready(self) -> None:
        self._line("steps", [0, [], read[0], time.perf_counter()])

    def step(self, number: int, model: Model) -> None:
        self._line("steps", [number, list(model.used), read[0], time.perf_counter()])
        model.used.clear()
        if self.job.data in ("plain", "augmented"):
            time.sleep(STEP_S)
        if self.job.strike is not None and self.job.strike[0] in (number, -1):
            os.kill(os.getpid(), self.job.strike[1])

    def log(self, step: int, figures: dict) -> None:
        self._line("log", [step, figures])

    def ended(self, model: nn.Module, state: float) -> None:
        """`state`: of a callback, or of what stands in its place."""
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        (self.job.path / "outcome").write_text(json.dumps({"weights": weights, "state": state}))

    def _line(self, name: str, what: list) -> None:
        with (self.job.path / name).open("a") as file:
            print(json.dumps(what), file=file)


def prepare() -> None:
    """The same start for all."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(3)
    read[0] = 0
