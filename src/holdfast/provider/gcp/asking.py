"""From an order to the exact `instances.insert`, as JSON. Pure: what is written down before the call is all that is sent.

One call, one zone: the first of the allowed pools. Another zone is another launch, with a number and a token of its own, so that an
answer that was lost can only ever stand for one machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool
from holdfast.provider.base import MachineSpec, Order
from holdfast.provider.gcp.words import (
    DISK,
    PROVIDER,
    REQUEST,
    MachineType,
    instance_name,
    label_value,
    labels_of,
    request_id,
)

__all__ = ["LOCAL_SSD_GIB", "MAX_USER_DATA_BYTES", "Images", "Insert", "address_wanted", "insert_request", "usual_disk"]

METHOD = "compute.instances.insert"
MAX_USER_DATA_BYTES = 16 * 1024
LOCAL_SSD_GIB = 375
_LIFETIME_S = (30, 120 * 24 * 3600)
"""What GCP takes for `maxRunDuration`."""
_NETWORK_KEYS = ("network", "subnetwork", "subnets", "public_address", "tags")
_ONLY_HYPERDISK = ("a4", "a4x", "c4", "c4a", "c4d", "g4", "h4d", "m4", "n4", "n4d", "x4")
_WITH_LOCAL_SSD = ("a2-ultragpu", "a3-")
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What is started when the job names no image. Families, so the newest of them: name an image to pin it."""

    cpu: str = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
    gpu: str = (
        "projects/ubuntu-os-accelerator-images/global/images/family/ubuntu-accelerator-2404-amd64-with-nvidia-580"
    )
    """With NVIDIA's driver. The preflight looks whether there is still such a family."""


@dataclass(frozen=True, slots=True)
class Insert:
    """A request as it was written down, checked before it is sent."""

    project: str
    zone: str
    request_id: str
    body: dict[str, Any]

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> Insert:
        """UsageError for what `insert_request` has not made."""
        if request.get("method") != METHOD or set(request) != {"method", "project", "zone", "requestId", "body"}:
            raise UsageError(f"not a request for a machine of GCP: {sorted(request)}")
        return cls(request["project"], request["zone"], request["requestId"], dict(request["body"]))

    @property
    def name(self) -> str:
        return str(self.body["name"])


def insert_request(order: Order, project: str, images: Images, *, preemption_notice_s: int = 0) -> dict[str, Any]:
    """UsageError for what GCP cannot be asked for."""
    if not order.allowed:
        raise UsageError(f"launch {order.launch} of run {order.run_id} may use no pool at all")
    pool = order.allowed[0].pool
    if wrong := [each.pool.name for each in order.allowed if each.pool.provider != PROVIDER]:
        raise UsageError(f"not a pool of GCP: {wrong[0]}; like gcp/us-central1/us-central1-a/a2-highgpu-1g/spot")
    if len({each.pool.market for each in order.allowed}) > 1:
        raise UsageError("the pools that a launch may use are all spot, or all on-demand")
    if len(order.user_data.encode()) >= MAX_USER_DATA_BYTES:
        raise UsageError(
            f"the start-up script has {len(order.user_data.encode())} bytes; below {MAX_USER_DATA_BYTES} are allowed"
        )
    kind, name = MachineType.read(pool.instance_type), instance_name(order)
    disk = order.spec.disk_type or usual_disk(kind)
    labels = labels_of(order) | {DISK: label_value(disk)}
    body: dict[str, Any] = {
        "name": name,
        "description": f"holdfast: launch {order.launch} of run {order.run_id}",
        "machineType": f"zones/{pool.zone}/machineTypes/{kind.name}",
        "labels": labels,
        "scheduling": _scheduling(order, pool, preemption_notice_s),
        "disks": _disks(order.spec, disk, kind, pool.zone, name, labels, images),
        "networkInterfaces": [_interface(order.spec.network, pool)],
        "metadata": {"items": _metadata(order)},
    }
    if tags := order.spec.network.get("tags"):
        body["tags"] = {"items": list(tags)}
    if order.spec.role:
        scopes = list(order.spec.scopes or _SCOPES)
        body["serviceAccounts"] = [{"email": order.spec.role, "scopes": scopes}]
    if kind.accelerator:
        part = f"zones/{pool.zone}/acceleratorTypes/{kind.accelerator}"
        body["guestAccelerators"] = [{"acceleratorType": part, "acceleratorCount": kind.count}]
    # Disks keep the labels without it: it is of the whole body.
    body["labels"] = labels | {REQUEST: hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]}
    return {
        "method": METHOD, "project": project, "zone": pool.zone, "requestId": request_id(order.token), "body": body,
    }  # fmt: skip


def _scheduling(order: Order, pool: Pool, preemption_notice_s: int) -> dict[str, Any]:
    shortest_s, longest_s = _LIFETIME_S
    if not shortest_s <= order.lifetime_s <= longest_s:
        raise UsageError(
            f"GCP ends machines by itself after {shortest_s} s to {longest_s} s, not after {order.lifetime_s} s"
        )
    scheduling: dict[str, Any] = {
        "provisioningModel": "SPOT" if pool.market == "spot" else "STANDARD",
        "instanceTerminationAction": "DELETE",
        "maxRunDuration": {"seconds": str(order.lifetime_s)},
        "automaticRestart": False,
        "onHostMaintenance": "TERMINATE",
    }
    if preemption_notice_s and pool.market == "spot":
        scheduling["preemptionNoticeDuration"] = {"seconds": str(preemption_notice_s)}
    return scheduling


def _disks(
    spec: MachineSpec, disk: str, kind: MachineType, zone: str, name: str, labels: dict[str, str], images: Images
) -> list[dict[str, Any]]:
    """The boot disk goes with the machine, and is labelled in case that it does not."""
    boot = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {
            "diskName": name,
            "diskSizeGb": str(spec.disk_gib),
            "diskType": f"zones/{zone}/diskTypes/{disk}",
            "sourceImage": spec.image or (images.gpu if kind.has_gpu else images.cpu),
            "labels": labels,
        },
    }
    if not spec.local_ssd or kind.name.startswith(_WITH_LOCAL_SSD) or kind.name.endswith("-lssd"):
        return [boot]
    local = f"zones/{zone}/diskTypes/local-ssd"
    return [
        boot,
        {"type": "SCRATCH", "autoDelete": True, "interface": "NVME", "initializeParams": {"diskType": local}},
    ]


def usual_disk(kind: MachineType) -> str:
    """The newer series take no persistent disks."""
    hyper = kind.family in _ONLY_HYPERDISK or kind.name.startswith("a3-ultra")
    return "hyperdisk-balanced" if hyper else "pd-balanced"


def address_wanted(network: Mapping[str, Any]) -> bool:
    """Of its own, to the outside."""
    return bool(network.get("public_address", True))


def _interface(network: Mapping[str, Any], pool: Pool) -> dict[str, Any]:
    if unknown := sorted(set(network) - set(_NETWORK_KEYS)):
        raise UsageError(f"network: {', '.join(unknown)} is not known for GCP; known are {', '.join(_NETWORK_KEYS)}")
    subnets, region = network.get("subnets", {}), pool.region
    subnetwork = network.get("subnetwork") or subnets.get(pool.zone) or subnets.get(region)
    if subnets and not subnetwork:
        raise UsageError(f"network: subnets names none for {region}, only for {', '.join(sorted(subnets))}")
    interface: dict[str, Any] = {}
    if subnetwork:
        interface["subnetwork"] = subnetwork if "/" in subnetwork else f"regions/{region}/subnetworks/{subnetwork}"
    if network.get("network") or not subnetwork:
        named = network.get("network", "default")
        interface["network"] = named if "/" in named else f"global/networks/{named}"
    if address_wanted(network):
        interface["accessConfigs"] = [{"type": "ONE_TO_ONE_NAT", "name": "External NAT"}]
    return interface


def _metadata(order: Order) -> list[dict[str, str]]:
    """Nobody needs to log in: keys of the project do not open these machines."""
    items = {"startup-script": order.user_data, "block-project-ssh-keys": "TRUE"}
    return [{"key": key, "value": value} for key, value in items.items()]
