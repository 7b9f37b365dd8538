"""How `holdfast checkpoints` shows what it found: tables and sentences for people, JSON for programs. Everything goes to
standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from holdfast.core.config import format_bytes, format_duration

if TYPE_CHECKING:
    from holdfast.checkpoint.runs.inspect import CheckpointDetails, RunListing
    from holdfast.checkpoint.runs.unpin import PinLine
    from holdfast.checkpoint.runs.verify import VerifyReport

__all__ = ["print_details", "print_json", "print_listing", "print_pins", "print_report", "print_table"]

_PLAIN_WIDTH = 200
_SHOWN_ROWS = 40


def print_json(value: object) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns whose title begins with `>` are aligned to the right. Into a pipe, nothing is cut or wrapped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False).print(table)


def print_listing(listing: RunListing) -> None:
    state = "removed" if listing.removed else "finished" if listing.finished else "not finished"
    name = f" ({listing.name})" if listing.name else ""
    typer.echo(
        f"{listing.url}{name}: {state}, attempt {listing.attempt}, generation {listing.generation}, head {listing.head}, "
        f"run id {listing.run_id}"
    )
    if listing.checkpoints:
        newest = [line.name for line in listing.checkpoints if line.generation == listing.generation][-1:]
        rows = [
            [
                str(line.step), str(line.epoch), f"{format_duration(line.age_s)} ago", format_bytes(line.total_bytes),
                "unreadable" if line.own_bytes is None else format_bytes(line.own_bytes), str(line.generation),
                str(line.attempt), line.home or "here", "newest" if [line.name] == newest else "",
            ]
            for line in listing.checkpoints
        ]  # fmt: skip
        print_table(
            [">STEP", ">EPOCH", ">SAVED", ">SIZE", ">FREES", ">GENERATION", ">ATTEMPT", "BYTES LIE IN", ""], rows
        )
    elif not listing.removed:
        typer.echo("No checkpoint yet.")
    waiting = f", of which {format_bytes(listing.unreached_bytes)} wait to be swept or are kept for forks"
    typer.echo(f"{format_bytes(listing.stored_bytes)} stored{waiting if listing.unreached_bytes else ''}.")
    for fork_line in listing.forks:
        typer.echo(f"{fork_line.target} refers to step {fork_line.step}.")
    for problem in listing.altered:
        typer.echo(f"ALTERED: {problem}")


def print_pins(url: str, lines: Sequence[PinLine]) -> None:
    if not lines:
        typer.echo(f"{url}: no other run refers to this one.")
        return
    rows = [
        [
            line.target or "?", "?" if line.step is None else str(line.step),
            "?" if line.age_s is None else f"{format_duration(line.age_s)} ago", line.state, line.pin,
        ]
        for line in lines
    ]  # fmt: skip
    print_table(["TARGET", ">STEP", ">SAVED", "STATE", "PIN"], rows)


def print_details(details: CheckpointDetails) -> None:
    import msgspec

    line = details.checkpoint
    typer.echo(
        f"{details.url}/{line.name}: step {line.step}, epoch {line.epoch}, attempt {line.attempt}, generation {line.generation}, "
        f"saved {format_duration(line.age_s)} ago{', the newest' if details.newest else ''}"
    )
    borrowed = f", {format_bytes(details.borrowed_bytes)} borrowed from other runs" if details.borrowed_bytes else ""
    typer.echo(
        f"{format_bytes(details.total_bytes)} in {len(details.arrays)} arrays: {format_bytes(details.new_bytes)} new, "
        f"{format_bytes(details.shared_bytes)} shared with the checkpoint before{borrowed}\n"
    )
    print_table(
        ["ARRAY", "DTYPE", "SHAPE", ">SIZE"],
        [
            [item.name, item.dtype, " x ".join(map(str, item.shape)) or "scalar", format_bytes(item.size_bytes)]
            for item in details.arrays[:_SHOWN_ROWS]
        ],
    )
    _more(len(details.arrays))
    typer.echo("")
    print_table(
        ["OBJECT", ">SIZE", ">USED", "IN"],
        [
            [item.key, format_bytes(item.size_bytes), format_bytes(item.live_bytes), item.home or "this run"]
            for item in details.objects[:_SHOWN_ROWS]
        ],
    )
    _more(len(details.objects))
    typer.echo("\nMetadata:")
    typer.echo(msgspec.json.format(msgspec.json.encode(details.metadata), indent=2).decode())
    if details.changes:
        typer.echo(f"\nChanged since {details.previous}:")
        for change in details.changes:
            typer.echo(f"  {change.path}: {change.before!r} → {change.now!r}")


def _more(count: int) -> None:
    if count > _SHOWN_ROWS:
        typer.echo(f"… and {count - _SHOWN_ROWS} more; --json shows all")


def print_report(report: VerifyReport) -> None:
    print_table(
        [">STEP", ">GENERATION", "STATUS", "CHECKPOINT"],
        [[str(item.step), str(item.generation), item.status, item.name] for item in report.checkpoints],
    )
    for verdict in report.checkpoints:
        for problem in verdict.problems:
            arrays = f" (arrays {', '.join(problem.arrays)})" if problem.arrays else ""
            place = f"{problem.home or report.url}/{problem.key}"
            typer.echo(f"step {verdict.step}: {problem.kind}: {place}: {problem.detail}{arrays}")
    for problem_text in report.altered:
        typer.echo(f"ALTERED: {problem_text}")
    typer.echo(f"{format_bytes(report.read_bytes)} checked: {'everything is whole' if report.good else 'NOT SOUND'}.")
