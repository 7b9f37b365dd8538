"""The callback that makes `transformers.Trainer` a holdfast run.

It finds the Trainer that it was given to when that is complete, and has it driven (driving.py); the Trainer's events say when an
epoch begins and ends.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from transformers import Trainer, TrainerCallback

from holdfast.core.errors import UsageError
from holdfast.train.huggingface.book import is_time
from holdfast.train.huggingface.driving import Driver
from holdfast.train.huggingface.versions import check_version
from holdfast.train.run import Run

__all__ = ["Callback"]


class Callback(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer survive being killed: `Trainer(..., callbacks=[Callback("s3://bucket/runs/gpt")])`, and plain
    `trainer.train()`.

    Takes what `holdfast.Run` takes. The seed of the data order is `data_seed` or `seed` of the TrainingArguments; progress lines
    are left to the Trainer. The run is restored when training begins, if it has a checkpoint; it is marked as finished when
    `train()` returns; a notice ends the process with exit code 75, as with every run. Of several ranks, each makes one.

    frozen: `"saved"` keeps parameters that are not trained in the checkpoint (they are sent once); `"left out"` saves a fingerprint
        of them only, and leaves it to the script to load the same base model again.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        frozen: Literal["saved", "left out"] = "saved",
        **options: Any,
    ) -> None:
        check_version()
        if frozen not in ("saved", "left out"):
            raise UsageError(f'frozen={frozen!r}: it is "saved" or "left out"')
        self._url, self._options, self._keeps_frozen = url, options, frozen == "saved"
        self._driver: Driver | None = None

    @property
    def run(self) -> Run:
        """While it trains. Raises UsageError before and after."""
        if self._driver is None or self._driver.run is None:
            raise UsageError("the callback has a run while trainer.train() is at work, and neither before nor after it")
        return self._driver.run

    def _make_run(self, args: Any) -> Run:
        seed = args.seed if args.data_seed is None else args.data_seed
        return Run(self._url, **{"seed": seed, "progress": False, **self._options})

    # ---- the Trainer's events

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._driver is not None:
            raise UsageError(
                "this callback belongs to another Trainer already: give each one its own, with its own URL"
            )
        trainer = _trainer_above()
        if sum(isinstance(callback, Callback) for callback in trainer.callback_handler.callbacks) > 1:
            raise UsageError("two holdfast callbacks for one Trainer: a training is one run, under one URL")
        self._make_run(args)  # so that what is wrong with its options shows now
        self._driver = Driver(trainer, self, self._make_run, keeps_frozen=self._keeps_frozen)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._driver is None or self._driver.run is None:
            raise UsageError(
                "the holdfast callback came too late, or its Trainer trains in a way of its own: pass it when the Trainer is made, "
                "Trainer(..., callbacks=[Callback(url)])"
            )
        self._driver.begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._driver is not None:
            self._driver.begin_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._driver is not None:
            self._driver.end_epoch(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._driver is not None:
            self._driver.saved(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Figures of a training go into the run's ledger as well; it has times of its own."""
        if self._driver is not None and self._driver.run is not None:
            figures = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self._driver.run.log(
                **{name: value for name, value in figures.items() if name != "epoch" and not is_time(name)}
            )


def _trainer_above() -> Trainer:
    """The Trainer in whose `__init__` this is: its events say everything but who sends them."""
    frame = sys._getframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise UsageError("the holdfast callback works with transformers.Trainer and classes derived from it")
