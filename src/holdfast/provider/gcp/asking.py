"""From an order to the exact `instances.insert`, as JSON. Pure: what is written down before the call is all that is sent.

One call, one zone: the first of the allowed pools. Another zone is another launch, with a number and a token of its own, so that an
answer that was lost can only ever stand for one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool
from holdfast.provider.base import MachineSpec, Order
from holdfast.provider.gcp.words import PROVIDER, MachineType, instance_name, labels_of, request_id

__all__ = ["MAX_USER_DATA_BYTES", "Images", "Insert", "insert_request"]

METHOD = "compute.instances.insert"
MAX_USER_DATA_BYTES = 16 * 1024
_LIFETIME_S = (30, 120 * 24 * 3600)
"""What GCP takes for `maxRunDuration`."""
_NETWORK_KEYS = ("network", "subnetwork", "subnets", "public_address", "tags")
_ONLY_HYPERDISK = ("a4", "a4x", "c4", "c4a", "c4d", "g4", "h4d", "m4", "n4", "n4d", "x4")
_WITH_LOCAL_SSD = ("a2-ultragpu", "a3-")
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write", "https://www.googleapis.com/auth/logging.write")


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What is started when the job names no image. Families, so the newest of them: name an image to pin it."""

    cpu: str = "projects/debian-cloud/global/images/family/debian-12"
    gpu: str = "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570"
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
    if pool.provider != PROVIDER or not pool.zone.startswith(pool.region + "-"):
        raise UsageError(f"not a pool of GCP: {pool.name}; like gcp/us-central1/us-central1-a/a2-highgpu-1g/spot")
    if len(order.user_data.encode()) >= MAX_USER_DATA_BYTES:
        raise UsageError(f"the start-up script has {len(order.user_data.encode())} bytes; below {MAX_USER_DATA_BYTES} are allowed")
    kind, name, labels = MachineType.read(pool.instance_type), instance_name(order.launch, order.token), labels_of(order)
    body: dict[str, Any] = {
        "name": name,
        "description": f"holdfast: launch {order.launch} of run {order.run_id}",
        "machineType": f"zones/{pool.zone}/machineTypes/{kind.name}",
        "labels": labels,
        "scheduling": _scheduling(order, pool, preemption_notice_s),
        "disks": _disks(order.spec, kind, pool.zone, name, labels, images),
        "networkInterfaces": [_interface(order.spec.network, pool.region)],
        "metadata": {"items": _metadata(order, kind)},
    }
    if tags := order.spec.network.get("tags"):
        body["tags"] = {"items": list(tags)}
    if order.spec.role:
        scopes = list(order.spec.scopes or _SCOPES)
        body["serviceAccounts"] = [{"email": order.spec.role, "scopes": scopes}]
    if kind.accelerator:
        part = f"zones/{pool.zone}/acceleratorTypes/{kind.accelerator}"
        body["guestAccelerators"] = [{"acceleratorType": part, "acceleratorCount": kind.count}]
    return {
        "method": METHOD, "project": project, "zone": pool.zone, "requestId": request_id(order.token), "body": body,
    }  # fmt: skip


def _scheduling(order: Order, pool: Pool, preemption_notice_s: int) -> dict[str, Any]:
    shortest_s, longest_s = _LIFETIME_S
    if not shortest_s <= order.lifetime_s <= longest_s:
        raise UsageError(f"GCP ends machines by itself after {shortest_s} s to {longest_s} s, not after {order.lifetime_s} s")
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
    spec: MachineSpec, kind: MachineType, zone: str, name: str, labels: dict[str, str], images: Images
) -> list[dict[str, Any]]:
    """The boot disk goes with the machine, and is labelled in case that it does not."""
    usual = "hyperdisk-balanced" if kind.family in _ONLY_HYPERDISK or kind.name.startswith("a3-ultra") else "pd-balanced"
    boot = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {
            "diskName": name,
            "diskSizeGb": str(spec.disk_gib),
            "diskType": f"zones/{zone}/diskTypes/{spec.disk_type or usual}",
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


def _interface(network: Mapping[str, Any], region: str) -> dict[str, Any]:
    if unknown := sorted(set(network) - set(_NETWORK_KEYS)):
        raise UsageError(f"network: {', '.join(unknown)} is not known for GCP; known are {', '.join(_NETWORK_KEYS)}")
    subnets = network.get("subnets", {})
    subnetwork = network.get("subnetwork") or subnets.get(region)
    if subnets and not subnetwork:
        raise UsageError(f"network: subnets names none for {region}, only for {', '.join(sorted(subnets))}")
    interface: dict[str, Any] = {}
    if subnetwork:
        interface["subnetwork"] = subnetwork if "/" in subnetwork else f"regions/{region}/subnetworks/{subnetwork}"
    if network.get("network") or not subnetwork:
        named = network.get("network", "default")
        interface["network"] = named if "/" in named else f"global/networks/{named}"
    if network.get("public_address", True):
        interface["accessConfigs"] = [{"type": "ONE_TO_ONE_NAT", "name": "External NAT"}]
    return interface


def _metadata(order: Order, kind: MachineType) -> list[dict[str, str]]:
    """Nobody needs to log in: keys of the project do not open these machines."""
    items = {"startup-script": order.user_data, "block-project-ssh-keys": "TRUE"}
    if kind.has_gpu and order.spec.image is None:
        items["install-nvidia-driver"] = "True"
    return [{"key": key, "value": value} for key, value in items.items()]
