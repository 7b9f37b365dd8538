"""What a Trainer is asked for that cannot be resumed exactly, or is not supported yet: refused or told before the first step."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import IterableDataset

from holdfast.core.errors import HoldfastWarning, UsageError
from holdfast.train.loader_source import has_state, length_or_none

__all__ = ["refuse_loader", "refuse_trainer", "tell_of_streams"]

_ARGUMENTS = {
    "ignore_data_skip": "the run goes on at the exact next sample, and reads nothing to get there. Leave it out",
    "auto_find_batch_size": "a batch size that is found by failing may be another one after a restart. Set "
    "per_device_train_batch_size to what it finds",
    "enable_jit_checkpoint": "holdfast saves when this machine gets notice. Leave it out",
}


def refuse_trainer(trainer: Any, *, is_trial: bool) -> None:
    """Raises UsageError."""
    args = trainer.args
    for name, why in _ARGUMENTS.items():
        if getattr(args, name, False):
            raise UsageError(f"TrainingArguments({name}=True) with holdfast: {why}")
    if is_trial:
        raise UsageError(
            "hyperparameter_search() trains many models, and a holdfast run is one: leave the callback out of the search, and "
            "train the winner with it"
        )
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        raise UsageError("DeepSpeed and FSDP under the Trainer are not supported by this callback yet; DDP and one process are not "
                         "sharded. Write the loop with holdfast.Run (FSDP2), or use `holdfast run --mirror`")  # fmt: skip
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise UsageError(
            "models that from_pretrained(distributed_config=…) has sharded are not supported by this callback yet"
        )
    if args.world_size > 1:
        raise UsageError(
            f"this callback trains with one process so far, and this job has {args.world_size}. Start one (one GPU visible: "
            "CUDA_VISIBLE_DEVICES=0), write the loop with holdfast.Run, or use `holdfast run --mirror` with the Trainer's own "
            "checkpoints"
        )


def refuse_loader(loader: Any, batches_per_step: int) -> None:
    """Raises UsageError."""
    if batches_per_step > 1 and length_or_none(loader) is None:
        raise UsageError(
            f"gradient_accumulation_steps={batches_per_step} over a {type(loader.dataset).__name__} without a length: the Trainer "
            "leaves gradients behind where an epoch ends in the middle of an accumulation, and no checkpoint can hold them. Give "
            "the dataset a __len__, or use a larger per_device_train_batch_size with gradient_accumulation_steps=1"
        )


def tell_of_streams(loader: Any) -> None:
    """Warn at the start of what a resume will cost."""
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset):
        return
    if not has_state(dataset):
        why = f"{type(dataset).__name__} is a stream without state_dict() and load_state_dict()"
    elif loader.num_workers:
        why = f"the state of a stream is out of reach in its {loader.num_workers} workers (dataloader_num_workers=0 avoids it)"
    else:
        return
    warnings.warn(
        f"{why}: a resume reads and drops all batches of the epoch that were used, which may take long, and is exact only if the "
        "stream gives the same samples again. A map-style dataset is resumed without reading",
        HoldfastWarning,
        stacklevel=2,
    )
