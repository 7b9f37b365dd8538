"""A small but awkward training with Lightning, to be killed: dropout, BatchNorm, random augmentation of every sample, a metric of
torchmetrics, averages over epochs, learning rate schedulers of three kinds, an average of the weights, a datamodule with a state,
hooks that put something into checkpoints, and callbacks with a state, one of which records every sample and every logged figure."""

from __future__ import annotations

import logging
import os
import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter_data import StatefulStream, Stream, fetched, hand_over
from torch import nn
from torch.utils.data import DataLoader, Dataset
from victim import announce, digest

if os.environ.get("HOLDFAST_TEST_LIGHTNING") == "pytorch_lightning":
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
    from pytorch_lightning.loggers.logger import Logger
else:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers.logger import Logger

import torchmetrics

from holdfast.core.errors import HoldfastWarning
from holdfast.train.lightning import Callback as Holdfast

SAMPLES, BATCH, EPOCHS, WIDTH, CLASSES = 44, 4, 3, 8, 3

for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


def sample(index: int) -> dict[str, torch.Tensor]:
    fetched.append(index)
    noise = torch.rand(WIDTH) * random.random() + float(np.random.rand())
    return {
        "index": torch.tensor(index),
        "x": torch.full((WIDTH,), index / SAMPLES) + 0.1 * noise,
        "y": torch.tensor(index % CLASSES),
    }


class Noisy(Dataset[dict[str, torch.Tensor]]):
    """Augments with all three generators."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return sample(index)


DATA: dict[str, Callable[[], Any]] = {
    "map": Noisy, "stream": lambda: Stream(sample, SAMPLES),
    "stateful-stream": lambda: StatefulStream(sample, SAMPLES, endless=True),
}  # fmt: skip


class Data(pl.LightningDataModule):
    """Counts, and has a split that depends on what is drawn when it is made."""

    def __init__(self, kind: str = "map", workers: int = 0) -> None:
        super().__init__()
        self.kind, self.workers, self.seen = kind, workers, 0

    def train_dataloader(self) -> Any:
        if self.kind == "redrawn":
            chosen = torch.randperm(2 * SAMPLES)[:SAMPLES].tolist()
            return DataLoader(torch.utils.data.Subset(Noisy(2 * SAMPLES), chosen), batch_size=BATCH, shuffle=True)
        dataset: Any = DATA[self.kind]()
        shuffle = {"shuffle": True} if self.kind == "map" else {}
        workers: dict[str, Any] = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(dataset, batch_size=BATCH, **shuffle, **workers)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(10), batch_size=BATCH)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Net(pl.LightningModule):
    """Automatic optimization, with a scheduler that follows the steps."""

    def __init__(self, schedule: str = "step") -> None:
        super().__init__()
        self.schedule = schedule
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, CLASSES)
        )
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.used: list[int] = []
        self.hooked = 0

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.used.extend(batch["index"].tolist())
        self.trainer.datamodule.seen += len(batch["index"])  # type: ignore[attr-defined]
        scores = self.body(batch["x"])
        loss = nn.functional.cross_entropy(scores, batch["y"])
        self.accuracy(scores.softmax(1), batch["y"])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", scores.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.hooked += 1
        return loss

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        scores = self.body(batch["x"]) + 0.01 * torch.rand(1)
        self.log("val_loss", nn.functional.cross_entropy(scores, batch["y"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        steps = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=200)
        epochs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
        return [optimizer], [{"scheduler": steps, "interval": "step"}, {"scheduler": epochs, "interval": "epoch"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hooked"] = {"count": self.hooked, "kinds": {"net", self.schedule}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.hooked = checkpoint["hooked"]["count"]


class Manual(Net):
    """Two optimizers, of which one steps at every other batch, so that gradients wait for it."""

    def __init__(self, schedule: str = "step") -> None:
        super().__init__(schedule)
        self.automatic_optimization = False
        self.head = nn.Linear(CLASSES, CLASSES)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        body, head = self.optimizers()
        scheduler = self.lr_schedulers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        body.step()
        body.zero_grad()
        self.manual_backward(self.head(self.body(batch["x"]).detach()).square().mean())
        if batch_idx % 2 or self.trainer.is_last_batch:
            head.step()
            head.zero_grad()
        scheduler.step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        body = torch.optim.Adam(self.body.parameters(), lr=1e-2)
        head = torch.optim.SGD(self.head.parameters(), lr=1e-2, momentum=0.9)
        return [body, head], [torch.optim.lr_scheduler.ExponentialLR(body, 0.99)]


class Memory(Logger):
    """Keeps what is logged; the recorder makes it survive."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append([step, dict(metrics)])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        return None


class Recorder(Callback):
    """Keeps what happened."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.events: list[str] = []
        self.memory = Memory()

    def state_dict(self) -> dict[str, Any]:
        return {"samples": list(self.samples), "events": list(self.events), "log": list(self.memory.entries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self.events, self.memory.entries = state["samples"], state["events"], state["log"]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples.extend(module.used)
        module.used.clear()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.events.append(f"epoch {trainer.current_epoch}")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.events.append(f"evaluated at {trainer.global_step}: {trainer.callback_metrics['val_loss'].item()}")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        figures = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        self.events.append(f"end of {trainer.current_epoch} at {trainer.global_step}: {figures}")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.events.append(f"end at {trainer.global_step}")


class Average(Callback):
    """A moving average of the weights, swapped in while an evaluation goes on, as users write it."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.weights = {name: value.detach().clone() for name, value in module.body.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, value in module.body.state_dict().items():
            self.weights[name].lerp_(value, 0.1) if value.is_floating_point() else self.weights[name].copy_(value)

    def _swap(self, module: Any) -> None:
        for name, value in module.body.state_dict().items():
            mine = self.weights[name].clone()
            self.weights[name].copy_(value)
            value.copy_(mine)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self._swap(module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self._swap(module)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


class Announcing(Callback):
    """Stops at a place until it is killed there, or told to go on."""

    def __init__(self, place: str) -> None:
        self.place = place

    def announce(self, place: str, step: int) -> None:
        announce(self.place, place, step)
        if self.place == f"{place}:{step}":
            self.place = ""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.announce("stepping", trainer.global_step)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.announce("evaluating", trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.announce("ending", trainer.global_step)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.announce("finishing", trainer.global_step)


class Page(Callback):
    """Notes how far this rank is, and slows it down."""

    def __init__(self, page: Path, pace_s: float) -> None:
        self.page, self.pace_s = page, pace_s

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.pace_s)
        self.page.write_text(str(trainer.global_step))


MODELS = {"automatic": Net, "manual": Manual}


def make_trainer(
    url: str | None,
    output: str,
    *,
    save_every: str = "2 steps",
    pause_in: str = "",
    callbacks: list[Any] | None = None,
    ema: bool = False,
    patience: int | None = None,
    checkpoints: bool = False,
    **arguments: Any,
) -> pl.Trainer:
    """The same Trainer every time. `arguments`: of Trainer. Without `url`, as it is without holdfast."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    recorder = Recorder()
    others: list[Any] = [Announcing(pause_in), recorder]
    if ema:
        others.append(
            pl.callbacks.EMAWeightAveraging(decay=0.9) if hasattr(pl.callbacks, "EMAWeightAveraging") else Average()
        )
    else:
        others.append(Average())
    if patience is not None:
        others.append(EarlyStopping("val_loss", patience=patience))
    if checkpoints:
        others.append(ModelCheckpoint(output, monitor="val_loss", save_top_k=2, save_last=True))
    mine = [] if url is None else [Holdfast(url, save_every=save_every)]
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "logger": recorder.memory, "log_every_n_steps": 3,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": checkpoints,
        "default_root_dir": output, **arguments,
    }  # fmt: skip
    return pl.Trainer(callbacks=[*others, *mine, *(callbacks or [])], **settings)


def outcome_of(trainer: Any, model: Any) -> dict[str, Any]:
    recorder = next(callback for callback in trainer.callbacks if isinstance(callback, Recorder))
    states = {type(c).__name__: c.state_dict() for c in trainer.callbacks if not isinstance(c, Recorder | Holdfast)}
    for state in states.values():
        state.pop("dirpath", None)
    parts = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "rng": [torch.get_rng_state(), list(random.getstate()), np.random.get_state()[1].tolist()],
    }
    checkpoint = states.get("ModelCheckpoint", {})
    return {
        "samples": recorder.samples,
        "events": recorder.events,
        "log": recorder.memory.entries,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {name: value.item() for name, value in sorted(trainer.callback_metrics.items())},
        "seen": trainer.datamodule.seen,
        "hooked": model.hooked,
        "stopping": {name: str(value) for name, value in states.get("EarlyStopping", {}).items()},
        "best": [_file(checkpoint[name]) for name in ("best_model_path", "last_model_path") if name in checkpoint],
        "average": digest(states.get("Average", {})),
        **{name: digest(part) for name, part in parts.items()},
        "tensors": {name: digest(tensor) for name, tensor in model.state_dict().items()},
    }


def _file(path: str) -> str:
    """Without the `-v1` that ModelCheckpoint adds where a lost attempt has left a file of the same step."""
    return re.sub(r"-v\d+\.ckpt$", ".ckpt", Path(path).name)


def make_model(model: str = "automatic", schedule: str = "step") -> Any:
    pl.seed_everything(7, verbose=False)
    return MODELS[model](schedule)


def train(
    url: str | None, result: str, model: str = "automatic", schedule: str = "step", data: str = "map", workers: int = 0,
    resume: bool = False, **settings: Any,
) -> None:  # fmt: skip
    """Train to the end and write what came out to `result`, with what was fetched by this attempt. `resume`: by Lightning's own
    checkpoints, if there are any."""
    warnings.simplefilter("ignore")  # Lightning and torch warn of each other
    warnings.simplefilter("default", HoldfastWarning)
    output = Path(result).parent / "output"
    module = make_model(model, schedule)
    trainer = make_trainer(url, str(output), **settings)
    last = output / "last.ckpt"
    trainer.fit(module, datamodule=Data(data, workers), ckpt_path=str(last) if resume and last.exists() else None)
    is_rank = trainer.world_size > 1 or "RANK" in os.environ
    hand_over(outcome_of(trainer, module), result, trainer.global_rank if is_rank else None)
