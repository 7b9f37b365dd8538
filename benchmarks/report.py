"""From samples to ratios, targets and tables, for the terminal and for Markdown.

A ratio is made within each round and the median of these is reported with its range: what the machine does between rounds cancels.
The best peer is the one with the lowest median among those that measured the same thing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

__all__ = ["TARGETS", "Measured", "Target", "as_markdown", "evaluate", "show"]

_FLOORS = ("memcpy", "raw file", "raw client", "bare loop")
_OURS = ("holdfast", "run.batches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`ours` of holdfast over `theirs` of `against`, at most `limit` (at least, where `least`).

    `against` is a contestant, "best peer", or "itself". Without `theirs`, the figure itself is held against the limit.
    """

    figure: str
    scenario: str
    ours: str
    limit: float
    against: str = "itself"
    theirs: str | None = None
    least: bool = False


def _targets() -> Iterable[Target]:
    for name in ("loop", "loop-spare-cpu"):
        yield Target(
            figure="cost of a save to the loop / one warm memcpy",
            scenario=name,
            ours="cost_s",
            theirs="memcpy_s",
            limit=1.2,
        )
        yield Target(
            figure="cost of a save to the loop / DCP async_save's", scenario=name, ours="cost_s", against="DCP async_save",
            theirs="cost_s", limit=0.3,
        )  # fmt: skip
    for name in ("saves-256M", "saves-1G", "saves-4G"):
        for against, limit in (("raw file", 1.1), ("best peer", 1.0)):
            yield Target(
                figure=f"durable, hashed / {against}, fsynced", scenario=name, ours="durable_s", against=against,
                theirs="durable_s", limit=limit,
            )  # fmt: skip
    for name in ("restores-256M", "restores-1G", "restores-4G"):
        yield Target(
            figure="verified restore / torch.load + load_state_dict", scenario=name, ours="restore_s", against="torch.save",
            theirs="restore_s", limit=0.5,
        )  # fmt: skip
    yield Target(figure="90 % frozen, second save: share of bytes", scenario="frozen", ours="later_share", limit=0.11)
    yield Target(
        figure="90 % frozen, second save / full save",
        scenario="frozen",
        ours="later_durable_s",
        theirs="full_durable_s",
        limit=0.25,
    )
    for name, figure, peer in (("saves", "durable_s", "save"), ("restores", "restore_s", "load")):
        yield Target(
            figure=f"10,000 tensors: {name.removesuffix('s')} / torch.{peer}", scenario=f"{name}-small", ours=figure,
            against="torch.save", theirs=figure, limit=0.5,
        )  # fmt: skip
    for figure, name in (("durable_s", "put"), ("restore_s", "get")):
        yield Target(
            figure=f"S3 {name}: speed / raw parallel client", scenario="s3", ours=figure, against="raw client", theirs=figure,
            limit=0.9, least=True,
        )  # fmt: skip
    yield Target(figure="run.batches: µs a step", scenario="batches", ours="step_s", against="bare loop", limit=50.0)


TARGETS = tuple(_targets())


@dataclass(frozen=True, slots=True)
class Measured:
    """A target and what came out. `ours_s` and `theirs_s` are medians, None for what is not a time."""

    target: Target
    state: str
    ratios: tuple[float, ...]
    ours_s: float | None
    theirs_s: float | None
    theirs_name: str

    @property
    def value(self) -> float:
        return median(self.ratios)

    @property
    def met(self) -> bool:
        return self.value >= self.target.limit if self.target.least else self.value <= self.target.limit

    @property
    def of_limit(self) -> float:
        """Measured over allowed: up to 1 is met."""
        return self.target.limit / self.value if self.target.least else self.value / self.target.limit


def evaluate(result: dict[str, Any]) -> list[Measured]:
    """Every target whose scenario was measured."""
    return [
        _evaluate(target, result["scenarios"][target.scenario])
        for target in TARGETS
        if target.scenario in result["scenarios"]
    ]


def _evaluate(target: Target, scenario: dict[str, Any]) -> Measured:
    samples = scenario["samples"]
    if target.scenario == "batches":
        pairs = zip(samples["run.batches"]["step_s"], samples["bare loop"]["step_s"], strict=True)
        return Measured(target, scenario["state"], tuple(1e6 * (a - b) for a, b in pairs), None, None, "bare loop")
    mine = samples["holdfast"][target.ours]
    if target.theirs is None:
        return Measured(target, scenario["state"], tuple(mine), None, None, "")
    name = _best_peer(samples, target.theirs) if target.against == "best peer" else target.against
    theirs = samples["holdfast" if name == "itself" else name][target.theirs]
    each = len(mine) // len(theirs)  # rounds with several saves after one full save
    theirs = [value for value in theirs for _ in range(each)]
    pairs = zip(theirs, mine, strict=True) if target.least else zip(mine, theirs, strict=True)
    return Measured(target, scenario["state"], tuple(a / b for a, b in pairs), median(mine), median(theirs), name)


def _best_peer(samples: dict[str, Any], figure: str) -> str:
    peers = [name for name in samples if name not in _FLOORS and name not in _OURS and figure in samples[name]]
    return min(peers, key=lambda name: median(samples[name][figure]))


@dataclass(frozen=True, slots=True)
class _Table:
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _tables(result: dict[str, Any]) -> list[_Table]:
    return [
        _target_table(evaluate(result)),
        *(_detail_table(name, found) for name, found in result["scenarios"].items()),
    ]


def _target_table(measured: list[Measured]) -> _Table:
    rows = []
    for item in measured:
        target = item.target
        compared = (
            ""
            if item.ours_s is None or item.theirs_s is None
            else f"{_seconds(item.ours_s)} / {_seconds(item.theirs_s)} s"
        )
        if target.against == "best peer":
            compared += f" ({item.theirs_name})"
        rows.append((
            target.figure, item.state, f"{'≥' if target.least else '≤'} {target.limit:g}", f"{item.value:.2f}",
            f"{min(item.ratios):.2f} to {max(item.ratios):.2f}", compared, "met" if item.met else "missed",
        ))  # fmt: skip
    headings = ("figure", "state", "target", "measured", "range", "medians", "")
    return _Table("Targets", headings, tuple(rows))


def _detail_table(name: str, found: dict[str, Any]) -> _Table:
    samples = found["samples"]
    figures = list(dict.fromkeys(figure for of in samples.values() for figure in of))
    rows = [
        (_shown(contestant, name), *(_spread(figure, of[figure]) if figure in of else "" for figure in figures))
        for contestant, of in samples.items()
    ]
    headings = ("", *(figure.removesuffix("_s").replace("_", " ") + _unit(figure) for figure in figures))
    checked = f"; values compared: {len(found['verified'])} of {len(samples)}" if found["verified"] else ""
    return _Table(f"{name}: {found['state']}{checked}", headings, tuple(rows))


def _shown(contestant: str, scenario: str) -> str:
    return "torch.load" if contestant == "torch.save" and scenario.startswith("restores") else contestant


def _unit(figure: str) -> str:
    return ", s" if figure.endswith("_s") else ""


def _spread(figure: str, values: list[float]) -> str:
    show = _seconds if figure.endswith("_s") else (lambda value: f"{value:.3g}")
    return f"{show(median(values))} ({show(min(values))} to {show(max(values))})"


def _seconds(value: float) -> str:
    return f"{value:.6f}" if abs(value) < 0.0005 else f"{value:.3f}"


_METHOD = """\
Medians with range (min to max). Contestants take turns within a round, in rotating order; a first round is dropped. Ratios are made
within a round; their median is given. Durable means through fsync, for everybody. Restores read from a warm page cache into a live
model, with no warm free memory, as at a start. Before each timing everything is written back (sync) and garbage is collected.
torch.load(mmap) and safetensors restore the moments of AdamW lazily: their bytes are read when they are first used. Nobody but
holdfast verifies what is read."""


def _preface(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    hardware = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB; Linux {machine['kernel']}"
    when = f"{result['date']}, {result['rounds']} rounds, load {result['load_before']:.1f} before the first"
    return [f"{hardware}; Python {machine['python']}; {versions}. {when}.", _METHOD.replace("\n", " ")]


def show(result: dict[str, Any], console: Console) -> None:
    for paragraph in _preface(result):
        console.print(paragraph, style="dim", markup=False, highlight=False)
    for table in _tables(result):
        rich = RichTable(title=table.title, title_justify="left")
        for number, heading in enumerate(table.headings):
            rich.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            rich.add_row(*row, style={"met": "green", "missed": "red"}.get(row[-1]))
        console.print(rich)


def as_markdown(result: dict[str, Any], picture: str) -> str:
    lines = ["# Checkpoints, side by side", "", *(line for text in _preface(result) for line in (text, ""))]
    lines += [f"![What a save and a resume cost]({picture})", ""]
    for table in _tables(result):
        lines += [
            f"## {table.title}",
            "",
            f"| {' | '.join(table.headings)} |",
            "|---" + "|---:" * (len(table.headings) - 1) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in table.rows] + [""]
    for name, said in result["failed"].items():
        lines += [f"## {name}: failed", "", "```", said, "```", ""]
    return "\n".join(lines)
