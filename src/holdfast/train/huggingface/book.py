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
from typing import Any

import safetensors.torch
import torch
from transformers.trainer_callback import ExportableState

from holdfast.train.loader_source import has_state

__all__ = ["BestModel", "Book"]

_SETTINGS = {
    "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size", "stateful_callbacks",
    "is_local_process_zero", "is_world_process_zero", "is_hyper_param_search", "trial_name", "trial_params",
}  # fmt: skip


class Book:
    """Tracked by the run. `state_dict` is asked at step boundaries; what `load_state_dict` is given reaches the Trainer when it
    is ready for it: `restore_state`, then `restore_averages`."""

    def __init__(self, trainer: Any, own_callback: object) -> None:
        self._trainer, self._own = trainer, own_callback
        self._loaded: dict[str, Any] = {}
        self._began_s: float | None = None
        self.earlier_s = 0.0
        """How long former attempts trained, up to the checkpoint."""
        self._last: tuple[Any, Any] = (None, None)
        """Norm of the gradients and learning rate of the newest step."""

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
            "callbacks": self._callback_states(),
            "elapsed_s": self.earlier_s + running_s,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self._loaded = tree

    # ---- what the driver asks

    def restore_state(self) -> None:
        """Once the Trainer has made itself a new state."""
        tree, state = self._loaded, self._trainer.state
        for name, value in json.loads(tree["state"]).items():
            if hasattr(state, name):
                setattr(state, name, value)
        self._trainer.current_flos = tree["averages"]["flos"]
        self.earlier_s, self._last = tree["elapsed_s"], tuple(tree["last"])
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


def _plain(value: Any) -> Any:
    """Metrics may be numpy's numbers."""
    return value.item()


class BestModel:
    """The weights that `load_best_model_at_end` will ask for. The Trainer keeps them in a folder of this machine, which goes with
    it: a copy in host memory is part of every checkpoint (sent once, since it rarely changes)."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._weights: dict[str, torch.Tensor] = {}

    def keep(self, model: torch.nn.Module, step: int) -> None:
        self._step = step
        self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}

    def put_back(self, folder: str, step: int | None) -> bool:
        """Make the folder from which the Trainer loads them, if it is not there. False when these are not what it asks for."""
        if os.path.isdir(folder):
            return True
        if not self._weights or step != self._step:
            return False
        os.makedirs(folder)
        weights = {name: tensor.contiguous() for name, tensor in self._weights.items()}
        safetensors.torch.save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "weights": self._weights}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self._step, self._weights = tree["step"], tree["weights"]
