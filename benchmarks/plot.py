"""The picture: what a save costs the loop, until durable, the restore, and how far every figure is from its target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from report import Measured, evaluate

__all__ = ["draw"]

_OURS, _PEER, _FLOOR, _MET, _MISSED = "#1f6feb", "#9aa4b2", "#d9dee5", "#1a7f37", "#cf222e"
_PARTS = (("blocked_s", "blocked", 1.0), ("gate_s", "waiting at the gate", 0.6), ("slowdown_s", "slower steps", 0.3))


def draw(result: dict[str, Any], path: Path) -> None:
    found = result["scenarios"]
    largest = next((size for size in ("1G", "256M") if f"saves-{size}" in found or f"restores-{size}" in found), "1G")
    measured = evaluate(result)
    figure, axes = plt.subplot_mosaic("ad;bd;cd", figsize=(16, 12), layout="constrained", width_ratios=(1, 1.05))
    _loop(axes["a"], found.get("loop"))
    _bars(axes["b"], found.get(f"saves-{largest}"), "durable_s", "Seconds until durable (fsync)")
    _bars(axes["c"], found.get(f"restores-{largest}"), "restore_s", "Seconds to restore into a live model")
    _targets(axes["d"], measured)
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cpus']} CPUs, {result['date']}"
    figure.suptitle(
        f"holdfast beside its peers: {where}; medians of {result['rounds']} rounds, lines from min to max", fontsize=12
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _loop(axes: Axes, scenario: dict[str, Any] | None) -> None:
    if scenario is None:
        axes.set_visible(False)
        return
    samples = scenario["samples"]
    names = sorted(samples, key=lambda name: -median(samples[name]["cost_s"]))
    for row, name in enumerate(names):
        left = 0.0
        for figure, _, alpha in _PARTS:
            width = max(0.0, median(samples[name][figure]))
            axes.barh(
                row, width, left=left, color=_OURS if name == "holdfast" else _PEER, alpha=alpha, edgecolor="white"
            )
            left += width
        cost = samples[name]["cost_s"]
        axes.plot((min(cost), max(cost)), (row, row), color="#24292f", linewidth=1.2)
        axes.text(max(left, *cost), row, f"  {median(cost):.2f} s", va="center", fontsize=9)
    copy_s = median(value for of in samples.values() for value in of["memcpy_s"])
    axes.axvline(copy_s, color="#24292f", linestyle=":", linewidth=1)
    axes.text(copy_s, len(names) - 0.45, " one memcpy", fontsize=8, va="bottom")
    for _, label, alpha in _PARTS:
        axes.barh(0, 0, color="#555555", alpha=alpha, label=label)
    axes.legend(fontsize=8, loc="upper right", frameon=False)
    axes.set_ylim(-0.6, len(names) - 0.1)
    _finish(axes, names, f"What one save costs the loop, seconds\n{scenario['state']}")


def _bars(axes: Axes, scenario: dict[str, Any] | None, figure: str, title: str) -> None:
    if scenario is None:
        axes.set_visible(False)
        return
    samples = {name: of[figure] for name, of in scenario["samples"].items() if figure in of}
    names = sorted(samples, key=lambda name: -median(samples[name]))
    for row, name in enumerate(names):
        values = samples[name]
        axes.barh(row, median(values), color={"holdfast": _OURS, "raw file": _FLOOR}.get(name, _PEER))
        axes.plot((min(values), max(values)), (row, row), color="#24292f", linewidth=1.2)
        axes.text(max(values), row, f"  {median(values):.2f}", va="center", fontsize=9)
    axes.set_xlim(right=1.12 * max(max(values) for values in samples.values()))
    shown = [_note(name, figure) for name in names]
    _finish(axes, shown, f"{title}\n{scenario['state']}")


def _note(name: str, figure: str) -> str:
    if figure != "restore_s":
        return f"{name}, hashed" if name == "holdfast" else name
    return {
        "holdfast": "holdfast, verified", "torch.save": "torch.load", "torch.load(mmap)": "torch.load(mmap), lazy",
        "safetensors": "safetensors, partly lazy",
    }.get(name, name)  # fmt: skip


def _targets(axes: Axes, measured: Sequence[Measured]) -> None:
    for row, item in enumerate(reversed(measured)):
        color = _MET if item.met else _MISSED
        ends = [item.target.limit / ratio if item.target.least else ratio / item.target.limit for ratio in item.ratios]
        low, high = max(min(ends), 0.02), max(*ends, 0.02)
        axes.plot((low, high), (row, row), color=color, linewidth=1.5, alpha=0.5)
        axes.plot(max(item.of_limit, 0.02), row, "o", color=color, markersize=6)
    axes.axvline(1.0, color="#24292f", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.25, 0.5, 1, 2, 4, 8], ["0.1", "0.25", "0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    labels = [f"{item.target.figure} ({item.state})" for item in reversed(measured)]
    _finish(axes, labels, "Measured / allowed: left of the line is met")
    axes.tick_params(axis="y", labelsize=7.5)
    axes.grid(axis="x", color="#eaeef2")


def _finish(axes: Axes, labels: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
