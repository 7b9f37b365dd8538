"""A small training for the drill: dropout, noise in the loader, an evaluation after each epoch, a record of every sample. The first
argument is the time that a step takes at least, in milliseconds; the second a fault to have."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import holdfast

SAMPLES, BATCH, EPOCHS, WIDTH = 80, 8, 5, 8


class Noisy(Dataset[tuple[int, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.full((WIDTH,), index / SAMPLES) + 0.1 * torch.rand(WIDTH)


def main(step_ms: int) -> None:
    torch.manual_seed(5)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.ReLU(), nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record: dict[str, Any] = {"samples": [], "scores": []}
    loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True)
    with holdfast.Run(save_every="4 steps") as run:
        run.track(model=model, optimizer=optimizer, record=record)
        for _ in run.epochs(EPOCHS):
            model.train()
            for index, x in run.batches(loader):
                optimizer.zero_grad()
                loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
                loss.backward()
                optimizer.step()
                record["samples"].extend(index.tolist())
                run.log(loss=loss)
                time.sleep(step_ms / 1000)
            with run.evaluating(), torch.no_grad():
                time.sleep(2 * step_ms / 1000)
                score = model.eval()(torch.rand(4, WIDTH)).sum().item()
            record["scores"].append(score)
            run.log(score=score)


if __name__ == "__main__":
    main(int(sys.argv[1]))
