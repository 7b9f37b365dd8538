"""A small but awkward training run to be killed: BatchNorm, Dropout, random augmentation in loader workers, OneCycle, a frozen
part, tied weights, gradient clipping, an evaluation after every epoch, and a record of every sample in the order in which it was
used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import holdfast

SAMPLES, BATCH, EPOCHS, WIDTH = 96, 8, 3, 16


class Noisy(Dataset[dict[str, torch.Tensor]]):
    """Augments with all three generators, so that a sample is the same again only if all three are seeded per sample."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        base = torch.full((WIDTH,), float(index) / SAMPLES)
        noise = torch.rand(WIDTH) * random.random() + float(np.random.rand())
        return {"index": torch.tensor(index), "x": base + 0.1 * noise, "y": torch.tensor(index % 4)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.hidden.weight
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.frozen(x)).relu()
        return self.out(self.drop(self.tied(self.hidden(x).relu())))


def digest(value: Any) -> str:
    """A hash of a state tree, independent of how it is stored."""
    sha = hashlib.sha256()

    def walk(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            sha.update(str((node.dtype, tuple(node.shape))).encode())
            sha.update(node.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, dict):
            for key in node:
                sha.update(repr(key).encode())
                walk(node[key])
        elif isinstance(node, list | tuple):
            sha.update(b"[")
            for item in node:
                walk(item)
        else:
            sha.update(repr(node).encode())

    walk(value)
    return sha.hexdigest()


def train(url: str, result: str, workers: int = 2, save_every: Any = "3 steps", pause_in: str = "") -> None:
    """Train to the end and write what came out to `result`. `pause_in` names a place that announces itself to the killer."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=EPOCHS * SAMPLES // BATCH)
    record: dict[str, Any] = {"samples": [], "evaluations": []}
    loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=workers)
    with holdfast.Run(url, save_every=save_every, keep=2) as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, record=record)
        for epoch in run.epochs(EPOCHS):
            model.train()
            for batch in run.batches(loader):
                announce(pause_in, "stepping", run.step)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                record["samples"].extend(batch["index"].tolist())
                run.log(loss=loss)
            with run.evaluating():
                announce(pause_in, "evaluating", run.step)
                model.eval()
                with torch.no_grad():
                    score = model(torch.linspace(0, 1, 4 * WIDTH).reshape(4, WIDTH) + torch.rand(4, WIDTH)).sum().item()
            record["evaluations"].append([epoch, score])
    outcome = {
        "digest": digest([model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), record]),
        "samples": record["samples"],
        "evaluations": record["evaluations"],
        "rng": digest([torch.get_rng_state(), list(random.getstate()), np.random.get_state()[1].tolist()]),
    }
    temporary = Path(result + f".{os.getpid()}")
    temporary.write_text(json.dumps(outcome))
    temporary.replace(result)


def announce(wanted: str, place: str, step: int) -> None:
    """Tell the killer where we are, and wait there to be killed, or until it takes the mark away."""
    if wanted == f"{place}:{step}":
        mark = Path(os.environ["VICTIM_PLACE"])
        mark.write_text(place)
        while mark.exists():
            time.sleep(0.005)
