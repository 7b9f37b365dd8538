"""The cloud's calls, without a network: a method, a path and a body go in, an answer comes out. `server.py` puts HTTP around it,
and `tabletop.py` nothing.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from holdfast.core.clock import Clock
from holdfast.core.errors import UsageError
from holdfast.core.failures import Failure
from holdfast.core.launches import Pool
from holdfast.provider.base import Guarantees, Offer
from holdfast.provider.local.wire import Address, BillingRules
from holdfast.testing.cloud.config import Billing
from holdfast.testing.cloud.hosts import Isolation, boot_facts
from holdfast.testing.cloud.market import UNLIMITED, micro_dollars
from holdfast.testing.cloud.refusals import Refused
from holdfast.testing.cloud.world import World
from holdfast.testing.loopback import Answer

__all__ = ["Api", "billing_rules"]


class Api:
    """Thread safety: every method. `clock` is this machine's."""

    def __init__(self, world: World, clock: Clock, secret: str) -> None:
        self.world, self._clock, self._secret = world, clock, secret
        self.is_ending = False
        """Somebody has asked for the end of everything."""

    def address(self, folder: Path, endpoint: str, boot_id: str, isolation: Isolation) -> Address:
        """What clients need to know."""
        config, speed = self.world.config, self.world.time.speed
        boot_s = config.boot_s if isinstance(config.boot_s, (int, float)) else config.boot_s[1]
        guarantees = Guarantees(
            honours_tokens=config.faults.tokens == "enforced",
            shutdown_terminates=config.shutdown_terminates,
            enforces_lifetime=config.enforces_lifetime,
            tags_at_birth=True,
            list_delay_s=math.ceil(config.faults.list_delay_s * speed),
            notice_s=math.floor(config.notice.lead_s),
            minimum_s=config.billing.minimum_s,
            boot_s=math.ceil((boot_s + 1) * speed),
            stop_s=math.ceil((config.grace_s + 1) * speed),
        )
        return Address(
            endpoint=endpoint,
            secret=self._secret,
            pid=os.getpid(),
            boot_id=boot_id,
            origin_real_s=self.world.time.origin_real_s,
            start_unix_s=self.world.time.start_unix_s,
            speed=speed,
            isolation="namespaces" if isolation.in_namespaces else f"process ({isolation.refused or 'as set'})",
            network="own" if isolation.own_network else "shared",
            guarantees=guarantees,
            rules=billing_rules(config.billing),
            boot_facts=boot_facts(folder),
        )

    def answer(self, method: str, target: str, body: bytes, authorization: str) -> Answer:
        """Raises Lost."""
        try:
            return _json(200, self._called(method, target, body, authorization))
        except Refused as refused:
            return _json(refused.status, refused.refusal)

    def _called(self, method: str, target: str, body: bytes, authorization: str) -> object:
        if not secrets.compare_digest(authorization, f"Bearer {self._secret}"):
            raise Refused(403, "UnauthorizedOperation", "the secret is wrong", Failure.NO_PERMISSION)
        parts = urlsplit(target)
        call = _CALLS.get((method, parts.path))
        if call is None:
            raise Refused(404, "NoSuchCall", f"there is no {method} {parts.path}", Failure.BAD_REQUEST)
        try:
            fields = msgspec.json.decode(body) if body else dict(parse_qsl(parts.query))
            if not isinstance(fields, dict):
                raise UsageError("the body is no object")
            return call(self, fields, self._clock.monotonic_s())
        except (msgspec.MsgspecError, UsageError, KeyError, TypeError, ValueError) as error:
            raise Refused(400, "BadRequest", f"not a request: {error}", Failure.BAD_REQUEST) from None

    def _create(self, fields: dict[str, Any], real_s: float) -> object:
        return self.world.create(fields["request"], real_s)

    def _machines(self, fields: dict[str, Any], real_s: float) -> object:
        return self.world.machines(fields["fleet"], fields.get("run"), real_s)

    def _extend(self, fields: dict[str, Any], real_s: float) -> None:
        self.world.extend(fields["machine"], int(fields["expires_unix_s"]), real_s)

    def _terminate(self, fields: dict[str, Any], real_s: float) -> None:
        self.world.terminate(list(fields["ids"]), real_s)

    def _leftovers(self, fields: dict[str, Any], real_s: float) -> object:
        return self.world.leftovers(fields["fleet"])

    def _remove(self, fields: dict[str, Any], real_s: float) -> None:
        self.world.remove(list(fields["ids"]), real_s)

    def _do(self, fields: dict[str, Any], real_s: float) -> None:
        self.world.do(fields["machine"], fields["do"], fields.get("lead_s"), real_s)

    def _change(self, fields: dict[str, Any], real_s: float) -> None:
        self.world.change(fields, real_s)

    def _end(self, fields: dict[str, Any], real_s: float) -> None:
        self.world.end_all(real_s)
        self.is_ending = True

    def _prices(self, fields: dict[str, Any], real_s: float) -> object:
        return self.world.prices(fields["pool"], float(fields["since"]), float(fields["until"]))

    def _facts(self, fields: dict[str, Any], real_s: float) -> object:
        return self.world.facts(fields["machine"])

    def _offers(self, fields: dict[str, Any], real_s: float) -> object:
        """Every pool, and what its type has."""
        second, found = self.world.time.unix_s(real_s) - self.world.time.start_unix_s, []
        with self.world.lock:
            market = self.world.market
            for name, capacity in market.capacity.items():
                pool, room = Pool.named(name), capacity.at(second)
                used = sum(life.pool == pool for life in self.world.lives.there())
                offer = Offer(
                    pool=pool,
                    microusd_h=market.microusd_h[name].at(second),
                    on_demand_microusd_h=market.on_demand_microusd_h(pool, second),
                    available=True if room >= UNLIMITED else room > used,
                )
                found.append((offer, self.world.config.types.get(pool.instance_type)))
        return found


_CALLS: dict[tuple[str, str], Callable[[Api, dict[str, Any], float], object]] = {
    ("POST", "/create"): Api._create,
    ("GET", "/machines"): Api._machines,
    ("POST", "/extend"): Api._extend,
    ("POST", "/terminate"): Api._terminate,
    ("GET", "/leftovers"): Api._leftovers,
    ("POST", "/remove"): Api._remove,
    ("POST", "/do"): Api._do,
    ("POST", "/change"): Api._change,
    ("POST", "/end"): Api._end,
    ("GET", "/prices"): Api._prices,
    ("GET", "/facts"): Api._facts,
    ("GET", "/offers"): Api._offers,
}


def billing_rules(billing: Billing) -> BillingRules:
    return BillingRules(
        minimum_s=billing.minimum_s,
        first_hour_free=billing.first_hour_free,
        disk_microusd_gib_h=micro_dollars(billing.disk_per_gib_h),
        address_microusd_h=micro_dollars(billing.address_per_h),
        extras_unit_s=billing.extras_unit_s,
    )


def _json(status: int, said: object) -> Answer:
    return Answer(status, (("Content-Type", "application/json"),), msgspec.json.encode(said))
