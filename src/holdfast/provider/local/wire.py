"""What the rehearsal cloud and its clients say to each other: JSON over HTTP on 127.0.0.1, and a file that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from holdfast.core.errors import FormatError
from holdfast.provider.base import BootFacts, Guarantees

__all__ = [
    "ADDRESS",
    "EXIT_TAKEN",
    "TAG_EXPIRES",
    "TAG_FLEET",
    "TAG_LAUNCH",
    "TAG_RUN",
    "TAG_TOKEN",
    "Address",
    "AllowedPool",
    "BillingRules",
    "CreateRequest",
    "ExtraFacts",
    "MachineFacts",
    "Refusal",
    "read_address",
]

ADDRESS = "cloud.json"
EXIT_TAKEN = 73
"""With which a cloud's process ends that has found another one in its folder."""
TAG_FLEET, TAG_RUN, TAG_LAUNCH = "holdfast:fleet", "holdfast:run", "holdfast:launch"
TAG_TOKEN, TAG_EXPIRES = "holdfast:token", "holdfast:expires"


class BillingRules(msgspec.Struct, frozen=True, kw_only=True):
    """By which the cloud bills; see `docs/rehearsal.md`."""

    minimum_s: int
    first_hour_free: bool
    disk_microusd_gib_h: int
    address_microusd_h: int
    extras_unit_s: int


class ExtraFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A disk or an address that came with a machine."""

    id: str
    kind: str
    gib: int
    since_unix_s: int
    removed_unix_s: int | None


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is billed by, beside what a list shows."""

    ceiling_microusd_h: int
    extras: list[ExtraFacts]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a cloud is, and what it promises. In the cloud's folder, readable by its owner only."""

    endpoint: str
    secret: str
    pid: int
    boot_id: str
    """Of this machine: after another start the file is about a cloud that is gone."""
    origin_real_s: float
    """On this machine's CLOCK_MONOTONIC."""
    start_unix_s: int
    speed: float
    isolation: str
    network: str
    guarantees: Guarantees
    rules: BillingRules
    boot_facts: BootFacts


class AllowedPool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pool: str
    ceiling_microusd_h: int


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The call that makes a machine. Everything is named; nothing is taken from elsewhere."""

    token: str
    allowed: list[AllowedPool]
    """Best first; the first with room is taken."""
    tags: dict[str, str]
    user_data: str
    lifetime_s: int
    disk_gib: int
    disk_type: str | None
    image: str | None
    network: dict[str, Any]
    role: str | None
    scopes: list[str]
    local_ssd: bool


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is no success."""

    code: str
    message: str
    failure: str | None = None
    """Name of a `core.failures.Failure`; None: whether it was done is not said."""
    retry_after_s: int = 0


def read_address(folder: Path) -> Address | None:
    """None where no cloud has been started. FormatError for what is no address."""
    try:
        return msgspec.json.decode((folder / ADDRESS).read_bytes(), type=Address)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise FormatError(f"{folder / ADDRESS} is no address of a cloud: {error}") from None
