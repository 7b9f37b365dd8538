"""holdfast: train on spot capacity as if it never went away.

    import holdfast

    with holdfast.Run("s3://bucket/runs/gpt", save_every="10 min") as run:
        run.track(model=model, optimizer=optimizer)
        for epoch in run.epochs(10):
            for batch in run.batches(loader):
                loss = train_step(batch)
                run.log(loss=loss)

Importing this module is quick and does not import torch: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from holdfast.core.errors import (
    DifferentRun,
    Fenced,
    FormatError,
    HoldfastError,
    HoldfastWarning,
    IntegrityError,
    NotFound,
    PermissionDenied,
    Preempted,
    RestoreError,
    RunConflict,
    RunFinished,
    RunRemoved,
    SaveError,
    StoreError,
    StoreFull,
    StoreUnavailable,
    StoreUnsafe,
    TooManyUnsaved,
    TrackedStateMismatch,
    UnsupportedState,
    UsageError,
)

if TYPE_CHECKING:
    from holdfast.checkpoint.retain import Keep
    from holdfast.checkpoint.saver import SaveHandle
    from holdfast.checkpoint.tier import LocalTier
    from holdfast.checkpoint.tree import register_codec
    from holdfast.train.run import Run
    from holdfast.train.sample_seeds import sample_seed

__version__ = "0.1.0"

__all__ = [
    "DifferentRun",
    "Fenced",
    "FormatError",
    "HoldfastError",
    "HoldfastWarning",
    "IntegrityError",
    "Keep",
    "LocalTier",
    "NotFound",
    "PermissionDenied",
    "Preempted",
    "RestoreError",
    "Run",
    "RunConflict",
    "RunFinished",
    "RunRemoved",
    "SaveError",
    "SaveHandle",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "StoreUnsafe",
    "TooManyUnsaved",
    "TrackedStateMismatch",
    "UnsupportedState",
    "UsageError",
    "__version__",
    "register_codec",
    "sample_seed",
]

_LAZY = {
    "Keep": "holdfast.checkpoint.retain",
    "LocalTier": "holdfast.checkpoint.tier",
    "Run": "holdfast.train.run",
    "SaveHandle": "holdfast.checkpoint.saver",
    "register_codec": "holdfast.checkpoint.tree",
    "sample_seed": "holdfast.train.sample_seeds",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
