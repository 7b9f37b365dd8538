"""How GCP is told of launches: names, labels, machine types; and how they are read back. Pure.

    token ──→ the instance's name       a second insert of the same name fails, however late it comes
    fleet, run, launch, token, expiry ──→ labels at birth, by which everything is found again
    n1-standard-8+nvidia-tesla-t4:2     a machine type of ours: N1 machines take GPUs as parts; elsewhere they belong to the type

Label values are lower-case letters, digits, `-` and `_`; everything else is written as `_` and two hexadecimal digits for each
byte, so that what is read is what was meant.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool
from holdfast.provider.base import Order

__all__ = [
    "DISK",
    "EXPIRES",
    "FLEET",
    "LAUNCH",
    "NAME_START",
    "PRICE",
    "PROVIDER",
    "REQUEST",
    "RUN",
    "TOKEN",
    "MachineType",
    "Named",
    "instance_name",
    "label_value",
    "labels_of",
    "last",
    "pool_of",
    "read_label",
    "read_name",
    "request_id",
]

PROVIDER = "gcp"
NAME_START = "hf-"
FLEET, RUN, LAUNCH = "holdfast-fleet", "holdfast-run", "holdfast-launch"
TOKEN, EXPIRES, PRICE = "holdfast-token", "holdfast-expires", "holdfast-microusd-h"
DISK = "holdfast-disk"
"""The boot disk's type: instances do not show it."""
REQUEST = "holdfast-request"
"""A digest of the body: a token belongs to one request."""
_LONGEST_LABEL = 63
_USER_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_NAME = re.compile(rf"{NAME_START}(\d+)-([0-9a-f]{{32}})-([sd])(\d+)")
_TYPE = re.compile(r"(?P<type>[a-z][a-z0-9-]*)(?:\+(?P<part>[a-z][a-z0-9-]*):(?P<count>[1-9]\d?))?")


@dataclass(frozen=True, slots=True)
class MachineType:
    """`n1-standard-8+nvidia-tesla-t4:2`, taken apart."""

    name: str
    accelerator: str = ""
    """A part that is bought beside the machine; empty where the type has its GPUs in it, or none."""
    count: int = 0

    @classmethod
    def read(cls, text: str) -> MachineType:
        """UsageError for what is no machine type."""
        found = _TYPE.fullmatch(text)
        if found is None:
            raise UsageError(
                f"not a machine type of GCP: {text!r}; like a2-highgpu-1g, or n1-standard-8+nvidia-tesla-t4:1 with GPUs as parts"
            )
        if found["part"] and not found["type"].startswith(("n1-", "custom-")):
            raise UsageError(
                f"{text}: only N1 machines take GPUs as parts; elsewhere the machine type says which it has"
            )
        return cls(found["type"], found["part"] or "", int(found["count"] or 0))

    def __str__(self) -> str:
        return f"{self.name}+{self.accelerator}:{self.count}" if self.accelerator else self.name

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]

    @property
    def has_gpu(self) -> bool:
        return bool(self.accelerator) or self.family in ("a2", "a3", "a4", "a4x", "g2", "g4")


def request_id(token: str) -> str:
    """GCP takes UUIDs only, and not the zero one."""
    try:
        found = uuid.UUID(token)
    except ValueError as error:
        raise UsageError(f"GCP wants a UUID for a launch's token, not {token!r}") from error
    if found.int == 0:
        raise UsageError("GCP does not take the zero UUID for a launch's token")
    return str(found)


def instance_name(order: Order) -> str:
    """`hf-<launch>-<token>-<s or d><ceiling>`: derived from the token, so it is the same in every repetition and for nobody
    else. When the instance is gone its name is all that is left of it, so its market and what it could cost per hour are said
    there as well.
    """
    first = order.allowed[0]
    token = uuid.UUID(request_id(order.token)).hex
    return f"{NAME_START}{order.launch}-{token}-{first.pool.market[0].replace('o', 'd')}{first.ceiling_microusd_h}"


@dataclass(frozen=True, slots=True)
class Named:
    """What a name says."""

    launch: int
    token: str
    spot: bool
    ceiling_microusd_h: int


def read_name(name: str) -> Named | None:
    """None for what is not named by us."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return Named(int(found[1]), str(uuid.UUID(found[2])), found[3] == "s", int(found[4]))


def label_value(text: str) -> str:
    """UsageError when it is too long to be a label."""
    written = "".join(
        char if re.fullmatch("[a-z0-9-]", char) else "".join(f"_{byte:02x}" for byte in char.encode()) for char in text
    )
    if len(written) > _LONGEST_LABEL:
        raise UsageError(f"too long for a label of GCP ({_LONGEST_LABEL} characters): {text!r} becomes {written!r}")
    return written


def read_label(value: str) -> str:
    """What `label_value` was given; the value itself where somebody else has written it."""
    data = re.sub(rb"_([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), value.encode())
    return data.decode(errors="replace")


def labels_of(order: Order) -> dict[str, str]:
    """The user's labels and ours. UsageError for keys that GCP, or we, keep for ourselves."""
    labels = {}
    for key, value in order.tags.items():
        if not _USER_KEY.fullmatch(key) or key.startswith(("goog", "holdfast-")):
            raise UsageError(
                f"not a key for a label at GCP: {key!r}; up to 63 lower-case letters, digits, - and _, a letter first, and neither "
                "goog… nor holdfast-…, which are taken"
            )
        labels[key] = label_value(value)
    return labels | {
        FLEET: label_value(order.fleet),
        RUN: label_value(order.run_id),
        LAUNCH: str(order.launch),
        TOKEN: request_id(order.token),
        EXPIRES: str(order.expires_unix_s),
        PRICE: str(order.allowed[0].ceiling_microusd_h),
    }


def last(url: str) -> str:
    """The name at the end of one of GCP's URLs: of a zone, a machine type, a disk."""
    return url.rpartition("/")[2]


def pool_of(zone: str, resource: Mapping[str, Any]) -> Pool:
    """The pool of an instance, as it is described or asked for."""
    machine_type = MachineType(last(resource.get("machineType", "")) or "unknown")
    parts = resource.get("guestAccelerators") or []
    # GPUs that belong to the machine type are listed as well.
    if parts and machine_type.family in ("n1", "custom"):
        part = parts[0]
        machine_type = MachineType(machine_type.name, last(part["acceleratorType"]), int(part["acceleratorCount"]))
    scheduling = resource.get("scheduling") or {}
    spot = scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))
    return Pool(PROVIDER, zone.rpartition("-")[0], zone, str(machine_type), "spot" if spot else "on-demand")
