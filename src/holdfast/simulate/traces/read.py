"""Read availability traces that others publish: probes as CSV or JSON, nodes that join and leave, spot prices.

What a 1 means cannot be seen in a file: some mark what is available, some what is taken away. So a reader is told (`Marks`) and
never guesses. A file that does not follow its format raises FormatError with the file and the place; nothing is skipped
silently.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Decimal, InvalidOperation
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import FormatError, UsageError
from holdfast.policy.market.arrays import Ints
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, LONGEST_S
from holdfast.simulate.traces.trace import Trace

__all__ = ["Dollars", "Marks", "dollars", "priced", "read_csv", "read_json", "read_node_events", "read_prices"]

Dollars: TypeAlias = Decimal | str | float
"""A price per hour. A float counts as the shortest decimal number that is written like it."""
_MOST_TICKS = 1 << 24


class Marks(Enum):
    """What the numbers of an availability file say."""

    AVAILABLE = "1 where at least one machine could be had, else 0"
    TAKEN = "1 where none could be had (or the one that ran was preempted), else 0"
    MACHINES = "how many machines could be had"


def dollars(price: Dollars) -> int:
    """Millionths of a dollar, to the nearest."""
    try:
        microusd = int((Decimal(str(price)) * 1_000_000).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError):
        raise UsageError(f"not a price: {price!r}") from None
    if not 0 <= microusd <= HIGHEST_MICROUSD_H:
        raise UsageError(f"a price lies between $0 and ${HIGHEST_MICROUSD_H / 1e6:,.0f} an hour, not at {price!r}")
    return microusd


def read_csv(
    path: Path, *, marks: Marks, spot: Dollars, on_demand: Dollars, pool: str | None = None, tick_s: int | None = None
) -> Trace:
    """Lines of `date,number` under a heading, oldest first; dates as ISO 8601.

    Without `tick_s` every probe is a tick, as long as the median distance of two, and where probes are missing the last one
    holds. With it the probes are laid on that clock: each tick has the last one at or before it.
    """
    times: list[datetime] = []
    values: list[int] = []
    for number, row in _rows(path):
        if number > 1:
            try:
                time, value = datetime.fromisoformat(row[0].strip()), int(row[1])
                backwards = bool(times) and time < times[-1]
            except (ValueError, IndexError, TypeError):
                raise FormatError(f"{path}, line {number}: a date and a whole number are expected, not {row}") from None
            if backwards:
                raise FormatError(f"{path}, line {number}: {row[0]} is earlier than the line before")
            times.append(time)
            values.append(value)
    if len(times) < 2:
        raise FormatError(f"{path} has fewer than two probes")
    since_s = [(time - times[0]).total_seconds() for time in times]
    probes = _machines(path, values, marks)
    length_s, ticks = _on_ticks(path, since_s, tick_s)
    return _single(pool or path.stem, length_s, probes[ticks], spot, on_demand)


def read_json(
    path: Path,
    *,
    marks: Marks,
    spot: Dollars | None = None,
    on_demand: Dollars | None = None,
    pool: str | None = None,
) -> Trace:
    """A document with `metadata.gap_seconds` and `data`; prices from `prices` and `metadata.price_info.on_demand_price` unless
    given."""
    document = _document(path)
    try:
        metadata, values = document["metadata"], document["data"]
        tick_s = _whole_seconds(metadata["gap_seconds"])
        name = pool or str(metadata.get("zone", path.stem))
        if on_demand is None:
            on_demand = metadata["price_info"]["on_demand_price"]
        prices = document["prices"] if spot is None else [spot] * len(values)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: metadata.gap_seconds, data and prices are expected ({error!r})") from None
    trace = _single(name, tick_s, _machines(path, values, marks), "0", on_demand)
    return priced(trace, {name: _prices(path, prices)})


def read_node_events(
    path: Path, *, pool: str, tick_s: int, spot: Dollars, on_demand: Dollars, duration_s: int | None = None
) -> Trace:
    """Lines of `milliseconds,add|remove,node`: a cluster's machines as they joined and left. Capacity is how many were there.

    Machines that nobody asked for do not show in such a file, so this is capacity that was had, not capacity that could have
    been. Without `duration_s` the trace ends with the last event.
    """
    events: list[tuple[float, int]] = []
    there: set[str] = set()
    for number, row in _rows(path):
        try:
            at_s, word, node = int(row[0]) / 1000, row[1].strip(), row[2].strip()
            change = {"add": 1, "remove": -1}[word]
        except (ValueError, IndexError, KeyError):
            raise FormatError(f"{path}, line {number}: milliseconds,add|remove,node is expected, not {row}") from None
        if (node in there) == (change > 0):
            raise FormatError(f"{path}, line {number}: {word} {node}, which {'is' if change > 0 else 'is not'} there")
        if events and at_s < events[-1][0]:
            raise FormatError(f"{path}, line {number}: {row[0]} is earlier than the line before")
        there ^= {node}
        events.append((at_s, change))
    if not events or not 0 < tick_s <= LONGEST_S // 8:
        raise FormatError(f"{path} has no events, or the tick of {tick_s} s is not one")
    end_s = events[-1][0] if duration_s is None else duration_s
    counts = np.cumsum([change for _, change in events])
    clock = np.arange(_tick_count(path, end_s, tick_s)) * tick_s
    newest = np.searchsorted([at_s for at_s, _ in events], clock, side="right") - 1
    return _single(pool, tick_s, np.where(newest < 0, 0, counts[newest]), spot, on_demand)


def read_prices(path: Path) -> dict[str, Ints]:
    """A document of pool → dollars per hour, tick by tick."""
    document = _document(path)
    return {str(pool): _prices(path, prices) for pool, prices in document.items()}


def priced(trace: Trace, prices: Mapping[str, Ints]) -> Trace:
    """The same capacity at these spot prices; as long as the shorter of the two."""
    missing = [pool for pool in trace.pools if pool not in prices]
    if missing:
        raise UsageError(f"there are no prices for pool {missing[0]}")
    ticks = min(trace.ticks, *(len(prices[pool]) for pool in trace.pools))
    rows = np.vstack([prices[pool][:ticks] for pool in trace.pools])
    return replace(trace, capacity=trace.capacity[:, :ticks], microusd_h=rows)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a CSV file with their numbers, from 1."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from enumerate(csv.reader(file), start=1)
    except (csv.Error, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not CSV: {error}") from None


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise FormatError(f"{path}: an object is expected")
    return document


def _machines(path: Path, values: Any, marks: Marks) -> NDArray[np.int32]:
    if not isinstance(values, list):
        raise FormatError(f"{path}: a list of probes is expected, not {type(values).__name__}")
    most = (1 << 31) - 1 if marks is Marks.MACHINES else 1
    out: list[int] = []
    for number, value in enumerate(values):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value != int(value)
            or not 0 <= value <= most
        ):
            raise FormatError(f"{path}: probe {number} is {value!r}; expected is {marks.value}")
        out.append(1 - int(value) if marks is Marks.TAKEN else int(value))
    return np.array(out, np.int32)


def _on_ticks(path: Path, since_s: Sequence[float], tick_s: int | None) -> tuple[int, Ints]:
    """The length of a tick, and for each tick the number of its probe."""
    steps_s = np.diff(since_s)
    if tick_s is not None:
        clock = np.arange(_tick_count(path, since_s[-1], tick_s)) * tick_s
        return tick_s, np.searchsorted(since_s, clock, side="right") - 1
    usual_s = round(median(steps_s))
    if usual_s < 1:
        raise FormatError(f"{path}: half of the probes are less than a second apart")
    _tick_count(path, since_s[-1], usual_s)
    ticks_each = np.maximum(1, np.rint(steps_s / usual_s)).astype(np.int64)
    return usual_s, np.repeat(np.arange(len(since_s)), np.append(ticks_each, 1))


def _tick_count(path: Path, end_s: float, tick_s: int) -> int:
    if tick_s < 1 or end_s / tick_s >= _MOST_TICKS:
        raise FormatError(f"{path}: {end_s:.0f} s in ticks of {tick_s} s; a trace has at most {_MOST_TICKS} ticks")
    return math.floor(end_s / tick_s) + 1


def _whole_seconds(value: Any) -> int:
    if isinstance(value, bool) or not math.isfinite(value) or value != int(value):
        raise ValueError(f"a tick of {value!r} s is not a whole number")
    return int(value)


def _prices(path: Path, prices: Any) -> Ints:
    if not isinstance(prices, list):
        raise FormatError(f"{path}: a list of prices is expected, not {type(prices).__name__}")
    known: dict[Any, int] = {}
    try:
        for price in prices:
            if price not in known:
                known[price] = dollars(price)
    except (UsageError, TypeError) as error:
        raise FormatError(f"{path}: {error}") from None
    return np.array([known[price] for price in prices], np.int64)


def _single(pool: str, tick_s: int, machines: NDArray[Any], spot: Dollars, on_demand: Dollars) -> Trace:
    capacity = machines.astype(np.int32).reshape(1, -1)
    return Trace(
        pools=(pool,),
        tick_s=tick_s,
        capacity=capacity,
        microusd_h=np.full(capacity.shape, dollars(spot), np.int64),
        on_demand_microusd_h=dollars(on_demand),
    )
