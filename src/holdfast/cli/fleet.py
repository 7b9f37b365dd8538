"""What `controller`, `launch`, `status` and `cost` do with `--home URL`: all runs of a fleet at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.core.fleet_home import RunOver
    from holdfast.fleet.home import Home
    from holdfast.fleet.index import Index
    from holdfast.fleet.instructions import Over
    from holdfast.fleet.mandate import Mandate
    from holdfast.fleet.overview import Overview
    from holdfast.fleet.roll import Roll, RunLine
    from holdfast.store.beneath import SharedStores

__all__ = [
    "HomeUrl",
    "IndexFile",
    "control_fleet",
    "cost_of_fleet",
    "enrol",
    "one_of",
    "ring_cancelled",
    "show_fleet",
    "sign_off",
]

HomeUrl = Annotated[
    str | None, typer.Option("--home", metavar="URL", help="All runs of the fleet that has its home there.")
]
IndexFile = Annotated[
    Path | None,
    typer.Option(
        "--index", metavar="PATH", help="With --home: the cache of records; else in ~/.local/state/holdfast/fleets."
    ),
]
_WATCH_S = 5.0
_MOST_OVER = 20


class _Opened(NamedTuple):
    home: Home
    stores: SharedStores
    kept: Index | None


def one_of(url: str | None, home: str | None) -> None:
    if (url is None) == (home is None):
        raise UsageError("name either a run, by its URL, or a fleet, by --home URL")


@contextmanager
def _opened(url: str, index: Path | None = None, *, with_index: bool = True) -> Iterator[_Opened]:
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token
    from holdfast.fleet.home import Home
    from holdfast.fleet.index import Index, index_path
    from holdfast.store.beneath import SharedStores

    stores = SharedStores()
    store = stores(url)
    kept = Index(index or index_path(store.url), say=_say) if with_index else None
    try:
        yield _Opened(Home(store, clock=SystemClock(), tokens=random_token), stores, kept)
    finally:
        if kept is not None:
            kept.close()
        stores.close()


def _say(line: str) -> None:
    typer.echo(line, err=True)


# ---- the controller


def control_fleet(url: str, slice_: str, index: Path | None, workers: int, *, until_empty: bool) -> None:
    """Until Ctrl-C or SIGTERM; a second one leaves at once."""
    from holdfast.core.clock import SystemClock
    from holdfast.core.config import parse_duration_s
    from holdfast.core.ids import random_token
    from holdfast.fleet.adopting import Adopter
    from holdfast.fleet.crew import run_fleet
    from holdfast.fleet.fleet_controller import FleetController
    from holdfast.fleet.pace import FleetPace

    pace, clock, id = FleetPace(), SystemClock(), random_token()
    with _opened(url, index) as (home, stores, kept), _stopping() as stopped:
        for pulse, ago_s in home.controllers():
            _say(f"Another controller of this fleet, on {pulse.host}, was heard {ago_s} s ago. Two do no harm.")
        adopt = Adopter(
            home.url, stores, clock=clock, tokens=random_token, say=_say, pace=pace.run, index=kept,
            slice_s=int(parse_duration_s(slice_)),
        )  # fmt: skip
        fleet = FleetController(home, adopt, clock=clock, id=id, say=_say, pace=pace, index=kept)
        _say(f"This controller looks after the runs of {home.url}.")
        try:
            run_fleet(fleet, lambda: bool(stopped), pace=pace, say=_say, workers=workers, until_empty=until_empty)
        finally:
            fleet.leave()
        left = len(fleet.run_ids())
    if not left and until_empty:
        _say("No run is left.")
        return
    _say(
        f"The controller has stopped. What runs goes on until its grant ends, and is not replaced when it is taken ({left} runs). "
        f"Go on: holdfast controller --home {url}"
    )
    raise typer.Exit(130)


@contextmanager
def _stopping() -> Iterator[list[int]]:
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        _say("Stopping when the steps that were begun are done; once more to stop at once.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what is done for one run


def enrol(url: str, mandate: Mandate, run_url: str, name: str) -> bool:
    """Into the fleet; whether somebody looks after it."""
    with _opened(url, with_index=False) as (home, _, _):
        home.enrol(mandate, run_url, name)
        heard = home.controllers()
        for pulse, ago_s in heard[:1]:
            _say(
                f"A controller on {pulse.host} (process {pulse.pid}, {pulse.runs} runs) was heard {ago_s} s ago, and takes this "
                f"run on. `holdfast status {run_url}` shows it, `holdfast cancel {run_url}` ends it."
            )
        if not heard:
            _say(f"Nobody looks after this fleet: holdfast controller --home {home.url}")
        return bool(heard)


def sign_off(mandate: Mandate, run_url: str, over: Over, overview: Overview) -> None:
    """A run that was looked after alone is over: its fleet should know. If that fails, the fleet's next controller finds it out."""
    from holdfast.core.errors import StoreError

    try:
        with _opened(mandate.home, with_index=False) as (home, _, _):
            run = home.enrolment(mandate.run_id)
            if run is not None:
                home.sign_off(run, over, overview)
    except StoreError as error:
        _say(f"{mandate.home} could not be told that {run_url} is over: {error}")


def ring_cancelled(url: str, run_id: str) -> None:
    with _opened(url, with_index=False) as (home, _, _):
        home.ring(run_id, "cancelled")


# ---- what people see


def show_fleet(url: str, index: Path | None, *, watch: bool, json: bool) -> None:
    from dataclasses import asdict

    from holdfast.cli.checkpoint_tables import print_json
    from holdfast.core.clock import SystemClock

    with _opened(url, index) as opened:
        roll = _roll(opened)
        while True:
            lines, overs = roll.look()
            heard = opened.home.controllers()
            if json:
                print_json(
                    {
                        "runs": [asdict(line) for line in lines],
                        "over": [_plain(over) for over in overs],
                        "controllers": [
                            {"host": pulse.host, "pid": pulse.pid, "runs": pulse.runs, "heard_s": ago_s} for pulse, ago_s in heard
                        ],
                        "spent_microusd": _spent(lines, overs),
                        "reserved_microusd": sum(line.reserved_microusd for line in lines),
                    }
                )  # fmt: skip
            else:
                for pulse, ago_s in heard:
                    typer.echo(f"A controller on {pulse.host} (process {pulse.pid}) was heard {ago_s} s ago.")
                if lines and not heard:
                    typer.echo(f"Nobody looks after this fleet: holdfast controller --home {opened.home.url}")
                _print(opened.home.url, lines, overs)
            if not watch or not lines:
                return
            try:
                SystemClock().sleep(_WATCH_S)
            except KeyboardInterrupt:
                return
            if not json:
                typer.echo("")


def cost_of_fleet(url: str, index: Path | None, *, json: bool) -> None:
    from holdfast.cli.checkpoint_tables import print_json, print_table

    with _opened(url, index) as opened:
        lines, overs = _roll(opened).look()
    on_demand = sum(line.on_demand_microusd for line in lines) + sum(over.on_demand_microusd for over in overs)
    spent, reserved = _spent(lines, overs), sum(line.reserved_microusd for line in lines)
    found = [(line.name, line.url, "", sum(each[1] for each in line.by_market), line.spent_microusd) for line in lines]
    found += [(over.name, over.url, over.outcome, over.billed_s, over.cost_microusd) for over in overs]
    if json:
        print_json(
            {
                "runs": [
                    {"name": name, "url": run_url, "outcome": outcome or None, "billed_s": billed_s, "cost_microusd": cost}
                    for name, run_url, outcome, billed_s, cost in found
                ],
                "spent_microusd": spent, "reserved_microusd": reserved, "on_demand_microusd": on_demand,
            }
        )  # fmt: skip
        return
    rows = [[name, outcome or "goes on", _hours(billed_s), _usd(cost)] for name, _, outcome, billed_s, cost in found]
    print_table(
        ["run", "", ">hours", ">cost"], [*rows, ["in all", "", _hours(sum(each[3] for each in found)), _usd(spent)]]
    )
    if on_demand:
        typer.echo(f"The same hours on demand: {_usd(on_demand)} (saved {1 - spent / on_demand:.0%})")
    if reserved:
        typer.echo(f"What runs may still cost up to {_usd(reserved)}")


def _roll(opened: _Opened) -> Roll:
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token
    from holdfast.fleet.roll import Roll

    return Roll(opened.home, opened.stores, clock=SystemClock(), tokens=random_token, index=opened.kept)


def _print(url: str, lines: list[RunLine], overs: list[RunOver]) -> None:
    from holdfast.cli.checkpoint_tables import print_table

    rows = [
        [
            line.name, f"{line.phase}{', cancelled' if line.cancelled else ''}", "" if line.step is None else str(line.step),
            "" if line.kept_step is None else str(line.kept_step), str(line.launches), _usd(line.spent_microusd),
            _usd(line.reserved_microusd), line.why or "",
        ]
        for line in lines
    ]  # fmt: skip
    rows += [
        [over.name, over.outcome, "", "", str(over.launches), _usd(over.cost_microusd), "", "; ".join(over.reasons)]
        for over in overs[:_MOST_OVER]
    ]
    print_table(["run", "phase", ">step", ">saved", ">launches", ">spent", ">reserved", ""], rows)
    more = f" ({len(overs) - _MOST_OVER} older ones are not shown)" if len(overs) > _MOST_OVER else ""
    typer.echo(
        f"{url}: {len(lines)} runs, {len(overs)} over{more}; spent {_usd(_spent(lines, overs))}, and at most "
        f"{_usd(sum(line.reserved_microusd for line in lines))} more by what runs"
    )


def _spent(lines: list[RunLine], overs: list[RunOver]) -> int:
    return sum(line.spent_microusd for line in lines) + sum(over.cost_microusd for over in overs)


def _plain(over: RunOver) -> dict[str, object]:
    from msgspec import to_builtins

    return {name: value for name, value in to_builtins(over).items() if name not in ("format", "nonce")}


def _usd(microusd: int) -> str:
    return f"${microusd / 1e6:,.4f}"


def _hours(seconds: int) -> str:
    return f"{seconds / 3600:,.2f}"
