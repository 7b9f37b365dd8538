"""What a machine of GCP costs beside its hours, and in all: per second, for a minute at least. Our own arithmetic, from known
prices.

GCP changes spot prices once a month at most, so the newest price that is known is taken for a machine's whole life.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from holdfast.core.errors import ProviderError
from holdfast.provider.base import Bill, Machine, MachineSpec
from holdfast.provider.gcp.asking import LOCAL_SSD_GIB, address_wanted, usual_disk
from holdfast.provider.gcp.prices import Prices, Use
from holdfast.provider.gcp.words import DISK, MachineType, last

__all__ = ["MINIMUM_S", "Extras", "bill_of", "extras_of", "extras_of_spec"]

MINIMUM_S = 60
_HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Extras:
    """What is billed with one machine."""

    microusd_h: int = 0
    """Disks and address. What has no known price is not in it."""
    stopped_unix_s: float | None = None
    """Since then only the disks are billed."""


def extras_of(instance: Mapping[str, Any], prices: Prices, region: str, use: Use) -> Extras:
    """`use`: the market of the machine."""
    boot = (instance.get("labels") or {}).get(DISK, "")
    sizes = [
        ("local-ssd" if disk.get("type") == "SCRATCH" else boot, int(disk.get("diskSizeGb", 0)))
        for disk in instance.get("disks", [])
    ]
    address = any(interface.get("accessConfigs") for interface in instance.get("networkInterfaces", []))
    stopped = instance.get("lastStopTimestamp") if instance.get("status") in ("TERMINATED", "STOPPED") else None
    since = None if stopped is None else datetime.fromisoformat(stopped).timestamp()
    return Extras(_sum(prices, region, sizes, use if address else None), since)


def extras_of_spec(spec: MachineSpec, prices: Prices, region: str) -> int:
    """Before there is a machine, whatever its market and type: at most."""
    sizes = [(spec.disk_type or usual_disk(MachineType("unknown")), spec.disk_gib)]
    sizes += [("local-ssd", LOCAL_SSD_GIB)] if spec.local_ssd else []
    return _sum(prices, region, sizes, "on-demand" if address_wanted(spec.network) else None)


def bill_of(machine: Machine, extras: Extras, now_unix_s: float) -> Bill:
    """Spot machines that are preempted within their first minute cost nothing for it; their disks do."""
    until_s = now_unix_s if machine.gone_unix_s is None else machine.gone_unix_s
    ran_until_s = min(until_s, extras.stopped_unix_s or until_s)
    there_s, ran_s = (max(0, math.ceil(end - machine.created_unix_s)) for end in (until_s, ran_until_s))
    billed_s = max(ran_s, MINIMUM_S)
    free = machine.pool.market == "spot" and machine.ended_by == "provider" and ran_s < MINIMUM_S
    microusd = 0 if free else -(-machine.microusd_h * billed_s // _HOUR_S)
    microusd += -(-extras.microusd_h * max(there_s, billed_s) // _HOUR_S)
    return Bill(billed_s=billed_s, microusd=microusd, final=machine.state == "gone" and machine.gone_unix_s is not None)


def _sum(prices: Prices, region: str, disks: list[tuple[str, int]], address: Use | None) -> int:
    try:
        of_disks = [prices.disk_microusd_h(region, last(kind), gib) or 0 for kind, gib in disks]
        return sum(of_disks) + (0 if address is None else prices.address_microusd_h(region, address) or 0)
    except ProviderError:
        return 0
