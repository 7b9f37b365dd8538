"""What can be set of a rehearsal cloud: a JSON file. Unknown keys are errors; `docs/rehearsal.md` has an example and explains each.

Prices are dollars per hour, as text or number. Times in pools and billing are seconds of the cloud's clock; boots, leads and
graces are seconds of this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool

__all__ = [
    "Billing",
    "CloudConfig",
    "FaultConfig",
    "LeftoverConfig",
    "NoticeConfig",
    "PoolConfig",
    "TraceConfig",
    "TypeConfig",
    "read_config",
    "usual_config",
]

Price = str | float
Span = float | tuple[float, float]
"""One figure, or the ends of a range from which each machine draws."""


class TraceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published trace: see `simulate.traces.read`."""

    file: str
    """`.json` or `.csv`, relative to the configuration's folder."""
    marks: Literal["available", "taken", "machines"] = "machines"
    machines: int = 1
    """How many machines a 1 stands for."""
    spot: Price | None = None
    """None: the file's own prices."""
    on_demand: Price | None = None
    from_s: int = 0
    """Where in the trace the cloud begins."""
    speed: int = 1
    """Seconds of the trace that pass in one of the cloud's: gaps become short, boots, notices and the bill stay as they are."""

    def __post_init__(self) -> None:
        if self.machines < 1 or self.from_s < 0 or self.speed < 1:
            raise UsageError("machines and speed of a trace are 1 or more, from_s is 0 or more")


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Capacity of one kind; `name` is written like `local/here/a/small/spot`."""

    name: str
    capacity: int | list[tuple[int, int]] | None = None
    """Machines at most; or [from which second, machines]; None: as many as are wanted."""
    price: Price | list[tuple[int, Price]] | None = None
    repeat_s: int | None = None
    """What is scripted begins anew after so many seconds."""
    trace: TraceConfig | None = None


class TypeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a machine of this type has, as offers are looked for by it."""

    accelerators: dict[str, int] = {}
    cpus: float = 2
    memory_gib: float = 8


class NoticeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a preemption is announced with."""

    lead_s: float = 120.0
    chance: float = 1.0
    """Share of the preemptions that are announced at all."""
    withdrawn: float = 0.0
    """Share of the announced ones that are taken back half-way."""
    rebalance: float = 0.0
    """Share of the preemptions with an advice before the notice."""
    rebalance_before_s: float = 0.0
    """So long before the notice."""
    idle_rebalance: float = 0.0
    """Share of the machines that hear an advice that comes to nothing."""
    idle_after_s: float = 60.0
    """So long after the boot."""


class Billing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The provider's rules."""

    minimum_s: int = 60
    first_hour_free: bool = False
    """Computing of a spot machine that the provider takes within its first hour costs nothing."""
    disk_per_gib_h: Price = 0.0
    address_per_h: Price = 0.0
    extras_unit_s: int = 1
    """Disks and addresses are billed in whole units of this length."""


class FaultConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the API does wrong. Chances are drawn for each call, from the seed; a script comes before them."""

    create: dict[str, float] = {}
    """Chances of `error`, `throttle`, `no-capacity`, `lost`, `late`."""
    list: dict[str, float] = {}
    """Chances of `error`, `throttle`, `lost`."""
    terminate: dict[str, float] = {}
    """Chances of `error`, `throttle`, `lost`, `ignored`."""
    script: dict[Literal["create", "list", "terminate"], tuple[str, ...]] = {}
    """For the next calls, one after the other: one of those words, or `ok`."""
    list_delay_s: float = 0.0
    """A list shows what was so long ago."""
    late_s: float = 1.0
    """After which a create call that was `late` is carried out; its caller hears an error at once."""
    retry_after_s: int = 1
    tokens: Literal["enforced", "ignored"] = "enforced"


class LeftoverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stays, and is billed, when a machine ends in one of these ways."""

    after: tuple[Literal["shutdown", "terminated", "preempted"], ...] = ()
    kinds: tuple[Literal["volume", "address"], ...] = ("volume", "address")


class CloudConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything."""

    pools: list[PoolConfig]
    types: dict[str, TypeConfig] = {}
    seed: int = 0
    speed: float = 1.0
    """Seconds of the cloud's clock per second of this machine."""
    start_unix_s: int | None = None
    """The cloud's time when it is first started; None: now."""
    boot_s: Span = 0.2
    grace_s: float = 10.0
    """From SIGTERM to SIGKILL, for machines that are ended or end themselves."""
    clock_skew_s: Span = 0.0
    metadata: Literal["aws", "gcp", "azure"] = "aws"
    isolation: Literal["auto", "namespaces", "process"] = "auto"
    network: Literal["auto", "own", "shared"] = "auto"
    reach: list[int] = []
    """Ports of this machine's 127.0.0.1 that machines with a network of their own reach, at their 127.0.0.1."""
    environment: dict[str, str] = {}
    """More variables for every machine."""
    shutdown_terminates: bool = True
    """False: a machine that shuts down does nothing any more, and is billed until it is ended."""
    enforces_lifetime: bool = False
    quotas: dict[Literal["spot", "on-demand"], int] = {}
    gone_shown_s: float = 3600.0
    """How long a list shows machines that are gone."""
    notice: NoticeConfig = NoticeConfig()
    billing: Billing = Billing()
    faults: FaultConfig = FaultConfig()
    leftovers: LeftoverConfig = LeftoverConfig()

    def __post_init__(self) -> None:
        names = [Pool.named(pool.name) for pool in self.pools]
        if not names or len(set(names)) < len(names) or any(pool.provider != "local" for pool in names):
            raise UsageError("a cloud has at least one pool, each once, and their names begin with local/")
        if self.speed <= 0 or min(self.billing.minimum_s, 0) < 0 or self.billing.extras_unit_s < 1:
            raise UsageError("speed, minimum_s and extras_unit_s are above zero (minimum_s may be zero)")
        for chances in (self.faults.create, self.faults.list, self.faults.terminate):
            if not all(0 <= chance <= 1 for chance in chances.values()) or sum(chances.values()) > 1:
                raise UsageError(f"chances lie between 0 and 1, and add up to 1 at most: {chances}")


def usual_config() -> CloudConfig:
    """One small type, on both markets: what there is without a file."""
    return CloudConfig(
        pools=[
            PoolConfig(name="local/here/a/small/spot", capacity=4, price="0.30"),
            PoolConfig(name="local/here/a/small/on-demand", price="1.00"),
        ],
        types={"small": TypeConfig()},
    )


_T = TypeVar("_T")


def read_config(path: Path | None) -> CloudConfig:
    """UsageError that names the file and the place."""
    if path is None:
        return usual_config()
    try:
        return parsed(msgspec.json.decode(path.read_bytes()), CloudConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"cannot read the cloud's configuration {str(path)!r}: {error}") from None
    except UsageError as error:
        raise UsageError(f"the cloud's configuration {str(path)!r}: {error}") from None


def parsed(fields: Any, into: type[_T]) -> _T:
    """UsageError for what does not fit."""
    try:
        return msgspec.convert(fields, into)
    except msgspec.ValidationError as error:
        raise UsageError(f"{error}") from None
