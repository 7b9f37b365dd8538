"""Which transformers this adapter fits: said at the start, and not found out in the middle of a run.

The Trainer's public events do not reach far enough (they cannot say which epoch to begin with), so parts of it that are not public
are used. Their names and parameters are looked at before anything is trained.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from holdfast.core.errors import UsageError

__all__ = ["check_parts", "check_version"]

_MAJOR, _OLDEST_MINOR = 5, 3
_RANGE = f"{_MAJOR}.{_OLDEST_MINOR} or newer, and older than {_MAJOR + 1}"
_PARTS = {
    "get_train_dataloader": (),
    "evaluate": (),
    "get_eval_dataloader": (),
    "_inner_training_loop": (),
    "_init_training_state": (
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_run_epoch": ("epoch", "train_dataloader", "steps_in_epoch", "resume_from_checkpoint", "epochs_trained"),
    "_load_rng_state": ("checkpoint",),
    "_maybe_log_save_evaluate": ("tr_loss", "grad_norm", "learning_rate"),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
}  # fmt: skip
"""Methods of the Trainer, and parameters that they must have."""


def check_version(version: str = transformers.__version__) -> None:
    """Raises UsageError for a transformers that this adapter was not made for."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if major != _MAJOR or minor < _OLDEST_MINOR:
        raise UsageError(
            f"holdfast.train.huggingface is made for transformers {_RANGE}; this is {version}. Install one of these (pip install "
            f"'transformers>={_MAJOR}.{_OLDEST_MINOR},<{_MAJOR + 1}'), or a newer holdfast"
        )


def check_parts(trainer: Any) -> None:
    """Raises UsageError where this Trainer is not built as expected: a newer transformers, or a class that changes its insides."""
    for name, expected in _PARTS.items():
        method = getattr(trainer, name, None)
        if not callable(method):
            raise _unknown(trainer, f"it has no {name}()")
        present = inspect.signature(method).parameters
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in present.values())
        lost = [] if is_open else [parameter for parameter in expected if parameter not in present]
        if lost:
            raise _unknown(trainer, f"{name}() does not take {', '.join(lost)}")


def _unknown(trainer: Any, what: str) -> UsageError:
    kind = type(trainer)
    return UsageError(
        f"{kind.__module__}.{kind.__qualname__} of transformers {transformers.__version__} is not built as this holdfast expects "
        f"({what}), so it cannot be resumed exactly. Use transformers {_RANGE}, a newer holdfast, or `holdfast run --mirror` with "
        "the Trainer's own checkpoints"
    )
