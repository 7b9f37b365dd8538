"""What the Trainer remembers beside model, optimizer and scheduler: its state, its unfinished averages, its callbacks' states, and
the best model.

The Trainer keeps its settings (how often to log, how many steps in all) in the same object as its progress. Settings are those of
the script, progress is the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import ExportableState

from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.loader_source import has_state

__all__ = ["BestModel", "Book", "is_time"]

_SETTINGS = {
    "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size", "stateful_callbacks",
    "is_local_process_zero", "is_world_process_zero", "is_hyper_param_search", "trial_name", "trial_params",
}  # fmt: skip

_NOT_THE_MODEL = ("optimizer.", "scheduler.", "scaler.", "rng_state", "trainer_state.", "training_args.")


class Book:
    """Tracked by the run, on every rank for itself: unfinished averages differ, and each has callbacks of its own.

    `state_dict` is asked at step boundaries; what `load_state_dict` is given reaches the Trainer when it
    is ready for it: `restore_state`, then `restore_averages`."""

    def __init__(self, trainer: Any, own_callback: object) -> None:
        self._trainer, self._own = trainer, own_callback
        self._loaded: dict[str, Any] = {}
        self._began_s: float | None = None
        self.earlier_s = 0.0
        """How long former attempts trained, up to the checkpoint."""
        self._last: tuple[Any, Any] = (None, None)
        """Norm of the gradients and learning rate of the newest step."""
        self.frozen = ""
        """Fingerprint of what is left out of checkpoints."""

    @property
    def is_loaded(self) -> bool:
        return bool(self._loaded)

    # ---- what the run asks

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        progress = {
            field.name: getattr(trainer.state, field.name)
            for field in dataclasses.fields(trainer.state)
            if field.name not in _SETTINGS
        }
        running_s = 0.0 if self._began_s is None else time.monotonic() - self._began_s
        progress["log_history"], times = _without_times(progress["log_history"])
        return {
            "state": json.dumps(progress, default=_plain),
            "averages": {
                "loss": getattr(trainer, "_tr_loss", 0.0),
                "total_loss": getattr(trainer, "_total_loss_scalar", 0.0),
                "logged_at": getattr(trainer, "_globalstep_last_logged", 0),
                "began_at": getattr(trainer, "_initial_global_step", 0),
                "flos": trainer.current_flos,
            },
            "last": list(self._last),
            "step_samples": self._step_samples(),
            "frozen": self.frozen,
            "callbacks": self._callback_states(),
            "wall_clock": {"elapsed_s": self.earlier_s + running_s, "logged": json.dumps(times, default=_plain)},
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self._loaded = tree

    # ---- what the driver asks

    def check_frozen(self) -> None:
        """Raises UsageError where what was left out is not what the script has loaded."""
        if self._loaded["frozen"] != self.frozen:
            raise UsageError(
                'the frozen parameters are not those that this run was begun with, and with frozen="left out" its checkpoints do '
                "not hold them: load the same base model, in the same dtype, before the adapter's training begins"
            )

    def check_step(self, *, in_epoch: bool) -> None:
        """The Trainer counts in steps: their number, and the learning rates, follow from how many samples one takes. Raises
        UsageError where that has changed in the middle of an epoch."""
        before, now = self._loaded["step_samples"], self._step_samples()
        if before == now:
            return
        args = self._trainer.args
        what = f"an optimizer step takes {before} → {now} samples"
        if not in_epoch:
            warnings.warn(
                f"{what} from this epoch on; the number of steps and the learning rates are those of the new size",
                HoldfastWarning,
                stacklevel=2,
            )
            return
        size = f"{args.train_batch_size} a batch, {args.gradient_accumulation_steps} batches, {args.world_size} ranks"
        raise UsageError(
            f"{what} in the middle of an epoch (here: {size}), and the Trainer counts epochs and learning rates in steps. Set "
            f"per_device_train_batch_size and gradient_accumulation_steps so that it is {before}, or go on as before until the "
            "epoch ends"
        )

    def restore_state(self) -> None:
        """Once the Trainer has made itself a new state."""
        tree, state = self._loaded, self._trainer.state
        progress = json.loads(tree["state"])
        _put_times_back(progress["log_history"], json.loads(tree["wall_clock"]["logged"]))
        for name, value in progress.items():
            if hasattr(state, name):
                setattr(state, name, value)
        self._trainer.current_flos = tree["averages"]["flos"]
        self.earlier_s, self._last = tree["wall_clock"]["elapsed_s"], tuple(tree["last"])
        states = {kind: list(found) for kind, found in tree["callbacks"].items()}
        for callback in self._stateful():
            if found := states.get(type(callback).__name__):
                _load(callback, found.pop(0))

    def restore_averages(self) -> None:
        """When training begins: the Trainer has just set these to zero."""
        self._began_s = time.monotonic()
        if not self._loaded:
            return
        trainer, averages = self._trainer, self._loaded["averages"]
        trainer._tr_loss = torch.as_tensor(averages["loss"], device=trainer.args.device)
        trainer._total_loss_scalar = averages["total_loss"]
        trainer._globalstep_last_logged = averages["logged_at"]
        trainer._initial_global_step = averages["began_at"]
        self._loaded = {"state": ""}  # the tree is no longer needed, that there was one is

    def newest(self, grad_norm: Any, learning_rate: Any) -> tuple[Any, Any]:
        """What there is to log about the newest step; at the end of an epoch that was resumed there, what the checkpoint says."""
        if grad_norm is not None or learning_rate is not None:
            self._last = (grad_norm, learning_rate)
        return self._last

    def _step_samples(self) -> int:
        return int(self._trainer.get_total_train_batch_size(self._trainer.args))

    def _stateful(self) -> list[Any]:
        return [
            callback
            for callback in self._trainer.callback_handler.callbacks
            if callback is not self._own and (isinstance(callback, ExportableState) or has_state(callback))
        ]

    def _callback_states(self) -> dict[str, list[Any]]:
        """By class, in order: a script may have several of one."""
        found: dict[str, list[Any]] = {}
        for callback in self._stateful():
            state = callback.state_dict() if has_state(callback) else callback.state()
            found.setdefault(type(callback).__name__, []).append(state)
        return found


def _load(callback: Any, state: Any) -> None:
    """Into the script's own object: what it was made with (`args`) stays as the script says."""
    if has_state(callback):
        callback.load_state_dict(state)
        return
    for name, value in state.get("attributes", {}).items():
        setattr(callback, name, value)


def is_time(figure: str) -> bool:
    """Whether a figure that the Trainer logs says how long something took, so that it is another one in every run."""
    return figure.endswith(("_runtime", "_per_second", "_preparation_time"))


def _without_times(history: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """With nothing in their places; and they, in order."""
    rest = [{name: None if is_time(name) else value for name, value in entry.items()} for entry in history]
    return rest, [value for entry in history for name, value in entry.items() if is_time(name)]


def _put_times_back(history: list[dict[str, Any]], times: list[Any]) -> None:
    left = iter(times)
    for entry in history:
        entry.update({name: next(left) for name in entry if is_time(name)})


def _plain(value: Any) -> Any:
    """Metrics may be numpy's numbers."""
    return value.item()


class BestModel:
    """The files that `load_best_model_at_end` will ask for. The Trainer keeps them in a folder of this machine, which goes with
    it: a copy in host memory is part of every checkpoint (sent once, since it rarely changes). Of several ranks, those keep it that
    write the folder."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._files: dict[str, Any] = {}

    def keep(self, folder: str, step: int) -> None:
        """What the Trainer has just written, of the model only: its weights, or its adapter's, in the form that it reads."""
        paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        names = {
            path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(_NOT_THE_MODEL)
        }
        self._step, self._files = step, {name: np.fromfile(path, np.uint8) for name, path in names.items()}

    def put_back(self, folder: str, step: int | None) -> None:
        """Make the folder from which the Trainer loads them, if it is not there and these are what it asks for."""
        if os.path.isdir(folder) or not self._files or step != self._step:
            return
        made = Path(f"{folder}.{os.getpid()}")
        for name, content in self._files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(path)
        made.rename(folder)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "files": self._files}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self._step, self._files = tree["step"], tree["files"]
