"""Scripts that look well and are not, for the drill to find out: the first argument is the fault, the second the time of a step."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import holdfast

STEPS, WIDTH = 40, 6
FAULTS = (
    "unseeded", "unseeded python", "unseeded own generator", "own url", "own generator", "torch.save", "exit 0", "counter",
    "average",
)  # fmt: skip


def main(fault: str, step_ms: int) -> None:
    if fault not in FAULTS:
        raise ValueError(f"there is no fault {fault!r}")
    if fault != "unseeded":
        torch.manual_seed(5)
    torch.set_num_threads(1)
    if fault == "own url":
        where: str | None = "./runs/mine"
    else:
        where = None
    own_generator = np.random.default_rng(3 if fault != "unseeded own generator" else None)
    model = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    counter = 0
    average = torch.zeros(WIDTH)
    record: dict[str, Any] = {"samples": []}
    latest = Path("latest.pt")
    with holdfast.Run(where, save_every="3 steps") as run:
        run.track(model=model, optimizer=optimizer, record=record)
        run.restore()
        if fault == "torch.save" and latest.exists():
            # Over the same file, in place: it holds what was there at the last save, which was another moment.
            kept = torch.load(latest)
            model.load_state_dict(kept["model"])
        if fault == "exit 0":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        for index in run.batches([torch.tensor(i) for i in range(STEPS)]):
            counter += 1
            x = torch.linspace(0, 1, WIDTH) + index / STEPS
            if fault == "unseeded":
                x = x + 0.1 * torch.randn(WIDTH)
            if fault == "unseeded python":
                x = x + 0.1 * random.random()
            if "own generator" in fault:
                x = x + 0.1 * torch.from_numpy(own_generator.standard_normal(WIDTH)).float()
            if fault == "counter":
                optimizer.param_groups[0]["lr"] = 0.05 / (1 + counter)
            if fault == "average":
                average = 0.9 * average + 0.1 * x
                x = x - average
            optimizer.zero_grad()
            loss = (model(x) - index / STEPS).square().mean()
            loss.backward()
            optimizer.step()
            record["samples"].append(int(index))
            run.log(loss=loss)
            if fault == "torch.save" and counter % 5 == 0:
                torch.save({"model": model.state_dict()}, latest)
            time.sleep(step_ms / 1000)


def plain(step_ms: int) -> None:
    """Never heard of holdfast."""
    for _ in range(10):
        time.sleep(step_ms / 1000)
    torch.save({"weights": torch.ones(3)}, "latest.pt")


if __name__ == "__main__":
    chosen, milliseconds = sys.argv[1], int(sys.argv[2])
    if chosen == "no holdfast":
        plain(milliseconds)
    else:
        main(chosen, milliseconds)
