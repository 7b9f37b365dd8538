"""`holdfast sweep-leaks PROVIDER`: find and end what a fleet has left behind, with nothing but the provider's own tags."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.terminal import Json, Yes, ask_first
from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.fleet.leaks import Leak, Sighting

__all__ = ["sweep_leaks"]


def sweep_leaks(
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="local, aws or gcp.")],
    fleet: Annotated[str, typer.Option("--fleet", metavar="NAME", help="As at the launch.")] = "default",
    cloud: Annotated[
        str, typer.Option("--cloud", metavar="PLACE", help="A rehearsal cloud's folder, or a GCP project.")
    ] = "",
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region", metavar="REGION", help="Look here only; may be given several times. Without it, everywhere."
        ),
    ] = None,
    end: Annotated[
        bool, typer.Option("--end", help="End and remove what was found; without it, only show it.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Show machines, disks, addresses and templates of a fleet whose time is over, and end them.

    Everything that is launched carries the moment after which nobody can still want it; each renewed grant moves it. So no state of
    ours is needed, and no run has to be known: what is past that moment, with ten minutes to spare, is a leak. What carries no such
    moment is shown, and never ended. What has been renewed while you were asked stays.

    \b
    Examples:
      holdfast sweep-leaks aws --region us-east-1
      holdfast sweep-leaks aws --end
      holdfast sweep-leaks local --cloud ./cloud --end --yes

    \b
    Exit codes: 0 all places have answered, and all that was to be ended was asked to; 1 some have not, or were not.
    JSON keys: machines[id, pool, run_id, launch, expired_s, usd_h, ends], leftovers[kind, id, region, run_id, expired_s, usd_h,
      ends], problems. `ends`: whether --end ends it.
    """
    from holdfast.fleet.leaks import end as end_leaks
    from holdfast.fleet.leaks import look
    from holdfast.provider.registry import everywhere

    if not fleet.strip():
        raise UsageError("a fleet has a name; without --fleet it is `default`")
    if cloud and provider == "aws":
        raise UsageError(
            "--cloud names a rehearsal cloud's folder or a GCP project; for aws, there are regions and your credentials"
        )
    with ExitStack() as closing:
        places = everywhere(provider, cloud, region or ())
        for each in places.values():
            closing.callback(getattr(each, "close", lambda: None))
        seen = look(places, fleet, region or ())
        _show(seen, fleet, provider, json=json)
        problems = list(seen.problems)
        if end and seen.to_end:
            ask_first(yes)
            leaks = seen.to_end if yes else seen.still(look(places, fleet, region or ()))
            failed = end_leaks(places, leaks)
            for problem in failed:
                typer.echo(f"FAILED: {problem}", err=True)
            _sum_up(seen, leaks, failed)
            problems += failed
    if problems:
        raise typer.Exit(1)


def _sum_up(seen: Sighting, leaks: tuple[Leak, ...], failed: list[str]) -> None:
    machines = sum(each.is_machine for each in leaks)
    renewed = len(seen.to_end) - len(leaks)
    kept = f" {renewed} had been renewed or had gone meanwhile." if renewed else ""
    some = ", and not all of it was done, see above" if failed else ""
    loose = " What comes loose when they end is found by the next sweep." if machines else ""
    typer.echo(
        f"Asked for the end of {machines} machines and {len(leaks) - machines} other things{some}.{kept}{loose}",
        err=True,
    )


def _show(seen: Sighting, fleet: str, provider: str, *, json: bool) -> None:
    from holdfast.cli.checkpoint_tables import print_json, print_table

    machines = [each for each in seen.leaks if each.is_machine]
    others = [each for each in seen.leaks if not each.is_machine]
    if json:
        print_json(
            {"machines": [_plain(each) for each in machines], "leftovers": [_plain(each) for each in others],
             "problems": seen.problems}
        )  # fmt: skip
        return
    if seen.leaks:
        print_table(
            ["what", "name", "where", "run", ">launch", "expired", ">per hour"], [_row(each) for each in seen.leaks]
        )
    elif not seen.problems:
        typer.echo(f"Nothing of fleet {fleet} at {provider} is past its time.")
    for problem in seen.problems:
        typer.echo(f"not known: {problem}", err=True)


def _plain(leak: Leak) -> dict[str, Any]:
    from holdfast.provider.base import Machine

    thing = leak.thing
    what: dict[str, Any]
    if isinstance(thing, Machine):
        what = {"id": thing.id, "pool": thing.pool.name, "run_id": thing.run_id, "launch": thing.launch}
    else:
        what = {"kind": thing.kind, "id": thing.id, "region": thing.region, "run_id": thing.run_id}
    return {**what, "expired_s": leak.expired_s, "usd_h": thing.microusd_h / 1e6, "ends": leak.ends}


def _row(leak: Leak) -> list[str]:
    from holdfast.provider.base import Machine

    thing = leak.thing
    if isinstance(thing, Machine):
        words = ["machine", thing.id, thing.pool.name, thing.run_id, str(thing.launch)]
    else:
        words = [thing.kind, thing.id, thing.region, thing.run_id, ""]
    if leak.expired_s is None:
        when = "it does not say: not ended by this command"
    else:
        when = f"{format_duration(leak.expired_s)} ago{'' if leak.ends else ', is ending'}"
    return [*words, when, f"${thing.microusd_h / 1e6:,.4f}"]
