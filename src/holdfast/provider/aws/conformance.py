"""Does AWS keep what is promised in its name? A script for a real account: a few small machines for minutes, within a stated cap.

    the worst that it can cost, before anything is asked for → preflight → born, repeated, listed, tagged → ends itself, is ended
    → a price too low → nothing left

It launches two machines, or up to five where AWS does what it should not, each with a dead-man timer in its script, and ends all
that carries its fleet's name however it goes. What an emulator cannot show is shown here: tokens, tags at birth, and that a
shutdown is the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.core.errors import HoldfastError, LaunchFailed
from holdfast.core.failures import Failure
from holdfast.provider.aws.account import Refused
from holdfast.provider.aws.instances import AwsInstances
from holdfast.provider.aws.request import TAG
from holdfast.provider.base import Machine, MachineSpec, Offer, Wanted
from holdfast.provider.conformance import Finding, Script, carry_out, cheapest, dollars, within

__all__ = ["Finding", "conformance", "plan"]

_OVERPRICE = 2
"""A spot price may rise while this runs: so much of today's is the ceiling."""
_DEAD_MAN = "#!/bin/sh\nshutdown -h +15\n"
_LOOK = (
    "{ python3 -c 'import sys; print(\"holdfast-python\", sys.version_info >= (3, 11))'; "
    "command -v aws >/dev/null && echo holdfast-aws True; "
    "python3 -m pip --version >/dev/null 2>&1 && echo holdfast-pip True; } > /dev/console\n"
)


def plan(
    cloud: AwsInstances, *, fleet: str, cap_microusd: int, wanted: Wanted, spec: MachineSpec, market: str = "spot"
) -> Script:
    """`fleet` must be a new name. UsageError when the cap is too small or nothing fits. Nothing is made yet."""
    script = _AwsScript(cloud, fleet, cheapest(cloud, wanted, market), spec)
    within(script, cap_microusd)
    return script


def conformance(
    cloud: AwsInstances,
    *,
    fleet: str,
    cap_microusd: int,
    wanted: Wanted,
    spec: MachineSpec,
    market: str = "spot",
    say: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """`plan`, and carry it out."""
    script = plan(cloud, fleet=fleet, cap_microusd=cap_microusd, wanted=wanted, spec=spec, market=market)
    return carry_out(script, say)


class _AwsScript(Script):
    machines_at_most = 5
    """Two, and three more where calls make what they must not."""
    longest_s = 1800
    """Dead-man timer and stop included."""

    def __init__(self, cloud: AwsInstances, fleet: str, offer: Offer, spec: MachineSpec) -> None:
        super().__init__(cloud, fleet, offer, spec, _OVERPRICE * offer.microusd_h)
        self._cloud, self._fleet, self._offer = cloud, fleet, offer
        self._region = offer.pool.region

    def findings(self) -> Iterator[Finding]:
        order = self.order(1, _DEAD_MAN)
        checks = list(self.preflight(order))
        yield from checks
        if any(each.ok is False for each in checks):
            return
        request = self._cloud.request(order)
        began = self._cloud.clock.monotonic_s()
        try:
            machine = self.create(request)
        except HoldfastError as error:
            yield Finding("a machine is made", False, str(error))
            return
        yield Finding("a machine is made", True, f"{machine.id} in {machine.pool.name}")
        yield self.listed(machine, began)
        yield self._again(request, machine)
        yield from self._tokens(request, machine)
        yield from self._born(machine)
        yield from self._owners_end(machine)
        yield from self._own_end()
        yield self._price_too_low()

    def _again(self, request: Mapping[str, Any], machine: Machine) -> Finding:
        again = self.create(request)
        return Finding("the same request again", again.id == machine.id, f"{again.id} after {machine.id}")

    def _tokens(self, request: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
        """What AWS itself says, without our looking first: to the same call with and without its template, and to another one with
        its token."""
        same, template = request["CreateFleet"], request["CreateLaunchTemplate"]
        named = same["TagSpecifications"][0]["Tags"]
        other = {**same, "TagSpecifications": [{"ResourceType": "fleet", "Tags": [*named, {"Key": "x", "Value": "y"}]}]}
        anew = {**template, "ClientToken": f"{template['ClientToken']}-anew"}
        for what, operation, call in (
            ("the same call without its template", "CreateFleet", same),
            ("a template of the same name again", "CreateLaunchTemplate", anew),
            ("the same call", "CreateFleet", same),
            ("its token with another call", "CreateFleet", other),
        ):
            others: list[str] = []
            try:
                with self.asking():
                    answer = self._cloud.account.once("ec2", self._region, operation, call)
                ids = [id for each in answer.get("Instances") or () for id in each.get("InstanceIds", ())]
                # The list may be late.
                others = [each for each in ids if each != machine.id]
                self.made += [replace(machine, id=each) for each in others]
                said = f"fleet {answer.get('FleetId', '-')}, machines {', '.join(ids) or 'not named'}"
            except Refused as error:
                said = error.code
            except HoldfastError as error:
                said = str(error)
            yield Finding(f"AWS to {what}", not others and self.living() == {machine.id}, said)

    def _born(self, machine: Machine) -> Iterator[Finding]:
        ask = self._cloud.account.ask
        told = ask("ec2", self._region, "DescribeInstances", InstanceIds=[machine.id])["Reservations"][0]["Instances"][
            0
        ]
        options = told.get("MetadataOptions", {})
        tokens, hops = options.get("HttpTokens"), options.get("HttpPutResponseHopLimit")
        said = f"HttpTokens {tokens}, hop limit {hops}"
        yield Finding("metadata wants tokens, two hops away", (tokens, hops) == ("required", 2), said)
        attribute = "instanceInitiatedShutdownBehavior"
        behaviour = ask("ec2", self._region, "DescribeInstanceAttribute", InstanceId=machine.id, Attribute=attribute)[
            "InstanceInitiatedShutdownBehavior"
        ]["Value"]
        yield Finding("a shutdown means its end", behaviour == "terminate", behaviour)
        disks = [each["Ebs"] for each in told.get("BlockDeviceMappings", ())]
        stays = [each["VolumeId"] for each in disks if not each.get("DeleteOnTermination")]
        yield Finding(
            "its disks end with it", bool(disks) and not stays, f"{len(disks)} disks, {len(stays)} would stay"
        )
        for kind, operation, key, tags in self._beside(told, disks):
            ours = [
                each
                for each in ask("ec2", self._region, operation, **key).get(tags[0], ())
                if self._is_ours(each, tags[1])
            ]
            yield Finding(f"its {kind} has its tags", bool(ours), f"{len(ours)} with {TAG}fleet={self._fleet}")

    def _beside(
        self, told: Mapping[str, Any], disks: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, str]]]:
        yield "disk", "DescribeVolumes", {"VolumeIds": [each["VolumeId"] for each in disks]}, ("Volumes", "Tags")
        interfaces = [each["NetworkInterfaceId"] for each in told.get("NetworkInterfaces", ())]
        interface = ("NetworkInterfaces", "TagSet")
        yield "network interface", "DescribeNetworkInterfaces", {"NetworkInterfaceIds": interfaces}, interface
        if told.get("SpotInstanceRequestId"):
            request = {"SpotInstanceRequestIds": [told["SpotInstanceRequestId"]]}
            yield "spot request", "DescribeSpotInstanceRequests", request, ("SpotInstanceRequests", "Tags")

    def _is_ours(self, told: Mapping[str, Any], tags: str) -> bool:
        return {"Key": f"{TAG}fleet", "Value": self._fleet} in [dict(each) for each in told.get(tags) or ()]

    def _owners_end(self, machine: Machine) -> Iterator[Finding]:
        began = self._cloud.clock.monotonic_s()
        self._cloud.terminate([machine])
        yield from self._ended(machine, "owner", began)

    def _own_end(self) -> Iterator[Finding]:
        """The way of the agent, the watchdog and the bootstrap: the guest shuts itself down."""
        began = self._cloud.clock.monotonic_s()
        try:
            machine = self.create(self._cloud.request(self.order(2, f"{_DEAD_MAN}{_LOOK}sleep 60\nshutdown -h now\n")))
        except HoldfastError as error:
            yield Finding("a second machine is made", None, str(error))
            return
        yield from self._ended(machine, "itself", began)
        told = self._cloud.account.ask("ec2", self._region, "GetConsoleOutput", InstanceId=machine.id)
        output = str(told.get("Output", ""))
        said = [each for each in ("python", "aws", "pip") if f"holdfast-{each} True" in output]
        ok = None if "holdfast-python" not in output else len(said) == 3
        yield Finding(
            "the image has Python 3.11, aws and pip", ok, f"on the console: {', '.join(said) or 'nothing of it'}"
        )

    def _ended(self, machine: Machine, by: str, began: float) -> Iterator[Finding]:
        gone = self.gone(machine)
        after_s = self._cloud.clock.monotonic_s() - began
        yield Finding(f"ended by {by}: it is gone", gone, f"{machine.id} after {after_s:.0f} s")
        now = self.now(machine)
        if now is not None:
            yield Finding(f"ended by {by}: AWS says so", now.ended_by == by, str(now.ended_by))
            yield Finding(f"ended by {by}: and when", now.gone_unix_s is not None, str(now.gone_unix_s))
            bill = self._cloud.bill(replace(now, state="gone"))
            yield Finding("a bill by AWS's prices", bill.final, f"${dollars(bill.microusd)} for {bill.billed_s} s")

    def _price_too_low(self) -> Finding:
        name = "a ceiling below the price makes no machine"
        if self._offer.pool.market != "spot":
            return Finding(name, None, "only spot has a ceiling")
        try:
            machine = self.create(self._cloud.request(self.order(3, _DEAD_MAN, ceiling=100)))
        except LaunchFailed as failed:
            return Finding(name, failed.failure is Failure.NO_CAPACITY, str(failed))
        except HoldfastError as error:
            return Finding(name, None, str(error))
        return Finding(name, False, f"{machine.id} runs at a ceiling of $0.0001")
