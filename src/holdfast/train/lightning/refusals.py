"""What a Trainer is asked for that cannot be resumed exactly, or is not supported yet: refused or told before the first step."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.frameworks import warn_of_rereading
from holdfast.train.lightning.feed import Feed
from holdfast.train.loader_source import has_state, length_or_none
from holdfast.train.loader_twin import unwrapped
from holdfast.train.sampler_parts import shards_itself

__all__ = ["refuse_checkpoint", "refuse_loader", "refuse_trainer", "tell_of_loader"]

_CALLBACKS = {
    "StochasticWeightAveraging": "it replaces the learning rate schedulers in the middle of the training. EMAWeightAveraging and "
    "WeightAveraging do not",
    "BaseFinetuning": "it gives the optimizers new parameters in the middle of the training. Give each part a parameter group from "
    "the start, and let a scheduler keep its learning rate at 0 until it is to learn",
    "ModelPruning": "it changes which tensors the model has in the middle of the training",
    "LearningRateFinder": "it trains to find a value, before the training. Find it once, in a script of its own, and write it down",
    "BatchSizeFinder": "it trains to find a value, before the training. Find it once, in a script of its own, and write it down",
}
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_WITHOUT_HOLDFAST = "or use `holdfast run --mirror` with Lightning's own checkpoints"


def refuse_trainer(trainer: Any) -> None:
    """Raises UsageError."""
    for callback in trainer.callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        for name in kinds & _CALLBACKS.keys():
            raise UsageError(f"the callback {type(callback).__name__} with holdfast: {_CALLBACKS[name]}")
    if trainer.overfit_batches:
        raise UsageError("Trainer(overfit_batches=…) with holdfast: it is for trying out. Leave the callback out meanwhile, or use "
                         " limit_train_batches and a loader that does not shuffle")  # fmt: skip
    training_step = getattr(trainer.lightning_module, "training_step", None)
    if callable(training_step) and "dataloader_iter" in inspect.signature(training_step).parameters:
        raise UsageError("training_step(dataloader_iter) takes batches by itself, so nobody knows where a step ends. Write "
                         "training_step(batch, batch_idx)")  # fmt: skip
    _refuse_strategy(trainer.strategy)
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        warnings.warn(
            "val_check_interval is a time: evaluations come at other steps after a resume, as at every start. The training itself "
            "is exact as long as nothing depends on them; a number of batches makes it so in any case",
            HoldfastWarning,
            stacklevel=2,
        )


def _refuse_strategy(strategy: Any) -> None:
    name, kinds = type(strategy).__name__, {kind.__name__ for kind in type(strategy).__mro__}
    if kinds & set(_SHARDED):
        raise UsageError(f"{name} is not supported by this callback yet; DDP and one process are. Write the loop with holdfast.Run "
                         f"(FSDP2), {_WITHOUT_HOLDFAST}")  # fmt: skip
    if not kinds & {"SingleDeviceStrategy", "DDPStrategy"} or any("XLA" in kind for kind in kinds):
        raise UsageError(f"{name} is not known to this callback: DDP and one process are. Use strategy=\"ddp\", "
                         f"{_WITHOUT_HOLDFAST}")  # fmt: skip
    if "MultiProcessing" in type(strategy.launcher).__name__:
        raise UsageError("strategy=\"ddp_spawn\", \"ddp_fork\" and \"ddp_notebook\" train in processes that cannot leave with an "
                         "exit code of their own. Use strategy=\"ddp\", or torchrun")  # fmt: skip
    for attribute, what in (("_ddp_comm_hook", "ddp_comm_hook"), ("_model_averaging_period", "model_averaging_period")):
        if getattr(strategy, attribute, None) is not None:
            raise UsageError(f"DDPStrategy({what}=…) keeps a state that cannot be saved, so a resume would not be exact. Leave "
                             f"it out, {_WITHOUT_HOLDFAST}")  # fmt: skip


def refuse_checkpoint(trainer: Any, path: Any, url: str, *, is_resumed: bool) -> None:
    """A checkpoint of Lightning's own, that the script has asked for or that Lightning has found by itself. Raises UsageError."""
    if path is None or is_resumed:
        return
    found = any(
        type(callback).__name__ == "OnExceptionCheckpoint" for callback in trainer.callbacks
    ) or "hpc_ckpt_" in str(path)
    if found:
        warnings.warn(
            f"Lightning has found {path}, and it is not used: {url} has no checkpoint yet, and begins at its own first step",
            HoldfastWarning,
            stacklevel=2,
        )
        return
    raise UsageError(
        f"fit(ckpt_path={str(path)!r}): {url} has no checkpoint yet, and a run begins at its own first step. Call fit() without it "
        "(a run that has one is resumed unasked); to begin with those weights, make the model with load_from_checkpoint()"
    )


def refuse_loader(trainer: Any, loader: Any) -> None:
    """Raises UsageError."""
    if isinstance(loader, dict | list | tuple) or type(loader).__name__ == "CombinedLoader":
        raise UsageError(
            f"several train dataloaders ({type(loader).__name__}): this callback drives one. Make one loader of them, over a "
            "torch.utils.data.StackDataset (samples of each, side by side) or a ConcatDataset (one after the other)"
        )
    if not isinstance(loader, DataLoader) and has_state(loader):
        raise UsageError(
            f"{type(loader).__name__} has a state of its own and is no DataLoader, so a run does not know where it is. Use "
            "torchdata's StatefulDataLoader, or a DataLoader over a dataset with that state"
        )
    if isinstance(trainer.limit_train_batches, int):
        return
    base = unwrapped(loader) if isinstance(loader, DataLoader) else loader
    if length_or_none(base) is None:
        what = type(base.dataset).__name__ if isinstance(base, DataLoader) else type(base).__name__
        raise UsageError(
            f"{what} has no length: Lightning then reads a batch ahead to know which one is the last, and a checkpoint does not "
            "know where such a stream is. Say how many batches make an epoch, limit_train_batches=1000, or give it a __len__"
        )


def tell_of_loader(trainer: Any, feed: Feed) -> None:
    """Warn at the start of what a resume will cost, and of what is done differently."""
    loader = unwrapped(feed.loader) if isinstance(feed.loader, DataLoader) else None
    if loader is None:
        return
    if isinstance(loader.dataset, IterableDataset):
        _tell_of_stream(loader)
    elif (
        trainer.world_size > 1
        and not trainer._accelerator_connector.use_distributed_sampler
        and not shards_itself(loader.sampler)
    ):
        warnings.warn(
            "use_distributed_sampler=False: every rank gets its part of one order all the same, since this loader does not share "
            "it out by itself",
            HoldfastWarning,
            stacklevel=2,
        )


def _tell_of_stream(loader: Any) -> None:
    if has_state(loader):
        return
    if not has_state(loader.dataset):
        why = f"{type(loader.dataset).__name__} is a stream without state_dict() and load_state_dict()"
    elif loader.num_workers:
        why = f"the state of a stream is out of reach in its {loader.num_workers} workers (num_workers=0 avoids it)"
    else:
        return
    warn_of_rereading(why)
