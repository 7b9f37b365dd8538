"""The pictures of `holdfast simulate --plot DIR`, as PNG: how costs are spread, how far policies are from the optimum, one window.

Drawn from a comparison that is done; matplotlib is imported here and nowhere else in the command. A policy has the same colour in
all pictures.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.simulate_tables import long_time, money, percent, write_bytes
from holdfast.core.config import format_duration
from holdfast.policy.market.facts import Market

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from holdfast.policy.market.arrays import Floats
    from holdfast.simulate.market.comparing import Comparison, Ground, Line, Section
    from holdfast.simulate.market.lane import Lane
    from holdfast.simulate.market.workload import Workload

__all__ = ["draw_comparison", "draw_window"]

_POLICIES = {
    "ours": "#2f6fd0", "greedy": "#e08a1e", "uniform-progress": "#17938f", "uniform-progress-as-written": "#86c5c0",
    "on-demand": "#9aa4b0", "spot": "#8a5fd0", "optimum": "#2b9a5e",
}  # fmt: skip
_OTHERS = ("#b0417a", "#6b7a1f", "#4a5568", "#c2603c")
_POOLS = ("#2f7fd0", "#1aa0a0", "#6a5fd0", "#4c9a52", "#3f5fa8", "#7ab8e0", "#9c6fc0", "#2b6f6f")
_ON_DEMAND, _WAITING, _CHANGEOVER, _TAKEN, _INK, _FAINT = (
    "#d9822b",
    "#e7e9ec",
    "#f0c23c",
    "#c62828",
    "#1d2330",
    "#6b7480",
)
_DPI = 130
_STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _FAINT, "axes.titlesize": 11, "font.size": 9,
    "axes.titlelocation": "left", "text.color": _INK, "xtick.color": _FAINT, "ytick.color": _INK, "legend.frameon": False,
}  # fmt: skip


def draw_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes cost.png, gap.png (where the optimum is known) and window.png. Each file is whole or absent."""
    from holdfast.simulate.market.comparing import policy_on
    from holdfast.simulate.market.lane import lane_of

    request, sections = comparison.request, comparison.sections
    paths = [_draw_grid(sections, folder / "cost.png", "Cost of a window", _costs)]
    if all(section.optimum_usd is not None for section in sections):
        paths.append(_draw_grid(sections, folder / "gap.png", "Dearer than the optimum", _gaps))
    _, played, number = max((section.most_telling() for section in sections), key=lambda found: found[0])
    ground, workload, start = played.ground, played.workload, int(played.starts[number])
    lanes = [
        lane_of(ground.trace, policy_on(name, ground, workload, request.given), workload, start)
        for name in request.policies
    ]
    least = None if played.optimum_microusd is None else int(played.optimum_microusd[number]) / 1e6
    paths.append(
        draw_window(ground, workload, number + 1, start, lanes, least, folder, ", where the policies differ most")
    )
    return paths


# ---- one picture per section, side by side: deadlines across, groups down


def _draw_grid(sections: Sequence[Section], path: Path, title: str, draw: Any) -> Path:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(section.group for section in sections))
    across = max(1, len(sections) // len(groups))
    rows = len(sections[0].lines) + 1
    with rc_context(_STYLE):
        figure = Figure(figsize=(2.2 + 5.2 * across, (0.75 + 0.36 * rows) * len(groups) + 0.7), layout="constrained")
        axes = figure.subplots(len(groups), across, squeeze=False, sharey=True)
        for number, section in enumerate(_by_group(sections, groups)):
            draw(axes[number // across][number % across], section)
        job = sections[0].workload.job
        figure.suptitle(
            f"{title}: {long_time(job.work_s)} of work, changeover {format_duration(job.changeover_s)}",
            fontsize=13, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        return _save(figure, path)


def _by_group(sections: Sequence[Section], groups: Sequence[str]) -> list[Section]:
    return [section for group in groups for section in sections if section.group == group]


def _costs(axes: Axes, section: Section) -> None:
    """Every window a dot, half of them in the box, nine of ten between the whiskers, the mean a diamond."""
    import numpy as np

    rows: dict[str, Floats] = {line.policy: section.costs_usd(line.policy) for line in section.lines}
    late = {line.policy: line.misses for line in section.lines}
    least = section.least_usd()
    if least is not None:
        rows["optimum"] = least
    luck = np.random.default_rng(0)
    for place, (name, costs) in enumerate(rows.items()):
        color = _color(name, rows)
        places = place + luck.uniform(-0.3, 0.3, len(costs))
        axes.plot(costs, places, ".", color=color, markersize=3.5, alpha=0.45, markeredgewidth=0, zorder=1)
        low, quarter, half, three, high = np.quantile(costs, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
        axes.plot((low, high), (place, place), color=color, linewidth=1.4, zorder=2)
        axes.barh(place, three - quarter, 0.5, left=quarter, color=color, alpha=0.45, linewidth=0, zorder=3)
        axes.plot((half, half), (place - 0.25, place + 0.25), color=color, linewidth=2.2, zorder=4)
        mean = float(costs.mean())
        axes.plot(mean, place, marker="D", color="white", markeredgecolor=color, markersize=5, zorder=5)
        words = money(mean, mean) + (f", {late[name]} late" if late.get(name) else "")
        axes.annotate(
            words, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=_TAKEN if late.get(name) else _INK,
        )  # fmt: skip
    _rows_named(axes, section, list(rows))
    low, high = min(float(each.min()) for each in rows.values()), max(float(each.max()) for each in rows.values())
    margin = 0.03 * (high - low) + 0.01 * high + 1e-6
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(
        "dollars per window: dots; half of them in the box; line from 5 to 95 %; diamond: mean", fontsize=7.5
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"${value:,.0f}")


def _gaps(axes: Axes, section: Section) -> None:
    """How much dearer than the optimum, with the band of the mean; what is left of greedy's gap."""
    names = [line.policy for line in section.lines]
    timely = [line.above_optimum for line in section.lines if line.above_optimum is not None]
    reach = max([0.02, *sorted(timely)]) * 100
    # One policy far off must not press all others to the edge.
    if len(timely) > 2 and sorted(timely)[-1] > 2.5 * sorted(timely)[-2]:
        reach = sorted(timely)[-2] * 250
    for place, line in enumerate(section.lines):
        color = _color(line.policy, names)
        if line.above_optimum is None:
            words = f"late in {line.misses} of {line.windows}" if line.misses else "the optimum costs nothing"
            axes.annotate(words, (0, place), xytext=(6, 0), textcoords="offset points", va="center", color=_TAKEN)
            continue
        above = line.above_optimum * 100
        axes.barh(place, min(above, reach), 0.55, color=color, linewidth=0)
        band = line.above_optimum_band
        if band is not None and above < reach:
            axes.plot((band.low * 100, min(band.high * 100, reach)), (place, place), color=_INK, linewidth=1.3)
        words = f"+{above:.1f} %" + (f", {_closed(line)}" if line.gap_closed is not None else "")
        axes.annotate(
            words, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8.5,
        )  # fmt: skip
    _rows_named(axes, section, names)
    axes.set_xlim(0, reach * 1.04)
    axes.set_xlabel("mean cost above the optimum; line: 5 to 95 % of a bootstrap over days", fontsize=7.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")


def _closed(line: Line) -> str:
    from holdfast.simulate.market.comparing import BASELINE

    return "the gap" if line.policy == BASELINE else f"{percent(line.gap_closed)} of the gap closed"


def _rows_named(axes: Axes, section: Section, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("-as-written", ",\nas written") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    windows = section.lines[0].windows
    axes.set_title(f"{section.group}, {long_time(section.workload.job.deadline_s)} ({windows} windows)")


def _color(name: str, names: Mapping[str, object] | Sequence[str]) -> str:
    others = [each for each in names if each not in _POLICIES]
    return _POLICIES.get(name) or _OTHERS[others.index(name) % len(_OTHERS)]


# ---- one window


def draw_window(
    ground: Ground, workload: Workload, number: int, start: int, lanes: Sequence[Lane], least_usd: float | None, folder: Path,
    which: str = "",
) -> Path:  # fmt: skip
    """Writes window.png: where capacity was, what each policy ran on, and how the work got on."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pools = ground.trace.pools
    end_s = max([workload.job.deadline_s, *(lane.stretches[-1].end_s for lane in lanes if lane.stretches)])
    with rc_context(_STYLE):
        heights = (0.3 * len(pools) + 0.1, 0.36 * len(lanes) + 0.2, 2.6)
        figure = Figure(figsize=(12, sum(heights) + 1.9), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=heights)
        _market(above, ground, workload, start)
        _lanes(middle, lanes, pools)
        _slack(below, lanes, workload)
        for axes in (above, middle, below):
            axes.axvline(workload.job.deadline_s / 3600, color=_TAKEN, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.grid(axis="x", color="#eceef1", linewidth=0.8)
            axes.set_axisbelow(True)
        below.set_xlim(0, end_s / 3600 * 1.001)
        below.set_xlabel(
            "hours since the start of the window; the deadline is dashed. To spare: time left less work left"
        )
        best = "" if least_usd is None else f"; at best {money(least_usd, least_usd)}"
        figure.suptitle(
            f"{ground.name}, window {number}{which}: {long_time(workload.job.work_s)} of work in "
            f"{long_time(workload.job.deadline_s)}{best}",
            fontsize=13, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        return _save(figure, folder / "window.png")


def _market(axes: Axes, ground: Ground, workload: Workload, start: int) -> None:
    import numpy as np

    trace = ground.trace
    ticks = -(-workload.follow_s // trace.tick_s)
    there = trace.available(workload.gang)[:, start : start + ticks]
    hours = trace.tick_s / 3600
    names: list[str] = []
    for place, row in enumerate(there):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        spans = [(begin * hours, (end - begin) * hours) for begin, end in edges.reshape(-1, 2).tolist()]
        axes.broken_barh(spans, (place - 0.36, 0.72), color=_POOLS[place % len(_POOLS)], alpha=0.55, linewidth=0)
        price = float(trace.microusd_h[place, start : start + ticks].mean()) / 1e6
        names.append(f"{trace.pools[place]}, ${price:.2f}")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.set_title(
        f"spot capacity, dollars an hour of one machine; on-demand ${trace.on_demand_microusd_h / 1e6:.2f}",
        fontsize=9.5,
    )


def _lanes(axes: Axes, lanes: Sequence[Lane], pools: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for place, lane in enumerate(lanes):
        for stretch in lane.stretches:
            ready_s = min(stretch.ready_s, stretch.end_s)
            color = {Market.ON_DEMAND: _ON_DEMAND, Market.NOTHING: _WAITING}.get(stretch.market)
            if color is None:
                color = _POOLS[pools.index(stretch.pool or "") % len(_POOLS)]
            _bar(axes, place, stretch.begin_s, ready_s, _CHANGEOVER)
            _bar(axes, place, ready_s, stretch.end_s, color)
        if lane.preempted_s:
            hours = [at_s / 3600 for at_s in lane.preempted_s]
            axes.plot(
                hours, [place - 0.36] * len(hours), linestyle="", marker="v", color=_TAKEN, markersize=5, clip_on=False
            )
        words = money(lane.microusd / 1e6, lane.microusd / 1e6) + (" late" if lane.missed else "")
        axes.annotate(
            words, (1.0, place), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center",
            color=_TAKEN if lane.missed else _INK,
        )  # fmt: skip
    axes.set_yticks(range(len(lanes)), [lane.policy for lane in lanes])
    axes.set_ylim(len(lanes) - 0.4, -0.7)
    axes.tick_params(length=0)
    marks: list[Any] = [
        Patch(color=_POOLS[0], label="spot" if len(pools) == 1 else "spot, coloured by pool"),
        Patch(color=_ON_DEMAND, label="on-demand"),
        Patch(color=_CHANGEOVER, label="changeover"),
        Patch(color=_WAITING, label="waiting"),
        Line2D([], [], linestyle="", marker="v", color=_TAKEN, label="taken away"),
    ]
    axes.legend(handles=marks, ncols=5, loc="lower left", bbox_to_anchor=(-0.005, 1.0), fontsize=8.5, borderpad=0)


def _bar(axes: Axes, place: int, begin_s: int, end_s: int, color: str) -> None:
    if end_s > begin_s:
        axes.barh(place, (end_s - begin_s) / 3600, 0.6, left=begin_s / 3600, color=color, linewidth=0)


def _slack(axes: Axes, lanes: Sequence[Lane], workload: Workload) -> None:
    """Time that need not be worked, over time: level while work is done, down while nothing is. Below zero it is too late."""
    job = workload.job
    names = [lane.policy for lane in lanes]
    for lane in lanes:
        spare_h = [(job.deadline_s - at_s - (job.work_s - done_s)) / 3600 for at_s, done_s in lane.progress]
        axes.plot(
            [at_s / 3600 for at_s, _ in lane.progress], spare_h, color=_color(lane.policy, names),
            linewidth=2.4 if lane.policy == "ours" else 1.5, label=lane.policy,
        )  # fmt: skip
    axes.axhline(0, color=_TAKEN, linewidth=1.2)
    axes.set_ylabel("hours to spare")
    first_h = (job.deadline_s - job.work_s) / 3600
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.5 * first_h - 1), top=first_h * 1.05)
    axes.legend(loc="upper right", fontsize=8.5, ncols=2).set_in_layout(False)


def _save(figure: Figure, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    return write_bytes(path, drawn.getvalue())
