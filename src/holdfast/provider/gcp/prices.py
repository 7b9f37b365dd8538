"""What machines of GCP cost: from the user's table, or from the Cloud Billing Catalog (`catalog`). Nothing is invented: what
neither tells has no price, and is not launched.

A price is of a whole machine, per hour: where GPUs are parts (N1), the price of the GPU alone is no price, and the machine's is
added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool
from holdfast.provider.gcp.words import MachineType

__all__ = ["MONTH_H", "PriceTable", "Prices", "Rate", "Shape", "Use"]

Use = Literal["spot", "on-demand", "kept"]
"""Of an address: by a machine on this market; or kept, and not used."""
MONTH_H = 730
"""Disks are priced by the month; GCP counts it as so many hours."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a machine type consists of."""

    cpus: int
    memory_mib: int
    accelerators: tuple[tuple[str, int], ...] = ()
    """Those that belong to the type."""


class Prices(Protocol):
    """Thread safety: every method. ProviderError when nobody could be asked."""

    def machine_microusd_h(self, pool: Pool, shape: Callable[[], Shape]) -> int | None:
        """Of the whole machine, without its disk; None: not known. `shape` is asked for only where the price is put together."""
        ...

    def disk_microusd_h(self, region: str, disk_type: str, gib: int) -> int | None: ...

    def address_microusd_h(self, region: str, use: Use) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One line of a price table, in millionths of a dollar."""

    of: str
    """A machine type (`n1-standard-8`, without its GPUs), or a GPU as a part (`nvidia-tesla-t4`)."""
    region: str = "*"
    """`*`: everywhere where no other line says more."""
    spot_microusd_h: int | None = None
    on_demand_microusd_h: int | None = None


class PriceTable:
    """Implements `Prices` from what the user says."""

    def __init__(
        self,
        rates: Iterable[Rate],
        *,
        disks_microusd_gib_month: Mapping[str, int] | None = None,
        addresses_microusd_h: Mapping[Use, int] | None = None,
    ) -> None:
        """`disks_microusd_gib_month`: by disk type (`pd-balanced`, `local-ssd`)."""
        self._rates: dict[tuple[str, str], Rate] = {}
        for rate in rates:
            if (rate.of, rate.region) in self._rates:
                raise UsageError(f"the price table names {rate.of} in {rate.region} twice")
            if min(rate.spot_microusd_h or 0, rate.on_demand_microusd_h or 0) < 0:
                raise UsageError(f"the price table has a price below zero: {rate}")
            self._rates[rate.of, rate.region] = rate
        self._disks, self._addresses = dict(disks_microusd_gib_month or {}), dict(addresses_microusd_h or {})

    def machine_microusd_h(self, pool: Pool, shape: Callable[[], Shape]) -> int | None:
        kind = MachineType.read(pool.instance_type)
        machine = self._of(kind.name, pool)
        if machine is None or not kind.accelerator:
            return machine
        part = self._of(kind.accelerator, pool)
        return None if part is None else machine + kind.count * part

    def disk_microusd_h(self, region: str, disk_type: str, gib: int) -> int | None:
        month = self._disks.get(disk_type)
        return None if month is None else -(-month * gib // MONTH_H)

    def address_microusd_h(self, region: str, use: Use) -> int | None:
        return self._addresses.get(use)

    def _of(self, name: str, pool: Pool) -> int | None:
        for region in (pool.region, "*"):
            rate = self._rates.get((name, region))
            price = (
                None if rate is None else rate.spot_microusd_h if pool.market == "spot" else rate.on_demand_microusd_h
            )
            if price is not None:
                return price
        return None
