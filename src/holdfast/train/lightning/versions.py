"""Which Lightning this adapter fits: said at the start, and not found out in the middle of a run.

Lightning comes as two packages with the same content, `lightning` (its part `lightning.pytorch`) and `pytorch_lightning`; a script
uses one of them. Callbacks alone cannot say where in an epoch to begin, so parts that are not public are used. Their names and
parameters are looked at before anything is trained.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.train.frameworks import check_range, lack_of

__all__ = ["PACKAGES", "base_classes", "check_parts", "check_version", "package_of", "version_of"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_MAJOR, _OLDEST_MINOR = 2, 4
_RANGE = f"{_MAJOR}.{_OLDEST_MINOR} or newer, and older than {_MAJOR + 1}"
_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"_run_stage": (), "_run_sanity_check": ()},
    "fit_loop": {
        "run": (), "setup_data": (), "reset": (), "on_run_start": (), "on_advance_start": (), "advance": (), "on_advance_end": (),
        "on_run_end": (), "state_dict": (), "load_state_dict": ("state_dict",),
    },
    "fit_loop._data_source": {"dataloader": ()},
    "fit_loop.epoch_loop": {
        "run": ("data_fetcher",), "on_run_start": ("data_fetcher",), "advance": ("data_fetcher",),
        "on_advance_end": ("data_fetcher",), "_num_ready_batches_reached": (),
    },
    "fit_loop.epoch_loop.val_loop": {"run": (), "setup_data": ()},
    "fit_loop.epoch_loop.val_loop._data_source": {"dataloader": ()},
    "_checkpoint_connector": {"_restore_modules_and_callbacks": ("checkpoint_path",)},
    "_signal_connector": {"register_signal_handlers": ()},
    "_logger_connector": {"log_metrics": ("metrics", "step")},
}  # fmt: skip
"""By the path from the Trainer: methods, and parameters that they must have."""
_ATTRIBUTES = {
    "fit_loop": ("epoch_progress", "_combined_loader", "_last_train_dl_reload_epoch", "_restarting"),
    "fit_loop.epoch_loop": ("batch_progress", "_results", "_batches_that_stepped", "done"),
    "fit_loop.epoch_loop.val_loop": ("_combined_loader", "_last_val_dl_reload_epoch"),
    "_logger_connector": ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx"),
}  # fmt: skip


def base_classes() -> tuple[type[Any], ...]:
    """`Callback` of every Lightning that this process uses; where it uses none yet, of one that is installed."""
    used = [name for name in PACKAGES if name in sys.modules]
    if not used:
        used = [name for name in PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None][:1]
    if not used:
        raise UsageError(
            f"holdfast.train.lightning needs Lightning, and neither package is installed: pip install 'lightning>={_MAJOR}."
            f"{_OLDEST_MINOR},<{_MAJOR + 1}' (or pytorch-lightning)"
        )
    modules = [importlib.import_module(name) for name in used]
    for name, module in zip(used, modules, strict=True):
        check_version(module.__version__, name)
    return tuple(module.Callback for module in modules)


def package_of(trainer: object) -> str:
    """The one of PACKAGES that this Trainer, or the class that it is derived from, belongs to."""
    for kind in type(trainer).__mro__:
        for name in PACKAGES:
            if kind.__module__.startswith(f"{name}."):
                return name
    raise UsageError(
        f"the holdfast callback works with Lightning's Trainer and classes derived from it, not {type(trainer)}"
    )


def version_of(trainer: object) -> str:
    return str(sys.modules[package_of(trainer)].__version__)


def check_version(version: str, package: str = PACKAGES[0]) -> None:
    """Raises UsageError for a Lightning that this adapter was not made for."""
    check_range(
        "holdfast.train.lightning", package, version, major=_MAJOR, oldest_minor=_OLDEST_MINOR,
        project=package.partition(".")[0].replace("_", "-"),
    )  # fmt: skip


def check_parts(trainer: Any) -> None:
    """Raises UsageError where this Trainer is not built as expected: a newer Lightning, or a class that changes its insides."""
    for path, methods in _METHODS.items():
        for name, expected in methods.items():
            lack = lack_of(_at(trainer, path), _name(path), name, expected)
            if lack is not None:
                raise _unknown(trainer, lack)
    for path, names in _ATTRIBUTES.items():
        for name in names:
            if not hasattr(_at(trainer, path), name):
                raise _unknown(trainer, f"{_name(path)} has no {name}")


def _at(trainer: Any, path: str) -> Any:
    part = trainer
    for name in path.split(".") if path else ():
        part = getattr(part, name, None)
    return part


def _name(path: str) -> str:
    return f"trainer.{path}" if path else "trainer"


def _unknown(trainer: Any, what: str) -> UsageError:
    kind, package = type(trainer), package_of(trainer)
    return UsageError(
        f"{kind.__module__}.{kind.__qualname__} of {package} {version_of(trainer)} is not built as this holdfast "
        f"expects ({what}), so it cannot be resumed exactly. Use {package} {_RANGE}, a newer holdfast, or `holdfast run --mirror` "
        "with Lightning's own checkpoints"
    )
