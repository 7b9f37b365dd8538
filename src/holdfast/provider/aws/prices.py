"""What AWS asks for machines and disks, in whole millionths of a dollar, rounded up. No price is made up.

    spot        DescribeSpotPriceHistory, the newest of each zone
    on-demand   the user's own table first, then the Price List API; where neither knows, the reason why
    disks, addresses   the same two

The user's table is dollars by region: {"us-east-1": {"p4d.24xlarge": 21.95, "gp3": 0.08, "address": 0.005}}. A disk type's price
is for a GiB and month, as AWS writes it; an address's for an hour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from threading import Lock
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.errors import ProviderError, UsageError
from holdfast.provider.aws.account import Account

__all__ = ["PriceTable", "Prices", "microusd"]

PriceTable = Mapping[str, Mapping[str, float | str]]

_PRICE_LIST_REGION = "us-east-1"
"""The Price List API answers for all regions from here."""
_SYSTEMS = ["Linux/UNIX", "Linux/UNIX (Amazon VPC)"]
_SPOT_STAYS_S = 300.0
_LIST_STAYS_S = 86_400.0
_FEWEST_HOURS = 28 * 24
"""Of a month: a disk's price per hour is highest in February."""
_TYPES_AT_ONCE = 50
_LINUX = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
}


def microusd(price: str | float, per: int = 1) -> int:
    """Millionths of a dollar, rounded up. UsageError for what is no amount."""
    try:
        amount = Decimal(str(price)) * 1_000_000 / per
        if not amount.is_finite() or amount < 0:
            raise InvalidOperation
    except InvalidOperation:
        raise UsageError(f"not a price in dollars: {price!r}") from None
    return math.ceil(amount)


class Prices:
    """What is known of prices, for as long as it stays true. Thread safety: any thread."""

    def __init__(self, account: Account, clock: Clock, table: PriceTable | None = None) -> None:
        self._account, self._clock, self._table = account, clock, table or {}
        self._spot: dict[tuple[str, str], tuple[float, dict[str, int]]] = {}
        self._list: dict[tuple[str, str], tuple[float, int]] = {}
        self._histories: dict[tuple[str, str, str, float], tuple[float, list[tuple[float, int]]]] = {}
        self._lock = Lock()

    def spot(self, region: str, types: Iterable[str]) -> dict[tuple[str, str], int]:
        """By instance type and zone; where there is no spot, there is no price. ProviderError."""
        wanted, now_s = list(dict.fromkeys(types)), self._clock.monotonic_s()
        stale = [each for each in wanted if not self._fresh(self._spot.get((region, each)), now_s, _SPOT_STAYS_S)]
        for start in range(0, len(stale), _TYPES_AT_ONCE):
            self._learn_spot(region, stale[start : start + _TYPES_AT_ONCE], now_s)
        known = {name: self._spot.get((region, name), (now_s, {}))[1] for name in wanted}
        return {(name, zone): price for name, zones in known.items() for zone, price in zones.items()}

    def history(
        self, region: str, kind: str, zone: str, begin: float, end: float, *, final: bool
    ) -> list[tuple[float, int]]:
        """Since when which spot price held between these moments, oldest first. `final`: to the very end. ProviderError."""
        key = (region, kind, zone, begin)
        now, known = self._clock.unix_s(), self._histories.get(key)
        if known is None or known[0] < (end if final else min(end, now - _SPOT_STAYS_S)):
            told = self._account.ask_all(
                "ec2",
                region,
                "DescribeSpotPriceHistory",
                "SpotPriceHistory",
                InstanceTypes=[kind],
                AvailabilityZone=zone,
                ProductDescriptions=_SYSTEMS,
                StartTime=datetime.fromtimestamp(begin, UTC),
                EndTime=datetime.fromtimestamp(max(end, now), UTC),
            )
            found = sorted((each["Timestamp"].timestamp(), microusd(each["SpotPrice"])) for each in told)
            if not found:
                raise ProviderError(f"AWS tells of no spot price of {kind} in {zone} from the time of this machine")
            known = (now, found)
            with self._lock:
                self._histories[key] = known
        return known[1]

    def on_demand(self, region: str, types: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
        """Prices by instance type, and why there is none for the rest."""
        wanted = list(dict.fromkeys(types))
        prices = {name: self._written(region, name) for name in wanted}
        missing = [name for name, price in prices.items() if price is None]
        said = "the Price List API has no price of it"
        try:
            learnt = self._learn_on_demand(region, missing)
        except ProviderError as error:
            learnt, said = {}, f"the Price List API cannot be asked ({error})"
        found = {name: price for name, price in {**prices, **learnt}.items() if price is not None}
        advice = f"{said}; write it into the table of prices, in dollars per hour"
        return found, {name: f"{region}, {name}: {advice}" for name in wanted if name not in found}

    def disk_microusd_h(self, region: str, kind: str, gib: int) -> int:
        """At most, in the shortest month. ProviderError where the price is not known."""
        filters = {"productFamily": "Storage", "volumeApiName": kind}
        price = self._of("AmazonEC2", region, kind, filters, "GB-Mo")
        return math.ceil(Decimal(price) * gib / _FEWEST_HOURS)

    def address_microusd_h(self, region: str) -> int:
        """Of a public IPv4 address, in use or idle. ProviderError where the price is not known."""
        return self._of("AmazonVPC", region, "address", {"group": "VPCPublicIPv4Address"}, "Hrs")

    def _written(self, region: str, name: str) -> int | None:
        price = self._table.get(region, {}).get(name)
        return None if price is None else microusd(price)

    def _fresh(self, known: tuple[float, object] | None, now_s: float, stays_s: float) -> bool:
        return known is not None and now_s - known[0] < stays_s

    def _learn_spot(self, region: str, types: Sequence[str], now_s: float) -> None:
        now = datetime.fromtimestamp(self._clock.unix_s(), UTC)
        told = self._account.ask_all(
            "ec2",
            region,
            "DescribeSpotPriceHistory",
            "SpotPriceHistory",
            InstanceTypes=list(types),
            ProductDescriptions=_SYSTEMS,
            StartTime=now,
            EndTime=now,
        )
        newest: dict[str, dict[str, int]] = {name: {} for name in types}
        for each in sorted(told, key=lambda one: one["Timestamp"]):
            newest.setdefault(each["InstanceType"], {})[each["AvailabilityZone"]] = microusd(each["SpotPrice"])
        with self._lock:
            self._spot.update({(region, name): (now_s, zones) for name, zones in newest.items()})

    def _learn_on_demand(self, region: str, types: Sequence[str]) -> dict[str, int]:
        now_s = self._clock.monotonic_s()
        stale = [each for each in types if not self._fresh(self._list.get((region, each)), now_s, _LIST_STAYS_S)]
        for start in range(0, len(stale), _TYPES_AT_ONCE):
            several = stale[start : start + _TYPES_AT_ONCE]
            of_types = {"Type": "ANY_OF", "Field": "instanceType", "Value": ",".join(several)}
            for product in self._products("AmazonEC2", region, _LINUX, of_types):
                name = product["product"]["attributes"].get("instanceType", "")
                price = _list_price(product, "Hrs")
                if name in several and price is not None:
                    with self._lock:
                        self._list[region, name] = (now_s, price)
        return {name: self._list[region, name][1] for name in types if (region, name) in self._list}

    def _of(self, service: str, region: str, name: str, filters: Mapping[str, str], unit: str) -> int:
        written = self._written(region, name)
        if written is not None:
            return written
        now_s = self._clock.monotonic_s()
        if not self._fresh(self._list.get((region, name)), now_s, _LIST_STAYS_S):
            prices = [_list_price(product, unit) for product in self._products(service, region, filters)]
            known = [price for price in prices if price is not None]
            if not known:
                raise ProviderError(f"no price of {name} in {region} is known; write it into the table of prices")
            with self._lock:
                self._list[region, name] = (now_s, max(known))
        return self._list[region, name][1]

    def _products(
        self, service: str, region: str, filters: Mapping[str, str], *others: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        exact = {"regionCode": region, **filters}
        asked = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in exact.items()]
        told: list[Any] = self._account.ask_all(
            "pricing",
            _PRICE_LIST_REGION,
            "GetProducts",
            "PriceList",
            ServiceCode=service,
            Filters=[*asked, *others],
            FormatVersion="aws_v1",
        )
        return [json.loads(each) for each in told]


def _list_price(product: Mapping[str, Any], unit: str) -> int | None:
    """The dearest of its prices on demand that is not zero."""
    terms = product.get("terms", {}).get("OnDemand", {}).values()
    dimensions = [each for term in terms for each in term.get("priceDimensions", {}).values()]
    prices = [each["pricePerUnit"].get("USD") for each in dimensions if each.get("unit") == unit]
    known = [microusd(price) for price in prices if price is not None]
    return max(known, default=0) or None
