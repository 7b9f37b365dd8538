"""Which accelerate this fits, and what of it cannot be a run: said when an object of it is tracked or a loader of it is opened,
before the first step, and not found out in the middle of a run.

accelerate is looked up among the modules that the script has imported; nothing is imported here.
"""

from __future__ import annotations

import sys
from typing import Any

from torch.utils.data import IterableDataset

from holdfast.core.errors import UsageError

__all__ = ["check_loader", "check_version", "is_accelerator", "is_from_accelerate", "refuse_strategy"]

_MAJOR = 1
_STRATEGIES = {
    "DEEPSPEED": "DeepSpeed keeps model and optimizer in an engine of its own",
    "MEGATRON_LM": "Megatron-LM keeps model and optimizer in an engine of its own",
    "XLA": "XLA's tensors are not on a device that holdfast reads",
}


def is_from_accelerate(subject: object) -> bool:
    """Whether accelerate made this: what it prepares are wrappers of its own classes."""
    return any(kind.__module__.partition(".")[0] == "accelerate" for kind in type(subject).__mro__)


def is_accelerator(subject: object) -> bool:
    return any(kind.__module__ == "accelerate.accelerator" for kind in type(subject).__mro__)


def check_version(version: str | None = None) -> None:
    """Raises UsageError for an accelerate that this was not made for. Default: the one that is imported."""
    if version is None:
        version = str(getattr(sys.modules.get("accelerate"), "__version__", f"{_MAJOR}."))
    if version.partition(".")[0] != str(_MAJOR):
        raise UsageError(
            f"this holdfast is made for accelerate {_MAJOR}.x; this is {version}. Install one of these (pip install "
            f"'accelerate>={_MAJOR},<{_MAJOR + 1}'), or a newer holdfast; loops without it need none"
        )


def refuse_strategy(state: Any) -> None:
    """Raises UsageError. `state`: accelerate's AcceleratorState."""
    check_version()
    kind = str(getattr(getattr(state, "distributed_type", None), "value", "NO"))
    if kind in _STRATEGIES:
        raise UsageError(
            f"an Accelerator with {kind} cannot be tracked: {_STRATEGIES[kind]}. Use DDP, or fully_shard (FSDP version 2), or "
            "`holdfast run --mirror` with accelerator.save_state()"
        )
    if kind == "FSDP" and getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
        raise UsageError(
            "an Accelerator with FSDP version 1 cannot be tracked: its shards say nothing of where they belong. Set "
            "fsdp_version: 2 (FullyShardedDataParallelPlugin(fsdp_version=2))"
        )


def check_loader(loader: Any) -> None:
    """Raises UsageError for a prepared loader of which a run cannot take its batches."""
    check_version()
    if type(loader).__name__ != "DataLoaderDispatcher" or loader.state.num_processes == 1:
        return
    if not isinstance(loader.dataset, IterableDataset):
        raise UsageError(
            "dispatch_batches=True over a map-style dataset: rank 0 would read for all ranks, and run.batches() gives every rank "
            "its part of the order to read. Leave dispatch_batches out of DataLoaderConfiguration; which samples make up a step "
            "does not change"
        )
    if loader.use_stateful_dataloader:
        raise UsageError(
            "use_stateful_dataloader=True where rank 0 reads a stream for several ranks: the state that the loader tells is ahead "
            "of what was used. Leave it out (a resume then reads and drops what was used), or make the data map-style"
        )
