"""The Trainer of hf_victim.py on several ranks that can be killed at any place. They are forked by hf_zygote.py."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import hf_victim
import numpy as np
import torch
import torch.distributed as dist
from adapter_data import hand_over
from job import die_at
from transformers import TrainerCallback

from holdfast.checkpoint import shares
from holdfast.train.huggingface import Callback


class Page(TrainerCallback):
    """Notes how far this rank is, and slows it down."""

    def __init__(self, page: Path, samples: Path, pace_s: float) -> None:
        self.page, self.samples, self.pace_s = page, samples, pace_s

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        with self.samples.open("a") as file:
            file.writelines(f"{int(state.epoch - 1e-9)} {index}\n" for index in hf_victim.plain(model).latest)
        time.sleep(self.pace_s)
        self.page.write_text(str(state.global_step))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(self.pace_s)


def main(
    url: str, result: str, pace_s: float = 0.0, notice: str = "none", place: str = "", at: int = 1, pause_in: str = "",
    **settings: Any,
) -> None:  # fmt: skip
    """`place`, `at`: this rank dies there, the `at`-th time. What came out goes to `result`, with the rank at its end."""
    shares.LEAST_STRETCH_BYTES = 1
    if place:
        die_at(place, at)
    output, os.environ["VICTIM_PLACE"] = (str(Path(result).parent / name) for name in ("output", "place"))
    options = {
        "save_every": settings.pop("save_every", "2 steps"),
        "keep": 2,
        "notice": notice,
        "frozen": settings.pop("frozen", "saved"),
    }
    trainer = hf_victim.make_trainer(
        None, output, pause_in=pause_in, ddp_backend="gloo", callbacks=[Callback(url, **options)], **settings
    )
    rank = trainer.args.process_index
    trainer.add_callback(Page(Path(f"{url}.step-{rank}"), Path(f"{url}.samples-{rank}"), pace_s))
    # The Trainer seeds all ranks alike; here each has streams of its own to lose.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank)
    returned = trainer.train()
    outcome = {**hf_victim.outcome_of(trainer), "returned": [returned.global_step, returned.training_loss]}
    hand_over(outcome, result, rank)
    dist.destroy_process_group()
