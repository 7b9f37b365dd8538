"""A training like any other: it knows nothing of Slurm. `python training.py URL RESULT [PACE_S]`."""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import holdfast

WIDTH, SAMPLES, EPOCHS = 16, 120, 3


class Noisy(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Augmented from every generator."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return index / SAMPLES + torch.rand(WIDTH) * random.random() + float(np.random.rand()), index


def digest(value: Any) -> str:
    """Of every byte of the state."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy().tobytes()
    elif isinstance(value, dict):
        value = [(key, digest(each)) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        value = [digest(each) for each in value]
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def main(url: str, result: str, pace_s: str = "0") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record: dict[str, list[int]] = {"samples": []}
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True)
    with holdfast.Run(url, save_every="1 h") as run:
        run.track(model=model, optimizer=optimizer, record=record)
        for batch, numbers in run.batches(loader, epochs=EPOCHS):
            optimizer.zero_grad()
            model(batch.float()).square().mean().backward()
            optimizer.step()
            record["samples"] += numbers.tolist()
            if run.step % 10 == 0:
                print(f"at step {run.step}", flush=True)
            time.sleep(float(pace_s))
    generators = [torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())]
    outcome = digest([model.state_dict(), optimizer.state_dict(), record, generators])
    Path(result).write_text(f"{outcome} {len(record['samples'])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
