"""A small but awkward loop with `accelerate.Accelerator`, to be killed: everything prepared, accumulation with a short tail,
clipping, a schedule that counts micro-batches, registered objects, random augmentation, workers; one process or one of several."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from adapter_data import StatefulStream, Stream, fetched, hand_over
from torch import nn
from torch.utils.data import DataLoader, Dataset
from victim import announce, digest

import holdfast

SAMPLES, BATCH, EPOCHS, WIDTH = 44, 4, 3, 8


def sample(index: int) -> dict[str, Any]:
    fetched.append(index)
    noise = torch.rand(WIDTH) * random.random() + float(np.random.rand())
    return {"index": torch.tensor(index), "x": torch.full((WIDTH,), index / SAMPLES) + 0.1 * noise}


class Noisy(Dataset[dict[str, Any]]):
    """Augments with all three generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index)


class Average:
    """Something of the script's own, registered with `register_for_checkpointing`."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class Mean(nn.Module):
    """A moving average of the weights: a registered object that is a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.copy = nn.Linear(WIDTH, WIDTH)
        self.copy.load_state_dict(model[0].state_dict())  # type: ignore[index]

    def update(self, model: Any) -> None:
        with torch.no_grad():
            for mine, its in zip(self.copy.parameters(), model[0].parameters(), strict=True):
                mine.lerp_(its, 0.1)


DATA: dict[str, Callable[[], Any]] = {
    "map": Noisy, "stream": lambda: Stream(sample, SAMPLES), "stateful-stream": lambda: StatefulStream(sample, SAMPLES),
}  # fmt: skip


def make_model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 1))


def train(
    url: str,
    result: str,
    *,
    data: str = "map",
    workers: int = 0,
    accumulation: int = 1,
    adjust_scheduler: bool = False,
    sync_with_dataloader: bool = True,
    grouped: bool = True,
    precision: str = "no",
    scaler: bool = False,
    loaders: dict[str, Any] | None = None,
    whole: bool = False,
    batch: int = BATCH,
    save_every: str = "2 steps",
    pause_in: str = "",
    pace_s: float = 0.0,
    notice: str = "none",
) -> None:
    """Train to the end and write what came out to `result`, with the rank at its end where there are several. `whole`: the
    accelerator is all that is tracked. `grouped`: a step has as many batches as are accumulated. `loaders`: of
    DataLoaderConfiguration."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    plugin = GradientAccumulationPlugin(
        num_steps=accumulation, adjust_scheduler=adjust_scheduler, sync_with_dataloader=sync_with_dataloader
    )
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=precision,
        gradient_accumulation_plugin=plugin,
        dataloader_config=DataLoaderConfiguration(**(loaders or {})),
    )
    if scaler:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
    rank, several = accelerator.process_index, accelerator.num_processes > 1
    model = make_model()
    mean, average = Mean(model), Average()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=3 * EPOCHS * SAMPLES // BATCH)
    shuffle = data == "map"
    loader = DataLoader(DATA[data](), batch_size=batch, num_workers=workers, shuffle=shuffle)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(mean, average)
    random.seed(7 + rank)
    np.random.seed(7 + rank)
    torch.manual_seed(7 + rank)
    record: dict[str, Any] = {"samples": [], "syncs": [], "rates": [], "skipped": 0}
    page = Path(f"{url}.step-{rank}")
    with holdfast.Run(url, save_every=save_every, keep=2, notice=notice, progress=False, seed=3) as run:
        if whole:
            run.track(accelerator=accelerator, record=record)
        else:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            run.track(**parts, accelerator=accelerator, record=record)
        for _ in run.epochs(EPOCHS):
            model.train()
            for taken in run.batches(loader, batches_per_step=accumulation if grouped else 1):
                if run.micro.index == 0:
                    announce(pause_in, "stepping", run.step)
                with accelerator.accumulate(model):
                    assert taken["x"].device.type == accelerator.device.type
                    loss = (model(taken["x"]).float() - taken["x"].mean(1, keepdim=True)).square().mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        mean.update(accelerator.unwrap_model(model))
                average.value = 0.9 * average.value + 0.1 * loss.item()
                record["skipped"] += accelerator.optimizer_step_was_skipped
                record["samples"].extend(taken["index"].tolist())
                at_end = accelerator.gradient_state.end_of_dataloader
                record["syncs"].append([accelerator.sync_gradients, accelerator.step, at_end])
                record["rates"].append(scheduler.get_last_lr()[0])
                run.log(loss=loss)
                if several:
                    time.sleep(pace_s)
                    page.write_text(str(run.step + run.micro.last))
            with run.evaluating():
                announce(pause_in, "evaluating", run.step)
        steps = run.step
    parts = [model.state_dict(), mean.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
    outcome = {
        "steps": steps,
        **record,
        "average": average.value,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "digests": [digest(part) for part in parts],
        "rng": digest([torch.get_rng_state(), list(random.getstate()), np.random.get_state()[1].tolist()]),
    }
    hand_over(outcome, result, rank if several else None)
