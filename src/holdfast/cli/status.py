"""`holdfast status URL`, `holdfast cost URL`, `holdfast cancel URL`, `holdfast down URL`: a launched run from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.fleet import HomeUrl, IndexFile
from holdfast.cli.terminal import Json, Url, Yes, ask_first, opened_stores
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.fleet.overview import Overview
    from holdfast.store.base import Store

__all__ = ["cancel", "cost", "down", "status"]

_WATCH_S = 5.0


RunUrl = Annotated[
    str | None, typer.Argument(metavar="URL", help="The run: s3://bucket/runs/gpt, gs://…, az://…, ./runs/gpt")
]


def status(
    url: RunUrl = None,
    home: HomeUrl = None,
    watch: Annotated[
        bool, typer.Option("-w", "--watch", help="Again every few seconds, until nothing runs or Ctrl-C.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Why each launch was made, and what a controller would do now.")
    ] = False,
    json: Json = False,
    index: IndexFile = None,
) -> None:
    """Show what was launched for a run, where it stands and why, what it has cost and may still cost; with --home, all runs of a
    fleet, and whether somebody looks after it.

    \b
    Examples:
      holdfast status s3://bucket/runs/gpt
      holdfast status s3://bucket/runs/gpt --watch
      holdfast status s3://bucket/runs/gpt --explain
      holdfast status --home s3://bucket/fleet --watch

    \b
    JSON keys: launches[launch, phase, pool, machine, predecessor, asked_unix_s, ended_unix_s, why, step, kept_step, kept_work_s,
      billed_s, cost_microusd, microusd_h, on_demand_microusd_h, grant_left_s, reasons], cancelled, spent_microusd,
      reserved_microusd, on_demand_microusd, by_market, altered; with --explain, explained[launched[launch, reasons], known,
      would[do, reasons], because, wait_s, problem].
    With --home: runs[run_id, name, url, phase, step, kept_step, launches, spent_microusd, reserved_microusd, on_demand_microusd,
      by_market, cancelled, why, problem], over[run_id, url, name, outcome, exit_code, reasons, launches, billed_s, cost_microusd,
      on_demand_microusd, at_unix_s], controllers[host, pid, runs, heard_s], spent_microusd, reserved_microusd.
    """
    from holdfast.cli.checkpoint_tables import print_json
    from holdfast.cli.explain_run import explained, plain_explanation, print_explanation
    from holdfast.cli.fleet import one_of, show_fleet
    from holdfast.core.clock import SystemClock

    one_of(url, home)
    if home is not None:
        if explain:
            raise UsageError("--explain is of one run: holdfast status URL --explain")
        show_fleet(home, index, watch=watch, json=json)
        return
    assert url is not None
    clock = SystemClock()
    with opened_stores() as open_home:
        store = open_home(url)
        while True:
            overview = _overview(store)
            why = explained(store) if explain else None
            if json:
                print_json(_plain(overview) | ({} if why is None else {"explained": plain_explanation(why)}))
            else:
                _print(store.url, overview)
                if why is not None:
                    print_explanation(why)
            if not watch or not overview.is_live:
                return
            try:
                clock.sleep(_WATCH_S)
            except KeyboardInterrupt:
                return
            if not json:
                typer.echo("")


def cost(url: RunUrl = None, home: HomeUrl = None, json: Json = False, index: IndexFile = None) -> None:
    """Show what the machines of a run have cost, by market, and what the same hours would have cost on demand; with --home, run by
    run.

    Rework is in it on both sides: what the run would have cost on demand without preemptions, `holdfast report` says.

    \b
    Examples:
      holdfast cost s3://bucket/runs/gpt
      holdfast cost --home s3://bucket/fleet
    """
    from holdfast.cli.checkpoint_tables import print_json, print_table
    from holdfast.cli.fleet import cost_of_fleet, one_of

    one_of(url, home)
    if home is not None:
        cost_of_fleet(home, index, json=json)
        return
    assert url is not None
    with opened_stores() as open_home:
        store = open_home(url)
        overview = _overview(store)
        if json:
            print_json({name: value for name, value in _plain(overview).items() if name != "launches"})
            return
        rows = [[market, _hours(billed_s), _usd(microusd)] for market, billed_s, microusd in overview.by_market]
        print_table(
            ["market", ">hours", ">cost"],
            [*rows, ["in all", _hours(sum(each[1] for each in overview.by_market)), _usd(overview.spent_microusd)]],
        )
        if overview.on_demand_microusd:
            saved = 1 - overview.spent_microusd / overview.on_demand_microusd
            typer.echo(f"The same hours on demand: {_usd(overview.on_demand_microusd)} (saved {saved:.0%})")
        if overview.reserved_microusd:
            typer.echo(f"What runs may still cost up to {_usd(overview.reserved_microusd)}")


def cancel(url: Url, yes: Yes = False) -> None:
    """Give a run up: its machines save what they have and end; nothing is launched for it any more.

    A controller does it, or the machines by themselves at the end of their grants.

    \b
    Examples:
      holdfast cancel s3://bucket/runs/gpt
    """
    ask_first(yes)
    _cancel(url, now=False)


def down(url: Url, yes: Yes = False) -> None:
    """End a run's machines at once, without a last checkpoint, and launch nothing for it any more.

    \b
    Examples:
      holdfast down s3://bucket/runs/gpt -y
    """
    ask_first(yes)
    _cancel(url, now=True)


def _cancel(url: str, *, now: bool) -> None:
    from holdfast.cli.fleet import ring_cancelled
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token
    from holdfast.core.launches import CANCEL_KEY, Cancel
    from holdfast.core.sealed import FORMAT_VERSION
    from holdfast.fleet.mandate import read_mandate
    from holdfast.fleet.records import RunRecords

    clock = SystemClock()
    with opened_stores() as open_home:
        store = open_home(url)
        mandate = read_mandate(store)
        record = Cancel(
            format=FORMAT_VERSION,
            nonce=random_token(),
            now=now,
            reason="somebody has cancelled it",
            at_unix_s=clock.unix_s(),
        )
        won, found = RunRecords(store, clock=clock, tokens=random_token).write(CANCEL_KEY, record)
        if not won and now and not found.now:
            typer.echo(
                "It had been cancelled before: its machines save first. The provider's own console ends them at once."
            )
        if mandate.home:
            ring_cancelled(mandate.home, mandate.run_id)
        whose = f"--home {mandate.home}" if mandate.home else store.url
        typer.echo(f"Cancelled. Its controller ends what runs; if none lives: holdfast controller {whose}")


def _overview(store: Store) -> Overview:
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token
    from holdfast.fleet.mandate import read_mandate
    from holdfast.fleet.overview import overview_of
    from holdfast.fleet.records import RunRecords
    from holdfast.fleet.view import RunView, see

    read_mandate(store)
    clock = SystemClock()
    records, view = RunRecords(store, clock=clock, tokens=random_token), RunView()
    for event in records.read():
        view = see(view, event)
    return overview_of(view, int(clock.unix_s()), tuple(records.altered.values()))


def _plain(overview: Overview) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(overview)


def _print(url: str, overview: Overview) -> None:
    from holdfast.cli.checkpoint_tables import print_table
    from holdfast.core.config import format_duration

    state = "live" if overview.is_live else "nothing runs"
    typer.echo(f"{url}: {state}{', cancelled' if overview.cancelled else ''}")
    rows = [
        [
            str(line.launch), line.phase, line.pool or "", line.machine or "", "" if line.step is None else str(line.step),
            "" if line.kept_step is None else str(line.kept_step), "" if line.billed_s is None else format_duration(line.billed_s),
            "" if line.cost_microusd is None else _usd(line.cost_microusd), line.why or "",
        ]
        for line in overview.launches
    ]  # fmt: skip
    print_table([">launch", "phase", "pool", "machine", ">step", ">saved", ">billed", ">cost", ""], rows)
    typer.echo(
        f"spent {_usd(overview.spent_microusd)}, and at most {_usd(overview.reserved_microusd)} more by what runs"
    )
    for problem in overview.altered:
        typer.echo(f"not believed: {problem}")


def _usd(microusd: int) -> str:
    return f"${microusd / 1e6:,.4f}"


def _hours(seconds: int) -> str:
    return f"{seconds / 3600:,.2f}"
