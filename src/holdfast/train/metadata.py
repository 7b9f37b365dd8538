"""What a person wants to know about a checkpoint, as JSON: where the run was, what it ran on, and how it was set up.

At resume the saved description is compared with the present one; what differs is shown in a few lines, since a changed batch size,
GPU type or library version is the first thing to look at when a curve bends.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe_environment", "differences", "hyperparameters"]

_IGNORED = ("hostname",)


def describe_environment() -> dict[str, Any]:
    """Hardware, versions, determinism flags and the source's git commit."""
    cuda = torch.cuda.is_available()
    import numpy

    import holdfast

    return {
        "hardware": {
            "hostname": platform.node(),
            "cpu": platform.machine(),
            "cpu_count": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
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
        "command": [Path(argument).name if index == 0 else argument for index, argument in enumerate(sys.argv)],
    }


def _git_commit() -> str | None:
    """The commit of the script's folder, with `+` when tracked files differ from it. None outside a repository."""
    folder = Path(sys.argv[0]).resolve().parent if sys.argv and sys.argv[0] else Path.cwd()
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def hyperparameters(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, list[dict[str, Any]]]:
    """The plain settings of every parameter group (learning rate, betas, weight decay, …) by optimizer."""
    return {
        name: [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in optimizer.param_groups
        ]
        for name, optimizer in optimizers.items()
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line per value that differs, `path: before → now`. Lists and tuples compare alike."""
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
    return [] if before == now else [f"{path}: {before!r} → {now!r}"]
