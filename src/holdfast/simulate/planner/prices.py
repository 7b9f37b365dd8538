"""What machines cost: dated facts from a file, the shipped one or the user's.

Prices are those of whole machines, in dollars per hour: a list that names the GPU alone has had the machine around it added.
They are orientation: every row says when it was true, and nobody knows a spot price in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from holdfast.core.errors import UsageError
from holdfast.core.jobfile import Accelerator

__all__ = ["Price", "Where", "load_prices", "parse_where", "priced"]

_FORMAT = 1


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine type in one region. `gpus` counts vCPUs where the accelerator is CPU."""

    provider: str
    region: str
    instance: str
    accelerator: str
    gpus: int
    gpu_memory_gib: float
    on_demand_usd_h: float
    spot_usd_h: float
    notice_s: float
    as_of: str
    source: str

    def __post_init__(self) -> None:
        if not (0 < self.on_demand_usd_h < 2000 and 0 < self.spot_usd_h < 2000):
            raise ValueError("a machine costs more than $0 and less than $2,000 an hour")
        if self.gpus < 1 or not (self.gpu_memory_gib >= 0 and self.notice_s >= 0):
            raise ValueError("gpus is 1 or more, gpu_memory_gib and notice_s are zero or more")

    @property
    def pool(self) -> str:
        return f"{self.provider}/{self.region}/{self.instance}"


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    rows: tuple[Price, ...]
    note: str = ""
    sources: dict[str, str] = {}


class Where(msgspec.Struct, frozen=True):
    """Pools that are allowed. None: any."""

    provider: str | None = None
    region: str | None = None
    instance: str | None = None

    def allows(self, price: Price) -> bool:
        return all(
            wanted is None or wanted.lower() == had.lower()
            for wanted, had in (
                (self.provider, price.provider),
                (self.region, price.region),
                (self.instance, price.instance),
            )
        )


def parse_where(text: str, instance: str | None = None) -> Where:
    """From `aws`, `aws/us-east-1`, `aws/us-east-1/p4d.24xlarge`; `*` is any. A zone in the third place stands for its region."""
    parts = [part.strip() for part in text.strip().split("/")]
    if not parts[0] or len(parts) > 3 or not all(parts):
        raise UsageError(f"not a place: {text!r}; written like aws, aws/us-east-1 or aws/us-east-1/p4d.24xlarge")
    named = [None if part == "*" else part for part in (*parts, "*", "*")][:3]
    if named[1] and named[2] and named[2].startswith(named[1]):
        named[2] = None
    return Where(named[0], named[1], instance or named[2])


def load_prices(path: Path | None = None) -> tuple[Price, ...]:
    """The shipped table, or that of a file of the same format."""
    source = files("holdfast.simulate.planner") / "prices.json" if path is None else path
    try:
        table = msgspec.json.decode(source.read_bytes(), type=_Table)
    except OSError as error:
        raise UsageError(f"cannot read the prices in {str(path)!r}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise UsageError(f"{str(path)!r} is no price table: {error}") from None
    if table.format != _FORMAT:
        raise UsageError(f"{str(path)!r} is a price table of format {table.format}; this holdfast reads {_FORMAT}")
    pools = [row.pool for row in table.rows]
    if len(set(pools)) < len(pools):
        raise UsageError(f"{str(path)!r} prices one machine twice")
    return table.rows


def priced(table: Sequence[Price], wanted: Accelerator, where: Sequence[Where] = ()) -> tuple[Price, ...]:
    """All pools of that hardware, cheapest spot capacity first. UsageError that says what is known instead."""
    of_kind = [row for row in table if row.accelerator.lower() == wanted.name.lower()]
    fitting = [row for row in of_kind if row.gpus == wanted.count]
    allowed = [row for row in fitting if not where or any(each.allows(row) for each in where)]
    if allowed:
        return tuple(sorted(allowed, key=lambda row: (row.spot_usd_h, row.on_demand_usd_h, row.pool)))
    hint = "give --price-spot and --price-on-demand, or --prices FILE"
    if fitting:
        raise UsageError(f"no price of {wanted} there; known are {', '.join(row.pool for row in fitting)}; or {hint}")
    if of_kind:
        counts = ", ".join(f"{of_kind[0].accelerator}:{count}" for count in sorted({row.gpus for row in of_kind}))
        raise UsageError(f"no machine with {wanted} has a price; known are {counts}; or {hint}")
    names = ", ".join(sorted({row.accelerator for row in table}))
    raise UsageError(f"no price of {wanted.name} is known; known are {names}; or {hint}")
