"""The loss with the kills marked: as a picture, and in the terminal with braille dots.

Both draw the same: every step that was computed, those twice that a kill made necessary twice, over the uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text
from training import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Kill", "draw_png", "draw_terminal"]

_KILL, _AGAIN, _REFERENCE = "#c62828", "#f6a623", "#b8bcc4"
_STARTS = ("#0b4f8a", "#2a7fbf", "#1f9e89", "#5b8c2a")


class Kill(NamedTuple):
    """A kill that came after `step` steps; the next attempt went on from `resumed_step`."""

    step: int
    resumed_step: int


def draw_png(
    path: Path, reference: Sequence[Point], killed: Sequence[Point], kills: Sequence[Kill], title: str
) -> None:
    """Above, the loss by step; below, the steps by time, where a kill is a step back and a pause."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with pyplot.rc_context(style):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 7.5), height_ratios=(3, 2), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        above.set_xlim(0, reference[-1].step * 1.01)
        _plot(above, below, reference, _REFERENCE, "reference, never interrupted", width=5)
        attempts = [[p for p in killed if p.start == start] for start in sorted({p.start for p in killed})]
        for number, points in enumerate(attempts):
            _plot(above, below, points, _STARTS[number % len(_STARTS)], f"attempt {number + 1}", width=1.4)
        for number, (dead, alive) in enumerate(pairwise(attempts)):
            label = None if number else "killed, started again"
            times_s, steps = [dead[-1].at_s, alive[0].at_s], [dead[-1].step, alive[0].step]
            below.plot(times_s, steps, color=_KILL, linestyle=":", marker="X", markevery=[0], markersize=9, label=label)
        for number, kill in enumerate(kills):
            _mark_kill(above, kill, number)
        above.set(xlabel="step", ylabel="training loss (nats per character)")
        above.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=6, columnspacing=1.2, handlelength=1.6, fontsize=9
        )
        below.set(xlabel="seconds since the start", ylabel="completed steps", xlim=(0, killed[-1].at_s * 1.01))
        below.set_ylim(bottom=0)
        below.legend(loc="lower right")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _plot(above: Axes, below: Axes, points: Sequence[Point], color: str, label: str, width: float) -> None:
    above.plot([p.step for p in points], [p.loss for p in points], color=color, linewidth=width, label=label)
    below.plot([p.at_s for p in points], [p.step for p in points], color=color, linewidth=width + 0.6)


def _mark_kill(axes: Axes, kill: Kill, number: int) -> None:
    again = kill.step - kill.resumed_step
    label = None if number else "computed again"
    axes.axvspan(kill.resumed_step, kill.step, color=_AGAIN, alpha=0.3, linewidth=0, label=label)
    axes.axvline(kill.step, color=_KILL, linestyle=(0, (4, 2)), linewidth=1.3)
    # One below the other, because kills may be close together.
    offset = (4, -2 - 30 * number) if kill.step < 0.85 * axes.get_xlim()[1] else (-4, -2 - 30 * number)
    axes.annotate(
        f"SIGKILL after step {kill.step}\n{again} {'step' if again == 1 else 'steps'} computed again",
        (kill.step, 1.0), xycoords=("data", "axes fraction"), xytext=offset, textcoords="offset points",
        va="top", ha="left" if offset[0] > 0 else "right", fontsize=9, color=_KILL,
    )  # fmt: skip


def draw_terminal(points: Sequence[Point], kills: Sequence[Kill], width: int, height: int = 10) -> list[Text]:
    """`height` rows of dots, an axis, and the kills below it. A cell holds 2 by 4 dots."""
    gutter = 6
    columns = max(20, width - gutter - 2)
    last_step = max(point.step for point in points)
    low, high = min(point.loss for point in points), max(point.loss for point in points)
    span = (high - low) or 1.0

    def column(step: float, cells: int) -> int:
        return min(cells - 1, int(step / last_step * cells))

    dots = [[0] * columns for _ in range(height)]
    for point in points:
        x = column(point.step, columns * 2)
        y = min(height * 4 - 1, int((high - point.loss) / span * height * 4))
        dots[y // 4][x // 2] |= _DOT[y % 4][x % 2]
    again = {c for kill in kills for c in range(column(kill.resumed_step, columns), column(kill.step, columns) + 1)}
    struck = {column(kill.step, columns) for kill in kills}
    rows = []
    for number, row in enumerate(dots):
        label = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}.get(number, "")
        text = Text().append(f"{label:>{gutter - 1}} ┤" if label else " " * gutter + "│", style="dim")
        for x, cell in enumerate(row):
            if cell:
                text.append(chr(0x2800 + cell), style=_AGAIN if x in again else _STARTS[1])
            else:
                text.append("┊", style=_KILL) if x in struck else text.append(" ")
        rows.append(text)
    rows.append(Text(" " * gutter + "└" + "─" * columns, style="dim"))
    rows.append(_axis(kills, struck, last_step, columns, gutter))
    return rows


# Dots of a braille character, from the top: (left, right).
_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _axis(kills: Sequence[Kill], struck: set[int], last_step: int, columns: int, gutter: int) -> Text:
    cells = list(f"step 0{last_step:>{columns - 6}}")
    for kill, x in zip(kills, sorted(struck), strict=False):
        mark = f"✗ {kill.step}"
        start = min(x, columns - len(mark) - len(str(last_step)) - 1)
        cells[start : start + len(mark)] = mark
    text = Text(" " * (gutter + 1) + "".join(cells))
    text.highlight_regex(r"✗ \d+", f"bold {_KILL}")
    return text
