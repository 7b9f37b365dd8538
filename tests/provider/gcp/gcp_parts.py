"""Orders, machine types and clients for these tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from gcp_stand_in import PROJECT, GcpStandIn, stand_in
from google.auth.credentials import AnonymousCredentials

from holdfast.core.launches import Allowed, Pool, client_token
from holdfast.provider.base import MachineSpec, Order
from holdfast.provider.gcp import GcpInstances, PriceTable, Rate
from holdfast.testing.clock import ManualClock

__all__ = ["FLEET", "PRICES", "RUN", "allowed", "client", "compute", "order"]

FLEET, RUN = "night", "0123456789abcdef01234567"
PRICES = PriceTable(
    [
        Rate(of="n1-standard-8", spot_microusd_h=80_000, on_demand_microusd_h=380_000),
        Rate(of="nvidia-tesla-t4", spot_microusd_h=110_000, on_demand_microusd_h=350_000),
        Rate(of="a2-highgpu-1g", region="us-central1", spot_microusd_h=1_470_000, on_demand_microusd_h=3_673_000),
    ],
    disks_microusd_gib_month={"pd-balanced": 100_000},
    addresses_microusd_h={"spot": 2_500, "on-demand": 5_000, "kept": 10_000},
)
_RESOURCES: dict[str, dict[tuple[str, ...], Any]] = {}
_TYPES: dict[str, tuple[int, int, tuple[tuple[str, int], ...]]] = {
    "n1-standard-8": (8, 30720, ()),
    "n1-standard-16": (16, 61440, ()),
    "e2-standard-8": (8, 32768, ()),
    "a2-highgpu-1g": (12, 87040, (("nvidia-tesla-a100", 1),)),
}


@contextmanager
def compute(clock: ManualClock | None = None, kind: type[GcpStandIn] = GcpStandIn) -> Iterator[GcpStandIn]:
    """A stand-in with some machine types."""
    with stand_in(clock or ManualClock(), kind) as cloud:
        for name, (cpus, memory_mib, gpus) in _TYPES.items():
            shown: dict[str, Any] = {"name": name, "guestCpus": cpus, "memoryMb": memory_mib}
            parts = [{"guestAcceleratorType": gpu, "guestAcceleratorCount": count} for gpu, count in gpus]
            cloud.machine_types[name] = shown | ({"accelerators": parts} if parts else {})
        cloud.quotas = {
            "CPUS": (64, 0), "PREEMPTIBLE_CPUS": (64, 0), "SSD_TOTAL_GB": (500, 0), "IN_USE_ADDRESSES": (8, 0),
            "PREEMPTIBLE_NVIDIA_T4_GPUS": (4, 0), "NVIDIA_T4_GPUS": (4, 0), "PREEMPTIBLE_NVIDIA_A100_GPUS": (1, 0),
        }  # fmt: skip
        yield cloud


def client(cloud: GcpStandIn, **options: Any) -> GcpInstances:
    usual: dict[str, Any] = {
        "prices": PRICES, "clock": cloud.clock, "credentials": AnonymousCredentials(), "endpoints": cloud.endpoints,
    }  # fmt: skip
    gcp = GcpInstances(PROJECT, **(usual | options))
    gcp._calls._resources = _RESOURCES.setdefault(cloud.url, {})
    return gcp


def allowed(
    instance_type: str = "n1-standard-8+nvidia-tesla-t4:2", zone: str = "us-central1-b", market: str = "spot"
) -> Allowed:
    pool = Pool("gcp", zone.rpartition("-")[0], zone, instance_type, "spot" if market == "spot" else "on-demand")
    return Allowed(pool=pool, ceiling_microusd_h=900_000, on_demand_microusd_h=1_080_000)


def order(launch: int = 1, **changes: Any) -> Order:
    usual = Order(
        token=client_token(RUN, launch), fleet=FLEET, run_id=RUN, launch=launch, allowed=(allowed(),),
        spec=MachineSpec(disk_gib=50), user_data="#!/bin/sh\n", lifetime_s=7200, expires_unix_s=1_800_000_000,
    )  # fmt: skip
    return replace(usual, **changes)
