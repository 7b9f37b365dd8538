"""transformers.Trainer: resumed by its own checkpoints (`resume_from_checkpoint`), and by holdfast's callback."""

# mypy: ignore-errors
from __future__ import annotations

import transformers
from adapters_training import BATCH, LOG_STEPS, Job, Model, Say, make_data, prepare
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from holdfast.train.huggingface import Callback

__all__ = ["CHECKPOINTS", "OWN", "VARIANTS", "VERSION", "train"]

VERSION = f"transformers {transformers.__version__}"
OWN = "`resume_from_checkpoint`"
VARIANTS = {"jit": "with enable_jit_checkpoint"}
CHECKPOINTS = "output/checkpoint-*"
_CLOCKED = ("runtime", "per_second")


class Watch(TrainerCallback, ExportableState):
    """Keeps a moving average."""

    def __init__(self, say: Say) -> None:
        self.say, self.average = say, 0.0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"average": self.average}}

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.say.step(state.global_step, model)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.average = 0.9 * self.average + 0.1 * logs.get("loss", 0.0)
        self.say.log(state.global_step, {k: v for k, v in logs.items() if not k.endswith(_CLOCKED)})


def train(job: Job) -> None:
    prepare()
    say, own = Say(job), job.how != "holdfast"
    watch, output = Watch(say), job.path / "output"
    trainer = Trainer(
        model=Model(job.data),
        args=TrainingArguments(
            str(output), max_steps=job.steps, per_device_train_batch_size=BATCH, report_to=[], disable_tqdm=True,
            gradient_accumulation_steps=job.accumulation, logging_steps=LOG_STEPS, use_cpu=True, seed=3,
            remove_unused_columns=False, dataloader_pin_memory=False, save_steps=job.save_steps or 1,
            save_strategy="steps" if own and job.save_steps else "no", enable_jit_checkpoint=job.how == "jit",
        ),
        train_dataset=make_data(job.data),
        callbacks=[watch, *([] if own else [Callback(job.path / "run", save_every=job.save_every)])],
    )  # fmt: skip
    say.ready()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if own and output.exists() else None)
    say.ended(trainer.model, watch.average)
