"""A small but awkward training with `transformers.Trainer`, to be killed: GPT-2 with dropout and tied weights, random augmentation
of every sample, a collator that draws, warmup and cosine, clipping, logs that average over several steps, evaluations, and
callbacks with a state, one of which records every sample that reached the model."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter_data import StatefulStream, Stream, fetched, hand_over
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from victim import announce, digest

from holdfast.train.huggingface import Callback

SAMPLES, BATCH, EPOCHS, LENGTH, VOCABULARY = 44, 4, 3, 12, 32
CLOCKED = ("runtime", "per_second")
"""Figures that no two runs have in common."""


def sample(index: int) -> dict[str, Any]:
    fetched.append(index)
    noise = torch.randint(0, VOCABULARY, (LENGTH,)) + random.randrange(VOCABULARY) + int(np.random.randint(VOCABULARY))
    return {"input_ids": (noise + index) % VOCABULARY, "index": index}


class Noisy(Dataset[dict[str, Any]]):
    """Augments with all three generators."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.count:
            raise IndexError(index)  # the sampler that groups by length iterates over it
        return sample(index)


class Fixed(Noisy):
    """For workers that live through all evaluations: nobody brings back what such a worker has drawn."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = super().__getitem__(index)
        return {**one, "input_ids": (torch.arange(LENGTH) * (index + 1)) % VOCABULARY, "mask": False}


def numbers(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for index in range(shard * SAMPLES // 4, (shard + 1) * SAMPLES // 4):
            yield {"index": index}


def from_datasets(buffered: bool) -> Any:
    """A stream of Hugging Face's library, shuffled anew in every epoch if `buffered`."""
    import datasets

    made = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": list(range(4))})
    made = made.shuffle(seed=3, buffer_size=8) if buffered else made
    return made.map(lambda row: sample(row["index"]))


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Masks some of the input, as collators for language models do."""
    ids = torch.stack([torch.as_tensor(one["input_ids"]) for one in samples])
    masked = torch.where(torch.rand(ids.shape) < 0.1, 0, ids) if samples[0].get("mask", True) else ids
    return {"input_ids": masked, "labels": ids, "index": torch.tensor([one["index"] for one in samples])}


class Model(GPT2LMHeadModel):
    """Tells which samples it was trained on."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.used: list[int] = []
        self.latest: list[int] = []

    def forward(
        self, input_ids: Any = None, labels: Any = None, index: torch.Tensor | None = None, **others: Any
    ) -> Any:
        if self.training and index is not None:
            self.used.extend(index.tolist())
        return super().forward(input_ids=input_ids, labels=labels, **others)


def plain(model: Any) -> Any:
    """Without its wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Recorder(TrainerCallback, ExportableState):
    """Keeps what happened, in a state of the Trainer's own kind."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.events: list[str] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"samples": list(self.samples), "events": list(self.events)}}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model = plain(model)
        self.samples.extend(model.used)
        model.latest, model.used = model.used, []

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(f"evaluated at {state.global_step}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(f"end of {state.epoch}")


class Smooth(TrainerCallback):
    """A moving average of the loss, in a state of torch's kind."""

    def __init__(self) -> None:
        self.average = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.average = state["average"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.average = 0.9 * self.average + 0.1 * logs.get("loss", 0.0)


class Announcing(TrainerCallback):
    """Stops at a place until it is killed there. First in line, and last of all with what it announces."""

    def __init__(self, place: str) -> None:
        self.place = place

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        announce(self.place, "stepping", state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        announce(self.place, "evaluating", state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        announce(self.place, "ending", state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        announce(self.place, "finishing", state.global_step)


DATA: dict[str, Callable[[], Any]] = {
    "map": Noisy, "odd": lambda: Noisy(43), "stream": lambda: Stream(sample, SAMPLES),
    "stateful-stream": lambda: StatefulStream(sample, SAMPLES), "datasets": lambda: from_datasets(False),
    "shuffled-datasets": lambda: from_datasets(True),
}  # fmt: skip


def make_model(width: int = 16) -> Model:
    torch.manual_seed(7)
    return Model(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )
    )  # fmt: skip


def make_adapted(width: int, kind: str) -> Any:
    """A frozen base with LoRA on its attention; `head`: with a layer that is trained whole (modules_to_save)."""
    import peft

    whole = {"modules_to_save": ["ln_f"]} if kind == "head" else {}
    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True, **whole
    )
    return peft.get_peft_model(make_model(width), config)


def make_trainer(
    url: str | None,
    output: str,
    *,
    data: str = "map",
    save_every: str = "2 steps",
    pause_in: str = "",
    callbacks: list[Any] | None = None,
    adapter: str = "",
    frozen: str = "saved",
    width: int = 16,
    scaler: bool = False,
    **arguments: Any,
) -> Trainer:
    """The same Trainer every time. `arguments`: of TrainingArguments. Without `url`, as it is without holdfast. `scaler`: torch's
    for the CPU, which the Trainer uses as it would a GPU's; its first steps overflow and are skipped."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    settings: dict[str, Any] = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3, "logging_steps": 3, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5, "remove_unused_columns": False,
        "dataloader_pin_memory": False, "include_num_input_tokens_seen": "all", **arguments,
    }  # fmt: skip
    mine = [] if url is None else [Callback(url, save_every=save_every, frozen=frozen)]
    trainer = Trainer(
        model=make_adapted(width, adapter) if adapter else make_model(width),
        args=TrainingArguments(output_dir=output, **settings),
        train_dataset=DATA[data](),
        eval_dataset=Fixed(10) if settings.get("dataloader_persistent_workers") else Noisy(10),
        data_collator=collate,
        callbacks=[Announcing(pause_in), Recorder(), Smooth(), *mine, *(callbacks or [])],
    )
    if scaler:
        accelerator = trainer.accelerator
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=3)
    return trainer


def outcome_of(trainer: Trainer) -> dict[str, Any]:
    recorder = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Recorder))
    smooth = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Smooth))
    history = [
        {name: value for name, value in entry.items() if not name.endswith(CLOCKED)}
        for entry in trainer.state.log_history
    ]
    parts = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rng": [torch.get_rng_state(), list(random.getstate()), np.random.get_state()[1].tolist()],
    }
    return {
        "samples": recorder.samples,
        "events": recorder.events,
        "average": smooth.average,
        "history": history,
        "step": trainer.state.global_step,
        "flos": trainer.state.total_flos,
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        **({} if trainer.accelerator.scaler is None else {"scaler": trainer.accelerator.scaler.state_dict()}),
        **{name: digest(part) for name, part in parts.items()},
    }


def train(url: str | None, result: str, resume: bool = False, **settings: Any) -> None:
    """Train to the end and write what came out to `result`, with what was fetched by this attempt. `resume`: by the Trainer's own
    checkpoints, if there are any."""
    output = str(Path(result).parent / "output")
    trainer = make_trainer(url, output, **settings)
    mine = any(name.startswith("checkpoint-") for name in os.listdir(output)) if resume else False
    returned = trainer.train(resume_from_checkpoint=True if mine else None)
    outcome = {**outcome_of(trainer), "returned": [returned.global_step, returned.training_loss]}
    hand_over(outcome, result)
