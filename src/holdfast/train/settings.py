"""What the run was set up with, then and now; and the rule for optimizer settings that the script has changed.

The rule: the checkpoint's settings are in force, unless `hyperparameters="script"`; then exactly those settings that the script has
changed since the checkpoint are applied, on top of the checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from holdfast.core.errors import UsageError
from holdfast.train.metadata import differences, hidden, hyperparameters

__all__ = ["Settings", "plain_config"]

_SHOWN_LINES = 12


def plain_config(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`config` as JSON values, so that it has a stable digest and can be shown. Raises UsageError for anything else."""
    return None if config is None else dict(_plain(config, "config"))


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan and no inf
    if isinstance(value, int | float):
        return value + 0
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "__fspath__") or isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise UsageError(
        f"{path}: a value of type {type(value).__qualname__} is not plain. config takes numbers, strings, lists and dicts; "
        "pass str(…) or the fields that matter"
    )


class Settings:
    """The present settings, and what becomes of them when a checkpoint says otherwise."""

    def __init__(self, config: dict[str, Any] | None, rule: str) -> None:
        if rule not in ("checkpoint", "script"):
            raise UsageError(f'hyperparameters must be "checkpoint" or "script", not {rule!r}')
        self.config = config
        self.script: dict[str, list[dict[str, Any]]] = {}
        self.environment: dict[str, Any] = {}
        self._rule = rule

    def observe(self, optimizers: Mapping[str, torch.optim.Optimizer], environment: dict[str, Any]) -> None:
        """Before anything is restored: what the script has set."""
        self.script = hyperparameters(optimizers)
        self.environment = environment

    def reconcile(
        self,
        saved: Mapping[str, Any],
        optimizers: Mapping[str, torch.optim.Optimizer],
        say: Callable[[str], None],
    ) -> None:
        """After the restore: show what changed since the checkpoint, and apply the rule."""
        lines = differences(saved.get("environment", {}), self.environment)
        lines += differences({"config": saved.get("config")}, {"config": hidden(self.config)})
        for line in lines[:_SHOWN_LINES]:
            say(f"changed since the checkpoint: {line}")
        if len(lines) > _SHOWN_LINES:
            say(f"changed since the checkpoint: … and {len(lines) - _SHOWN_LINES} more")
        before: Mapping[str, Any] = saved.get("script_hyperparameters", {})
        shared = [name for name in self.script if name in before]
        changed = differences({name: before[name] for name in shared}, {name: self.script[name] for name in shared})
        if not changed:
            return
        if self._rule == "script":
            self._apply(before, optimizers)
            rule = "applied (hyperparameters='script'); a tracked LR scheduler may set the learning rate again"
        else:
            rule = "NOT applied: the checkpoint's settings are in force. hyperparameters='script' applies the script's"
            # The next resume must compare with what this one was asked to keep, or it would fall silent.
            self.script = {**self.script, **{name: before[name] for name in shared}}
        for line in changed:
            say(f"the script changed {line}: {rule}")

    def _apply(self, before: Mapping[str, Any], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        for name, optimizer in optimizers.items():
            for group, old, now in zip(
                optimizer.param_groups, before.get(name, []), self.script.get(name, []), strict=False
            ):
                for key, value in now.items():
                    if key in old and differences(old[key], value):
                        _set(group, key, value)


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    """A learning rate may be a tensor, which compiled steps and graphs hold on to."""
    held = group.get(key)
    if isinstance(held, torch.Tensor):
        held.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(held, tuple) else value
