"""Prices from the Cloud Billing Catalog: Google's public list of what is billed, put together as machines.

A machine is billed as cores, memory and GPUs, each an entry of its own that says in words what it is ("Spot Preemptible N1
Predefined Instance Core running in Americas"). Words can change: an entry that is not found, or several that disagree, make no
price, and a table of the user's own has to say it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.errors import ProviderError
from holdfast.core.launches import Pool
from holdfast.provider.gcp.calls import Calls, NotSent, Refused, Unanswered, provider_error
from holdfast.provider.gcp.prices import MONTH_H, Shape, Use
from holdfast.provider.gcp.words import MachineType

__all__ = ["COMPUTE_ENGINE", "BillingCatalog"]

COMPUTE_ENGINE = "services/6F81-5844-456A"
_FRESH_S, _RETRY_S = 12 * 3600, 600
_NANOS_IN_MICRO = 1000
_MIB_IN_GIB = 1024
_SPOT = r"(?:spot )?preemptible "
_NAMED_OTHERWISE = {"c2": "compute optimized(?: instance)?", "n1": "n1 predefined instance"}
_DISKS = {
    "local-ssd": "ssd backed local storage",
    "pd-standard": "storage pd capacity",
    "pd-balanced": "balanced pd capacity",
    "pd-ssd": "ssd backed pd capacity",
}
_ADDRESSES: dict[Use, str] = {
    "spot": "external ip charge on a spot preemptible vm",
    "on-demand": "external ip charge on a standard vm",
    "kept": "static ip charge",
}


@dataclass(frozen=True, slots=True)
class _Sku:
    said: str
    spot: bool
    unit: str
    nanousd: int
    regions: frozenset[str]


class BillingCatalog:
    """Implements `Prices`. Read once in twelve hours; a failure is remembered for ten minutes."""

    def __init__(self, calls: Calls, clock: Clock) -> None:
        self._calls, self._clock = calls, clock
        self._lock = threading.Lock()
        self._skus: tuple[_Sku, ...] = ()
        self._until_s = float("-inf")
        self._failure: ProviderError | None = None

    def machine_microusd_h(self, pool: Pool, shape: Callable[[], Shape]) -> int | None:
        kind, parts = MachineType.read(pool.instance_type), shape()
        spot, series = pool.market == "spot", _series(kind)
        gpus = ((kind.accelerator, kind.count),) if kind.accelerator else parts.accelerators
        if series is None:
            return None
        wanted = [
            (rf"{series} core running in .*", "h", parts.cpus, 1),
            (rf"{series} ram running in .*", "GiBy.h", parts.memory_mib, _MIB_IN_GIB),
            *(
                (rf"{_gpu(name)} gpu(?: attached to spot preemptible vms)? running in .*", "h", count, 1)
                for name, count in gpus
            ),
        ]
        nanousd = 0
        for pattern, unit, count, per in wanted:
            price = self._price(pattern, unit, pool.region, spot=spot)
            if price is None:
                return None
            nanousd += -(-price * count // per)
        return -(-nanousd // _NANOS_IN_MICRO)

    def disk_microusd_h(self, region: str, disk_type: str, gib: int) -> int | None:
        said = _DISKS.get(disk_type)
        month = None if said is None else self._price(rf"{said}(?: in .*)?", "GiBy.mo", region, spot=False)
        return None if month is None else -(-month * gib // (MONTH_H * _NANOS_IN_MICRO))

    def address_microusd_h(self, region: str, use: Use) -> int | None:
        hour = self._price(rf"{_ADDRESSES[use]}(?: in .*)?", "h", region, spot=False)
        return None if hour is None else -(-hour // _NANOS_IN_MICRO)

    def _price(self, pattern: str, unit: str, region: str, *, spot: bool) -> int | None:
        """Of one unit, in thousand-millionths of a dollar; None unless exactly one price is named."""
        matcher = re.compile(rf"(?:{_SPOT})?{pattern}" if spot else pattern)
        found = {
            sku.nanousd
            for sku in self._loaded()
            if sku.spot == spot
            and sku.unit == unit
            and sku.regions & {region, "global"}
            and matcher.fullmatch(sku.said)
        }
        return found.pop() if len(found) == 1 else None

    def _loaded(self) -> tuple[_Sku, ...]:
        with self._lock:
            if self._clock.monotonic_s() >= self._until_s:
                try:
                    pages = self._calls.pages("cloudbilling", "services.skus.list", parent=COMPUTE_ENGINE)
                    found = (_read(each) for page in pages for each in page.get("skus", []))
                    self._skus, self._failure = tuple(sku for sku in found if sku is not None), None
                    self._until_s = self._clock.monotonic_s() + _FRESH_S
                except (Refused, Unanswered, NotSent) as error:
                    self._failure = provider_error(
                        "the Cloud Billing Catalog cannot be read; give a price table", error
                    )
                    self._until_s = self._clock.monotonic_s() + _RETRY_S
            if self._failure is not None:
                raise self._failure
            return self._skus


def _series(kind: MachineType) -> str | None:
    """In the catalogue's words; None where they do not follow from the name."""
    if kind.family in ("e2", "custom", "f1", "g1") and not kind.name.startswith("e2-standard"):
        return None
    if "custom" in kind.name or kind.name.startswith(("a3-mega", "a3-ultra", "a3-edge")):
        return None
    return _NAMED_OTHERWISE.get(kind.family) or rf"{kind.family}(?: amd| arm)? instance"


def _gpu(name: str) -> str:
    model = name.removeprefix("nvidia-").removeprefix("tesla-").replace("-", " ")
    return rf"nvidia (?:tesla )?{re.escape(model)}"


def _read(sku: Mapping[str, Any]) -> _Sku | None:
    """None for what is not billed by use, in dollars."""
    usage = sku.get("category", {}).get("usageType")
    pricing = sku.get("pricingInfo") or []
    if usage not in ("OnDemand", "Preemptible") or not pricing:
        return None
    expression = pricing[-1].get("pricingExpression", {})
    rates = expression.get("tieredRates") or []
    if not rates or rates[-1]["unitPrice"].get("currencyCode", "USD") != "USD":
        return None
    # The last tier: the ones before it are free allowances.
    price = rates[-1]["unitPrice"]
    nanousd = int(price.get("units", 0)) * 10**9 + int(price.get("nanos", 0))
    said = " ".join(str(sku["description"]).lower().split())
    regions = frozenset(sku.get("serviceRegions", ()))
    return _Sku(said, usage == "Preemptible", str(expression.get("usageUnit", "")), nanousd, regions)
