"""`holdfast drill -- CMD…`: interrupt a training script on purpose, and prove that the result is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.checkpoint_tables import print_json
from holdfast.cli.terminal import Json
from holdfast.core.config import format_duration
from holdfast.core.contract import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from types import FrameType

    from rich.table import Table

    from holdfast.drill.conduct import Stage
    from holdfast.drill.report import DrillReport, Verdict

__all__ = ["drill"]

_NOTHING = "\u2013"
_PLAIN_WIDTH = 200
"""Into a pipe nothing is cut."""


def drill(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="The training and its arguments.")],
    scenario: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Play this one; may be given several times.", show_default="all"),
    ] = None,
    times: Annotated[int, typer.Option(metavar="N", min=1, help="Interruptions in each scenario.")] = 3,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Tensors and figures may differ by this much, relative to their greatest magnitude.",
            show_default="bit by bit",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Draws the moments of the interruptions.", show_default="the clock")
    ] = None,
    here: Annotated[
        bool,
        typer.Option(
            "--here", help="Run in this folder, for scripts that read relative paths, not in a scratch folder."
        ),
    ] = False,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep stores, logs and working folders in DIR, which must not exist."),
    ] = None,
    json: Json = False,
) -> None:
    """Interrupt a training on purpose, many times, and prove that it comes out the same.

    The command is run twice without interruption, then once for each scenario, on runs of its own in a scratch folder: it must take
    its URL from $HOLDFAST_RUN (`holdfast.Run()` without a URL). Make it short: a few hundred steps show what a week would.

    \b
    Scenarios:
      kill            SIGKILL at random moments, under `holdfast run`
      notice-120      word 120 s before the end (less where the run is shorter)
      notice-30, -5   the same, 30 s and 5 s before
      sigterm         SIGTERM to the process
      sigterm-group   SIGTERM to its whole group, loader workers included
      eval            SIGTERM in the middle of an evaluation
      torn            the newest checkpoint is damaged between two attempts
      store           the store is gone when the last save is made
      two             an attempt that was thought dead wakes up
      full-disk       the disk is full when the last save is made
      clock           the clock jumps between two attempts (needs libfaketime)

    \b
    Examples:
      holdfast drill -- python train.py --steps 200
      holdfast drill --scenario kill --scenario torn --times 10 -- python train.py
      holdfast drill --json -- python train.py | jq .passed

    \b
    Exit codes: 0 all verdicts are good (skipped ones are named); 1 one is not; 2 wrong usage; 130 interrupted.

    \b
    JSON keys: passed, command, deterministic, tolerance, steps, run_s, seed, folder, took_s, verdicts[scenario, status, faults,
      notes, interruptions, exit_codes, same_state, lost_steps, notice_to_durable_s, first_step_s, took_s].
    """
    import os
    import signal
    import time

    import msgspec

    from holdfast.core.clock import SystemClock
    from holdfast.drill.conduct import DrillOptions, conduct

    options = DrillOptions(
        scenarios=tuple(scenario or ()), times=times, tolerance=tolerance, keep=keep, here=here,
        seed=int(time.time()) if seed is None else seed,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with _progress() as told:
            report = conduct(command, options, clock=SystemClock(), environment=os.environ, told=told)
    except KeyboardInterrupt:
        typer.echo("holdfast: interrupted; nothing of the drill is left", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        print_json({"passed": report.passed, **msgspec.to_builtins(report)})
    else:
        _print(report)
    raise typer.Exit(0 if report.passed else 1)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _progress() -> Iterator[Callable[[Stage], None]]:
    """A bar on a terminal, otherwise one line for each stage; on standard error."""

    def plain(stage: Stage) -> None:
        if stage.done < stage.total:
            typer.echo(f"holdfast: {stage.done + 1}/{stage.total} {stage.doing}{_left(stage)}", err=True)

    if not sys.stderr.isatty():
        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage: bar.update(
            task, completed=stage.done, total=stage.total, description=stage.doing + _left(stage)
        )


def _left(stage: Stage) -> str:
    return f" (about {format_duration(round(stage.left_s))} left)" if stage.left_s else ""


def _print(report: DrillReport) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(_table(report))
    for verdict in report.verdicts:
        for fault in verdict.faults:
            console.print(Text(f"✗ {verdict.scenario}: {fault}", style="red"), soft_wrap=True)
    for verdict in report.verdicts:
        for note in verdict.notes:
            console.print(Text(f"  {verdict.scenario}: {note}", style="dim"), soft_wrap=True)
    count = sum(verdict.interruptions for verdict in report.verdicts)
    took = f"{report.steps} steps, {count} interruptions, {format_duration(report.took_s)}, --seed {report.seed}"
    verdict_text = Text("Passed", "bold green") if report.passed else Text("FAILED", "bold red")
    console.print(verdict_text + Text(f" ({took})"), soft_wrap=True)
    if report.folder is not None:
        console.print(f"Stores and logs: {report.folder}", soft_wrap=True)


def _table(report: DrillReport) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for title in ("scenario", "verdict", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("struck", "steps\nlost", "notice →\ndurable", "first\nstep"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("exit codes")
    for verdict in report.verdicts:
        table.add_row(*_row(verdict, report))
    return table


def _row(verdict: Verdict, report: DrillReport) -> list[str]:
    style = {"passed": "[green]✓ passed[/]", "failed": "[bold red]✗ FAILED[/]", "skipped": "[yellow]- skipped[/]"}
    same = "the same bits" if report.tolerance == 0 else "the same within tolerance"
    state = {True: same, False: "DIFFERENT", None: _NOTHING}[verdict.same_state]
    return [
        verdict.scenario, style[verdict.status], state, str(verdict.interruptions or _NOTHING), str(verdict.lost_steps),
        _seconds(verdict.notice_to_durable_s), _seconds(verdict.first_step_s),
        " ".join(map(str, verdict.exit_codes)) or _NOTHING,
    ]  # fmt: skip


def _seconds(value_s: float | None) -> str:
    return _NOTHING if value_s is None else format_duration(value_s)
