"""Lightning: resumed by ModelCheckpoint and `ckpt_path="last"`, and by holdfast's callback."""

# mypy: ignore-errors
from __future__ import annotations

import logging
import warnings

import lightning
import torch
from adapters_training import BATCH, LOG_STEPS, Job, Model, Say, make_data, prepare
from lightning.pytorch import Callback as LightningCallback
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from holdfast.train.lightning import Callback

__all__ = ["CHECKPOINTS", "OWN", "VARIANTS", "VERSION", "train"]

VERSION = f"lightning {lightning.__version__}"
OWN = '`ckpt_path="last"`'
VARIANTS: dict = {}
CHECKPOINTS = "output/*.ckpt"
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(LightningModule):
    def __init__(self, data: str) -> None:
        super().__init__()
        self.inner = Model(data)

    def training_step(self, batch, _) -> torch.Tensor:
        loss = self.inner(**batch)["loss"]
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(LightningCallback):
    """Says how far it is, and keeps a moving average."""

    def __init__(self, say: Say) -> None:
        self.say, self.average, self.last = say, 0.0, 0

    def state_dict(self) -> dict:
        return {"average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.average = state["average"]

    def on_train_start(self, trainer, module) -> None:
        self.last = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > self.last:
            self.last = trainer.global_step
            self.average = 0.9 * self.average + 0.1 * float(outputs["loss"])
            self.say.step(trainer.global_step, module.inner)


class Log(Logger):
    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say = say

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_, **__) -> None:
        return None

    def log_metrics(self, metrics, step=None) -> None:
        self.say.log(step, {name: value for name, value in metrics.items() if name != "epoch"})


def train(job: Job) -> None:
    prepare()
    say, own = Say(job), job.how != "holdfast"
    watch, output = Watch(say), job.path / "output"
    saving = ModelCheckpoint(
        output, filename="{step}", every_n_train_steps=job.save_steps or 1, save_top_k=-1, save_last=True
    )
    mine = [saving] if own and job.save_steps else [Callback(job.path / "run", save_every=job.save_every)] * (not own)
    trainer = Trainer(
        accelerator="cpu", max_steps=job.steps, max_epochs=-1, accumulate_grad_batches=job.accumulation,
        log_every_n_steps=LOG_STEPS, logger=Log(say), enable_progress_bar=False, enable_model_summary=False,
        # Without it Lightning reads a batch ahead of a stream, which holdfast's callback refuses.
        limit_train_batches=100_000 if job.data == "stream" else 1.0,
        enable_checkpointing=own and bool(job.save_steps), callbacks=[watch, *mine], default_root_dir=job.path,
    )  # fmt: skip
    module = Module(job.data)
    loader = DataLoader(make_data(job.data), batch_size=BATCH, shuffle=job.data != "stream" or None)
    say.ready()
    trainer.fit(module, loader, ckpt_path="last" if own and job.save_steps else None)
    say.ended(module, watch.average)
