"""Whether a create call gets a machine, and where: no I/O."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from holdfast.core.failures import Failure
from holdfast.core.launches import Pool
from holdfast.provider.local.wire import TAG_EXPIRES, TAG_LAUNCH, AllowedPool, CreateRequest
from holdfast.testing.cloud.config import CloudConfig, Span
from holdfast.testing.cloud.life import Life
from holdfast.testing.cloud.market import Market
from holdfast.testing.cloud.plan import horizon_real_s
from holdfast.testing.cloud.refusals import Refused

__all__ = ["choose", "drawn", "read_request"]


def read_request(fields: dict[str, Any]) -> CreateRequest:
    try:
        request = msgspec.convert(fields, CreateRequest)
    except msgspec.ValidationError as error:
        raise Refused(400, "BadRequest", f"not a request: {error}", Failure.BAD_REQUEST) from None
    if not all(request.tags.get(name, "0").isdecimal() for name in (TAG_LAUNCH, TAG_EXPIRES)) or request.disk_gib < 0:
        raise Refused(400, "BadRequest", "launch, expiry and disk are whole numbers", Failure.BAD_REQUEST)
    if not request.allowed:
        raise Refused(400, "BadRequest", "the request allows no pool", Failure.BAD_REQUEST)
    return request


def choose(
    request: CreateRequest, there: list[Life], market: Market, config: CloudConfig, second: float
) -> AllowedPool:
    """The first allowed pool with room; Refused, with the reason. `there`: every machine that is not gone."""
    known = [each for each in request.allowed if each.pool in market.capacity]
    if not known:
        said = f"none of these pools exists: {', '.join(each.pool for each in request.allowed)}"
        raise Refused(400, "InvalidPool", said, Failure.BAD_REQUEST)
    on = Pool.named(known[0].pool).market
    quota = config.quotas.get(on)
    if quota is not None and sum(life.pool.market == on for life in there) >= quota:
        failure = Failure.QUOTA if quota else Failure.NO_QUOTA
        raise Refused(400, "QuotaExceeded", f"the quota of {quota} {on} machines is used up", failure)
    for each in known:
        if _has_room(each, sum(life.pool.name == each.pool for life in there), market, config, second):
            return each
    raise Refused(503, "InsufficientInstanceCapacity", "there is no capacity", Failure.NO_CAPACITY)


def _has_room(allowed: AllowedPool, used: int, market: Market, config: CloudConfig, second: float) -> bool:
    """A spot machine that would be taken within its notice is not launched."""
    spot = Pool.named(allowed.pool).market == "spot"
    until = second + (horizon_real_s(config.notice) * config.speed if spot else 0.0)
    room = min(market.capacity[allowed.pool].within(second, until))
    dearest = max(market.microusd_h[allowed.pool].within(second, until))
    return room > used and dearest <= allowed.ceiling_microusd_h


def drawn(span: Span, draw: random.Random) -> float:
    return draw.uniform(*span) if isinstance(span, tuple) else span
