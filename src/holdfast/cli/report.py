"""`holdfast report URL`: where a run's time and money went, as a table, as JSON, or as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.checkpoint_tables import print_json, print_table
from holdfast.cli.terminal import Json, Url, opened_stores
from holdfast.core.config import format_bytes, format_duration
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.ledger.report import AttemptReport, Figures, Report

__all__ = ["BUCKET_NAMES", "MINUS", "NOTHING", "dollars", "percent", "report"]

NOTHING = "\u2013"
"""A dash: not known, or there is none."""
MINUS = "\u2212"
BUCKET_NAMES = {
    "useful": "useful steps",
    "evaluation": "evaluation",
    "data_loading": "data loading",
    "checkpoint_save": "checkpoint save (stall)",
    "initialisation": "initialisation",
    "restore": "restore",
    "training_prep": "training preparation",
    "program_startup": "program startup (first step)",
    "infrastructure_recovery": "infrastructure recovery",
    "lost_work": "lost work (done again)",
    "idle": "idle (billed)",
}


def report(
    url: Url,
    price_spot: Annotated[
        str | None, typer.Option("--price-spot", metavar="USD", help="What an hour of a spot machine costs.")
    ] = None,
    price_on_demand: Annotated[
        str | None,
        typer.Option("--price-on-demand", metavar="USD", help="What an hour of the same machine costs on demand."),
    ] = None,
    json: Json = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page to FILE.")
    ] = None,
) -> None:
    """Show where a run's time and money went: goodput, what was lost, what it cost, what spot capacity saved.

    Everything is computed from the run's own record. Prices come from the record, unless they are given here. What was saved is
    measured against the same work, uninterrupted, on demand: steps that were lost and computed again count as cost, not as work.

    \b
    Examples:
      holdfast report s3://bucket/runs/gpt
      holdfast report ./runs/train --price-spot 1.10 --price-on-demand 3.67 --html report.html
      holdfast report ./runs/train --json | jq .total.goodput

    \b
    JSON keys: url, begun_unix_s, attempts[number, generation, machine, market, price_per_hour_usd, begin_s, ending, end_is_assumed,
      start_step, reached_step, retained_step, fell_back, figures, interruption_usd], total (figures of all attempts),
      restarts[count, by_cause, lost_steps_each, lost_work_s_each, restart_s_each, usd_each], savings[on_demand_usd,
      theoretical_usd, lost_work_usd, restarts_usd, checkpointing_usd, idle_usd, actual_usd, paid_usd, actual_share], notes[].
      Figures: wall_s, billed_s, useful_s, queue_wait_s, goodput, ettr, buckets_s, computed_steps, lost_steps, saves, cost_usd,
      costs_usd. The buckets add up to billed_s.
    """
    from holdfast.core.clock import SystemClock
    from holdfast.ledger.cost import Prices, parse_price
    from holdfast.ledger.read import read_events
    from holdfast.ledger.report import report_of
    from holdfast.ledger.timeline import timeline_of

    prices = Prices(
        None if price_spot is None else parse_price(price_spot),
        None if price_on_demand is None else parse_price(price_on_demand),
    )
    unreadable: list[str] = []
    with opened_stores() as open_home:
        store = open_home(url)
        timeline = timeline_of(read_events(store, unreadable.append), now_unix_s=SystemClock().unix_s())
        name = store.url
    if not timeline.attempts:
        raise UsageError(f"{name}: nothing is recorded here; name the URL of a run that has been started")
    made = report_of(name, timeline, prices, unreadable)
    if html is not None:
        from holdfast.cli.report_page import page

        try:
            html.write_text(page(made, timeline), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write the page to {str(html)!r}: {error.strerror}") from None
    if json:
        print_json(made)
    else:
        _print(made)
        if html is not None:
            typer.echo(f"Page: {html}")


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share * 100:.1f} %"


def dollars(amount: float | None, of: float | None) -> str:
    """With as many decimals as the whole that it is part of asks for, so that a column of them can be compared."""
    if amount is None:
        return NOTHING
    whole = abs(amount if of is None else of)
    digits = next((digits for digits, least in ((2, 100), (3, 10), (4, 0.1)) if whole >= least), 6)
    return f"{MINUS if amount < 0 else ''}${abs(amount):,.{digits}f}"


# ---- for people


def _print(made: Report) -> None:
    total = made.total
    typer.echo(f"{made.url}: {_many(len(made.attempts), 'attempt')}, {made.attempts[-1].ending}")
    typer.echo(
        f"goodput {percent(total.goodput)} (useful {format_duration(total.useful_s)} of {format_duration(total.billed_s)} billed), "
        f"ETTR {percent(total.ettr)} (of {format_duration(total.wall_s)} wall)"
    )
    has_costs = any(attempt.figures.cost_usd is not None for attempt in made.attempts)
    titles = [
        ">ATTEMPT", ">WALL", ">BILLED", ">USEFUL", ">GOODPUT", ">ETTR", ">STEPS", ">LOST", ">SAVES", ">SENT", ">SPARED",
        ">STALL", ">DURABLE IN", "ENDED", *([">COST", ">INTERRUPTION"] if has_costs else []),
    ]  # fmt: skip
    rows = [_row(str(attempt.number), attempt.figures, attempt, total.cost_usd, has_costs) for attempt in made.attempts]
    print_table(titles, [*rows, _row("all", total, None, total.cost_usd, has_costs)])
    typer.echo("")
    _print_buckets(total)
    typer.echo("")
    _print_restarts(made)
    _print_savings(made)
    for note in made.notes:
        typer.echo(f"Note: {note}.")


def _row(name: str, figures: Figures, attempt: AttemptReport | None, whole: float | None, has_costs: bool) -> list[str]:
    saves = figures.saves
    ended = "" if attempt is None else attempt.ending + (" (time assumed)" if attempt.end_is_assumed else "")
    costs = (
        [dollars(figures.cost_usd, whole), dollars(attempt.interruption_usd if attempt else None, whole)]
        if has_costs
        else []
    )
    return [
        name, format_duration(figures.wall_s), format_duration(figures.billed_s), format_duration(figures.useful_s),
        percent(figures.goodput), percent(figures.ettr), str(figures.computed_steps), str(figures.lost_steps),
        f"{saves.count}" + (f" + {saves.failed} failed" if saves.failed else ""), format_bytes(saves.sent_bytes),
        format_bytes(saves.deduplicated_bytes), format_duration(saves.stall_s),
        NOTHING if saves.durable_median_s is None else format_duration(saves.durable_median_s), ended, *costs,
    ]  # fmt: skip


def _print_buckets(total: Figures) -> None:
    costs = total.costs_usd
    rows = [
        [BUCKET_NAMES[bucket], format_duration(seconds), percent(seconds / total.billed_s if total.billed_s else None),
         *([dollars(costs[bucket], total.cost_usd)] if costs else [])]
        for bucket, seconds in total.buckets_s.items()
    ]  # fmt: skip
    rows.append(
        ["billed", format_duration(total.billed_s), percent(1.0), *([dollars(total.cost_usd, None)] if costs else [])]
    )
    rows.append(["queue wait (not billed)", format_duration(total.queue_wait_s), "", *([""] if costs else [])])
    print_table(["BILLED TIME", ">TIME", ">SHARE", *([">COST"] if costs else [])], rows)


def _print_restarts(made: Report) -> None:
    restarts = made.restarts
    if not restarts.count:
        typer.echo("No restarts.")
        return
    causes = ", ".join(f"{cause} {count}" for cause, count in restarts.by_cause.items())
    each = [
        f"{restarts.lost_steps_each:.1f} steps lost ({format_duration(restarts.lost_work_s_each or 0)} of work)",
        f"{format_duration(restarts.restart_s_each or 0)} to come back",
        *([] if restarts.usd_each is None else [dollars(restarts.usd_each, made.total.cost_usd)]),
    ]
    typer.echo(f"{_many(restarts.count, 'restart')} ({causes}); each on average: {', '.join(each)}.")
    noticed = made.total.saves.notice_to_durable_s
    if noticed is not None:
        typer.echo(f"From notice to durable: {format_duration(noticed)} at most.")


def _print_savings(made: Report) -> None:
    savings = made.savings
    if savings is None:
        if made.total.cost_usd is None:
            typer.echo("No prices are recorded; give --price-spot and --price-on-demand to see dollars.")
        else:
            typer.echo("No on-demand price is recorded; give --price-on-demand to see what was saved.")
        return
    typer.echo("")
    amounts = [
        ("the same work, uninterrupted, on demand", savings.on_demand_usd),
        ("saving in theory, at the prices paid", savings.theoretical_usd),
        (f"{MINUS} lost work", -savings.lost_work_usd),
        (f"{MINUS} restarts", -savings.restarts_usd),
        (f"{MINUS} checkpointing", -savings.checkpointing_usd),
        (f"{MINUS} idle", -savings.idle_usd),
        (f"saved in fact ({percent(savings.actual_share)})", savings.actual_usd),
        ("paid", savings.paid_usd),
    ]
    rows = [[name, dollars(amount, savings.on_demand_usd)] for name, amount in amounts]
    print_table(["SAVINGS", ">USD"], rows)


def _many(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
