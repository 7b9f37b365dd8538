"""The table and the picture of ranks_at_scale.py: each figure against the number of ranks, beside a line of slope 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["ROWS", "draw", "foreseen", "markdown"]

FORESEEN = (4096, 16384)
_COLOURS = ("#1f6feb", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#57606a", "#0a3069")


class Row(NamedTuple):
    """A figure of the table, by its name in the results."""

    panel: str
    title: str
    name: str


ROWS = (
    Row("words", "joining", "join.words"),
    Row("words", "sharing out the state", "share.fsdp.words"),
    Row("words", "a common stop, wished by one rank", "stop, one wishes.words"),
    Row("words", "a common stop, wished by all at once", "stop, all wish.words"),
    Row("words", "a notice that all hear", "notice, all hear.words"),
    Row("words", "a save", "save.fsdp.changed.words"),
    Row("words", "a save in which a rank dies", "one dies in phase one.words"),
    Row("bytes through rank 0", "joining, in", "join.bytes_to_rank_0"),
    Row("bytes through rank 0", "sharing out FSDP, in", "share.fsdp.bytes_to_rank_0"),
    Row("bytes through rank 0", "sharing out FSDP, out", "share.fsdp.bytes_from_rank_0"),
    Row("bytes through rank 0", "sharing out DDP, in", "share.ddp.bytes_to_rank_0"),
    Row("bytes through rank 0", "sharing out DDP, out", "share.ddp.bytes_from_rank_0"),
    Row("bytes through rank 0", "a notice that all hear, out", "notice, all hear.bytes_from_rank_0"),
    Row("bytes through rank 0", "a save, in", "save.fsdp.changed.bytes_to_rank_0"),
    Row("bytes through rank 0", "a save, out", "save.fsdp.changed.bytes_from_rank_0"),
    Row("bytes through rank 0", "opening and restoring, out", "restore.fsdp.same.bytes_from_rank_0"),
    Row("store requests", "a save, rank 0", "save.fsdp.changed.rank_0.requests"),
    Row("store requests", "a save, each member", "save.fsdp.changed.member.requests"),
    Row("store requests", "a save, all ranks", "save.fsdp.changed.all_requests"),
    Row("store requests", "the sweep after it, rank 0", "save.fsdp.changed.sweep_requests"),
    Row("store requests", "a restore of FSDP, each rank", "restore.fsdp.same.requests"),
    Row("store requests", "the same on half of the ranks, each", "restore.fsdp.half.requests"),
    Row("store requests", "a restore of DDP, each rank", "restore.ddp.same.requests"),
    Row("store requests", "a restore of FSDP, all ranks", "restore.fsdp.same.all_requests"),
    Row("sizes in bytes", "root (FSDP)", "save.fsdp.changed.root_bytes"),
    Row("sizes in bytes", "largest part (FSDP)", "save.fsdp.changed.largest_part_bytes"),
    Row("sizes in bytes", "root and all parts (FSDP)", "save.fsdp.changed.index_bytes"),
    Row("sizes in bytes", "head", "save.fsdp.changed.head_bytes"),
    Row("sizes in bytes", "read of the index by one rank at a restore", "restore.fsdp.same.index_bytes"),
    Row("seconds of rank 0's CPU", "sharing out FSDP", "share.fsdp.rank_0_s"),
    Row("seconds of rank 0's CPU", "a common stop, wished by all", "stop, all wish.rank_0_s"),
    Row("seconds of rank 0's CPU", "a save, with its own part", "save.fsdp.changed.rank_0_s"),
    Row("seconds of rank 0's CPU", "with sockets: joining", "hub: join.cpu_s"),
    Row("seconds of rank 0's CPU", "with sockets: a common stop", "hub: stop, all wish.cpu_s"),
    Row("seconds of rank 0's CPU", "with sockets: words of a save", "hub: save.cpu_s"),
    Row("seconds of rank 0's CPU", "with sockets: sharing out FSDP", "hub: share.fsdp.cpu_s"),
)  # fmt: skip


def foreseen(result: dict[str, Any], name: str, size: int) -> float:
    """On the line through the two largest jobs."""
    smaller, larger = sorted(map(int, result["figures"]))[-2:]
    before, after = (result["figures"][str(each)].get(name, 0.0) for each in (smaller, larger))
    return float(after + max(0.0, after - before) / (larger - smaller) * (size - larger))


def markdown(result: dict[str, Any], picture: str | None = None) -> str:
    sizes = list(result["figures"])
    model = f"A model of {result['parameters']} parameters with AdamW, which keeps three more tensors for each"
    machine = f"{result['cpus']} CPUs, Python {result['python']}, {result['date']}"
    how = "Exponents between sizes that follow each other: 1 is linear. Foreseen: on the line through the two largest jobs."
    lines = ["# Up to 1,024 ranks, simulated", "", f"{machine}. {model}. {how}", ""]
    if picture:
        lines += [f"![Figures against the number of ranks]({picture})", ""]
    faster = result["faster_than_linear"]
    lines += [f"Faster than linear: {', '.join(faster) if faster else 'nothing'}.", ""]
    titles = ["", *(f"{int(size):,}" for size in sizes), "exponents", *(f"{size:,}, foreseen" for size in FORESEEN)]
    panel = ""
    for row in ROWS:
        if row.panel != panel:
            panel = row.panel
            lines += ["", f"## {panel[0].upper()}{panel[1:]}", "", *_row(titles), "|---|" + "---:|" * (len(titles) - 1)]
        lines += _line(result, row.title, row.name)
    lines += ["", "## All figures", "", *_row(titles[: len(sizes) + 2]), "|---|" + "---:|" * (len(sizes) + 1)]
    for name in result["figures"][sizes[-1]]:
        lines += _line(result, name, name, with_foreseen=False)
    return "\n".join(lines) + "\n"


def _line(result: dict[str, Any], title: str, name: str, *, with_foreseen: bool = True) -> list[str]:
    values = [result["figures"][size].get(name) for size in result["figures"]]
    each = " ".join(f"{value:.2f}" for value in result["growth"][name])
    ahead = [_number(name, foreseen(result, name, size)) for size in FORESEEN] if with_foreseen else []
    return _row([title, *(_number(name, value) for value in values), each, *ahead])


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("_s"):
        return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"
    if "bytes" in name and value >= 10_000:
        return (
            f"{value / 1e3:,.0f} kB"
            if value < 1e6
            else f"{value / 1e6:,.1f} MB"
            if value < 1e9
            else f"{value / 1e9:,.2f} GB"
        )
    return f"{value:,.0f}"


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def draw(result: dict[str, Any], path: Path) -> None:
    panels = list(dict.fromkeys(row.panel for row in ROWS))
    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    for panel, place in zip(panels, axes.flat, strict=False):
        _panel(place, result, panel)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(
        f"Words, requests, sizes and rank 0's time against the number of ranks; {result['date']}", fontsize=12
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Axes, result: dict[str, Any], panel: str) -> None:
    sizes = [int(size) for size in result["figures"]]
    rows = [row for row in ROWS if row.panel == panel]
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(rows))]
    lowest = float("inf")
    for number, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        values = [float(result["figures"][str(size)].get(row.name) or 0.0) for size in sizes]
        lowest = min(lowest, *(value for value in values if value), float("inf"))
        style = "-" if number < len(_COLOURS) else "--"
        axes.plot(sizes, values, style, marker="o", markersize=4, color=colour, label=row.title, linewidth=1.4)
    axes.plot(
        sizes,
        [lowest * size / sizes[0] for size in sizes],
        ":",
        color="#24292f",
        linewidth=1.2,
        label="slope 1: linear",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_title(panel[0].upper() + panel[1:], fontsize=10, loc="left")
    axes.legend(fontsize=7.5, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eaeef2")
    axes.set_axisbelow(True)
