"""What commands share: the arguments that mean the same everywhere, stores that are closed at the end, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.core.errors import UsageError

if TYPE_CHECKING:
    from holdfast.store.base import Store

__all__ = ["STEP_HELP", "DryRun", "Json", "Url", "Yes", "ask_first", "opened_stores", "progress_bar"]

Url = Annotated[str, typer.Argument(metavar="URL", help="The run: s3://bucket/runs/gpt, gs://…, az://…, ./runs/gpt")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "--dryrun", help="Say what would happen, and change nothing.")]
STEP_HELP = 'A step, "latest", or the name of a checkpoint.'


def ask_first(yes: bool) -> None:
    """Go on only after a yes. Where nobody can be asked, `--yes` must say it."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this takes something away and there is no terminal to ask on; add --yes")
    if not typer.confirm("Proceed?", default=False, err=True):
        typer.echo("Nothing was changed.", err=True)
        raise typer.Exit(1)


@contextmanager
def opened_stores() -> Iterator[Callable[[str], Store]]:
    """Opens stores, each run once, and closes them all at the end."""
    from holdfast.store.open import normalise_url, open_store

    opened: dict[str, Store] = {}

    def open_home(url: str) -> Store:
        canonical = normalise_url(url)
        if canonical not in opened:
            opened[canonical] = open_store(canonical)
        return opened[canonical]

    try:
        yield open_home
    finally:
        for store in opened.values():
            store.close()


@contextmanager
def progress_bar(doing: str, *, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
