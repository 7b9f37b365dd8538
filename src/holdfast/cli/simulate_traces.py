"""What `holdfast simulate` plays on: trace files that the user names, or the markets that the project makes.

What a 1 means in a file of probes is never guessed: without `--marks` nothing is read, and with it a look that seems to be the
wrong one is remarked on, not corrected.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.core.errors import FormatError, UsageError

if TYPE_CHECKING:
    from holdfast.policy.market.arrays import Ints
    from holdfast.simulate.market.comparing import Ground
    from holdfast.simulate.traces.read import Marks
    from holdfast.simulate.traces.trace import Trace

__all__ = ["FileFormat", "MarkWord", "PoolsWord", "TraceOptions", "grounds_of", "known"]

DEFAULT_DAYS = 45.0
DEFAULT_SEED = 1
NODES_TICK_S = 60
_LOOKS_INVERTED = 0.5


class FileFormat(StrEnum):
    auto = "auto"
    csv = "csv"
    json = "json"
    nodes = "nodes"


class MarkWord(StrEnum):
    available = "available"
    preempted = "preempted"
    machines = "machines"


class PoolsWord(StrEnum):
    each = "each"
    together = "together"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """The options about traces, as given; None where not given."""

    files: Sequence[Path]
    format: FileFormat
    marks: MarkWord | None
    tick_s: int | None
    prices: Path | None
    spot: str | None
    on_demand: str | None
    scenarios: Sequence[str]
    seed: int | None
    days: float | None
    pools: PoolsWord
    history: str | None
    """A duration, or a share in per cent."""
    gang: int


def known(kind: str, name: str, names: Collection[str]) -> str:
    """The name, if there is such a thing; else UsageError with the nearest one."""
    if name in names:
        return name
    close = difflib.get_close_matches(name.strip().lower(), names, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise UsageError(f"there is no {kind} {name!r}{meant}; there are {', '.join(names)}")


def grounds_of(options: TraceOptions) -> tuple[list[Ground], list[str]]:
    """What is played, and remarks on it."""
    from holdfast.simulate.market.comparing import Ground
    from holdfast.simulate.traces.trace import joined

    if options.files:
        groups = {"traces": _from_files(options)}
        notes = _remarks(groups["traces"], options)
    else:
        groups, notes = {name: [trace] for name, trace in _from_scenarios(options)}, []
    grounds: list[Ground] = []
    for group, traces in groups.items():
        if options.pools is PoolsWord.together:
            if len({trace.ticks for trace in traces}) > 1:
                notes.append("the traces are cut to the shortest, and taken to begin at the same moment")
            parts = [joined(traces) if len(traces) > 1 else traces[0]]
        else:
            parts = [trace.only(pool) for trace in traces for pool in trace.pools]
        grounds += [Ground(group, part, _history_ticks(part, options.history)) for part in parts]
    _check_gang(grounds, options)
    return grounds, notes


def _from_scenarios(options: TraceOptions) -> list[tuple[str, Trace]]:
    from holdfast.simulate.traces.read import dollars
    from holdfast.simulate.traces.scenarios import SCENARIOS

    for given, name in ((options.marks, "--marks"), (options.prices, "--prices"), (options.tick_s, "--tick")):
        if given is not None:
            raise UsageError(f"{name} is about trace files; name one with --trace FILE")
    names = [known("scenario", name, SCENARIOS) for name in options.scenarios] or list(SCENARIOS)
    days = DEFAULT_DAYS if options.days is None else options.days
    seed = DEFAULT_SEED if options.seed is None else options.seed
    made: list[tuple[str, Trace]] = []
    for name in dict.fromkeys(names):
        trace = SCENARIOS[name].trace(seed=seed, days=days)
        if options.on_demand is not None:
            trace = replace(trace, on_demand_microusd_h=dollars(options.on_demand))
        made.append((name, trace if options.spot is None else trace.at_price(dollars(options.spot))))
    return made


def _from_files(options: TraceOptions) -> list[Trace]:
    if options.scenarios or options.seed is not None or options.days is not None:
        raise UsageError("--scenario, --seed and --days make traces; with --trace FILE there is nothing to make")
    if options.prices is not None and options.spot is not None:
        raise UsageError("give --prices FILE or one --spot-price, not both")
    prices: dict[str, Ints] | None = None
    if options.prices is not None:
        with _about(options.prices):
            prices = _prices(options.prices)
    traces: list[Trace] = []
    for path in options.files:
        with _about(path):
            traces.append(_read(path, options, prices))
    pools = [trace.pools[0] for trace in traces]
    twice = next((pool for pool in pools if pools.count(pool) > 1), None)
    if twice is not None:
        raise UsageError(f"two traces are of a pool {twice!r}: give each file once, and files different names")
    return traces


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What goes wrong with a file becomes one line about it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except FormatError as error:
        raise UsageError(str(error)) from None


def _prices(path: Path) -> dict[str, Ints]:
    from holdfast.simulate.traces.read import read_prices

    return read_prices(path)


def _read(path: Path, options: TraceOptions, prices: dict[str, Ints] | None) -> Trace:
    from holdfast.simulate.traces.read import priced, read_csv, read_json, read_node_events

    form = _format_of(path) if options.format is FileFormat.auto else options.format
    if options.tick_s is not None and form is FileFormat.json:
        raise UsageError(f"{path}: a JSON trace says itself how long its ticks are; leave --tick away")
    if form is not FileFormat.json:
        if options.on_demand is None:
            raise UsageError(f"{path} holds no prices: give --on-demand-price, in dollars per hour of one machine")
        if options.spot is None and prices is None:
            raise UsageError(f"{path} holds no prices: give --spot-price in dollars per hour, or --prices FILE")
    # Replaced below where there is a file of prices.
    spot = "0" if prices is not None else options.spot
    if form is FileFormat.nodes:
        trace = read_node_events(
            path,
            pool=path.stem,
            tick_s=options.tick_s or NODES_TICK_S,
            spot=spot or "0",
            on_demand=options.on_demand or "0",
        )
    elif form is FileFormat.json:
        trace = read_json(path, marks=_marks(path, form, options), spot=spot, on_demand=options.on_demand)
    else:
        trace = read_csv(
            path,
            marks=_marks(path, form, options),
            spot=spot or "0",
            on_demand=options.on_demand or "0",
            tick_s=options.tick_s,
        )
    if prices is None:
        return trace
    if trace.pools[0] not in prices:
        raise UsageError(
            f"{options.prices} has no prices for pool {trace.pools[0]} (the name of its file); it has {', '.join(prices)}"
        )
    return priced(trace, prices)


def _format_of(path: Path) -> FileFormat:
    """By the first line: an object, `number,add|remove,node`, or else a heading."""
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(1000)
    if line.lstrip().startswith("{"):
        return FileFormat.json
    words = [word.strip() for word in line.split(",")]
    return FileFormat.nodes if len(words) == 3 and words[1] in ("add", "remove") else FileFormat.csv


def _marks(path: Path, form: FileFormat, options: TraceOptions) -> Marks:
    from holdfast.simulate.traces.read import Marks, read_csv, read_json

    meanings = {
        MarkWord.available: Marks.AVAILABLE,
        MarkWord.preempted: Marks.TAKEN,
        MarkWord.machines: Marks.MACHINES,
    }
    if options.marks is not None:
        return meanings[options.marks]
    if form is FileFormat.json:
        counts = read_json(path, marks=Marks.MACHINES, spot="0", on_demand="0").capacity
    else:
        counts = read_csv(path, marks=Marks.MACHINES, spot="0", on_demand="0").capacity
    ones = f"{float((counts > 0).mean()):.0%}"
    raise UsageError(
        f"{path}: what does a 1 mean? Files differ, and nothing in them says. {ones} of its probes are 1 or more: give "
        f"--marks available if capacity was there {ones} of the time, --marks preempted if it was gone, --marks machines if the "
        f"numbers count machines"
    )


def _remarks(traces: Sequence[Trace], options: TraceOptions) -> list[str]:
    if options.marks not in (MarkWord.available, MarkWord.preempted):
        return []
    share = sum(float(trace.available().mean()) for trace in traces) / len(traces)
    if share >= _LOOKS_INVERTED:
        return []
    other = MarkWord.preempted if options.marks is MarkWord.available else MarkWord.available
    hint = (
        f"read with --marks {options.marks}, spot capacity is there {share:.0%} of the time only; if that looks the wrong way "
        f"round, your files may mean --marks {other}"
    )
    return [hint]


def _history_ticks(trace: Trace, history: str | None) -> int:
    from holdfast.core.config import parse_duration_s

    if history is None:
        return 0
    text = history.strip()
    if not text.endswith("%"):
        ticks = int(parse_duration_s(text) // trace.tick_s)
    else:
        try:
            ticks = round(float(text[:-1]) / 100 * trace.ticks)
        except (ValueError, OverflowError):
            raise UsageError(f'not a share: {history!r}; the history is written like "50%" or "10 d"') from None
    if not 0 < ticks < trace.ticks:
        raise UsageError(
            f"a history of {history} leaves nothing to learn from, or nothing to play on, in {'+'.join(trace.pools)}; "
            f'give a part of the trace, like "50%" or "10 d"'
        )
    return ticks


def _check_gang(grounds: Sequence[Ground], options: TraceOptions) -> None:
    """Whether such a gang could ever run: a file of 0 and 1 knows nothing of several machines."""
    if options.gang > 1 and not any(ground.trace.available(options.gang).any() for ground in grounds):
        most = max(int(ground.trace.capacity.max()) for ground in grounds)
        ones = " A file of 0 and 1 says that one machine could be had, and nothing of more." if most == 1 else ""
        raise UsageError(
            f"no pool ever has {options.gang} machines at once; the most is {most}.{ones} Give a smaller --gang, or "
            f"traces that count machines (--marks machines, --format nodes)"
        )
