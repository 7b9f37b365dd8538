"""What a fleet can leave behind at GCP and goes on paying: disks that no instance uses, addresses that are kept.

Boot disks go with their machines, and addresses are not kept, unless somebody has changed that by hand or a deletion stopped
half-way. Both carry the fleet's labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from holdfast.core.errors import ProviderError
from holdfast.provider.base import Leftover
from holdfast.provider.gcp.calls import Calls, Refused
from holdfast.provider.gcp.prices import Prices
from holdfast.provider.gcp.words import EXPIRES, FLEET, RUN, label_value, last, read_label

__all__ = ["YOUNG_S", "find_leftovers", "remove_leftover"]

_ID = re.compile(r"zones/(?P<zone>[^/]+)/disks/(?P<disk>[^/]+)|regions/(?P<region>[^/]+)/addresses/(?P<address>[^/]+)")
YOUNG_S = 600.0
"""A younger disk may belong to an instance that is being made."""


def find_leftovers(calls: Calls, project: str, fleet: str, prices: Prices, now_unix_s: float) -> list[Leftover]:
    """Raises what `Calls.pages` does."""
    wanted = f'(labels.{FLEET} = "{label_value(fleet)}")'
    found = []
    for disk in _all(calls, project, "disks", wanted):
        if disk.get("users") or now_unix_s - datetime.fromisoformat(disk["creationTimestamp"]).timestamp() < YOUNG_S:
            continue
        place = last(disk["zone"])
        price = _price(
            lambda at, disk=disk: prices.disk_microusd_h(at, last(disk["type"]), int(disk["sizeGb"])), _region(place)
        )
        found.append(_leftover("disk", f"zones/{place}/disks/{disk['name']}", _region(place), price, disk))
    for address in _all(calls, project, "addresses", wanted):
        if address["status"] == "RESERVED" and "region" in address:
            place = last(address["region"])
            price = _price(lambda at: prices.address_microusd_h(at, "kept"), place)
            found.append(_leftover("address", f"regions/{place}/addresses/{address['name']}", place, price, address))
    return found


def remove_leftover(calls: Calls, project: str, leftover: Leftover) -> None:
    """What is gone already, or never had a name of GCP's, is no error. Raises what `Calls.call` does."""
    found = _ID.fullmatch(leftover.id)
    try:
        if found is not None and found["zone"]:
            calls.call("compute", "disks.delete", project=project, zone=found["zone"], disk=found["disk"])
        elif found is not None:
            calls.call("compute", "addresses.delete", project=project, region=found["region"], address=found["address"])
    except Refused as error:
        if not error.refusal.is_absence:
            raise


def _all(calls: Calls, project: str, kind: str, wanted: str) -> Iterator[Mapping[str, Any]]:
    for page in calls.pages("compute", f"{kind}.aggregatedList", project=project, filter=wanted):
        for scope in (page.get("items") or {}).values():
            yield from scope.get(kind, [])


def _leftover(kind: str, id: str, region: str, microusd_h: int, resource: Mapping[str, Any]) -> Leftover:
    labels = resource.get("labels") or {}
    expires = labels.get(EXPIRES, "")
    return Leftover(
        kind=kind, id=id, region=region, microusd_h=microusd_h, expires_unix_s=int(expires) if expires.isdigit() else 0,
        run_id=read_label(labels.get(RUN, "")),
    )  # fmt: skip


def _price(ask: Any, region: str) -> int:
    """0 where it is not known: it is found all the same."""
    try:
        return ask(region) or 0
    except ProviderError:
        return 0


def _region(zone: str) -> str:
    return zone.rpartition("-")[0]
