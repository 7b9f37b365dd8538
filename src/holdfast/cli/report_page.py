"""`holdfast report --html`: one page that needs nothing else. No script, no font, no request; light and dark; readable on a phone.

Every figure stands in a `data-value` as `--json` prints it, beside its text for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files

from holdfast.cli.report import BUCKET_NAMES, MINUS, NOTHING, dollars, percent
from holdfast.cli.report_picture import LANE_PX, nice_ticks, timeline_svg
from holdfast.core.config import format_bytes, format_duration
from holdfast.ledger.goodput import Bucket, accounts_of
from holdfast.ledger.report import AttemptReport, Figures, Report, Savings
from holdfast.ledger.timeline import Timeline

__all__ = ["page"]


def page(made: Report, timeline: Timeline) -> str:
    """The page's whole text."""
    style = (files("holdfast.cli") / "report_page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Says to the browser what is true of the page: it loads nothing.
            """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
            f"<title>{escape(made.url)}</title><style>{style}</style></head><body><main>",
            *_heading(made),
            *_tiles(made),
            *_timeline(timeline),
            *_buckets(made.total),
            *_waterfall(made.savings),
            *_table(made),
            *_notes(made),
            "</main></body></html>",
        ]
    )


def _heading(made: Report) -> Iterator[str]:
    begun = datetime.fromtimestamp(made.begun_unix_s, UTC)
    attempts = "1 attempt" if len(made.attempts) == 1 else f"{len(made.attempts)} attempts"
    yield f"<header><h1>{escape(made.url)}</h1>"
    yield f"<p>Begun {begun:%d %B %Y, %H:%M} UTC · {attempts} · {escape(made.attempts[-1].ending)}</p></header>"


def _tiles(made: Report) -> Iterator[str]:
    total, savings = made.total, made.savings
    useful = format_duration(total.useful_s)
    tiles = [
        ("Goodput", percent(total.goodput), f"{useful} useful of {format_duration(total.billed_s)} billed"),
        ("ETTR", percent(total.ettr), f"of {format_duration(total.wall_s)} wall time, queueing included"),
        ("Lost work", f"{total.lost_steps} steps", f"{format_duration(total.buckets_s[Bucket.LOST])} computed again"),
    ]  # fmt: skip
    if savings is not None:
        tiles.append(
            (
                "Saved",
                percent(savings.actual_share),
                f"{dollars(savings.actual_usd, None)}; paid {dollars(savings.paid_usd, None)}",
            )
        )
    elif total.cost_usd is not None:
        tiles.append(("Cost", dollars(total.cost_usd, None), "no on-demand price to compare with"))
    else:
        restarts = made.restarts
        tiles.append(("Restarts", str(restarts.count), ", ".join(f"{why} {n}" for why, n in restarts.by_cause.items())))
    yield '<section class="tiles">'
    for name, figure, about in tiles:
        yield f"<div><h2>{name}</h2><strong>{escape(figure)}</strong><p>{escape(about)}</p></div>"
    yield "</section>"


def _timeline(timeline: Timeline) -> Iterator[str]:
    accounts = accounts_of(timeline)
    shown = [bucket for bucket in Bucket if any(account.buckets[bucket] for account in accounts)]
    waited = any(account.queue_wait_us for account in accounts)
    yield "<section><h2>Attempts over time</h2>"
    yield "<p>From left to right: time since the run began. The height of a colour is its share of that stretch of time.</p>"
    yield '<div class="lanes"><div>'
    for account in accounts:
        yield f'<span style="height:{LANE_PX}px">{account.attempt.number}</span>'
    yield f"</div><div>{timeline_svg(accounts)}</div></div>"
    yield '<ul class="legend">'
    for bucket in shown:
        yield _legend(f'<rect class="b-{bucket.value}" width="12" height="12" rx="2"/>', BUCKET_NAMES[bucket])
    if waited:
        yield _legend('<rect class="b-queue" y="5" width="12" height="2"/>', "queue wait (not billed)")
    yield _legend('<rect class="save-tick" x="5" y="3" width="1.5" height="6"/>', "save")
    yield _legend('<path class="ended" d="M2.5 2.5 l7 7 m0 -7 l-7 7"/>', "attempt ended early")
    yield "</ul></section>"


def _legend(shape: str, words: str) -> str:
    return f'<li><svg width="12" height="12">{shape}</svg>{words}</li>'


def _buckets(total: Figures) -> Iterator[str]:
    largest_s = max([*total.buckets_s.values(), 1e-9])
    yield '<section><h2>Where the billed time went</h2><table class="bars"><thead><tr><th>Bucket</th><th></th><th>Time</th>'
    yield f"<th>Share</th>{'<th>Cost</th>' if total.costs_usd else ''}</tr></thead><tbody>"
    for bucket, seconds in total.buckets_s.items():
        share = seconds / total.billed_s if total.billed_s else 0.0
        width = f"{100 * seconds / largest_s:.2f}%"
        yield (
            f'<tr><th>{BUCKET_NAMES[bucket]}</th><td class="bar"><svg width="100%" height="14">'
            f'<rect class="b-{bucket}" width="{width}" height="14" rx="2"/></svg></td>'
            f"{_cell(f'total.buckets_s.{bucket}', seconds, format_duration(seconds))}<td>{percent(share)}</td>"
        )
        if total.costs_usd:
            cost = total.costs_usd[bucket]
            yield _cell(f"total.costs_usd.{bucket}", cost, dollars(cost, total.cost_usd))
        yield "</tr>"
    billed = _cell("total.billed_s", total.billed_s, format_duration(total.billed_s))
    yield f"</tbody><tfoot><tr><th>billed</th><td></td>{billed}<td>{percent(1.0)}</td>"
    if total.costs_usd:
        yield _cell("total.cost_usd", total.cost_usd, dollars(total.cost_usd, None))
    yield "</tr></tfoot></table></section>"


def _waterfall(savings: Savings | None) -> Iterator[str]:
    if savings is None:
        return
    level = savings.theoretical_usd
    rows: list[tuple[str, str, float, float, str, float]] = [
        ("saving in theory", "theory", 0.0, level, "savings.theoretical_usd", level)
    ]
    for name, kind, key, amount in (
        (f"{MINUS} lost work", "lost_work", "savings.lost_work_usd", savings.lost_work_usd),
        (f"{MINUS} restarts", "restore", "savings.restarts_usd", savings.restarts_usd),
        (f"{MINUS} checkpointing", "checkpoint_save", "savings.checkpointing_usd", savings.checkpointing_usd),
        (f"{MINUS} idle", "idle", "savings.idle_usd", savings.idle_usd),
    ):
        rows.append((name, kind, level, level - amount, key, amount))
        level -= amount
    rows.append(("saved in fact", "theory", 0.0, savings.actual_usd, "savings.actual_usd", savings.actual_usd))
    low = min([0.0, *(min(begin, end) for _, _, begin, end, _, _ in rows)])
    high = max([0.0, *(max(begin, end) for _, _, begin, end, _, _ in rows)])
    scale = (high - low) or 1.0
    ticks = nice_ticks(low, high)
    grid = "".join(
        f'<line class="grid" x1="{100 * (tick - low) / scale:.3f}%" x2="{100 * (tick - low) / scale:.3f}%" y1="0" y2="100%"/>'
        for tick in ticks
    )
    yield "<section><h2>What spot capacity saved</h2>"
    yield "<p>Against the same work, uninterrupted, on demand: "
    yield f"{_span('savings.on_demand_usd', savings.on_demand_usd, dollars(savings.on_demand_usd, None))}. "
    yield f"Paid: {_span('savings.paid_usd', savings.paid_usd, dollars(savings.paid_usd, savings.on_demand_usd))}.</p>"
    yield '<table class="bars waterfall"><tbody>'
    for name, kind, begin, end, key, amount in rows:
        x, width = 100 * (min(begin, end) - low) / scale, 100 * abs(end - begin) / scale
        sign = -1 if name.startswith(MINUS) else 1
        yield (
            f'<tr><th>{name}</th><td class="bar"><svg width="100%" height="26">{grid}'
            f'<rect class="b-{kind}" x="{x:.3f}%" width="{width:.3f}%" y="5" height="16" rx="2"/></svg></td>'
            f"{_cell(key, amount, dollars(sign * amount, savings.on_demand_usd))}</tr>"
        )
    axis = f'<svg width="100%" height="18">{_dollar_axis(ticks, low, high)}</svg>'
    axis = f'<svg width="100%" height="18">{_dollar_axis(ticks, low, high)}</svg>'
    yield f'<tr class="axis"><th></th><td class="bar">{axis}</td><td></td></tr>'
    yield "</tbody></table></section>"


def _dollar_axis(ticks: Sequence[float], low: float, high: float) -> str:
    drawn = []
    for tick in ticks:
        share = (tick - low) / ((high - low) or 1.0)
        anchor = "start" if share < 0.05 else "end" if share > 0.95 else "middle"
        drawn.append(
            f'<text x="{100 * share:.3f}%" y="13" text-anchor="{anchor}">{dollars(round(tick, 6), high)}</text>'
        )
    return "".join(drawn)


# ---- the table of attempts

_COLUMNS = (
    "Attempt", "Wall", "Billed", "Useful", "Goodput", "ETTR", "From step", "To step", "Kept to", "Lost steps", "Saves", "Sent",
    "Spared by dedup", "Stall", "Durable in", "Notice → durable", "Ended",
)  # fmt: skip


def _table(made: Report) -> Iterator[str]:
    has_costs = any(attempt.figures.cost_usd is not None for attempt in made.attempts)
    columns = [*_COLUMNS, *(["Cost", "Interruption"] if has_costs else [])]
    yield '<section><h2>Attempts</h2><div class="scroll"><table class="attempts"><thead><tr>'
    yield "".join(f"<th>{column}</th>" for column in columns)
    yield "</tr></thead><tbody>"
    whole = made.total.cost_usd
    for index, attempt in enumerate(made.attempts):
        cells = _row(f"attempts.{index}.", attempt, attempt.figures, whole, has_costs)
        yield f"<tr><th>{attempt.number}</th>{cells}</tr>"
    yield f"</tbody><tfoot><tr><th>all</th>{_row('', None, made.total, whole, has_costs)}</tr></tfoot></table></div></section>"


def _row(prefix: str, attempt: AttemptReport | None, figures: Figures, whole: float | None, has_costs: bool) -> str:
    key = f"{prefix}figures." if attempt else "total."
    saves = figures.saves
    cells = [
        _cell(f"{key}{name}", seconds, format_duration(seconds))
        for name, seconds in (
            ("wall_s", figures.wall_s),
            ("billed_s", figures.billed_s),
            ("useful_s", figures.useful_s),
        )
    ]
    cells += [_cell(f"{key}goodput", figures.goodput, percent(figures.goodput))]
    cells += [_cell(f"{key}ettr", figures.ettr, percent(figures.ettr))]
    for name in ("start_step", "reached_step", "retained_step"):
        step = getattr(attempt, name) if attempt else None
        cells.append(_cell(f"{prefix}{name}", step, str(step)) if step is not None else "<td></td>")
    cells += [
        _cell(f"{key}lost_steps", figures.lost_steps, str(figures.lost_steps)),
        _cell(f"{key}saves.count", saves.count, f"{saves.count}{f' + {saves.failed} failed' if saves.failed else ''}"),
        _cell(f"{key}saves.sent_bytes", saves.sent_bytes, format_bytes(saves.sent_bytes)),
        _cell(f"{key}saves.deduplicated_bytes", saves.deduplicated_bytes, format_bytes(saves.deduplicated_bytes)),
        _cell(f"{key}saves.stall_s", saves.stall_s, format_duration(saves.stall_s)),
        _seconds(f"{key}saves.durable_median_s", saves.durable_median_s),
        _seconds(f"{key}saves.notice_to_durable_s", saves.notice_to_durable_s),
        f"<td>{escape(attempt.ending) + (' (time assumed)' if attempt.end_is_assumed else '') if attempt else ''}</td>",
    ]
    if has_costs:
        cells.append(_cell(f"{key}cost_usd", figures.cost_usd, dollars(figures.cost_usd, whole)))
        interruption = attempt.interruption_usd if attempt else None
        cells.append(
            _cell(f"{prefix}interruption_usd", interruption, dollars(interruption, whole)) if attempt else "<td></td>"
        )
    return "".join(cells)


def _seconds(key: str, seconds: float | None) -> str:
    return _cell(key, seconds, NOTHING if seconds is None else format_duration(seconds))


def _cell(key: str, value: float | None, words: str) -> str:
    return f"<td{_data(key, value)}>{escape(words)}</td>"


def _span(key: str, value: float, words: str) -> str:
    return f"<span{_data(key, value)}>{escape(words)}</span>"


def _data(key: str, value: float | None) -> str:
    return f' data-key="{escape(key)}" data-value="{"null" if value is None else repr(value)}"'


def _notes(made: Report) -> Iterator[str]:
    if made.notes:
        yield '<section class="notes"><h2>Assumed, or not readable</h2><ul>'
        for note in made.notes:
            yield f"<li>{escape(note)}</li>"
        yield "</ul></section>"
