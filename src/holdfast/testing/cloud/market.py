"""Capacity and prices over time: constant, scripted, or from traces; and the cloud's clock. Whole seconds since the cloud began."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool
from holdfast.testing.cloud.config import CloudConfig, PoolConfig, TraceConfig

__all__ = ["UNLIMITED", "CloudTime", "Market", "Steps", "micro_dollars"]

UNLIMITED = 1 << 30
_HIGHEST = Decimal(10**7)


@dataclass(frozen=True, slots=True)
class CloudTime:
    """The cloud's seconds, from those of this machine (CLOCK_MONOTONIC)."""

    origin_real_s: float
    start_unix_s: int
    speed: float

    def unix_s(self, real_s: float) -> float:
        return self.start_unix_s + (real_s - self.origin_real_s) * self.speed

    def real_s(self, unix_s: float) -> float:
        return self.origin_real_s + (unix_s - self.start_unix_s) / self.speed


@dataclass(frozen=True, slots=True)
class Steps:
    """A figure that holds from one second to another. `at_s` ascends, and begins with 0."""

    at_s: tuple[int, ...]
    values: tuple[int, ...]
    repeat_s: int | None = None

    def __post_init__(self) -> None:
        ascends = all(a < b for a, b in zip(self.at_s, self.at_s[1:], strict=False))
        if not self.at_s or self.at_s[0] != 0 or len(self.at_s) != len(self.values) or not ascends:
            raise UsageError(f"a schedule begins at second 0 and ascends, not {list(self.at_s)[:5]}")
        if min(self.values) < 0 or (self.repeat_s is not None and self.repeat_s <= self.at_s[-1]):
            raise UsageError("a schedule's figures are zero or more, and it repeats after its last change")

    def at(self, second: float) -> int:
        within = max(0.0, second) if self.repeat_s is None else max(0.0, second) % self.repeat_s
        return self.values[bisect_right(self.at_s, within) - 1]

    def changes(self, after: float, until: float) -> Iterator[tuple[int, int]]:
        """(second, figure from then on) with after < second ≤ until, where it differs from what was."""
        before, second = self.at(after), self.next_step(after)
        while second <= until:
            if (value := self.at(second)) != before:
                yield int(second), value
                before = value
            second = self.next_step(second)

    def next_step(self, after: float) -> float:
        """The first second after this one at which a figure is stated anew; infinity where there is none."""
        if self.repeat_s is None:
            index = bisect_right(self.at_s, after)
            return self.at_s[index] if index < len(self.at_s) else math.inf
        rounds = math.floor(after / self.repeat_s)
        index = bisect_right(self.at_s, after - rounds * self.repeat_s)
        return rounds * self.repeat_s + (self.at_s[index] if index < len(self.at_s) else self.repeat_s)

    def within(self, since: float, until: float) -> list[int]:
        """Every figure that holds at some time from `since` to `until`."""
        return [self.at(since), *(value for _, value in self.changes(since, until))]


@dataclass(slots=True)
class Market:
    """Every pool's capacity and price."""

    capacity: dict[str, Steps]
    microusd_h: dict[str, Steps]

    @classmethod
    def of(cls, config: CloudConfig, folder: Path) -> Market:
        """`folder`: where the configuration lies; traces are looked for from there."""
        made = {pool.name: _schedules(pool, folder) for pool in config.pools}
        return cls({name: each[0] for name, each in made.items()}, {name: each[1] for name, each in made.items()})

    def change(self, name: str, second: int, *, capacity: int | None, microusd_h: int | None) -> None:
        """From `second` on these figures hold, and no schedule any more."""
        for schedules, value in ((self.capacity, capacity), (self.microusd_h, microusd_h)):
            if value is not None:
                old = schedules[name]
                kept = [(0, old.at(0)), *old.changes(0, second - 1)] if second > 0 else []
                steps = dict([*kept, (second, value)])
                schedules[name] = Steps(tuple(steps), tuple(steps.values()))

    def next_change(self, after: float) -> float:
        every = (*self.capacity.values(), *self.microusd_h.values())
        return min((steps.next_step(after) for steps in every), default=math.inf)

    def on_demand_microusd_h(self, pool: Pool, second: float) -> int:
        """What a machine of this type costs on demand: in its zone, else in its region, else the pool's own price."""
        names = [Pool.named(name) for name in self.microusd_h]
        same = [each for each in names if each.market == "on-demand" and each.instance_type == pool.instance_type]
        for fits in ([e for e in same if e.zone == pool.zone], [e for e in same if e.region == pool.region]):
            if fits:
                return min(self.microusd_h[each.name].at(second) for each in fits)
        return self.microusd_h[pool.name].at(second)


def micro_dollars(price: object) -> int:
    """Whole millionths; a float counts as the shortest decimal number that is written like it."""
    try:
        dollars = Decimal(str(price))
        if not 0 <= dollars <= _HIGHEST:
            raise InvalidOperation
        return int((dollars * 1_000_000).to_integral_value())
    except InvalidOperation:
        raise UsageError(f"not a price in dollars per hour: {price!r}") from None


def _schedules(pool: PoolConfig, folder: Path) -> tuple[Steps, Steps]:
    if pool.trace is not None:
        if (pool.capacity, pool.price, pool.repeat_s) != (None, None, None):
            raise UsageError(f"{pool.name}: a trace has capacity and prices itself")
        return _traced(pool.trace, folder)
    if pool.price is None:
        raise UsageError(f"{pool.name} has neither a price nor a trace")
    capacity = [(0, UNLIMITED)] if pool.capacity is None else pool.capacity
    written = [(0, capacity)] if isinstance(capacity, int) else capacity
    prices = pool.price if isinstance(pool.price, list) else [(0, pool.price)]
    return (
        _steps([(second, machines) for second, machines in written], pool.repeat_s),
        _steps([(second, micro_dollars(price)) for second, price in prices], pool.repeat_s),
    )


def _steps(written: list[tuple[int, int]], repeat_s: int | None) -> Steps:
    if len(written) < 2:
        repeat_s = None
    return Steps(tuple(second for second, _ in written), tuple(value for _, value in written), repeat_s)


def _traced(trace: TraceConfig, folder: Path) -> tuple[Steps, Steps]:
    # Reading traces needs numpy, which a cloud without one does not wait for.
    from holdfast.simulate.traces.read import Marks, read_csv, read_json

    marks = {"available": Marks.AVAILABLE, "taken": Marks.TAKEN, "machines": Marks.MACHINES}[trace.marks]
    path, on_demand = folder / trace.file, "0" if trace.on_demand is None else trace.on_demand
    if path.suffix == ".json":
        read: Any = read_json(path, marks=marks, spot=trace.spot, on_demand=on_demand)
    elif trace.spot is not None:
        read = read_csv(path, marks=marks, spot=trace.spot, on_demand=on_demand)
    else:
        raise UsageError(f"{path}: a trace as CSV has no prices; name one as `spot`")
    first = trace.from_s // read.tick_s
    rows = ([trace.machines * each for each in read.capacity[0].tolist()], read.microusd_h[0].tolist())
    if first >= read.ticks:
        raise UsageError(f"{path} ends before second {trace.from_s}")
    capacity, prices = (_thinned(row[first:], read.tick_s, trace.speed) for row in rows)
    return capacity, prices


def _thinned(row: list[int], tick_s: int, speed: int) -> Steps:
    """Of ticks that fall into one second the last one counts."""
    seconds = {index * tick_s // speed: value for index, value in enumerate(row)}
    kept = [
        (at, value)
        for (at, value), before in zip(seconds.items(), (None, *seconds.values()), strict=False)
        if value != before
    ]
    return Steps(tuple(at for at, _ in kept), tuple(value for _, value in kept))
