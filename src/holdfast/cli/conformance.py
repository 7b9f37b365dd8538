"""`holdfast conformance aws`: does the provider keep what holdfast relies on? A script for people with credentials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.terminal import Json, Yes, ask_first
from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.provider.aws.conformance import Finding

__all__ = ["conformance"]


def conformance(
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="aws.")],
    region: Annotated[str, typer.Option("--region", metavar="REGION", help="Where machines are launched.")],
    instance_type: Annotated[str, typer.Option("--type", metavar="TYPE", help="Of the machines: a small one.")],
    subnet: Annotated[
        list[str],
        typer.Option("--subnet", metavar="ZONE=SUBNET", help="us-east-1a=subnet-…; may be given several times."),
    ],
    security_group: Annotated[
        list[str] | None, typer.Option("--security-group", metavar="SG", help="Of the machines.")
    ] = None,
    max_cost: Annotated[str, typer.Option(metavar="USD", help="What all of it may cost at most.")] = "1",
    market: Annotated[str, typer.Option(metavar="MARKET", help="spot or on-demand.")] = "spot",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Launch two small machines for minutes and look whether tokens, tags, lists, ends and images are what holdfast relies on.

    Nothing is asked for where it could cost more than --max-cost; whatever carries this check's name is ended at the end. GCP has
    no such script yet: docs/gcp.md says what is not verified.

    \b
    Examples:
      holdfast conformance aws --region us-east-1 --type t3.micro --subnet us-east-1a=subnet-0abc --max-cost 0.50

    \b
    Exit codes: 0 all is as it should be; 1 something is not. JSON keys: findings[name, ok, said].
    """
    if provider != "aws":
        raise UsageError(f"there is no such script for {provider!r} yet; there is one for aws")
    from dataclasses import asdict

    from holdfast.cli.checkpoint_tables import print_json
    from holdfast.core.ids import random_token
    from holdfast.core.jobfile import parse_dollars
    from holdfast.provider.aws import AwsInstances
    from holdfast.provider.aws.conformance import conformance as check
    from holdfast.provider.base import MachineSpec, Wanted

    ask_first(yes)
    pairs = [each.partition("=") for each in subnet]
    if not all(zone and name for zone, _, name in pairs):
        raise UsageError("--subnet takes ZONE=SUBNET, like us-east-1a=subnet-0abc")
    network: dict[str, object] = {"subnets": {zone: name for zone, _, name in pairs}}
    if security_group:
        network["security_groups"] = security_group

    def say(finding: Finding) -> None:
        if not json:
            typer.echo(
                f"{ {True: 'ok', False: 'FAILED', None: 'unknown'}[finding.ok] }: {finding.name}: {finding.said}"
            )

    with AwsInstances([region]) as cloud:
        found = check(
            cloud, fleet=f"conformance-{random_token()[:8]}", cap_microusd=round(parse_dollars(max_cost) * 1e6),
            wanted=Wanted(instance_types=(instance_type,)), spec=MachineSpec(network=network), market=market, say=say,
        )  # fmt: skip
    if json:
        print_json({"findings": [asdict(each) for each in found]})
    if any(each.ok is False for each in found):
        raise typer.Exit(1)
