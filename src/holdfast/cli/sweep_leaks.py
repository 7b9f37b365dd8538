"""`holdfast sweep-leaks PROVIDER`: find and end what a fleet has left behind, with nothing but the provider's own tags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.terminal import Json, Yes, ask_first
from holdfast.core.config import format_duration

if TYPE_CHECKING:
    from holdfast.provider.base import Leftover, Machine

__all__ = ["sweep_leaks"]

_MARGIN_S = 600


def sweep_leaks(
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="local, aws or gcp.")],
    fleet: Annotated[str, typer.Option("--fleet", metavar="NAME", help="As at the launch.")] = "default",
    cloud: Annotated[
        str, typer.Option("--cloud", metavar="PLACE", help="A rehearsal cloud's folder, or a GCP project.")
    ] = "",
    region: Annotated[
        list[str] | None, typer.Option("--region", metavar="REGION", help="Look here only; may be given several times.")
    ] = None,
    end: Annotated[
        bool, typer.Option("--end", help="End and remove what was found; without it, only show it.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Show machines, disks, addresses and templates of a fleet whose time is over, and end them.

    Everything that is launched carries the moment after which nobody can still want it; each renewed grant moves it. So no state of
    ours is needed, and no run has to be known: what is past that moment, with ten minutes to spare, is a leak.

    \b
    Examples:
      holdfast sweep-leaks aws --region us-east-1
      holdfast sweep-leaks aws --end

    \b
    JSON keys: machines[id, pool, run_id, launch, expired_s, usd_h], leftovers[kind, id, region, run_id, expired_s, usd_h].
    """
    from holdfast.cli.checkpoint_tables import print_json, print_table
    from holdfast.provider.registry import instances_named

    opened = instances_named(provider, cloud, region or ())
    now_s = int(opened.clock.unix_s())
    machines = [
        each for each in opened.machines(fleet) if each.state != "gone" and each.expires_unix_s + _MARGIN_S < now_s
    ]
    leftovers = [each for each in opened.leftovers(fleet) if each.expires_unix_s + _MARGIN_S < now_s]
    if json:
        print_json(
            {
                "machines": [
                    {"id": each.id, "pool": each.pool.name, "run_id": each.run_id, "launch": each.launch,
                     "expired_s": now_s - each.expires_unix_s, "usd_h": each.microusd_h / 1e6}
                    for each in machines
                ],
                "leftovers": [
                    {"kind": each.kind, "id": each.id, "region": each.region, "run_id": each.run_id,
                     "expired_s": now_s - each.expires_unix_s, "usd_h": each.microusd_h / 1e6}
                    for each in leftovers
                ],
            }
        )  # fmt: skip
    elif not machines and not leftovers:
        typer.echo(f"Nothing of fleet {fleet} at {provider} is past its time.")
    else:
        found = [("machine", each.id, each.pool.name, each.run_id, str(each.launch), each) for each in machines]
        rows = [[*words, *_when_and_what(thing, now_s)] for *words, thing in found]
        rows += [[each.kind, each.id, each.region, each.run_id, "", *_when_and_what(each, now_s)] for each in leftovers]
        print_table(["what", "name", "where", "run", ">launch", "expired", ">per hour"], rows)
    if not end or not (machines or leftovers):
        return
    ask_first(yes)
    opened.terminate(machines)
    opened.remove(leftovers)
    typer.echo(f"Asked for the end of {len(machines)} machines and {len(leftovers)} other things.", err=True)


def _when_and_what(thing: Machine | Leftover, now_s: int) -> tuple[str, str]:
    return f"{format_duration(now_s - thing.expires_unix_s)} ago", f"${thing.microusd_h / 1e6:,.4f}"
