"""What a person wants to know about a checkpoint, as JSON: where the run was, what it ran on, and how it was set up.

At resume the saved description is compared with the present one; what differs is shown in a few lines, since a changed batch size,
GPU type or library version is the first thing to look at when a curve bends.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from holdfast.store.redaction import redact

__all__ = ["describe_command", "describe_environment", "describe_state", "differences", "hidden", "hyperparameters"]

_IGNORED = ("hostname",)
_SHOWN_CHARACTERS = 80
_HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"key|secret|token|passw|credential|auth|signature", re.IGNORECASE)
_SECRET_SHAPE = re.compile(r"(?:hf|sk|pk|gh[a-z]|glpat|xox[a-z]|dckr_pat|AKIA|ASIA|AIza|ya29|eyJ)[_.-]?[\w.-]{12,}")
_LONG = re.compile(r"(?=[\w+=-]*\d)(?=[\w+=-]*[A-Za-z])[\w+=-]{32,}")
"""Longer than words are, of letters and digits: most keys look like this. Hiding a hash by mistake costs nothing."""


def describe_environment() -> dict[str, Any]:
    """The machine, versions, determinism flags and the source's git commit."""
    import holdfast

    return {
        "hardware": {
            "hostname": platform.node(),
            "cpu": platform.machine(),
            "cpu_count": os.cpu_count(),
        },
        "versions": {
            "holdfast": holdfast.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda,
        },
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
        },
        "git_commit": _git_commit(),
        "command": describe_command(sys.argv),
    }


def describe_command(arguments: Sequence[str]) -> str:
    """The command line without what may be a secret: checkpoints are read by more people than shell histories are."""
    shown = [Path(arguments[0]).name] if arguments else []
    hide_next = False
    for argument in arguments[1:]:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            shown.append(_HIDDEN)
        elif equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_without_secrets(argument))
        hide_next = argument.startswith("-") and not equals and bool(_SECRET_NAME.search(argument))
    return " ".join(shown)


def hidden(value: Any) -> Any:
    """A copy of plain values in which those whose name or shape says that they are secret are hidden."""
    if isinstance(value, Mapping):
        return {
            key: _HIDDEN if isinstance(item, str) and _SECRET_NAME.search(str(key)) else hidden(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [hidden(item) for item in value]
    return _without_secrets(value) if isinstance(value, str) else value


def _without_secrets(text: str) -> str:
    return _LONG.sub(_HIDDEN, _SECRET_SHAPE.sub(_HIDDEN, redact(text)))


def describe_state(
    optimizers: Mapping[str, torch.optim.Optimizer], modules: Mapping[str, torch.nn.Module]
) -> dict[str, Any]:
    """Learning rates and precision, as they are now."""
    rates = {
        name: [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        for name, optimizer in optimizers.items()
    }
    dtypes = {str(parameter.dtype) for module in modules.values() for parameter in module.parameters()}
    return {"learning_rates": rates, "precision": sorted(dtypes)}


def _git_commit() -> str | None:
    """The commit of the script's folder, with `+` when tracked files differ from it. None outside a repository."""
    folder = Path(sys.argv[0]).resolve().parent if sys.argv and sys.argv[0] else Path.cwd()
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=5,
        check=True,
    )
    return done.stdout.strip()


def hyperparameters(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, list[dict[str, Any]]]:
    """The plain settings of every parameter group (learning rate, betas, weight decay, …) by optimizer."""
    return {
        name: [
            {
                key: plain
                for key, value in group.items()
                if key != "params" and (plain := _plain(value)) is not _NOT_PLAIN
            }
            for group in optimizer.param_groups
        ]
        for name, optimizer in optimizers.items()
    }


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """`value` as JSON has it, or `_NOT_PLAIN`. Sizes and rates may be tensors or numpy scalars."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return value + 0
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    return _NOT_PLAIN


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line per value that differs, `path: before → now`. Lists and tuples compare alike: JSON knows lists only."""
    if isinstance(before, tuple):
        before = list(before)
    if isinstance(now, tuple):
        now = list(now)
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in _IGNORED:
                child = f"{path}.{key}" if path else str(key)
                lines += differences(before.get(key), now.get(key), child)
        return lines
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for index, pair in enumerate(zip(before, now, strict=True))
            for line in differences(*pair, f"{path}[{index}]")
        ]
    if before == now or (before != before and now != now):
        return []
    return [f"{path}: {_short(before)} → {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
