"""What a Trainer is asked for that cannot be resumed exactly, or is not supported yet: refused or told before the first step."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from holdfast.core.errors import UsageError
from holdfast.train.frameworks import warn_of_rereading
from holdfast.train.huggingface.streams import has_lossy_state
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
        _refuse_ranks(trainer)


def _refuse_ranks(trainer: Any) -> None:
    """What several processes may not be."""
    args = trainer.args
    sizes = {name: getattr(trainer, f"get_{name}_size", lambda: 1)() for name in ("tp", "cp", "sp")}
    if shared := [name for name, size in sizes.items() if size > 1]:
        raise UsageError(
            f"parallelism over {', '.join(shared)} under the Trainer is not supported by this callback yet; data parallel ranks "
            "(DDP) are. Write the loop with holdfast.Run, or use `holdfast run --mirror`"
        )
    if getattr(args, "train_sampling_strategy", "") == "batch_rebalance":
        raise UsageError(
            f'train_sampling_strategy="batch_rebalance" cuts batches up for {args.world_size} processes by itself, and so does '
            'holdfast. Use "group_by_length" or "random"'
        )


def refuse_loader(prepared: Any, loader: Any, batches_per_step: int, world_size: int) -> None:
    """`prepared`: by accelerate, of `loader`. Raises UsageError."""
    is_stream = isinstance(loader.dataset, IterableDataset)
    if world_size > 1 and is_stream and type(prepared).__name__ == "DataLoaderDispatcher":
        raise UsageError(
            f"{type(loader.dataset).__name__} is a stream, of which rank 0 reads everything and hands it out (dispatch_batches), "
            "and where it is cannot be saved exactly then. With TrainingArguments(accelerator_config={'dispatch_batches': False}) "
            "every rank reads the stream and takes its part"
        )
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
    stream = getattr(dataset, "stream", dataset)
    if has_lossy_state(stream):
        why = f"{type(stream).__name__}.shuffle() keeps samples in a buffer that its state does not hold"
    elif not has_state(dataset):
        why = f"{type(stream).__name__} is a stream without state_dict() and load_state_dict()"
    elif loader.num_workers:
        why = f"the state of a stream is out of reach in its {loader.num_workers} workers (dataloader_num_workers=0 avoids it)"
    else:
        return
    warn_of_rereading(why)
