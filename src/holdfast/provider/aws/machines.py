"""What AWS lists: machines by their tags, why they ended, and what was left over without a machine. Looking, ending, removing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from holdfast.core.errors import ProviderError
from holdfast.core.launches import Pool
from holdfast.provider.aws.account import THROTTLES, Account, Refused
from holdfast.provider.aws.prices import Prices
from holdfast.provider.aws.request import TAG
from holdfast.provider.base import Leftover, Machine

__all__ = [
    "extend",
    "extras_of",
    "find",
    "leftovers",
    "machine_of",
    "machines",
    "remove",
    "tagged",
    "tags_of",
    "terminate",
]

_STATES: Mapping[str, Literal["pending", "running", "ending", "gone"]] = {
    "pending": "pending",
    "running": "running",
    "shutting-down": "ending",
    "terminated": "gone",
    # Nobody of ours stops machines. One that was stopped does not end by itself: whoever looks must see it.
    "stopping": "running",
    "stopped": "running",
}
_WHEN = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")
_INTERRUPTED = ("instance-terminated-by-price", "instance-terminated-no-capacity", "instance-terminated-capacity")
_AT_ONCE = 100


def tagged(**tags: str) -> list[dict[str, Any]]:
    """A filter; wildcards in values stand for themselves."""
    return [{"Name": f"tag:{TAG}{key}", "Values": [re.sub(r"([*?\\])", r"\\\1", value)]} for key, value in tags.items()]


def tags_of(told: Mapping[str, Any]) -> dict[str, str]:
    return {each["Key"]: each["Value"] for each in told.get("Tags") or ()}


def find(account: Account, region: str, token: str) -> list[dict[str, Any]]:
    """The instances of a token as AWS tells of them, those that live first."""
    told = _instances(account, region, tagged(token=token))
    return sorted(told, key=lambda each: (_STATES.get(each["State"]["Name"]) == "gone", each["LaunchTime"]))


def machines(account: Account, prices: Prices, regions: Iterable[str], fleet: str, run_id: str | None) -> list[Machine]:
    """ProviderError when one region does not answer: a part of the list would pass for absence."""
    found: list[Machine] = []
    wanted = {"fleet": fleet, **({} if run_id is None else {"run": run_id})}
    for region in regions:
        told = _instances(account, region, tagged(**wanted))
        ends = _spot_ends(account, region, told)
        spot_types = {each["InstanceType"] for each in told if _market(each) == "spot" and _lives(each)}
        spot = _spot_prices(prices, region, spot_types)
        demand_types = {each["InstanceType"] for each in told if _market(each) == "on-demand" and _lives(each)}
        on_demand = prices.on_demand(region, demand_types)[0] if demand_types else {}
        for each in told:
            key = (each["InstanceType"], each["Placement"]["AvailabilityZone"])
            price = spot.get(key) if _market(each) == "spot" else on_demand.get(each["InstanceType"])
            found.append(machine_of(each, region, price, ends.get(each["InstanceId"])))
    return found


def _spot_prices(prices: Prices, region: str, types: set[str]) -> Mapping[tuple[str, str], int]:
    """A list is no worse for want of a price."""
    try:
        return prices.spot(region, types) if types else {}
    except ProviderError:
        return {}


def machine_of(
    told: Mapping[str, Any], region: str, price: int | None, end: tuple[str, float] | None = None
) -> Machine:
    """One instance in our words. Without a price it is the dearest that its launch allowed. `end`: of its spot request."""
    tags = tags_of(told)
    state = _STATES.get(told["State"]["Name"], "running")
    created = told["LaunchTime"].timestamp()
    gone: float | None = None
    if state == "gone":
        when = _WHEN.search(told.get("StateTransitionReason") or "")
        if when:
            gone = datetime.strptime(when[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
        elif end is not None:
            gone = end[1]
    zone = told["Placement"]["AvailabilityZone"]
    return Machine(
        id=told["InstanceId"],
        pool=Pool("aws", region, zone, told["InstanceType"], _market(told)),
        state=state,
        fleet=tags.get(f"{TAG}fleet", ""),
        run_id=tags.get(f"{TAG}run", ""),
        launch=_whole(tags.get(f"{TAG}launch")),
        token=tags.get(f"{TAG}token", ""),
        microusd_h=_whole(tags.get(f"{TAG}ceiling")) if price is None else price,
        created_unix_s=created,
        # Reasons are told in whole seconds, launch times not always.
        gone_unix_s=None if gone is None else max(gone, created),
        ended_by=_ended_by(told, end) if state in ("ending", "gone") else None,
        expires_unix_s=_whole(tags.get(f"{TAG}expires")),
    )


def extras_of(account: Account, machine: Machine) -> str:
    """What it was born with beside itself, by its tag. ProviderError when AWS does not tell of it any more."""
    told = _instances(account, machine.pool.region, [{"Name": "instance-id", "Values": [machine.id]}])
    if not told:
        raise ProviderError(f"AWS tells of {machine.id} no more: what came beside it is not known")
    return tags_of(told[0]).get(f"{TAG}extras", "")


def extend(account: Account, machine: Machine, expires_unix_s: int) -> None:
    """The tag of the machine, and of its disks, interfaces and spot request."""
    told = _instances(account, machine.pool.region, [{"Name": "instance-id", "Values": [machine.id]}])
    beside = {each for one in told for each in _beside(one)}
    tags = [{"Key": f"{TAG}expires", "Value": str(expires_unix_s)}]
    account.ask("ec2", machine.pool.region, "CreateTags", Resources=[machine.id, *sorted(beside)], Tags=tags)


def terminate(account: Account, machines: Sequence[Machine]) -> None:
    """All are tried; ProviderError afterwards, with those that may not have been ended."""
    by_region: dict[str, list[str]] = {}
    for each in machines:
        by_region.setdefault(each.pool.region, []).append(each.id)
    stayed: list[str] = []
    for region, ids in by_region.items():
        for start in range(0, len(ids), _AT_ONCE):
            stayed += _terminate(account, region, ids[start : start + _AT_ONCE])
    if stayed:
        raise ProviderError("these may not have been ended; ask again: " + "; ".join(stayed))


def leftovers(account: Account, prices: Prices, regions: Iterable[str], fleet: str) -> list[Leftover]:
    """Volumes and network interfaces that are attached to nothing, addresses without a machine, launch templates."""
    found: list[Leftover] = []
    free = [{"Name": "status", "Values": ["available"]}]
    for region in regions:
        ours = tagged(fleet=fleet)
        for each in account.ask_all("ec2", region, "DescribeVolumes", "Volumes", Filters=[*ours, *free]):
            price = _or_zero(prices.disk_microusd_h, region, each["VolumeType"], each["Size"])
            found.append(_leftover("volume", each["VolumeId"], region, price, tags_of(each)))
        interfaces = account.ask_all(
            "ec2", region, "DescribeNetworkInterfaces", "NetworkInterfaces", Filters=[*ours, *free]
        )
        for each in interfaces:
            tags = {tag["Key"]: tag["Value"] for tag in each.get("TagSet") or ()}
            found.append(_leftover("network-interface", each["NetworkInterfaceId"], region, 0, tags))
        for each in account.ask("ec2", region, "DescribeAddresses", Filters=ours).get("Addresses", ()):
            if not each.get("AssociationId") and not each.get("InstanceId"):
                price = _or_zero(prices.address_microusd_h, region)
                found.append(_leftover("address", each["AllocationId"], region, price, tags_of(each)))
        for each in account.ask_all("ec2", region, "DescribeLaunchTemplates", "LaunchTemplates", Filters=ours):
            found.append(_leftover("launch-template", each["LaunchTemplateId"], region, 0, tags_of(each)))
    return found


def remove(account: Account, leftovers: Sequence[Leftover]) -> None:
    """All are tried; ProviderError afterwards, with what did not go."""
    calls = {
        "volume": ("DeleteVolume", "VolumeId"),
        "network-interface": ("DeleteNetworkInterface", "NetworkInterfaceId"),
        "address": ("ReleaseAddress", "AllocationId"),
        "launch-template": ("DeleteLaunchTemplate", "LaunchTemplateId"),
    }
    stayed: list[str] = []
    for each in leftovers:
        operation, key = calls[each.kind]
        try:
            account.ask("ec2", each.region, operation, **{key: each.id})
        except Refused as error:
            if not error.code.endswith((".NotFound", ".NotFoundException", ".Malformed")):
                stayed.append(f"{each.kind} {each.id}: {error}")
        except ProviderError as error:
            stayed.append(f"{each.kind} {each.id}: {error}")
    if stayed:
        raise ProviderError("not removed: " + "; ".join(stayed))


def _instances(account: Account, region: str, filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    told = account.ask_all("ec2", region, "DescribeInstances", "Reservations", Filters=filters)
    return [each for reservation in told for each in reservation.get("Instances", ())]


def _beside(told: Mapping[str, Any]) -> list[str]:
    disks = [each["Ebs"]["VolumeId"] for each in told.get("BlockDeviceMappings") or () if "Ebs" in each]
    interfaces = [each["NetworkInterfaceId"] for each in told.get("NetworkInterfaces") or ()]
    request = told.get("SpotInstanceRequestId")
    return [*disks, *interfaces, *([request] if request else [])]


def _terminate(account: Account, region: str, ids: Sequence[str]) -> list[str]:
    """What stayed, and why. One that is gone, or protected, makes AWS refuse them all: then each is asked for alone."""
    try:
        account.ask("ec2", region, "TerminateInstances", InstanceIds=list(ids))
    except Refused as error:
        if len(ids) > 1 and error.code not in THROTTLES:
            return [line for each in ids for line in _terminate(account, region, [each])]
        if error.code not in ("InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed"):
            return [f"{', '.join(ids)}: {error}"]
    except ProviderError as error:
        return [f"{', '.join(ids)}: {error}"]
    return []


def _spot_ends(account: Account, region: str, told: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, float]]:
    """Of spot machines that are gone without saying when: their request's last word, and its time."""
    asked = {
        each["SpotInstanceRequestId"]: each["InstanceId"]
        for each in told
        if not _lives(each)
        and each.get("SpotInstanceRequestId")
        and not _WHEN.search(each.get("StateTransitionReason") or "")
    }
    if not asked:
        return {}
    requests = account.ask_all(
        "ec2",
        region,
        "DescribeSpotInstanceRequests",
        "SpotInstanceRequests",
        # A filter, and not ids: a request that AWS has forgotten already is no error.
        Filters=[{"Name": "spot-instance-request-id", "Values": list(asked)}],
    )
    status = {asked.get(each["SpotInstanceRequestId"]): each.get("Status", {}) for each in requests}
    return {
        machine: (each.get("Code", ""), each["UpdateTime"].timestamp())
        for machine, each in status.items()
        if machine and each.get("UpdateTime")
    }


def _ended_by(told: Mapping[str, Any], end: tuple[str, float] | None) -> Literal["provider", "owner", "itself"] | None:
    code = (told.get("StateReason") or {}).get("Code", "")
    if code == "Client.InstanceInitiatedShutdown":
        return "itself"
    if code == "Client.UserInitiatedShutdown":
        return "owner"
    if code.startswith("Server.") or (end is not None and end[0].startswith(_INTERRUPTED)):
        return "provider"
    return None


def _market(told: Mapping[str, Any]) -> Literal["spot", "on-demand"]:
    return "spot" if told.get("InstanceLifecycle") == "spot" else "on-demand"


def _lives(told: Mapping[str, Any]) -> bool:
    return _STATES.get(told["State"]["Name"], "running") != "gone"


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _leftover(kind: str, id: str, region: str, price: int, tags: Mapping[str, str]) -> Leftover:
    expires, run_id = _whole(tags.get(f"{TAG}expires")), tags.get(f"{TAG}run", "")
    return Leftover(kind=kind, id=id, region=region, microusd_h=price, expires_unix_s=expires, run_id=run_id)


def _or_zero(price: Callable[..., int], *of: Any) -> int:
    """What is left over is told of in any case; 0 where its price is not known."""
    try:
        return price(*of)
    except ProviderError:
        return 0
