"""A loop with accelerate: resumed by `save_state`, `load_state` and `skip_first_batches`, and as a holdfast run.

Its own way is that of accelerate's examples: a folder for every save, named by the step, of which the newest is loaded.
"""

# mypy: ignore-errors
from __future__ import annotations

import accelerate
import torch
import torch._dynamo  # this and the next two are imported on the way otherwise, in every process anew
import torchdata.stateful_dataloader  # noqa: F401
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from adapters_training import BATCH, EPOCH_STEPS, LOG_STEPS, LONG_EPOCH, Job, Model, Say, make_data, prepare
from torch.utils.data import DataLoader

import holdfast.train.run

__all__ = ["CHECKPOINTS", "OWN", "VARIANTS", "VERSION", "train"]

VERSION = f"accelerate {accelerate.__version__}"
OWN = "`load_state`, `skip_first_batches`"
VARIANTS: dict = {}
CHECKPOINTS = "output/step_*"


class Meter:
    """Registered for checkpointing: a moving average, and the losses since the last line of the log."""

    def __init__(self) -> None:
        self.average, self.losses = 0.0, []

    def state_dict(self) -> dict:
        return {"average": self.average, "losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        self.average, self.losses = state["average"], list(state["losses"])


class Loop:
    """The training; what differs between the two ways is how batches come in and when it is saved."""

    def __init__(self, job: Job) -> None:
        self.job, self.say, self.meter, self.step = job, Say(job), Meter(), 0
        # Without the seedable sampler, an epoch that is resumed has another order than the one that was begun.
        loaders = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=job.accumulation, dataloader_config=loaders
        )
        model = Model(job.data)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
        loader = DataLoader(make_data(job.data), batch_size=BATCH, shuffle=job.data != "stream" or None)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, loader
        )
        self.accelerator.register_for_checkpointing(self.meter)

    def train_on(self, batch: dict) -> bool:
        """True when an optimizer step is done."""
        meter = self.meter
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch)["loss"]
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        meter.losses.append(loss.item())
        if not self.accelerator.sync_gradients:
            return False
        self.step += 1
        if self.step % LOG_STEPS == 0:
            mean = sum(meter.losses) / len(meter.losses)
            meter.losses, meter.average = [], 0.9 * meter.average + 0.1 * mean
            self.say.log(self.step, {"loss": mean})
        self.say.step(self.step, self.model)
        return True


def _own(loop: Loop) -> None:
    job, output = loop.job, loop.job.path / "output"
    saved = sorted(output.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    per_epoch = None
    if job.data != "stream":
        per_epoch = LONG_EPOCH // BATCH if job.data in ("map", "big") else EPOCH_STEPS * job.accumulation
    epoch, skip = 0, 0
    if saved:
        loop.accelerator.load_state(str(saved[-1]))
        loop.step = int(saved[-1].name.split("_")[1])
        epoch, skip = divmod(loop.step * job.accumulation, per_epoch) if per_epoch else (0, loop.step)
    while loop.step < job.steps:
        loop.loader.set_epoch(epoch)
        batches = loop.accelerator.skip_first_batches(loop.loader, skip) if skip else loop.loader
        for batch in batches:
            if loop.train_on(batch):
                if job.save_steps and loop.step % job.save_steps == 0:
                    loop.accelerator.save_state(str(output / f"step_{loop.step}"))
                if loop.step >= job.steps:
                    break
        epoch, skip = epoch + 1, 0


def _as_a_run(loop: Loop) -> None:
    job = loop.job
    with holdfast.Run(job.path / "run", save_every=job.save_every, progress=False) as run:
        run.track(accelerator=loop.accelerator)
        loop.step = run.step
        for batch in run.batches(loop.loader, epochs=1_000, batches_per_step=job.accumulation):
            if loop.train_on(batch) and loop.step >= job.steps:
                break


def train(job: Job) -> None:
    prepare()
    loop = Loop(job)
    loop.say.ready()
    (_as_a_run if job.how == "holdfast" else _own)(loop)
    loop.say.ended(loop.model, loop.meter.average)
