"""Where a job's machines are to be had at GCP, and for how much: machine types and GPUs by zone, and their prices."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.core.errors import ProviderError, UsageError
from holdfast.core.launches import Pool
from holdfast.provider.base import Offer, Wanted
from holdfast.provider.gcp.calls import Calls, NotSent, Refused, Unanswered
from holdfast.provider.gcp.prices import Prices, Shape
from holdfast.provider.gcp.words import PROVIDER, MachineType

__all__ = ["Market", "accelerator_names"]

_CPUS_PER_PART = 4
_MIB_IN_GIB = 1024
_KNOWN_AS: dict[str, tuple[str, ...]] = {
    "T4": ("nvidia-tesla-t4",), "V100": ("nvidia-tesla-v100",), "P100": ("nvidia-tesla-p100",), "P4": ("nvidia-tesla-p4",),
    "L4": ("nvidia-l4",), "A100": ("nvidia-tesla-a100",), "A100-80GB": ("nvidia-a100-80gb",),
    "H100": ("nvidia-h100-80gb", "nvidia-h100-mega-80gb"), "H200": ("nvidia-h200-141gb",), "B200": ("nvidia-b200",),
}  # fmt: skip
_PARTS = ("nvidia-tesla-t4", "nvidia-tesla-v100", "nvidia-tesla-p100", "nvidia-tesla-p4")
_GPU_TYPES = 'name eq "(a2|a3|a4|a4x|g2|g4)-.*"'
_N1_TYPES = 'name eq "n1-(standard|highmem)-.*"'
_CPU_TYPES = 'name eq "(e2|n1|n2|n2d|n4|c2|c2d|c3|c3d|c4|t2d)-(standard|highmem|highcpu)-.*"'


@dataclass(frozen=True, slots=True)
class _Found:
    """A machine type that fits, in one zone."""

    zone: str
    kind: MachineType
    shape: Shape


@dataclass(slots=True)
class Market:
    """Thread safety: every method. Machine types are asked for once."""

    calls: Calls
    prices: Prices
    _shapes: dict[tuple[str, str], Shape] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def offers(self, project: str, wanted: Wanted) -> list[Offer]:
        """Sorted by pool. ProviderError when there are machines that fit, and no price of any."""
        found = [each for each in self._fitting(project, wanted) if _placed(each.zone, wanted)]
        offers = [offer for each in found for offer in self._priced(each)]
        if found and not offers:
            kinds = ", ".join(sorted({str(each.kind) for each in found})[:5])
            raise ProviderError(
                f"GCP has machines that fit ({kinds}, …), and no price is known of any: give a price table"
            )
        return sorted(offers, key=lambda offer: offer.pool)

    def known_microusd_h(self, project: str, pool: Pool) -> int | None:
        """None where no price can be had now: nothing fails for want of one."""
        try:
            return self.prices.machine_microusd_h(pool, lambda: self.shape(project, pool))
        except (ProviderError, UsageError, Refused, Unanswered, NotSent):
            return None

    def shape(self, project: str, pool: Pool) -> Shape:
        """Of the machine type, without parts. Raises what `Calls.call` does."""
        name = MachineType.read(pool.instance_type).name
        with self._lock:
            known = self._shapes.get((pool.zone, name))
        if known is None:
            known = _shape(
                self.calls.call("compute", "machineTypes.get", project=project, zone=pool.zone, machineType=name)
            )
            with self._lock:
                self._shapes[pool.zone, name] = known
        return known

    def _priced(self, found: _Found) -> Iterator[Offer]:
        markets: tuple[Literal["spot", "on-demand"], ...] = ("on-demand", "spot")
        on_demand = None
        for market in markets:
            pool = Pool(PROVIDER, found.zone.rpartition("-")[0], found.zone, str(found.kind), market)
            price = self.prices.machine_microusd_h(pool, lambda: found.shape)
            on_demand = price if market == "on-demand" else on_demand
            # Without its on-demand price nobody can say what spot saves.
            if price is not None and on_demand is not None:
                yield Offer(pool=pool, microusd_h=price, on_demand_microusd_h=on_demand)

    def _fitting(self, project: str, wanted: Wanted) -> Iterator[_Found]:
        if wanted.instance_types:
            for text in wanted.instance_types:
                kind = MachineType.read(text)
                places = self._zones_of(project, kind.accelerator) if kind.accelerator else None
                for zone, name, shape in self._types(project, f'(name = "{kind.name}")'):
                    if name == kind.name and (places is None or zone in places):
                        yield _Found(zone, kind, shape)
        elif wanted.accelerators:
            for name, count in wanted.accelerators:
                yield from self._with_gpus(project, accelerator_names(name), count, wanted)
        else:
            yield from self._smallest(self._types(project, _CPU_TYPES), wanted)

    def _with_gpus(self, project: str, names: tuple[str, ...], count: int, wanted: Wanted) -> Iterator[_Found]:
        if set(names) - set(_PARTS):
            for zone, name, shape in self._types(project, _GPU_TYPES):
                if any((each, count) in shape.accelerators for each in names) and _fits(shape, wanted):
                    yield _Found(zone, MachineType(name), shape)
        for part in set(names) & set(_PARTS):
            places = self._zones_of(project, part)
            least = max(wanted.cpus or 0, _CPUS_PER_PART * count)
            types = (each for each in self._types(project, _N1_TYPES) if each[0] in places and each[2].cpus >= least)
            for found in self._smallest(types, wanted):
                yield _Found(found.zone, MachineType(found.kind.name, part, count), found.shape)

    def _smallest(self, types: Iterator[tuple[str, str, Shape]], wanted: Wanted) -> Iterator[_Found]:
        """Of each series and zone the smallest that fits: larger ones only cost more."""
        best: dict[tuple[str, str], _Found] = {}
        for zone, name, shape in types:
            found, key = _Found(zone, MachineType(name), shape), (zone, name.rpartition("-")[0].partition("-")[0])
            if _fits(shape, wanted) and (key not in best or _size(found) < _size(best[key])):
                best[key] = found
        yield from best.values()

    def _types(self, project: str, filter: str) -> Iterator[tuple[str, str, Shape]]:
        for page in self.calls.pages(
            "compute", "machineTypes.aggregatedList", project=project, filter=filter, maxResults=500
        ):
            for scope, found in (page.get("items") or {}).items():
                for each in found.get("machineTypes", []):
                    if "deprecated" not in each:
                        yield scope.removeprefix("zones/"), each["name"], _shape(each)

    def _zones_of(self, project: str, accelerator: str) -> set[str]:
        pages = self.calls.pages(
            "compute", "acceleratorTypes.aggregatedList", project=project, filter=f'(name = "{accelerator}")'
        )
        return {
            scope.removeprefix("zones/")
            for page in pages
            for scope, found in (page.get("items") or {}).items()
            if any(each["name"] == accelerator for each in found.get("acceleratorTypes", []))
        }


def accelerator_names(name: str) -> tuple[str, ...]:
    """GCP's names of what a job file calls `A100`. UsageError for what is not known."""
    by_upper = {known.upper(): names for known, names in _KNOWN_AS.items()}
    if name.upper() in by_upper:
        return by_upper[name.upper()]
    if re.fullmatch(r"(nvidia|ct)-[a-z0-9-]+", name):
        return (name,)
    raise UsageError(
        f"GCP has no accelerator {name!r} that is known here; known are {', '.join(_KNOWN_AS)}, and nvidia-… as GCP says it"
    )


def _shape(machine_type: Mapping[str, Any]) -> Shape:
    parts = machine_type.get("accelerators") or []
    accelerators = tuple((each["guestAcceleratorType"], int(each["guestAcceleratorCount"])) for each in parts)
    return Shape(int(machine_type["guestCpus"]), int(machine_type["memoryMb"]), accelerators)


def _fits(shape: Shape, wanted: Wanted) -> bool:
    return shape.cpus >= (wanted.cpus or 0) and shape.memory_mib >= (wanted.memory_gib or 0) * _MIB_IN_GIB


def _size(found: _Found) -> tuple[int, int, str]:
    return found.shape.cpus, found.shape.memory_mib, found.kind.name


def _placed(zone: str, wanted: Wanted) -> bool:
    region = zone.rpartition("-")[0]
    return (not wanted.zones or zone in wanted.zones) and (not wanted.regions or region in wanted.regions)
