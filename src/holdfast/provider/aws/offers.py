"""Which pools fit: the zones' instance types that have what a job wants, with their prices now, and why others were left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.launches import Pool
from holdfast.provider.aws.account import Account
from holdfast.provider.aws.facts import Known, TypeFacts
from holdfast.provider.aws.prices import Prices
from holdfast.provider.base import Offer, Wanted

__all__ = ["Survey", "fits", "survey"]


@dataclass(frozen=True, slots=True)
class Survey:
    offers: tuple[Offer, ...]
    left_out: tuple[str, ...]
    """What fits and is not offered, with the reason."""


def survey(account: Account, known: Known, prices: Prices, regions: Sequence[str], wanted: Wanted) -> Survey:
    """ProviderError when a region does not answer: half a market must not look like a whole one."""
    offers: list[Offer] = []
    left_out: list[str] = []
    for region in regions:
        if wanted.instance_types:
            types = list(known.types(region, wanted.instance_types).values())
        else:
            # Today's images do not all boot on what came before Nitro; older accelerators are worth a look when they are wanted.
            newer = [] if wanted.accelerators else [{"Name": "hypervisor", "Values": ["nitro"]}]
            types = known.learn(region, newer)
        fitting = {each.name: each for each in types if fits(each, wanted)}
        if not fitting:
            left_out.append(f"{region}: no instance type has what is wanted")
            continue
        zones = _zones(account, region, list(fitting), wanted)
        on_demand, unpriced = prices.on_demand(region, [name for name in fitting if zones.get(name)])
        left_out += unpriced.values()
        spot = prices.spot(region, [name for name in on_demand if "spot" in fitting[name].markets])
        for name, price in on_demand.items():
            for zone in zones[name]:
                offers += _offers(region, zone, fitting[name], price, spot.get((name, zone)))
    return Survey(tuple(offers), tuple(left_out))


def fits(facts: TypeFacts, wanted: Wanted) -> bool:
    """Has it what is wanted? Burstable and bare-metal machines only where they are named."""
    if wanted.instance_types:
        if facts.name not in wanted.instance_types:
            return False
    elif facts.burstable or facts.bare_metal or (facts.accelerators and not wanted.accelerators):
        return False
    if not {"x86_64", "arm64"} & set(facts.architectures):
        return False
    if facts.vcpus < (wanted.cpus or 0) or facts.memory_mib < (wanted.memory_gib or 0) * 1024:
        return False
    return not wanted.accelerators or any(_has(facts, name, count) for name, count in wanted.accelerators)


def _has(facts: TypeFacts, name: str, count: int) -> bool:
    """`A100-80GB` is an A100 with that memory; `A100` is any."""
    sized = re.fullmatch(r"(.+?)-(\d+)GB", name, re.IGNORECASE)
    plain, least_mib = (sized[1], int(sized[2]) * 1000 * 0.9) if sized else (name, 0)
    return any(
        each.name.lower().replace(" ", "-") == plain.lower() and each.count == count and each.memory_mib >= least_mib
        for each in facts.accelerators
    )


def _zones(account: Account, region: str, names: Sequence[str], wanted: Wanted) -> dict[str, list[str]]:
    zones: dict[str, list[str]] = {}
    for start in range(0, len(names), 100):
        told = account.ask_all(
            "ec2",
            region,
            "DescribeInstanceTypeOfferings",
            "InstanceTypeOfferings",
            LocationType="availability-zone",
            Filters=[{"Name": "instance-type", "Values": list(names[start : start + 100])}],
        )
        for each in told:
            if not wanted.zones or each["Location"] in wanted.zones:
                zones.setdefault(each["InstanceType"], []).append(each["Location"])
    return zones


def _offers(region: str, zone: str, facts: TypeFacts, on_demand: int, spot: int | None) -> list[Offer]:
    found = []
    if spot is not None and "spot" in facts.markets:
        pool = Pool("aws", region, zone, facts.name, "spot")
        found.append(Offer(pool=pool, microusd_h=spot, on_demand_microusd_h=on_demand))
    if "on-demand" in facts.markets:
        pool = Pool("aws", region, zone, facts.name, "on-demand")
        found.append(Offer(pool=pool, microusd_h=on_demand, on_demand_microusd_h=on_demand))
    return found
