"""Does AWS keep what is promised in its name? A script for a real account: a few small machines for minutes, within a stated cap.

    the worst that it can cost, before anything is asked for → preflight → born, repeated, listed, tagged → ends itself, is ended
    → a price too low → nothing left

It launches two machines, or up to five where AWS does what it should not, each with a dead-man timer in its script, and ends all
that carries its fleet's name however it goes. What an emulator cannot show is shown here: tokens, tags at birth, and that a
shutdown is the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.core.errors import HoldfastError, LaunchFailed, UsageError
from holdfast.core.failures import Failure
from holdfast.core.launches import Allowed, client_token
from holdfast.provider.aws.account import Refused
from holdfast.provider.aws.instances import AwsInstances
from holdfast.provider.aws.request import TAG, dollars
from holdfast.provider.base import Machine, MachineSpec, Offer, Order, Wanted

__all__ = ["Finding", "conformance", "worst_microusd"]

_MACHINES = 5
"""Two, and three more where calls make what they must not."""
_LONGEST_S = 1800
"""Of one machine, dead-man timer and stop included."""
_POLL_S = 5.0
_OVERPRICE = 2
"""A spot price may rise while this runs: so much of today's is the ceiling."""
_DEAD_MAN = "#!/bin/sh\nshutdown -h +15\n"
_LOOK = (
    "{ python3 -c 'import sys; print(\"holdfast-python\", sys.version_info >= (3, 11))'; "
    "command -v aws >/dev/null && echo holdfast-aws True; "
    "python3 -m pip --version >/dev/null 2>&1 && echo holdfast-pip True; } > /dev/console\n"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise. None: it could not be found out."""

    name: str
    ok: bool | None
    said: str


def worst_microusd(cloud: AwsInstances, offer: Offer, spec: MachineSpec) -> int:
    """The most that a whole run of this script can cost."""
    hourly = _OVERPRICE * offer.microusd_h + cloud.extras_microusd_h(spec, offer.pool.region)
    return math.ceil(_MACHINES * hourly * _LONGEST_S / 3600)


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
    """`fleet` must be a new name. UsageError when the cap is too small or nothing fits: then nothing was asked for."""
    offers = [each for each in cloud.offers(wanted) if each.pool.market == market]
    if not offers:
        raise UsageError(
            f"no {market} offer fits; name instance types, and a table of prices if AWS's own cannot be read"
        )
    offer = min(offers, key=lambda each: each.microusd_h)
    worst = worst_microusd(cloud, offer, spec)
    if worst > cap_microusd:
        raise UsageError(
            f"this can cost up to ${dollars(worst)} with {offer.pool.name}; the cap is ${dollars(cap_microusd)}"
        )
    if cloud.machines(fleet):
        raise UsageError(f"there are machines of fleet {fleet!r}; give a name that nobody has used")
    script = _Script(cloud, fleet, offer, spec)
    found: list[Finding] = []
    try:
        for finding in script.findings():
            found.append(finding)
            say(finding)
    finally:
        script.clear()
    last = script.nothing_left()
    say(last)
    return [*found, last]


class _Script:
    def __init__(self, cloud: AwsInstances, fleet: str, offer: Offer, spec: MachineSpec) -> None:
        self._cloud, self._fleet, self._offer, self._spec = cloud, fleet, offer, spec
        self._region = offer.pool.region

    def findings(self) -> Iterator[Finding]:
        """Stops at the first thing without which the rest makes no sense."""
        order = self._order(1, _DEAD_MAN)
        checks = self._cloud.preflight(order)
        yield from (Finding(f"preflight: {each.name}", each.ok, each.said) for each in checks)
        if any(each.ok is False for each in checks):
            return
        request = self._cloud.request(order)
        began = self._cloud.clock.monotonic_s()
        try:
            machine = self._cloud.create(request)
        except HoldfastError as error:
            yield Finding("a machine is made", False, str(error))
            return
        yield Finding("a machine is made", True, f"{machine.id} in {machine.pool.name}")
        yield self._listed(machine, began)
        yield self._again(request, machine)
        yield from self._tokens(request, machine)
        yield from self._born(machine)
        yield from self._owners_end(machine)
        yield from self._own_end()
        yield self._price_too_low()

    def clear(self) -> None:
        """Everything of this fleet ends, whatever was found."""
        self._cloud.terminate([each for each in self._cloud.machines(self._fleet) if each.state != "gone"])
        self._until(lambda: all(each.state == "gone" for each in self._cloud.machines(self._fleet)))
        self._cloud.remove(self._cloud.leftovers(self._fleet))

    def nothing_left(self) -> Finding:
        self._until(lambda: not self._cloud.leftovers(self._fleet))
        left = [f"{each.kind} {each.id}" for each in self._cloud.leftovers(self._fleet)]
        left += [each.id for each in self._cloud.machines(self._fleet) if each.state != "gone"]
        return Finding("nothing is left", not left, ", ".join(left) or "no machine, volume, address or template")

    def _order(self, launch: int, script: str, ceiling: int | None = None) -> Order:
        price = _OVERPRICE * self._offer.microusd_h if ceiling is None else ceiling
        on_demand = self._offer.on_demand_microusd_h
        allowed = Allowed(pool=self._offer.pool, ceiling_microusd_h=price, on_demand_microusd_h=on_demand)
        return Order(
            token=client_token(f"{self._fleet}/conformance", launch),
            fleet=self._fleet,
            run_id="conformance",
            launch=launch,
            allowed=(allowed,),
            spec=self._spec,
            user_data=script,
            lifetime_s=_LONGEST_S,
            expires_unix_s=int(self._cloud.clock.unix_s()) + 2 * _LONGEST_S,
        )

    def _until(self, true: Callable[[], bool]) -> bool:
        for _ in range(int(_LONGEST_S / _POLL_S)):
            if true():
                return True
            self._cloud.clock.sleep(_POLL_S)
        return False

    def _now(self, machine: Machine) -> Machine | None:
        return next((each for each in self._cloud.machines(self._fleet) if each.id == machine.id), None)

    def _living(self) -> list[str]:
        return [each.id for each in self._cloud.machines(self._fleet) if each.state in ("pending", "running")]

    def _listed(self, machine: Machine, began: float) -> Finding:
        seen = self._until(lambda: self._now(machine) is not None)
        after_s = self._cloud.clock.monotonic_s() - began
        promised = self._cloud.guarantees.list_delay_s
        said = f"{after_s:.0f} s after the call began; {promised} s are promised" if seen else "never"
        return Finding("it is in the list by its tags", seen and after_s <= promised, said)

    def _again(self, request: Mapping[str, Any], machine: Machine) -> Finding:
        again = self._cloud.create(request)
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
            try:
                answer = self._cloud.account.once("ec2", self._region, operation, call)
                ids = [id for each in answer.get("Instances") or () for id in each.get("InstanceIds", ())]
                said = f"fleet {answer.get('FleetId', '-')}, machines {', '.join(ids) or 'not named'}"
            except Refused as error:
                said = error.code
            except HoldfastError as error:
                said = str(error)
            yield Finding(f"AWS to {what}", set(self._living()) == {machine.id}, said)

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
            machine = self._cloud.create(
                self._cloud.request(self._order(2, f"{_DEAD_MAN}{_LOOK}sleep 60\nshutdown -h now\n"))
            )
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
        def is_gone() -> bool:
            now = self._now(machine)
            return now is None or now.state == "gone"

        gone = self._until(is_gone)
        after_s = self._cloud.clock.monotonic_s() - began
        yield Finding(f"ended by {by}: it is gone", gone, f"{machine.id} after {after_s:.0f} s")
        now = self._now(machine)
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
            machine = self._cloud.create(self._cloud.request(self._order(3, _DEAD_MAN, ceiling=100)))
        except LaunchFailed as failed:
            return Finding(name, failed.failure is Failure.NO_CAPACITY, str(failed))
        except HoldfastError as error:
            return Finding(name, None, str(error))
        return Finding(name, False, f"{machine.id} runs at a ceiling of $0.0001")
