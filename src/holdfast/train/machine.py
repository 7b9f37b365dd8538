"""What is known about the machine that an attempt runs on: which one it is, what it costs, since when it costs."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from holdfast.core.contract import ENV_MACHINE, ENV_MACHINE_STARTED, ENV_MARKET, ENV_PRICE, ENV_PRICE_ON_DEMAND

__all__ = ["describe_machine"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_DOLLARS = 1_000_000


def describe_machine(environ: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `attempt.claimed`. What the launcher has not said, or not in a way that can be read, is None.

    `boot` tells one start of a kernel from another: only within it are readings of the monotonic clock comparable.
    """
    try:
        boot: str | None = _BOOT_ID.read_text().strip() or None
    except OSError:
        boot = None
    started = _number(environ.get(ENV_MACHINE_STARTED))
    return {
        "machine": environ.get(ENV_MACHINE) or boot,
        "boot": boot,
        "market": environ.get(ENV_MARKET) or None,
        "price_per_hour": _dollars(environ.get(ENV_PRICE)),
        "on_demand_price_per_hour": _dollars(environ.get(ENV_PRICE_ON_DEMAND)),
        "machine_started_unix_s": None if started is None else float(started),
    }


def _dollars(text: str | None) -> str | None:
    """As text, so that no digit is lost between here and the bill."""
    number = _number(text)
    return None if number is None or not 0 <= number < _MAX_DOLLARS else str(number)


def _number(text: str | None) -> Decimal | None:
    try:
        number = Decimal((text or "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
