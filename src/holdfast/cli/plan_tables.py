"""A plan on one page of a terminal: the verdict first, then what it rests on. Words and rounding are shared with the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from holdfast.cli.checkpoint_tables import print_table
from holdfast.cli.report import NOTHING
from holdfast.core.config import format_bytes, format_duration

if TYPE_CHECKING:
    from holdfast.simulate.planner.breakeven import BreakEven
    from holdfast.simulate.planner.figures import Figure
    from holdfast.simulate.planner.montecarlo import Band, Option
    from holdfast.simulate.planner.plan import Plan

__all__ = [
    "about_s",
    "about_usd",
    "band_words",
    "break_even_words",
    "chance",
    "cost_words",
    "figure_rows",
    "finish_words",
    "heading",
    "in_words",
    "interval_words",
    "pilot_rows",
    "pools_words",
    "print_plan",
    "saving_words",
    "verdict_lines",
]

_STRIP = 24


def about_usd(amount: float | None) -> str:
    """Two digits beyond what a plan knows would be a lie: three are shown."""
    if amount is None or not math.isfinite(amount):
        return NOTHING
    digits = float(f"{amount:.3g}")
    return f"${digits:,.0f}" if digits >= 10 else f"${digits:,.2f}"


def about_s(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return format_duration(seconds) if math.isfinite(seconds) else "not in the time followed"


def chance(share: float | None) -> str:
    if share is None:
        return NOTHING
    if share > 0.99:
        return ">99 %"
    return "<1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")


def in_words(name: str, value: float) -> str:
    """A figure of the assumptions with its unit."""
    if name.endswith("_s"):
        return format_duration(value)
    if name == "checkpoint_bytes":
        return format_bytes(value)
    if name == "bandwidth":
        return f"{format_bytes(value)}/s"
    if name == "heard":
        return f"{value:.0%}"
    return f"{value:.2g}" if name in ("gang", "shape") else f"{value:.0%}"


def cost_words(band: Band) -> str:
    spread = "" if band.low == band.high else f" ({about_usd(band.low)} to {about_usd(band.high)})"
    return f"{about_usd(band.mean)}{spread}"


def finish_words(band: Band) -> str:
    spread = band_words(band)
    return f"{about_s(band.middle)} ({spread})" if spread and math.isfinite(band.middle) else about_s(band.middle)


def band_words(band: Band) -> str:
    """5 % and 95 % of a finish."""
    if band.low == band.high or not math.isfinite(band.low):
        return ""
    return f"{about_s(band.low)} {f'to {about_s(band.high)}' if math.isfinite(band.high) else 'or not at all'}"


def saving_words(option: Option) -> str:
    return NOTHING if option.saving is None or option.is_on_demand else f"{option.saving:.0%}".replace("%", " %")


def pools_words(option: Option) -> str:
    return ", ".join(option.pools)


def heading(made: Plan) -> str:
    case = made.case
    kinds = " or ".join(f"{about_s(each.work_s)} on {each.accelerator}" for each in case.hardware)
    parts = [f"{case.name}: {kinds}"]
    if case.machines > 1:
        alone = ", each by itself" if case.tasks else ""
        parts.append(
            f"{case.machines} machines{alone}{f', {case.floor} of them always on demand' if case.floor else ''}"
        )
    if case.deadline_s is not None:
        parts.append(f"deadline {about_s(case.deadline_s)}")
    if case.budget_usd is not None:
        parts.append(f"budget {about_usd(case.budget_usd)}")
    return "; ".join(parts)


def verdict_lines(made: Plan) -> list[str]:
    """What is said below the headline."""
    verdict, best = made.verdict, made.best
    lines = [f"Also: {each.says}." for each in verdict.because[1:]]
    lines += [f"Mind: {each.says}." for each in verdict.cautions]
    if best is not None:
        fits = best.p_both >= made.case.confidence
        word = "Recommended" if verdict.worth or best.is_on_demand else "Cheapest all the same" if fits else "Best odds"
        if fits and not verdict.worth and not best.is_on_demand:
            lines.append(f"Recommended: on-demand, {about_usd(verdict.on_demand_usd)}.")
        lines.append(
            f"{word}: {best.mix} on {pools_words(best)} ({best.hardware}): {cost_words(best.cost_usd)}, "
            f"{finish_words(best.finish_s)}; deadline {chance(best.p_deadline)}, budget {chance(best.p_budget)}."
        )
    if verdict.engineering_usd:
        runs = NOTHING if verdict.runs_to_pay is None else f"{verdict.runs_to_pay:.2g}"
        lines.append(
            f"Engineering {about_usd(verdict.engineering_usd)} is counted once: it is paid for after {runs} such runs."
        )
    return lines


def interval_words(made: Plan) -> str:
    terms = made.setting.terms
    if terms.interval is None:
        return "No checkpoints: a preemption takes back the task." if made.case.tasks else "No checkpoints."
    why = "; ".join(terms.interval.reasons)
    return f"Save every {about_s(terms.interval.interval_s)}: {why}. One preemption loses {about_s(terms.lost_mean_s)} on average."


def break_even_words(even: BreakEven) -> str:
    if even.life_s is None:
        return "Break-even: spot never costs less than on-demand here."
    if even.life_s == 0:
        return "Break-even: spot costs less than on-demand however often it is taken."
    closed = (
        ""
        if even.closed_form_s is None
        else f"; with lives all equal and nothing lost it would be {about_s(even.closed_form_s)}"
    )
    return (
        f"Break-even: spot costs as much as on-demand when capacity lasts {about_s(even.life_s)} on average (about "
        f"{_count(even.preemptions_per_day)} preemptions a day on spot){closed}. Taken to last: {about_s(even.likely_life_s)}."
    )


def _count(number: float | None) -> str:
    return NOTHING if number is None else f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def figure_rows(made: Plan) -> list[tuple[str, Figure, str]]:
    """Name, figure and label of all that has something to say here."""
    from holdfast.simulate.planner.assumed import LABELS

    assumed = made.setting.assumed
    rows = [(field.name, getattr(assumed, field.name), LABELS[field.name]) for field in fields(assumed)]
    return [row for row in rows if not (row[1].is_known and row[1].likely == 0)]


def pilot_rows(made: Plan) -> list[list[str]]:
    pilot = made.pilot
    if pilot is None:
        return []
    return [
        [trial.what, f"{trial.count} {trial.of}", about_s(trial.instance_s), trial.how] for trial in pilot.trials
    ]  # fmt: skip


# ---- for people


def print_plan(made: Plan) -> None:
    from holdfast.simulate.planner.plan import NOT_MODELLED

    typer.echo(heading(made))
    typer.secho(made.verdict.headline, bold=True)
    for line in verdict_lines(made):
        typer.echo(line)
    if made.best is None:
        _print_prices(made)
        return
    typer.echo("")
    _print_options(made)
    typer.echo("")
    typer.echo(interval_words(made))
    if made.even is not None:
        typer.echo(break_even_words(made.even))
    _print_levers(made)
    typer.echo("")
    _print_figures(made)
    typer.echo("")
    print_table(["PILOT", "SEE", ">INSTANCE TIME", "HOW"], pilot_rows(made))
    if made.pilot is not None:
        typer.echo(
            f"On {made.pilot.pool}: {about_s(made.pilot.first_s)} ({about_usd(made.pilot.first_usd)}) for a first answer; "
            f"{about_s(made.pilot.hazard_s)} of instance time ({about_usd(made.pilot.hazard_usd)}) for the preemption rate."
        )
    typer.echo("")
    print_table(["READY?", "", ""], [[point.state.value, point.what, point.says] for point in made.points])
    typer.echo("")
    _print_prices(made)
    typer.echo(f"Not in the model: {'; '.join(NOT_MODELLED)}.")
    for note in made.notes:
        typer.echo(f"Note: {note}.")
    typer.echo(f"{made.sampling.samples} samples, seed {made.sampling.seed}. Orientation, not a quote.")


def _print_options(made: Plan) -> None:
    case = made.case
    finite = [each.cost_usd for each in made.options]
    low, high = min(band.low for band in finite), max(band.high for band in finite)
    titles = [
        "MIX", "ON", f"COST {about_usd(low)} … {about_usd(high)}", ">MEAN", ">5 % TO 95 %", ">SAVED", ">DONE IN (5 % TO 95 %)",
        *([">DEADLINE"] if case.deadline_s is not None else []), *([">BUDGET"] if case.budget_usd is not None else []), ">TAKEN",
    ]  # fmt: skip
    several = len(case.hardware) > 1
    rows = []
    for option in made.options:
        band = option.cost_usd
        where = f"{option.hardware} " if several else ""
        mark = "→ " if option is made.best else "  "
        rows.append(
            [
                f"{mark}{option.mix}", where + pools_words(option), _strip(band, low, high), about_usd(band.mean),
                f"{about_usd(band.low)} to {about_usd(band.high)}", saving_words(option), finish_words(option.finish_s),
                *([chance(option.p_deadline)] if case.deadline_s is not None else []),
                *([chance(option.p_budget)] if case.budget_usd is not None else []), _count(option.preemptions),
            ]
        )  # fmt: skip
    print_table(titles, rows)


def _strip(band: Band, low: float, high: float) -> str:
    """From 5 % to 95 %, the mean marked."""

    def place(value: float) -> int:
        return round((min(max(value, low), high) - low) / ((high - low) or 1.0) * (_STRIP - 1))

    cells = [" "] * _STRIP
    for column in range(place(band.low), place(band.high) + 1):
        cells[column] = "─"
    cells[place(band.mean)] = "●"
    return "".join(cells)


def _print_levers(made: Plan) -> None:
    if not made.levers or made.subject is None or made.base_usd is None:
        return
    typer.echo("")
    widest = max(
        max(abs(lever.low.cost_usd - made.base_usd), abs(lever.high.cost_usd - made.base_usd)) for lever in made.levers
    )
    rows = []
    for lever in made.levers:
        ends = (lever.low, lever.high)
        p = [chance(end.p_deadline) for end in ends]
        rows.append(
            [
                lever.label, f"{in_words(lever.name, lever.low.value)} … {in_words(lever.name, lever.high.value)}",
                _tilt([end.cost_usd - made.base_usd for end in ends], widest),
                f"{about_usd(lever.low.cost_usd)} … {about_usd(lever.high.cost_usd)}",
                *([f"{p[0]} … {p[1]}"] if made.case.deadline_s is not None else []),
            ]
        )  # fmt: skip
    title = f"WHAT DECIDES ({made.subject.mix}, one at a time)"
    deadline = [">DEADLINE"] if made.case.deadline_s is not None else []
    print_table([title, "LOW … HIGH", f"FROM {about_usd(made.base_usd)}", ">COST", *deadline], rows)


def _tilt(changes: Sequence[float], widest: float) -> str:
    """Left of the middle: cheaper. The letter says at which end of the range."""
    half = _STRIP // 2
    cells = [" "] * (2 * half + 1)
    cells[half] = "│"
    for letter, change in zip("lh", changes, strict=True):
        reach = round(abs(change) / (widest or 1.0) * half)
        for step in range(1, reach + 1):
            cells[half + (step if change > 0 else -step)] = "─" if step < reach else letter
    return "".join(cells)


def _print_figures(made: Plan) -> None:
    rows = []
    for name, figure, label in figure_rows(made):
        between = "" if figure.is_known else f"{in_words(name, figure.low)} … {in_words(name, figure.high)}"
        rows.append([label, in_words(name, figure.likely), between, figure.origin.value, figure.note])
    print_table(["FIGURE", ">LIKELY", "BETWEEN", "IS", "BECAUSE"], rows)


def _print_prices(made: Plan) -> None:
    shown = {pool for option in made.options for pool in option.pools}
    pools = [pool for each in made.case.hardware for pool in each.pools if not shown or pool.pool in shown]
    rows = [
        [
            pool.pool,
            about_usd(pool.on_demand_usd_h),
            about_usd(pool.spot_usd_h),
            about_s(pool.notice_s),
            pool.as_of,
            pool.source,
        ]
        for pool in pools
    ]
    print_table(["PRICES PER HOUR (check them)", ">ON DEMAND", ">SPOT", ">NOTICE", "AS OF", "SOURCE"], rows)
