"""Which transformers this adapter fits: said at the start, and not found out in the middle of a run.

The Trainer's public events do not reach far enough (they cannot say which epoch to begin with), so parts of it that are not public
are used. Their names and parameters are looked at before anything is trained.
"""

from __future__ import annotations

from typing import Any

import transformers

from holdfast.core.errors import UsageError
from holdfast.train.frameworks import check_range, lack_of

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
    check_range("holdfast.train.huggingface", "transformers", version, major=_MAJOR, oldest_minor=_OLDEST_MINOR)


def check_parts(trainer: Any) -> None:
    """Raises UsageError where this Trainer is not built as expected: a newer transformers, or a class that changes its insides."""
    for name, expected in _PARTS.items():
        lack = lack_of(trainer, "", name, expected)
        if lack is not None:
            raise _unknown(trainer, lack)


def _unknown(trainer: Any, what: str) -> UsageError:
    kind = type(trainer)
    return UsageError(
        f"{kind.__module__}.{kind.__qualname__} of transformers {transformers.__version__} is not built as this holdfast expects "
        f"({what}), so it cannot be resumed exactly. Use transformers {_RANGE}, a newer holdfast, or `holdfast run --mirror` with "
        "the Trainer's own checkpoints"
    )
