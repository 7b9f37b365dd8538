"""What a Trainer remembers beside model, optimizers and schedulers: loops, unfinished averages, callbacks, datamodule, and what the
`on_save_checkpoint` hooks add.

    state_dict, asked at step boundaries → the checkpoint → load_state_dict → restore, once the Trainer is set up

Lightning's own way of restarting its loops is not used: it guesses from counters where in a step a checkpoint was made. Here the
boundary is always at one of three places, and the book says at which.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.core.errors import HoldfastWarning
from holdfast.train.lightning.results import capture_results, plain, restore_results

__all__ = ["Book"]

_BUFFERS = "require_forward_param_sync"
"""DistributedDataParallel hands out rank 0's buffers before a forward pass, but not where the one before was an evaluation's or in
the middle of an accumulation: so it remembers that."""
_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


class Book:
    """Tracked by the run. One for each `fit()`."""

    def __init__(self, trainer: Any, own_callback: object, lightning_version: str) -> None:
        self._trainer, self._own, self._version = trainer, own_callback, lightning_version
        self._loaded: dict[str, Any] = {}
        self.seed: int = trainer.strategy.broadcast(torch.initial_seed() & (2**63 - 1))
        """Of what is drawn beside the training: by evaluations, and while dataloaders are made."""
        self.in_epoch = False
        """The boundary is one inside an epoch, and not one between two."""
        self.owes_batch_end = False
        """It comes before what Lightning does after the last batch of an epoch: the evaluation, its logs."""
        self.is_over = False
        """The loops are done."""
        self.was_over = False
        """They were when the checkpoint was made."""
        self.cut_at: str | None = None
        """The loops' progress when an epoch was left for good in its middle, so that a longer training goes on there."""

    @property
    def is_loaded(self) -> bool:
        return bool(self._loaded)

    # ---- what the run asks

    def state_dict(self) -> dict[str, Any]:
        trainer, connector = self._trainer, self._trainer._logger_connector
        return {
            "loops": self.progress(),
            "cut_at": self.cut_at,
            "in_epoch": self.in_epoch,
            "owes_batch_end": self.owes_batch_end,
            "is_over": self.is_over,
            "should_stop": trainer.should_stop,
            "accumulate": trainer.accumulate_grad_batches,
            "seed": self.seed,
            "world_size": trainer.world_size,
            "loaders_of": [
                _epoch(trainer.fit_loop._last_train_dl_reload_epoch),
                _epoch(_val_loop(trainer)._last_val_dl_reload_epoch),
            ],
            "metrics": {
                name: {key: plain(value) for key, value in getattr(connector, name).items()} for name in _METRICS
            },
            "logging": [connector._first_loop_iter, connector._current_fx],
            "results": capture_results(trainer.fit_loop.epoch_loop._results),
            _BUFFERS: getattr(trainer.strategy.model, _BUFFERS, None),
            "precision": trainer.precision_plugin.state_dict(),
            "datamodule": trainer.datamodule.state_dict() if trainer.datamodule is not None else {},
            **self._hooked(),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self._loaded = tree

    def progress(self) -> str:
        return json.dumps(self._trainer.fit_loop.state_dict())

    def _hooked(self) -> dict[str, Any]:
        """What callbacks keep, and what they and the module put into a checkpoint of Lightning's or change in it."""
        weights: dict[str, Any] = self._trainer.lightning_module.state_dict()
        checkpoint = self._checkpoint(weights)
        callbacks = {callback.state_key: callback.state_dict() for callback in self._others()}
        checkpoint["callbacks"] = callbacks = {key: state for key, state in callbacks.items() if state}
        standard = set(checkpoint)
        for callback in self._others():
            callback.on_save_checkpoint(self._trainer, self._trainer.lightning_module, checkpoint)
        self._trainer.lightning_module.on_save_checkpoint(checkpoint)
        kept = {name for name in checkpoint if name not in standard}
        if checkpoint.get("state_dict") is not weights or not _same(
            weights, self._trainer.lightning_module.state_dict()
        ):
            kept |= {"state_dict"} & set(checkpoint)
        return {"callbacks": callbacks, "hooks": {name: checkpoint[name] for name in sorted(kept)}}

    def _checkpoint(self, weights: dict[str, Any]) -> dict[str, Any]:
        """As Lightning makes one, for the hooks."""
        trainer = self._trainer
        return {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": self._version,
            "state_dict": weights,
            "loops": {"fit_loop": trainer.fit_loop.state_dict()},
            "callbacks": {},
            "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }

    def _others(self) -> list[Any]:
        return [callback for callback in self._trainer.callbacks if callback is not self._own]

    # ---- what the driver asks

    def restore(self, *, finished: bool) -> None:
        """Model, optimizers and schedulers are restored already. `finished`: nothing is trained any more."""
        tree, trainer = self._loaded, self._trainer
        self.seed, self.in_epoch, self.owes_batch_end = tree["seed"], tree["in_epoch"], tree["owes_batch_end"]
        self.was_over = tree["is_over"]
        # A training that was over and goes on has a new reason to.
        trainer.should_stop = tree["should_stop"] and not self.was_over
        if self.in_epoch:
            trainer.accumulate_grad_batches = tree["accumulate"]
        self._restore_loops(json.loads(tree["loops"] if finished or tree["cut_at"] is None else tree["cut_at"]))
        self._restore_metrics(tree)
        self._restore_hooked(tree)
        if tree[_BUFFERS] is not None and hasattr(trainer.strategy.model, _BUFFERS):
            setattr(trainer.strategy.model, _BUFFERS, tree[_BUFFERS])
        if tree["precision"]:
            trainer.precision_plugin.load_state_dict(tree["precision"])
        if tree["datamodule"] and trainer.datamodule is not None:
            trainer.datamodule.load_state_dict(tree["datamodule"])
        self._loaded = {"loaders_of": tree["loaders_of"]}  # the rest is no longer needed

    def _restore_loops(self, state: dict[str, Any]) -> None:
        self._trainer.fit_loop.load_state_dict(state)
        for loop in _with_inner(self._trainer.fit_loop):
            for flag in ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint"):
                if flag in vars(loop):
                    setattr(loop, flag, False)

    def _restore_metrics(self, tree: dict[str, Any]) -> None:
        trainer, connector = self._trainer, self._trainer._logger_connector
        device = trainer.strategy.root_device
        for name in _METRICS:
            found = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value
                for key, value in tree["metrics"][name].items()
            }
            setattr(connector, name, found)
        connector._first_loop_iter, connector._current_fx = tree["logging"]
        lost = restore_results(
            trainer.fit_loop.epoch_loop._results, tree["results"], module=trainer.lightning_module,
            reduce=trainer.strategy.reduce, device=device,
        )  # fmt: skip
        if lost and self.in_epoch:
            warnings.warn(
                f"the averages of {', '.join(lost)} over this epoch begin anew: they are summed over a sync_dist_group of the "
                "script's own, which no checkpoint can hold",
                HoldfastWarning,
                stacklevel=2,
            )
        if self.in_epoch and tree["world_size"] != trainer.world_size:
            warnings.warn(
                f"{tree['world_size']} → {trainer.world_size} ranks in the middle of an epoch: each kept averages of its own, so "
                "those that are logged at the end of this epoch are not exact. From the next epoch on they are",
                HoldfastWarning,
                stacklevel=2,
            )

    def _restore_hooked(self, tree: dict[str, Any]) -> None:
        module = self._trainer.lightning_module
        checkpoint = {**self._checkpoint(module.state_dict()), "callbacks": tree["callbacks"], **tree["hooks"]}
        module.on_load_checkpoint(checkpoint)
        for callback in self._others():
            callback.on_load_checkpoint(self._trainer, module, checkpoint)
        for callback in self._others():
            if state := checkpoint["callbacks"].get(callback.state_key):
                callback.load_state_dict(copy.deepcopy(state))

    @contextmanager
    def epoch_of_loaders(self, which: int) -> Iterator[None]:
        """Dataloaders that are made again after a resume are those of the epoch for which they were made. `which`: 0 those of the
        training, 1 those of the evaluation."""
        epochs = self._loaded.get("loaders_of", [None, None])
        epoch, epochs[which] = epochs[which], None
        progress = self._trainer.fit_loop.epoch_progress.current
        if epoch is None:
            yield
            return
        before, progress.completed = progress.completed, epoch
        try:
            yield
        finally:
            progress.completed = before


def _val_loop(trainer: Any) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop


def _epoch(number: float) -> int | None:
    """Lightning says minus infinity where no loader was made yet."""
    return int(number) if math.isfinite(number) else None


def _with_inner(loop: Any) -> Iterator[Any]:
    yield loop
    for part in vars(loop).values():
        if hasattr(part, "_restarting") and hasattr(part, "load_state_dict"):
            yield from _with_inner(part)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a hook has left the weights as they are."""
    return one.keys() == other.keys() and all(
        not isinstance(value, torch.Tensor) or value.data_ptr() == other[name].data_ptr() for name, value in one.items()
    )
