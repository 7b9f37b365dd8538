"""`holdfast conformance aws|gcp`: does the provider keep what holdfast relies on? A script for people with credentials."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.terminal import Json, Yes
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.provider.base import Wanted
    from holdfast.provider.conformance import Finding, Script

__all__ = ["conformance"]

_STOPPED = 130


def conformance(
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="aws or gcp.")],
    region: Annotated[str, typer.Option("--region", metavar="REGION", help="Where machines are launched.")],
    instance_type: Annotated[str, typer.Option("--type", metavar="TYPE", help="Of the machines: a small one.")],
    zone: Annotated[str | None, typer.Option("--zone", metavar="ZONE", help="In this zone of the region only.")] = None,
    subnet: Annotated[
        list[str] | None,
        typer.Option("--subnet", metavar="ZONE=SUBNET", help="us-east-1a=subnet-…; may be given several times."),
    ] = None,
    security_group: Annotated[
        list[str] | None, typer.Option("--security-group", metavar="SG", help="Of the machines; aws.")
    ] = None,
    cloud: Annotated[str, typer.Option("--cloud", metavar="PROJECT", help="The project; gcp.")] = "",
    price: Annotated[
        str | None,
        typer.Option(metavar="USD", help="An hour of that type on demand, where the provider's prices cannot be read."),
    ] = None,
    max_cost: Annotated[str, typer.Option(metavar="USD", help="What all of it may cost at most.")] = "1",
    market: Annotated[str, typer.Option(metavar="MARKET", help="spot or on-demand.")] = "spot",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Launch a few small machines for minutes and look whether tokens, tags, lists, ends and images are what holdfast relies on.

    What it can cost is shown first, and nothing is asked for where that is more than --max-cost. Whatever was launched is ended,
    also after Ctrl-C or an error.

    \b
    Examples:
      holdfast conformance aws --region us-east-1 --type t3.micro --subnet us-east-1a=subnet-0abc --max-cost 0.50
      holdfast conformance gcp --cloud my-project --region us-central1 --type e2-standard-2 --max-cost 0.50

    \b
    Exit codes: 0 all is as it should be; 1 something is not; 130 it was stopped. JSON keys: findings[name, ok, said].
    """
    from dataclasses import asdict

    from holdfast.cli.checkpoint_tables import print_json
    from holdfast.provider.base import Wanted
    from holdfast.provider.conformance import carry_out

    if market not in ("spot", "on-demand"):
        raise UsageError(f"there is no market {market!r}; there are spot and on-demand")
    wanted = Wanted(instance_types=(instance_type,), regions=(region,), zones=() if zone is None else (zone,))
    network = _network(provider, subnet or [], security_group or [])

    def say(finding: Finding) -> None:
        if not json:
            mark = {True: "ok", False: "FAILED", None: "unknown"}[finding.ok]
            typer.echo(f"{mark}: {finding.name}: {finding.said}")

    with _opened(provider, cloud, region, instance_type, price) as opened, _stoppable() as ending:
        script = _plan(provider, opened, max_cost, wanted, network, market)
        _agreed(script, yes)
        try:
            found = carry_out(script, say, ending)
        except KeyboardInterrupt:
            typer.echo(f"Stopped. What was launched as fleet {script.fleet} has been ended, see above.", err=True)
            raise typer.Exit(_STOPPED) from None
    if json:
        print_json({"findings": [asdict(each) for each in found]})
    if any(each.ok is False for each in found):
        raise typer.Exit(1)


def _network(provider: str, subnets: list[str], security_groups: list[str]) -> dict[str, Any]:
    pairs = [each.partition("=") for each in subnets]
    if not all(place and name for place, _, name in pairs):
        raise UsageError("--subnet takes ZONE=SUBNET, like us-east-1a=subnet-0abc")
    if provider == "aws" and not pairs:
        raise UsageError("aws needs --subnet ZONE=SUBNET, like us-east-1a=subnet-0abc")
    if provider == "gcp" and security_groups:
        raise UsageError("--security-group is of aws; at gcp, firewall rules are of the network")
    network: dict[str, Any] = {"subnets": {place: name for place, _, name in pairs}} if pairs else {}
    return network | ({"security_groups": security_groups} if security_groups else {})


def _opened(provider: str, cloud: str, region: str, instance_type: str, price: str | None) -> Any:
    from holdfast.core.jobfile import parse_dollars

    dollars = None if price is None else parse_dollars(price)
    if provider == "aws":
        from holdfast.provider.aws import AwsInstances

        return AwsInstances([region], prices=None if dollars is None else {region: {instance_type: dollars}})
    if provider == "gcp":
        from holdfast.provider.gcp import GcpInstances, PriceTable, Rate

        microusd_h = None if dollars is None else round(dollars * 1e6)
        rate = Rate(of=instance_type, spot_microusd_h=microusd_h, on_demand_microusd_h=microusd_h)
        return GcpInstances(cloud or None, prices=None if dollars is None else PriceTable([rate]))
    raise UsageError(f"there is no such script for {provider!r}; there are scripts for aws and gcp")


def _plan(provider: str, opened: Any, max_cost: str, wanted: Wanted, network: dict[str, Any], market: str) -> Script:
    from holdfast.core.ids import random_token
    from holdfast.core.jobfile import parse_dollars
    from holdfast.provider.base import MachineSpec

    if provider == "aws":
        from holdfast.provider.aws.conformance import plan
    else:
        from holdfast.provider.gcp.conformance import plan  # type: ignore[assignment]
    return plan(
        opened, fleet=f"conformance-{random_token()[:8]}", cap_microusd=round(parse_dollars(max_cost) * 1e6),
        wanted=wanted, spec=MachineSpec(disk_gib=_DISK_GIB, network=network), market=market,
    )  # fmt: skip


_DISK_GIB = 100


def _agreed(script: Script, yes: bool) -> None:
    """Before money is spent."""
    from holdfast.core.config import format_duration
    from holdfast.provider.conformance import dollars

    typer.echo(
        f"This launches at most {script.machines_at_most} machines in {script.offer.pool.name} for at most "
        f"{format_duration(script.longest_s)} each, as fleet {script.fleet}, and costs at most ${dollars(script.worst_microusd)}.",
        err=True,
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this spends money and there is no terminal to ask on; add --yes")
    if not typer.confirm("Proceed?", default=True, err=True):
        typer.echo("Nothing was launched.", err=True)
        raise typer.Exit(1)


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """The first Ctrl-C or SIGTERM stops the script. Those that come while everything is being ended are answered, and no more."""
    asked: list[int] = []

    def hear(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            raise KeyboardInterrupt
        typer.echo("What was launched is being ended; that takes a minute or two.", err=True)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked.append(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
