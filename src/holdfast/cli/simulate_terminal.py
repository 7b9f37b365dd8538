"""The pictures of `holdfast simulate` in a terminal: how costs are spread, how far each policy is from the optimum, and one window
as lanes of what ran when.

Glyphs carry the meaning and colours repeat it: the height of a lane's block is what it costs. So a lane reads the same in a pipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.cli.simulate_tables import console, long_time, money
from holdfast.policy.market.facts import Market

if TYPE_CHECKING:
    from rich.text import Text

    from holdfast.policy.market.arrays import Bools, Floats
    from holdfast.simulate.market.comparing import Comparison, Section
    from holdfast.simulate.market.lane import Lane

__all__ = ["LEGEND", "histogram", "lane_lines", "pictures_of", "print_pictures"]

_HEIGHTS = "▁▂▃▄▅▆▇█"
_WAITING, _CHANGEOVER, _SPOT, _ON_DEMAND, _TAKEN = "·", "▒", "▃", "█", "✗"
_STYLES = {
    _WAITING: "dim",
    _CHANGEOVER: "yellow",
    _SPOT: "cyan",
    _ON_DEMAND: "dark_orange3",
    _TAKEN: "bold red",
    " ": "",
}
LEGEND = f"{_SPOT} spot  {_ON_DEMAND} on-demand  {_CHANGEOVER} changeover  {_WAITING} waiting  {_TAKEN} taken away"
_EDGE = 12
"""Columns for what stands to the right of a picture."""


def print_pictures(comparison: Comparison) -> None:
    """As wide as the terminal."""
    out = console()
    for section in comparison.sections:
        for line in pictures_of(section, out.width):
            out.print(line, soft_wrap=True)
        out.print()


def pictures_of(section: Section, width: int) -> list[Text]:
    """How the windows' costs are spread, on one axis of dollars for all policies; the mean is marked. The optimum comes last."""
    from rich.text import Text

    names = [line.policy for line in section.lines]
    costs = {name: section.costs_usd(name) for name in names}
    least = section.least_usd()
    if least is not None:
        costs["optimum"] = least
    gutter = max(map(len, costs)) + 2
    columns = max(20, width - gutter - 2 * _EDGE)
    low = min(float(each.min()) for each in costs.values())
    high = max(float(each.max()) for each in costs.values())
    head = f"{section.group}, {long_time(section.workload.job.deadline_s)}: cost of a window".ljust(gutter)
    lines = [Text(head, style="bold"), _axis(low, high, gutter, columns, with_optimum=least is not None)]
    above = {line.policy: line.above_optimum for line in section.lines}
    for name, each in costs.items():
        text = Text(name.ljust(gutter), style="dim" if name == "optimum" else "")
        mean = float(each.mean())
        bars = histogram(each, low, high, columns)
        mark = _column(mean, low, high, columns)
        for at, glyph in enumerate(bars):
            text.append("┃" if at == mark else glyph, style="bold" if at == mark else "cyan")
        text.append(money(mean, mean).rjust(_EDGE))
        over = above.get(name)
        if over is not None:
            text.append(
                f"{over * 100:+.1f} %".rjust(_EDGE), style="green" if over < 0.1 else "yellow" if over < 0.3 else "red"
            )
        elif name != "optimum":
            text.append("late".rjust(_EDGE) if least is not None else "", style="red")
        lines.append(text)
    return lines


def _axis(low: float, high: float, gutter: int, columns: int, *, with_optimum: bool) -> Text:
    from rich.text import Text

    left, right = money(low, high), money(high, high)
    rule = "─" * max(0, columns - len(left) - len(right) - 2)
    heads = "mean ┃".rjust(_EDGE) + ("over best".rjust(_EDGE) if with_optimum else "")
    return Text(" " * gutter + f"{left} {rule} {right}" + heads, style="dim")


def histogram(values: Floats, low: float, high: float, columns: int) -> str:
    """Counts as heights, between `low` and `high`. What occurs at all is seen."""
    import numpy as np

    counts, _ = np.histogram(values, bins=columns, range=(low, high if high > low else low + 1))
    most = int(counts.max())
    return "".join(" " if not count else _HEIGHTS[max(0, -(-8 * count // most) - 1)] for count in counts.tolist())


def _column(value: float, low: float, high: float, columns: int) -> int:
    return min(columns - 1, int((value - low) / ((high - low) or 1) * columns))


def lane_lines(lanes: Sequence[Lane], there: Bools, tick_s: int, deadline_s: int, width: int) -> list[Text]:
    """Lanes one below the other, the market above them, time below them. `there` is the window's availability, tick by tick."""
    from rich.text import Text

    gutter = max([len("spot is there"), *(len(lane.policy) for lane in lanes)]) + 2
    columns = max(24, width - gutter - _EDGE - 8)
    end_s = max([deadline_s, *(lane.stretches[-1].end_s for lane in lanes if lane.stretches)])
    lines = [Text("spot is there".ljust(gutter) + _availability(there, tick_s, end_s, columns), style="dim")]
    for lane in lanes:
        text = Text(lane.policy.ljust(gutter))
        for glyph in _cells(lane, end_s, columns):
            text.append(glyph, style=_STYLES[glyph])
        done = "not done" if lane.finish_s is None else long_time(lane.finish_s)
        text.append(done.rjust(9), style="red" if lane.missed else "green")
        text.append(money(lane.microusd / 1e6, lane.microusd / 1e6).rjust(_EDGE - 2))
        lines.append(text)
    return [*lines, _time_axis(end_s, deadline_s, gutter, columns), Text(" " * gutter + LEGEND, style="dim")]


def _availability(there: Bools, tick_s: int, end_s: int, columns: int) -> str:
    """The share of each cell in which there was capacity, as a height."""
    cells = ""
    for column in range(columns):
        first = int(column * end_s / columns // tick_s)
        part = there[first : max(first + 1, int((column + 1) * end_s / columns // tick_s))]
        share = float(part.mean()) if len(part) else 0.0
        cells += " " if not share else _HEIGHTS[min(7, int(share * 7.999))]
    return cells


def _cells(lane: Lane, end_s: int, columns: int) -> list[str]:
    """What filled most of each cell; a preemption is shown in any case."""
    spent = [dict.fromkeys((" ", _WAITING, _CHANGEOVER, _SPOT, _ON_DEMAND), 0.0) for _ in range(columns)]
    cell_s = end_s / columns
    glyphs = {Market.SPOT: _SPOT, Market.ON_DEMAND: _ON_DEMAND, Market.NOTHING: _WAITING}
    for stretch in lane.stretches:
        ready_s = min(stretch.ready_s, stretch.end_s)
        for glyph, begin_s, until_s in (
            (_CHANGEOVER, stretch.begin_s, ready_s), (glyphs[stretch.market], ready_s, stretch.end_s),
        ):  # fmt: skip
            for column in range(int(begin_s / cell_s), min(columns, int(until_s / cell_s) + 1)):
                overlap_s = min(until_s, (column + 1) * cell_s) - max(begin_s, column * cell_s)
                spent[column][glyph] += max(0.0, overlap_s)
    cells = [max(each, key=lambda glyph: each[glyph]) if any(each.values()) else " " for each in spent]
    for at_s in lane.preempted_s:
        cells[min(columns - 1, int(at_s / cell_s))] = _TAKEN
    return cells


def _time_axis(end_s: int, deadline_s: int, gutter: int, columns: int) -> Text:
    from rich.text import Text

    cells = [" "] * (columns + 9)
    step_h = next(
        (hours for hours in (1, 2, 3, 6, 12, 24, 48, 96, 192, 384) if end_s / 3600 / hours <= columns / 8), 768
    )
    marks = [(hours * 3600, f"{hours} h") for hours in range(0, int(end_s / 3600) + 1, step_h)]
    end = min(columns - 1, int(deadline_s / end_s * columns))
    for at_s, words in marks:
        begin = int(at_s / end_s * columns)
        # The deadline is what counts: whatever stands too near to it gives way.
        if not end - len(words) - 1 <= begin <= end + 8:
            cells[begin : begin + len(words)] = words
    mark = f"▲ {long_time(deadline_s)}"
    cells[end : end + len(mark)] = mark
    return Text(" " * gutter + "".join(cells).rstrip(), style="dim")
