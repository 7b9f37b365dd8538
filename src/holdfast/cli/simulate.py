"""`holdfast simulate`: market policies on traces of spot capacity: what each would have cost, how sure that is, and why."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.checkpoint_tables import print_json
from holdfast.cli.simulate_traces import (
    DEFAULT_DAYS,
    DEFAULT_SEED,
    FileFormat,
    MarkWord,
    PoolsWord,
    TraceOptions,
    grounds_of,
    known,
)
from holdfast.cli.terminal import Json, progress_bar
from holdfast.core.config import parse_duration_s
from holdfast.core.contract import EXIT_INTERRUPTED
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.simulate.market.comparing import Comparison, Request
    from holdfast.simulate.market.workload import Workload

__all__ = ["simulate"]


class _Billing(StrEnum):
    per_second = "per-second"
    aws_first_hour_free = "aws-first-hour-free"


class _Beliefs(StrEnum):
    cold = "cold"
    past = "past"


_REFUND_WITHIN_S = {_Billing.per_second: 0, _Billing.aws_first_hour_free: 3600}


def simulate(
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Play this one; may be given several times.", show_default="all"),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A pool's availability; may be given several times.", show_default="scenarios"
        ),
    ] = None,
    form: Annotated[
        FileFormat, typer.Option("--format", help="How trace files are to be read.", metavar="auto|csv|json|nodes")
    ] = FileFormat.auto,
    marks: Annotated[
        MarkWord | None,
        typer.Option(
            help="What a 1 in a trace file means: capacity was there, or was taken away; machines: it is a count.",
            metavar="available|preempted|machines",
            show_default="must be said",
        ),
    ] = None,
    tick: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Length of a tick.", show_default="the file's; nodes 1 min")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON: pool → spot prices, tick by tick, in dollars per hour.")
    ] = None,
    spot_price: Annotated[
        str | None, typer.Option(metavar="USD", help="Spot price of a machine per hour.", show_default="the trace's")
    ] = None,
    on_demand_price: Annotated[
        str | None, typer.Option(metavar="USD", help="On-demand price per hour.", show_default="the trace's")
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Without a trace: make one; may be given several times.", show_default="all"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of the traces made.", show_default=str(DEFAULT_SEED))
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.01, max=3650, help="Their length.", show_default=f"{DEFAULT_DAYS:.0f}"),
    ] = None,
    work: Annotated[str, typer.Option(metavar="DURATION", help="Work, on capacity that is never interrupted.")] = "48h",
    deadline: Annotated[
        str, typer.Option(metavar="DURATION,…", help="From the start of the job; one or several.")
    ] = "60h",
    changeover: Annotated[
        str, typer.Option(metavar="DURATION", help="Until new capacity works: launch, set-up, restore. Billed.")
    ] = "6m",
    max_lost_work: Annotated[
        str, typer.Option(metavar="DURATION", help="The most work that a preemption takes back.")
    ] = "10m",
    gang: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Machines that work together, or not at all.")
    ] = 1,
    asks: Annotated[
        bool, typer.Option("--asks", help="Capacity is known only after asking for it, not in advance.")
    ] = False,
    horizon: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How long a late job is followed.", show_default="to its deadline"),
    ] = None,
    billing: Annotated[_Billing, typer.Option(help="A refund is shown apart, never subtracted.")] = _Billing.per_second,
    every: Annotated[str, typer.Option(metavar="DURATION", help="From the start of one window to the next.")] = "12h",
    windows: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="At most so many for each trace and deadline, spread evenly.", show_default="all"
        ),
    ] = None,
    pools: Annotated[PoolsWord, typer.Option(help="Each pool by itself, or all as one market.")] = PoolsWord.each,
    optimum: Annotated[
        bool, typer.Option("--optimum/--no-optimum", help="What somebody would pay who knows the future.")
    ] = True,
    beliefs: Annotated[
        _Beliefs, typer.Option(help="What a policy that learns begins with: nothing, or the trace before the windows.")
    ] = _Beliefs.cold,
    history: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help='Part of the trace before the windows: "50%" or "10 d".',
            show_default="50% for past, else none",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Processes that compute the optimum.")] = 1,
    explain: Annotated[
        str | None, typer.Option(metavar="WINDOW", help='Tell one window\'s decisions and reasons: "3", or "POOL:3".')
    ] = None,
    every_tick: Annotated[
        bool, typer.Option("--every-tick", help="With --explain: every tick, not changes only.")
    ] = False,
    json: Json = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="One line per window and policy, to FILE.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Pictures (PNG) into DIR; needs matplotlib.")] = None,
) -> None:
    """Simulate market policies: spot, on-demand or wait? What would each have cost, by when, and why?

    A window is one job that starts at some moment of a trace. Every policy plays every window; the same code decides as in a
    controller. Bands are from a bootstrap over days. The gap is the way from greedy to the optimum, which knows the future.

    \b
    Policies: greedy, uniform-progress, uniform-progress-as-written, on-demand, spot, ours.
    Scenarios, made from a seed: steady, bursty, diurnal, scarce, correlated.

    \b
    Trace files: probes as CSV (`date,number` under a heading), as JSON (metadata.gap_seconds, data, prices), or nodes that join and
      leave (`milliseconds,add|remove,node`). The pool is named by its file.

    \b
    Examples:
      holdfast simulate
      holdfast simulate --scenario bursty --deadline 52h,60h --policy ours --policy uniform-progress
      holdfast simulate --trace zone-a.csv --trace zone-b.csv --marks available --spot-price 0.97 --on-demand-price 3.06
      holdfast simulate --trace zone-a.json --marks preempted --beliefs past --plot pictures --csv windows.csv
      holdfast simulate --scenario scarce --explain 3 --policy ours
      holdfast simulate --scenario steady --json | jq '.sections[0].policies[] | {policy, mean_usd, gap_closed}'

    \b
    JSON keys: policies, beliefs, every_s, sections[group, work_s, deadline_s, …, grounds[], optimum{mean_usd, band_usd, exact},
      policies[policy, windows, mean_usd, band_usd{low, high}, gap_closed, misses, finish_s, spot_share, preemptions, goodput, …],
      windows[pool, window, start_s, optimum_usd, cost_usd{policy}, late[]]]. With --explain: pool, window, start_s, optimum_usd,
      told[policy, cost_usd, finish_s, late, decisions[at_s, market, pool, work_left_s, slack_s, reasons[]]].

    What the figures mean, and what a trace cannot say: docs/simulate.md.
    """
    try:
        options = TraceOptions(
            files=trace or (), format=form, marks=marks, tick_s=None if tick is None else _seconds(tick, "--tick"), prices=prices,
            spot=_price(spot_price), on_demand=_price(on_demand_price), scenarios=scenario or (), seed=seed, days=days, pools=pools,
            history="50%" if history is None and beliefs is _Beliefs.past else history, gang=gang,
        )  # fmt: skip
        workloads = [
            _workload(each, work, changeover, max_lost_work, horizon, gang, asks, billing)
            for each in dict.fromkeys(deadline.split(","))
        ]
        if every_tick and explain is None:
            raise UsageError("--every-tick is about --explain WINDOW")
        if csv is not None and explain is not None:
            raise UsageError("--csv is about all windows, --explain about one; leave one of them away")
        if plot is not None:
            _check_plot(plot)
        request, notes = _request(
            options, policy or (), workloads, _seconds(every, "--every"), windows, beliefs, with_optimum=optimum
        )
        if explain is not None:
            from holdfast.cli.simulate_story import tell_window

            _remark(notes)
            tell_window(request, explain, told_policies=policy or (), every_tick=every_tick, as_json=json, plot=plot)
        else:
            _show(_compared(request, jobs), notes, json, csv, plot)
    except KeyboardInterrupt:
        typer.echo("holdfast: interrupted; nothing was written", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _request(
    options: TraceOptions,
    policies: list[str] | tuple[()],
    workloads: list[Workload],
    every_s: int,
    windows: int | None,
    beliefs: _Beliefs,
    *,
    with_optimum: bool,
) -> tuple[Request, list[str]]:
    from holdfast.policy.market.registry import POLICIES
    from holdfast.simulate.market.comparing import Given, Request

    names = [known("policy", name, POLICIES) for name in policies] or list(POLICIES)
    grounds, notes = grounds_of(options)
    request = Request(
        grounds=grounds,
        policies=list(dict.fromkeys(names)),
        workloads=workloads,
        every_s=every_s,
        most_windows=windows,
        given=Given(beliefs.value),
        with_optimum=with_optimum,
    )
    return request, notes


def _workload(
    deadline: str,
    work: str,
    changeover: str,
    max_lost_work: str,
    horizon: str | None,
    gang: int,
    asks: bool,
    billing: _Billing,
) -> Workload:
    from holdfast.policy.market.facts import Job
    from holdfast.simulate.market.workload import Workload

    return Workload(
        job=Job(
            work_s=_seconds(work, "--work"),
            deadline_s=_seconds(deadline, "--deadline"),
            changeover_s=_seconds(changeover, "--changeover", least_s=0),
            max_lost_s=_seconds(max_lost_work, "--max-lost-work", least_s=0),
        ),
        gang=gang,
        asks=asks,
        horizon_s=None if horizon is None else _seconds(horizon, "--horizon"),
        free_if_taken_within_s=_REFUND_WITHIN_S[billing],
    )


def _seconds(text: str, option: str, least_s: int = 1) -> int:
    """Whole seconds: the simulator's clock knows no others."""
    try:
        seconds = parse_duration_s(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    if seconds != int(seconds) or seconds < least_s:
        raise UsageError(f"{option}: {text!r} is not a whole number of seconds, {least_s} or more")
    return int(seconds)


def _price(text: str | None) -> str | None:
    if text is None:
        return None
    from holdfast.ledger.cost import parse_price

    return str(parse_price(text))


def _compared(request: Request, jobs: int) -> Comparison:
    from holdfast.simulate.market.bounds import bounds_on
    from holdfast.simulate.market.comparing import compare

    with progress_bar("simulating", unit="windows") as told, bounds_on(jobs) as bounds:
        return compare(request, bounds, told)


def _show(comparison: Comparison, notes: list[str], as_json: bool, csv: Path | None, plot: Path | None) -> None:
    """Everything is there by now: files first, so that what is printed can name them."""
    from holdfast.cli.simulate_tables import print_comparison, write_csv

    files: list[Path] = []
    if csv is not None:
        files.append(write_csv(comparison, csv))
    if plot is not None:
        from holdfast.cli.simulate_pictures import draw_comparison

        files += draw_comparison(comparison, plot)
    if as_json:
        from holdfast.simulate.market.comparison_json import to_json

        _remark(notes)
        print_json(to_json(comparison))
        return
    print_comparison(comparison, notes)
    if sys.stdout.isatty():
        from holdfast.cli.simulate_terminal import print_pictures

        print_pictures(comparison)
    for path in files:
        typer.echo(f"Written: {path}")


def _remark(notes: list[str]) -> None:
    """Where standard output is for something else."""
    for note in notes:
        typer.echo(f"Note: {note}.", err=True)


def _check_plot(folder: Path) -> None:
    """Before anything is computed, find out what would fail after it."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib: pip install 'holdfast[demo]', or leave --plot away")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a folder; --plot takes the folder that the pictures go to")
