"""`holdfast plan --html`: one page that needs nothing else. No script, no font, no request; light and dark; readable on a phone.

Words and rounding are those of the terminal (`plan_tables`); figures stand in a `data-value` as `--json` prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from holdfast.cli.plan_json import rounded
from holdfast.cli.plan_picture import curves_svg, dollars_axis, lever_svg, strip_svg
from holdfast.cli.plan_tables import (
    about_s,
    about_usd,
    band_words,
    break_even_words,
    chance,
    figure_rows,
    heading,
    in_words,
    interval_words,
    pilot_rows,
    pools_words,
    saving_words,
    verdict_lines,
)
from holdfast.simulate.planner.montecarlo import Option
from holdfast.simulate.planner.plan import NOT_MODELLED, Plan

__all__ = ["page"]

_STATES = {"yes": "state-yes", "no": "state-no", "to check": "state-open"}


def page(made: Plan) -> str:
    """The page's whole text."""
    here = files("holdfast.cli")
    style = "\n".join((here / name).read_text(encoding="utf-8") for name in ("report_page.css", "plan_page.css"))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Says to the browser what is true of the page: it loads nothing.
            """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
            f"<title>Plan: {escape(made.case.name)}</title><style>{style}</style></head><body><main>",
            *_heading(made),
            *_tiles(made),
            *_options(made),
            *_plots(made),
            *_interval(made),
            *_levers(made),
            *_figures(made),
            *_pilot(made),
            *_checklist(made),
            *_prices(made),
            *_notes(made),
            "</main></body></html>",
        ]
    )


def _heading(made: Plan) -> Iterator[str]:
    yield f"<header><h1>{escape(heading(made))}</h1>"
    yield "<p>Orientation, not a quote: made-up markets, a dated price table, and assumptions that are listed below.</p></header>"
    yield f'<section class="verdict {"yes" if made.verdict.worth else "no"}"><strong>{escape(made.verdict.headline)}</strong>'
    for line in verdict_lines(made):
        yield f"<p>{escape(line)}</p>"
    yield "</section>"


def _tiles(made: Plan) -> Iterator[str]:
    best = made.best
    if best is None:
        return
    tiles = [
        ("Cost", "cost_usd.mean", best.cost_usd.mean, about_usd(best.cost_usd.mean),
         f"{about_usd(best.cost_usd.low)} to {about_usd(best.cost_usd.high)} in 90 of 100 cases"),
        ("Done in", "finish_s.p50", best.finish_s.middle, about_s(best.finish_s.middle),
         f"{about_s(best.finish_s.low)} to {about_s(best.finish_s.high)}"),
        ("Saved", "saving", best.saving, saving_words(best), f"on demand: {about_usd(made.verdict.on_demand_usd)}"),
        ("Meets all", "p_both", best.p_both, chance(best.p_both),
         f"deadline {chance(best.p_deadline)}, budget {chance(best.p_budget)}"),
    ]  # fmt: skip
    interval = made.setting.terms.interval
    if interval is not None:
        every = about_s(interval.interval_s)
        loses = f"a preemption loses {about_s(made.setting.terms.lost_mean_s)} on average"
        tiles.append(("Save every", "interval.every_s", interval.interval_s, every, loses))
    yield '<section class="tiles">'
    for name, key, value, figure, about in tiles:
        data = _data(key if key.startswith("interval") else f"recommended.{key}", value)
        yield f"<div><h2>{name}</h2><strong{data}>{escape(figure)}</strong><p>{escape(about)}</p></div>"
    yield "</section>"


def _options(made: Plan) -> Iterator[str]:
    if not made.options:
        return
    case = made.case
    most = max(option.cost_usd.high for option in made.options)
    most = max(most, case.budget_usd or 0.0) * 1.02
    dashed = "; the dashed line is the budget" if case.budget_usd is not None else ""
    yield f"<section><h2>Mixes and pools</h2><p>The line goes from 5 % to 95 %, the point is the mean{dashed}.</p>"
    yield '<div class="scroll"><table class="options"><thead><tr><th>Mix</th><th></th><th>Cost</th><th>Saved</th><th>Done in</th>'
    yield f"{'<th>Deadline</th>' if case.deadline_s is not None else ''}{'<th>Budget</th>' if case.budget_usd is not None else ''}"
    yield "<th>Taken</th><th>On spot</th></tr></thead><tbody>"
    for index, option in enumerate(made.options):
        yield from _option(made, option, f"options.{index}.", most)
    yield f'<tr><th></th><td class="strip">{dollars_axis(most)}</td></tr></tbody></table></div></section>'


def _option(made: Plan, option: Option, key: str, most: float) -> Iterator[str]:
    case = made.case
    name = escape(f"{option.mix} ({option.hardware})" if len(case.hardware) > 1 else option.mix)
    pools = escape(pools_words(option))
    yield f'<tr{" class=best" if option is made.best else ""}><th>{name}<span class="pool">{pools}</span></th>'
    yield f'<td class="strip">{strip_svg(option, most, case.budget_usd)}</td>'
    yield _cell(f"{key}cost_usd.mean", option.cost_usd.mean, about_usd(option.cost_usd.mean))
    yield _cell(f"{key}saving", option.saving, saving_words(option))
    ends = f"<td{_data(f'{key}finish_s.p50', option.finish_s.middle)}>{escape(about_s(option.finish_s.middle))}"
    yield f'{ends}<span class="pool">{escape(band_words(option.finish_s))}</span></td>'
    if case.deadline_s is not None:
        yield _cell(f"{key}p_deadline", option.p_deadline, chance(option.p_deadline))
    if case.budget_usd is not None:
        yield _cell(f"{key}p_budget", option.p_budget, chance(option.p_budget))
    yield _cell(f"{key}preemptions", option.preemptions, f"{option.preemptions:.1f}")
    yield _cell(f"{key}spot_share", option.spot_share, chance(option.spot_share)) + "</tr>"


def _plots(made: Plan) -> Iterator[str]:
    """The recommended mix, and the others on the same pools, beside on-demand."""
    if made.subject is None:
        return
    shown = [made.subject]
    shown += [each for each in made.options if each.is_on_demand and each.hardware == made.subject.hardware]
    shown += [each for each in made.options if each.pools == made.subject.pools and each not in shown]
    shown = shown[:4]
    yield '<section><h2>How likely is what</h2><div class="plots">'
    costs = [(each.mix, each.cost_usd.curve) for each in shown]
    yield f"<div><h3>Chance that it costs no more than …</h3>{curves_svg(costs, made.case.budget_usd, about_usd)}</div>"
    ends = [(each.mix, each.finish_s.curve) for each in shown]
    yield f"<div><h3>Chance that it is done within …</h3>{curves_svg(ends, made.case.deadline_s, about_s)}</div></div>"
    yield '<ul class="legend">'
    for number, each in enumerate(shown):
        mark = f'<svg width="12" height="12"><rect class="key c{number}" width="12" height="12" rx="2"/></svg>'
        yield f"<li>{mark}{escape(each.mix)}</li>"
    limits = [
        name
        for name, said in (("budget", made.case.budget_usd), ("deadline", made.case.deadline_s))
        if said is not None
    ]
    if limits:
        mark = '<svg width="12" height="12"><line class="limit" x1="6" x2="6" y1="0" y2="12"/></svg>'
        yield f"<li>{mark}{' and '.join(limits)}</li>"
    yield "</ul></section>"


def _interval(made: Plan) -> Iterator[str]:
    if made.best is None:
        return
    yield f"<section><h2>Saves, and when spot stops paying</h2><p>{escape(interval_words(made))}</p>"
    if made.even is not None:
        yield f"<p>{escape(break_even_words(made.even))}</p>"
    yield "</section>"


def _levers(made: Plan) -> Iterator[str]:
    if not made.levers or made.base_usd is None or made.subject is None:
        return
    base = made.base_usd
    ends = [end.cost_usd for lever in made.levers for end in (lever.low, lever.high)]
    low, high = min([base, *ends]), max([base, *ends])
    yield f"<section><h2>What decides</h2><p>{escape(made.subject.mix)}, one assumption at a time at the low and the high end "
    yield f"of its range; the line in the middle is {about_usd(base)}.</p>"
    yield '<table class="bars levers"><thead><tr><th>Assumption</th><th>Low</th><th></th><th>High</th><th>Cost</th>'
    yield f"{'<th>Deadline</th>' if made.case.deadline_s is not None else ''}</tr></thead><tbody>"
    for index, lever in enumerate(made.levers):
        both = (lever.low, lever.high)
        words = [in_words(lever.name, end.value) for end in both]
        yield f"<tr><th>{escape(lever.label)}</th><td>{words[0]}</td>"
        yield f'<td class="bar">{lever_svg(both[0].cost_usd, both[1].cost_usd, base, low, high)}</td><td>{words[1]}</td>'
        yield f"<td{_data(f'sensitivity.levers.{index}.low.cost_usd', both[0].cost_usd)}>"
        yield f"{about_usd(both[0].cost_usd)} … {about_usd(both[1].cost_usd)}</td>"
        if made.case.deadline_s is not None:
            yield f"<td>{chance(both[0].p_deadline)} … {chance(both[1].p_deadline)}</td>"
        yield "</tr>"
    yield "</tbody></table>"
    yield '<ul class="legend"><li><svg width="12" height="12"><rect class="low" width="12" height="12" rx="2"/></svg>low end</li>'
    yield '<li><svg width="12" height="12"><rect class="high" width="12" height="12" rx="2"/></svg>high end</li></ul></section>'


def _figures(made: Plan) -> Iterator[str]:
    yield "<section><h2>Measured, given, assumed</h2>"
    yield "<p>A pilot replaces what is assumed: run it, then plan again with --measured.</p>"
    yield '<div class="scroll"><table class="plain"><thead><tr><th>Figure</th><th>Likely</th><th>Between</th><th>Is</th>'
    yield "<th>Because</th></tr></thead><tbody>"
    for name, figure, label in figure_rows(made):
        between = "" if figure.is_known else f"{in_words(name, figure.low)} … {in_words(name, figure.high)}"
        likely = (
            f'<td class="figure"{_data(f"figures.{name}.likely", figure.likely)}>{in_words(name, figure.likely)}</td>'
        )
        yield f"<tr><th>{escape(label)}</th>{likely}<td>{between}</td><td>{figure.origin.value}</td>"
        yield f"<td>{escape(figure.note)}</td></tr>"
    yield "</tbody></table></div></section>"


def _pilot(made: Plan) -> Iterator[str]:
    if made.pilot is None:
        return
    pilot = made.pilot
    yield f"<section><h2>A pilot, on one instance</h2><p>{escape(pilot.pool)}: {about_s(pilot.first_s)} "
    yield f"({about_usd(pilot.first_usd)}) for a first answer; {about_s(pilot.hazard_s)} of instance time, on several at once if "
    yield f"you like ({about_usd(pilot.hazard_usd)}), for the preemption rate.</p>"
    yield '<table class="plain"><thead><tr><th>To know</th><th>See</th><th>Instance time</th><th>How</th></tr></thead><tbody>'
    for row in pilot_rows(made):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        yield f"<tr><th>{escape(row[0])}</th>{cells}</tr>"
    yield "</tbody></table></section>"


def _checklist(made: Plan) -> Iterator[str]:
    if not made.points:
        return
    yield '<section><h2>Ready?</h2><table class="plain"><tbody>'
    for point in made.points:
        state = f'<td class="{_STATES[point.state.value]}">{point.state.value}</td>'
        yield f"<tr>{state}<th>{escape(point.what)}</th><td>{escape(point.says)}</td></tr>"
    yield "</tbody></table></section>"


def _prices(made: Plan) -> Iterator[str]:
    shown = {pool for option in made.options for pool in option.pools}
    yield "<section><h2>Prices</h2><p>Dollars per hour of one machine. Check them before you spend.</p>"
    yield '<table class="plain"><thead><tr><th>Pool</th><th>On demand</th><th>Spot</th><th>Notice</th><th>As of</th><th>Source</th>'
    yield "</tr></thead><tbody>"
    for hardware in made.case.hardware:
        for pool in hardware.pools:
            if not shown or pool.pool in shown:
                cells = [
                    about_usd(pool.on_demand_usd_h),
                    about_usd(pool.spot_usd_h),
                    about_s(pool.notice_s),
                    pool.as_of,
                    pool.source,
                ]
                yield f"<tr><th>{escape(pool.pool)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</tbody></table></section>"


def _notes(made: Plan) -> Iterator[str]:
    yield '<section class="notes"><h2>Not in the model</h2><ul>'
    for note in (*NOT_MODELLED, *made.notes):
        yield f"<li>{escape(note)}</li>"
    yield f"</ul><p>{made.sampling.samples} samples, seed {made.sampling.seed}.</p></section>"


def _cell(key: str, value: float | None, words: str) -> str:
    return f"<td{_data(key, value)}>{escape(words)}</td>"


def _data(key: str, value: float | None) -> str:
    plain = rounded(value)
    return f' data-key="{escape(key)}" data-value="{"null" if plain is None else repr(plain)}"'
