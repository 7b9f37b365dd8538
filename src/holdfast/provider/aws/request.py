"""The exact calls of one launch, as JSON: an order and the facts about its pools in, nothing else. Pure.

A launch template (a fleet wants one), named by the token, then an instant fleet of one machine that may choose among the allowed
pools. The fleet names the template and not its id: so both calls are known before either is made, and a repeated one is the same
to the byte.

A fleet lives in one region: of the allowed pools, those in the region of the best one are asked for.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from blake3 import blake3

from holdfast.core.errors import UsageError
from holdfast.core.launches import Allowed, Pool
from holdfast.provider.aws.facts import Facts, ImageFacts
from holdfast.provider.base import MachineSpec, Order

__all__ = [
    "TAG",
    "dollars",
    "extras_tag",
    "in_one_region",
    "machine_tags",
    "plan_request",
    "subnet_of",
    "template_name",
]

TAG = "holdfast:"
_MOST_USER_DATA_BYTES = 16 * 1024
_NETWORK_KEYS = ("subnets", "security_groups", "public_address")
_DISK_TYPES = ("gp3", "gp2")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEMPLATES = uuid.UUID("0c0e6f64-2f0b-4f55-8d43-51b1c9b2b4d7")


def plan_request(order: Order, facts: Facts) -> dict[str, Any]:
    """UsageError for what cannot be asked for."""
    pools = in_one_region(order)
    if not _TOKEN.fullmatch(order.token):
        raise UsageError(f"a client token is 1 to 64 letters, digits, - and _: {order.token!r}")
    if len(order.user_data.encode()) > _MOST_USER_DATA_BYTES:
        raise UsageError(f"the bootstrap script has {len(order.user_data.encode())} bytes; EC2 takes 16 KiB")
    tags = machine_tags(order)
    region, spot = pools[0].pool.region, pools[0].pool.market == "spot"
    template: dict[str, Any] = {
        "ClientToken": str(uuid.uuid5(_TEMPLATES, order.token)),
        "LaunchTemplateName": template_name(order.token),
        "LaunchTemplateData": _template_data(order, region, pools, facts),
        "TagSpecifications": [_tagged("launch-template", tags)],
    }
    fleet: dict[str, Any] = {
        "ClientToken": order.token,
        "Type": "instant",
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": {"LaunchTemplateName": template_name(order.token), "Version": "1"},
                "Overrides": _overrides(order.spec, pools, facts),
            }
        ],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": 1,
            "DefaultTargetCapacityType": "spot" if spot else "on-demand",
        },
        "TagSpecifications": [_tagged("fleet", tags)],
    }
    if spot:
        fleet["SpotOptions"] = {
            "AllocationStrategy": "price-capacity-optimized",
            "InstanceInterruptionBehavior": "terminate",
        }
    else:
        fleet["OnDemandOptions"] = {"AllocationStrategy": "prioritized"}
    resources = ["instance", "volume", "network-interface", *(["spot-instances-request"] if spot else [])]
    # The digest stands in the tags, so that a machine of this token from another request is told from ours.
    digest = blake3(json.dumps([template, fleet], sort_keys=True).encode()).hexdigest()[:32]
    born = {**tags, f"{TAG}request": digest}
    template["LaunchTemplateData"]["TagSpecifications"] = [_tagged(each, born) for each in resources]
    return {
        "region": region,
        "token": order.token,
        "fleet": order.fleet,
        "run_id": order.run_id,
        "launch": order.launch,
        "expires_unix_s": order.expires_unix_s,
        "digest": digest,
        "pools": [[each.pool.name, each.ceiling_microusd_h] for each in pools],
        "subnets": {subnet: each.pool.zone for each in pools if (subnet := subnet_of(order.spec, each.pool))},
        "CreateLaunchTemplate": template,
        "CreateFleet": fleet,
    }


def in_one_region(order: Order) -> list[Allowed]:
    """The allowed pools that can be asked for at once, best first."""
    if not order.allowed:
        raise UsageError("a launch needs at least one allowed pool")
    if len({each.pool.market for each in order.allowed}) > 1:
        raise UsageError("the pools of one launch are all on spot, or all on demand")
    if others := sorted({each.pool.provider for each in order.allowed} - {"aws"}):
        raise UsageError(f"pools of {', '.join(others)} cannot be asked for at aws")
    network = order.spec.network
    if wrong := sorted(set(network) - set(_NETWORK_KEYS)):
        raise UsageError(f"aws does not know network.{wrong[0]}; it knows {', '.join(_NETWORK_KEYS)}")
    region = order.allowed[0].pool.region
    near = [each for each in order.allowed if each.pool.region == region]
    if not network.get("subnets"):
        return near
    reached = [each for each in near if each.pool.zone in network["subnets"]]
    if not reached:
        zones = ", ".join(sorted({each.pool.zone for each in near}))
        raise UsageError(f"network.subnets names no subnet in {zones}; write zone: subnet-… for it")
    return reached


def subnet_of(spec: MachineSpec, pool: Pool) -> str | None:
    """None: the zone's subnet of the default VPC."""
    subnets: Mapping[str, str] = spec.network.get("subnets") or {}
    return subnets.get(pool.zone)


def template_name(token: str) -> str:
    return f"holdfast-{token}"


def machine_tags(order: Order) -> dict[str, str]:
    """Everything that is made for this launch carries these from its first moment on."""
    if wrong := [key for key in order.tags if key.startswith((TAG, "aws:"))]:
        raise UsageError(f"a label cannot begin with {TAG!r} or 'aws:': {wrong[0]!r}")
    dearest = max(each.ceiling_microusd_h for each in order.allowed)
    ours = {
        "fleet": order.fleet,
        "run": order.run_id,
        "launch": str(order.launch),
        "token": order.token,
        "expires": str(order.expires_unix_s),
        "ceiling": str(dearest),
        "extras": extras_tag(order.spec),
    }
    tags = {**order.tags, **{f"{TAG}{key}": value for key, value in ours.items()}}
    if len(tags) > 49 or any(len(key) > 128 or len(value) > 256 for key, value in tags.items()):
        raise UsageError(
            "EC2 takes 41 labels beside holdfast's own, with keys up to 128 and values up to 256 characters"
        )
    return tags


def extras_tag(spec: MachineSpec) -> str:
    """What is billed beside the machine: `gp3:100+address`. Without a word about addresses there may be one: the subnet decides."""
    address = ["address"] if spec.network.get("public_address", True) else []
    return "+".join([f"{spec.disk_type or 'gp3'}:{spec.disk_gib}", *address])


def dollars(microusd: int) -> str:
    """As EC2 writes prices: 1250000 is "1.25"."""
    return f"{Decimal(microusd) / 1_000_000:f}"


def _tagged(resource: str, tags: Mapping[str, str]) -> dict[str, Any]:
    return {"ResourceType": resource, "Tags": [{"Key": key, "Value": value} for key, value in sorted(tags.items())]}


def _template_data(order: Order, region: str, pools: Sequence[Allowed], facts: Facts) -> dict[str, Any]:
    spec = order.spec
    image = facts.images[pools[0].pool.instance_type]
    data: dict[str, Any] = {
        "ImageId": image.id,
        "BlockDeviceMappings": [_disk(spec, image)],
        # What shuts itself down is gone, and billed no more: the agent's, the watchdog's and the bootstrap's way out.
        "InstanceInitiatedShutdownBehavior": "terminate",
        # Two hops, so that a container on the machine hears of preemptions too.
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        "UserData": base64.b64encode(order.user_data.encode()).decode(),
    }
    if spec.role:
        data["IamInstanceProfile"] = {"Arn" if spec.role.startswith("arn:") else "Name": spec.role}
    groups = _security_groups(spec.network, region)
    public = spec.network.get("public_address")
    if public is not None:
        interface = {"DeviceIndex": 0, "AssociatePublicIpAddress": bool(public), "DeleteOnTermination": True}
        data["NetworkInterfaces"] = [{**interface, **({"Groups": groups} if groups else {})}]
    elif groups:
        data["SecurityGroupIds"] = groups
    burstable = {facts.types[each.pool.instance_type].burstable for each in pools}
    if burstable == {True}:
        # Unlimited credits, their default, are billed above the list price, without a ceiling.
        data["CreditSpecification"] = {"CpuCredits": "standard"}
    elif len(burstable) > 1:
        raise UsageError("burstable and other instance types cannot share a launch: their prices are not bounded alike")
    return data


def _overrides(spec: MachineSpec, pools: Sequence[Allowed], facts: Facts) -> list[dict[str, Any]]:
    first = facts.images[pools[0].pool.instance_type]
    overrides: list[dict[str, Any]] = []
    for rank, each in enumerate(pools):
        override: dict[str, Any] = {"InstanceType": each.pool.instance_type}
        subnet = subnet_of(spec, each.pool)
        override.update({"SubnetId": subnet} if subnet else {"AvailabilityZone": each.pool.zone})
        if each.pool.market == "spot":
            override["MaxPrice"] = dollars(each.ceiling_microusd_h)
        else:
            override["Priority"] = float(rank)
        image = facts.images[each.pool.instance_type]
        if image != first:
            override |= {"ImageId": image.id, "BlockDeviceMappings": [_disk(spec, image)]}
        overrides.append(override)
    return overrides


def _disk(spec: MachineSpec, image: ImageFacts) -> dict[str, Any]:
    kind = spec.disk_type or "gp3"
    if kind not in _DISK_TYPES:
        raise UsageError(
            f"aws takes a disk of type {' or '.join(_DISK_TYPES)}, not {kind!r}: others need more than a size"
        )
    if spec.disk_gib < image.least_gib:
        raise UsageError(f"the image {image.id} needs a disk of {image.least_gib} GiB or more, not {spec.disk_gib}")
    volume = {"VolumeSize": spec.disk_gib, "VolumeType": kind, "DeleteOnTermination": True}
    return {"DeviceName": image.root_device, "Ebs": volume}


def _security_groups(network: Mapping[str, Any], region: str) -> list[str]:
    groups = network.get("security_groups") or ()
    if isinstance(groups, Mapping):
        groups = groups.get(region) or ()
    if isinstance(groups, str) or not all(isinstance(each, str) and each.startswith("sg-") for each in groups):
        raise UsageError(f"network.security_groups is a list of sg-…, or such a list for each region: {groups!r}")
    return list(groups)
