"""Averages of `self.log(..., on_epoch=True)` over an epoch that is not over: what they have collected so far, as a plain tree.

Lightning keeps one `_ResultMetric` for each name that was logged, made when it is logged first. Those of the checkpoint are made
before that, with the same settings, so an epoch that is resumed ends with the averages of all its batches.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture_results", "restore_results"]

_PLAIN = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
_SUMS = ("value", "cumulated_batch_size")


def capture_results(results: dict[str, Any]) -> dict[str, Any]:
    return {key: _capture(metric) for key, metric in results.items()}


def _capture(metric: Any) -> dict[str, Any]:
    meta = metric.meta
    names = _SUMS if metric.is_tensor else ()  # a metric of torchmetrics keeps its own, and the module keeps the metric
    return {
        "meta": {name: getattr(meta, name) for name in _PLAIN},
        "reduce": [meta.reduce_fx.__name__, _is_builtin(meta.reduce_fx)],
        "sync": {
            "should": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "has_group": meta.sync.group is not None,
        },
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "updates": metric._update_count,
        "sums": {name: plain(vars(metric)[name]) for name in names if name in vars(metric)},
        "newest": plain(metric._forward_cache),
        "computed": plain(metric._computed),
    }


def restore_results(
    results: dict[str, Any], saved: dict[str, Any], *, module: Any, reduce: Callable[..., Any], device: torch.device
) -> list[str]:
    """Returns the names that begin anew: of those that are summed over a process group of the script's own."""
    library = sys.modules[type(results).__module__]
    lost = []
    for key, state in saved.items():
        if state["sync"]["has_group"]:
            lost.append(state["meta"]["name"])
        else:
            results[key] = _restored(library, state, module, reduce, device)
    return lost


def _restored(
    library: Any, state: dict[str, Any], module: Any, reduce: Callable[..., Any], device: torch.device
) -> Any:
    name, is_builtin = state["reduce"]
    meta = library._Metadata(**state["meta"], reduce_fx=getattr(builtins if is_builtin else torch, name))
    meta.sync = library._Sync(
        fn=reduce, _should=state["sync"]["should"], rank_zero_only=state["sync"]["rank_zero_only"], _group=None
    )
    metric = library._ResultMetric(meta, state["is_tensor"])
    if not state["is_tensor"]:
        metric.value = module.get_submodule(meta.metric_attribute)
    for part, value in state["sums"].items():
        setattr(metric, part, _on(device, value))
    metric.has_reset, metric._update_count = state["has_reset"], state["updates"]
    metric._forward_cache, metric._computed = _on(device, state["newest"]), _on(device, state["computed"])
    return metric


def plain(value: Any) -> Any:
    """A copy of its own: what is computed in inference mode is a special kind of tensor, and may be written to later."""
    with torch.inference_mode(False):
        return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _is_builtin(function: Any) -> bool:
    return function in (sum, max, min)
