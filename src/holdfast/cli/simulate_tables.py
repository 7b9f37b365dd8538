"""How `holdfast simulate` shows a comparison: tables for people, a file of lines for spreadsheets.

Dollars and bands of one column have the same number of decimals, so that they can be compared by eye. Into a pipe nothing is
coloured, cut or wrapped.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from holdfast.simulate.market.bands import Band
    from holdfast.simulate.market.comparing import Comparison, Line, Section

__all__ = [
    "NOTHING",
    "console",
    "long_time",
    "money",
    "print_comparison",
    "shares",
    "title_of",
    "write_bytes",
    "write_csv",
]

NOTHING = "\u2013"
MINUS = "\u2212"
_PLAIN_WIDTH = 220
_MOST_PERCENT = 999
_GAP = 2
_SMALL_GAP = 0.1
_TITLES = (
    "POLICY", ">WIN-\nDOWS", ">MEAN\nCOST", "\n5 to 95 %", ">GAP\nCLOSED", "\n5 to 95 %", ">LATE", ">DONE\nAFTER", ">ON\nSPOT",
    ">PREEMP-\nTIONS", ">GOOD-\nPUT", ">RE-\nFUND",
)  # fmt: skip
_DISPENSABLE = (1, 10, 9, 5, 7, 3)
"""Columns that a narrow terminal does without, the first one first."""


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def print_comparison(comparison: Comparison, notes: Sequence[str] = ()) -> None:
    """A table per section, then what must be known to read them."""
    out = console()
    for section in comparison.sections:
        out.print(title_of(section), style="bold", soft_wrap=True, markup=False)
        out.print(_table(section, out.width))
        if len(section.played) > 1:
            out.print(_by_pool(section))
        out.print()
    for note in [*notes, *_notes(comparison)]:
        out.print(f"Note: {note}.", style="dim", soft_wrap=True, markup=False)


def title_of(section: Section) -> str:
    """What was played, in one line."""
    job, grounds = section.workload.job, [each.ground for each in section.played]
    up = [float(ground.trace.available(section.workload.gang).any(axis=0).mean()) for ground in grounds]
    there = percent(min(up)) if len(up) == 1 else f"{_bounded(min(up))} to {percent(max(up))}"
    pools = sum(len(ground.trace.pools) for ground in grounds)
    what = f"{pools} pools{' together' if len(grounds) == 1 else ' one by one'}" if pools > 1 else grounds[0].name
    gang = f", gangs of {section.workload.gang}" if section.workload.gang > 1 else ""
    name = f"{section.group}: " if section.group != what else ""
    return (
        f"{name}{what}, spot there {there} of the time{gang}. {long_time(job.work_s)} of work in {long_time(job.deadline_s)}, "
        f"changeover {format_duration(job.changeover_s)}, {format_duration(job.max_lost_s)} lost at most"
    )


def long_time(seconds: float) -> str:
    """In hours, as jobs and deadlines are spoken of: "60 h", "59.3 h"."""
    return f"{seconds / 3600:.1f} h".replace(".0 h", " h")


def money(usd: float | None, whole_usd: float) -> str:
    """With as many decimals as the whole asks for."""
    return NOTHING if usd is None else f"${usd:,.{_decimals(whole_usd)}f}"


def percent(share: float | None) -> str:
    """Of a gap that may be small, so that shares of it are huge."""
    if share is None:
        return NOTHING
    return f"{_bounded(share)} %"


def shares(band: Band | None) -> str:
    if band is None:
        return ""
    low, high = _bounded(band.low), _bounded(band.high)
    return low if low == high else f"{low} to {high}"


def _bounded(share: float) -> str:
    """In per cent; beyond -999 the figure says nothing but that."""
    hundredths = round(share * 100)
    if hundredths < -_MOST_PERCENT:
        return f"< {MINUS}{_MOST_PERCENT}"
    return f"{MINUS if hundredths < 0 else ''}{abs(hundredths)}"


def _decimals(whole_usd: float) -> int:
    return 2 if whole_usd >= 1 else 4


def _table(section: Section, width: int) -> Table:
    from rich.text import Text

    timely = [line.mean_usd for line in section.lines if not line.misses]
    rows = [_cells(line) for line in section.lines]
    styles = ["bold green" if not line.misses and line.mean_usd == min(timely) else "" for line in section.lines]
    if section.optimum_usd is not None:
        whole = section.lines[0].mean_usd
        cost, band = money(section.optimum_usd, whole), _usd_band(section.optimum_band_usd, whole)
        rows.append(["optimum", rows[0][1], cost, band, "100 %", "", "0", "", "", "", "", ""])
        styles.append("dim")
    shown = _fitting(rows, width, with_refund=bool(section.workload.free_if_taken_within_s))
    table = _empty([_TITLES[column] for column in shown])
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*(Text(row[column], style=style) for column in shown))
    return table


def _fitting(rows: Sequence[Sequence[str]], width: int, *, with_refund: bool) -> list[int]:
    """The columns that there is room for; what goes first is what the others say nearly as well."""
    parts = [title.removeprefix(">").split("\n") for title in _TITLES]
    widths = [
        max([*map(len, parts[column]), *(len(row[column]) for row in rows)]) + _GAP for column in range(len(_TITLES))
    ]
    shown = list(range(len(_TITLES) - (not with_refund)))
    for column in _DISPENSABLE:
        if sum(widths[each] for each in shown) <= width:
            break
        shown.remove(column)
    return shown


def _empty(titles: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(
            title.removeprefix(">"),
            justify="right" if title.startswith(">") else "left",
            vertical="bottom",
            no_wrap=True,
        )
    return table


def _cells(line: Line) -> list[str]:
    return [
        line.policy,
        str(line.windows),
        money(line.mean_usd, line.mean_usd) + ("*" if line.misses else ""),
        _usd_band(line.band_usd, line.mean_usd),
        percent(line.gap_closed),
        shares(line.gap_closed_band),
        str(line.misses),
        NOTHING if line.finish_s is None else long_time(line.finish_s),
        f"{line.spot_share * 100:.0f} %",
        f"{line.preemptions:.1f}",
        f"{line.goodput * 100:.1f} %",
        money(line.refund_usd, line.mean_usd),
    ]


def _usd_band(band: Band | None, whole_usd: float) -> str:
    if band is None:
        return NOTHING
    digits = _decimals(whole_usd)
    return f"{band.low:,.{digits}f} to {band.high:,.{digits}f}"


def _by_pool(section: Section) -> Table:
    """Mean cost per pool and policy."""
    from rich.text import Text

    names = [line.policy for line in section.lines]
    titles = ["POOL", ">SPOT\nTHERE", ">WIN-\nDOWS", *(">" + name.replace("-", "-\n") for name in names)]
    with_optimum = section.optimum_usd is not None
    table = _empty([*titles, *([">optimum"] if with_optimum else [])])
    for played in section.played:
        up = float(played.ground.trace.available(section.workload.gang).any(axis=0).mean())
        means = [float(played.outcomes[name].microusd.mean()) / 1e6 for name in names]
        timely = [mean for mean, name in zip(means, names, strict=True) if not played.outcomes[name].missed.any()]
        row = [Text(played.ground.name), Text(f"{up * 100:.0f} %"), Text(str(len(played.starts)))]
        for name, mean in zip(names, means, strict=True):
            late = bool(played.outcomes[name].missed.any())
            style = "" if late or mean > min(timely) else "bold green"
            row.append(Text(money(mean, means[0]) + ("*" if late else ""), style=style))
        if played.optimum_microusd is not None:
            row.append(Text(money(float(played.optimum_microusd.mean()) / 1e6, means[0]), style="dim"))
        table.add_row(*row)
    return table


def _notes(comparison: Comparison) -> Iterator[str]:
    """What the figures leave unsaid; each once."""
    from holdfast.simulate.market.bands import FEWEST_BLOCKS
    from holdfast.simulate.market.comparing import BASELINE

    request, sections = comparison.request, comparison.sections
    for policy in request.policies:
        lines = [line for section in sections for line in section.lines if line.policy == policy and line.misses]
        if lines:
            yield _about_lateness(policy, lines, sum(len(section.costs_usd(policy)) for section in sections))
    if any(section.workload.free_if_taken_within_s for section in sections):
        yield "refunds, a window on average, are luck: they are not subtracted from the cost"
    if request.given.value == "past":
        spans = {format_duration(ground.history_ticks * ground.trace.tick_s) for ground in request.grounds}
        yield f"policies that learn were given each trace's first {' / '.join(sorted(spans))}; all windows start after it"
    for section in sections:
        greedy = section.costs_usd(BASELINE).mean()
        if section.optimum_usd is not None and greedy - section.optimum_usd < _SMALL_GAP * greedy:
            gap = money(float(greedy) - section.optimum_usd, section.optimum_usd)
            where = f"{section.group}, {long_time(section.workload.job.deadline_s)}"
            yield f"{where}: from greedy to the optimum it is {gap} only, so shares of that gap say little"
    if any(section.workload.job.max_lost_s for section in sections) and request.with_optimum:
        yield "the optimum loses no work to preemptions, so nobody can quite reach it"
    if request.with_optimum and not all(played.optimum_is_exact for section in sections for played in section.played):
        yield "the optimum is a lower bound here: its changeover was rounded down"
    blocks = min(section.blocks for section in sections)
    if blocks < FEWEST_BLOCKS:
        count = "one stretch" if blocks == 1 else f"{blocks} stretches"
        yield f"{count} of days that do not overlap: too few for bands; take longer traces"
    else:
        yield f"bands hold 90 % of a bootstrap over days; the shortest has {blocks} stretches that do not overlap"


def _about_lateness(policy: str, lines: Sequence[Line], windows: int) -> str:
    unfinished = sum(line.unfinished for line in lines)
    left_s = sum(line.left_s * line.unfinished for line in lines) / max(1, unfinished)
    still = f", with {long_time(left_s)} of work left on average in the {unfinished} not done" if unfinished else ""
    late = sum(line.misses for line in lines)
    return f"{policy} was late in {late} of {windows} windows{still}; what it paid (*) is no bargain"


def write_csv(comparison: Comparison, path: Path) -> Path:
    """All windows of all policies."""
    from holdfast.simulate.market.comparison_json import COLUMNS, rows_of

    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(rows_of(comparison))
    return write_bytes(path, text.getvalue().encode())


def write_bytes(path: Path, content: bytes) -> Path:
    """The whole file or none of it."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None
    return path
