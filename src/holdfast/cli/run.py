"""`holdfast run -- CMD…`: start a command on this machine, and start it again when it was preempted or crashed."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from holdfast.cli.care_options import (
    HangAfter,
    HangLimit,
    Market,
    MaxCost,
    MaxHours,
    NoLogs,
    Notice,
    OnExit,
    Price,
    WaitGpu,
    WaitGpuLimit,
    care_from,
)

if TYPE_CHECKING:
    from holdfast.core.events import Event

__all__ = ["run"]


def run(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="The command and its arguments.")],
    url: Annotated[
        str | None,
        typer.Option(
            "--run",
            "--url",
            metavar="URL",
            help="Where the run lives (s3://bucket/runs/gpt, ./runs/gpt): for scripts that name no URL, and for the agent's own "
            "record and the logs. Default: $HOLDFAST_RUN.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew instead of resuming; restarts after that resume as usual.")
    ] = False,
    max_errors: Annotated[
        int, typer.Option(metavar="N", min=0, help="Restarts after errors in a row; progress refills them.")
    ] = 3,
    max_errors_total: Annotated[int, typer.Option(metavar="N", min=0, help="Restarts after errors in all.")] = 30,
    max_preemptions: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Restarts after preemptions in all.", show_default="any number"),
    ] = None,
    max_infrastructure: Annotated[
        int, typer.Option(metavar="N", min=0, help="Restarts after failures of the machine in a row (a lost GPU).")
    ] = 3,
    no_progress_limit: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Attempts in a row without a new checkpoint that end the run; 0: any number."
        ),
    ] = 2,
    grace: Annotated[
        str, typer.Option(metavar="DURATION", help="From SIGTERM until what still runs is killed.")
    ] = "30 s",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append what happens to FILE, one JSON object a line.")
    ] = None,
    mirror: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder that the command writes: restored before the start, kept under the run's URL. For scripts that do not "
            "use holdfast.",
        ),
    ] = None,
    mirror_include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Mirror only what matches; may be given several times.", show_default="everything"
        ),
    ] = None,
    notice: Notice = None,
    no_logs: NoLogs = False,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
    price: Price = None,
    market: Market = None,
    on_exit: OnExit = None,
    hang_after: HangAfter = None,
    hang_limit: HangLimit = None,
    wait_gpu: WaitGpu = False,
    wait_gpu_limit: WaitGpuLimit = "5 min",
) -> None:
    """Run a command, and run it again when it was preempted or crashed.

    Works with any command. One that uses holdfast resumes where it saved, and reports its progress: after two attempts
    in a row without a new checkpoint the run stops, because something is wrong that another start would not mend.

    \b
    Examples:
      holdfast run -- python train.py --lr 3e-4
      holdfast run --run s3://bucket/runs/gpt -- torchrun --nproc-per-node 8 train.py
      holdfast run --grace "100 s" --max-preemptions 20 -- python train.py
      holdfast run --run s3://bucket/runs/bert --mirror out -- python train_with_trainer.py --output_dir out
      holdfast run --max-hours 12 --on-exit "sudo shutdown -h now" --wait-gpu -- python train.py

    \b
    Exit codes: the command's own (128 + n when signal n ended it), of which
      0    done
      2    a wrong argument, or another run than expected: starting again would fail again
      69   the machine has failed (no GPU, a lost GPU): start it on another one
      75   preempted, and the state is saved: start it again
      76   another attempt owns the run now: do not start it again
      77   no progress: somebody must look
      78   the time or the money of --max-hours or --max-cost is used up
      130  interrupted from the keyboard (a second Ctrl-C kills at once)

    \b
    Signals: SIGTERM is passed to the command's main process, which has the grace period to save. In a shell script, start
    the training with `exec`, so that the training is that process.
    """
    import os
    import random

    from holdfast.agent.logs import LogLimits
    from holdfast.agent.mirror import MirrorOptions
    from holdfast.agent.restart import RunOptions, run_command
    from holdfast.core.clock import SystemClock
    from holdfast.core.config import parse_duration_s
    from holdfast.core.contract import ENV_MARKET, ENV_PRICE
    from holdfast.core.errors import UsageError
    from holdfast.core.events import NullSink
    from holdfast.policy.restart import RestartLimits
    from holdfast.store.open import open_store

    limits = RestartLimits(
        max_errors=max_errors,
        max_errors_total=max_errors_total,
        max_preemptions=max_preemptions,
        max_infrastructure=max_infrastructure,
        no_progress_limit=no_progress_limit,
    )
    environment = dict(os.environ)
    environment |= {ENV_PRICE: f"{price:g}"} if price is not None else {}
    environment |= {ENV_MARKET: market} if market is not None else {}
    care = care_from(
        max_hours=max_hours,
        max_cost=max_cost,
        price=price if price is not None else _price_of(environment.get(ENV_PRICE)),
        on_exit=on_exit,
        hang_after=hang_after,
        hang_limits=hang_limit or [],
        wait_gpu=wait_gpu,
        wait_gpu_limit=wait_gpu_limit,
        notice=notice,
    )
    options = RunOptions(
        url=url,
        fresh=fresh,
        grace_s=parse_duration_s(grace),
        limits=limits,
        care=care,
        logs=None if no_logs else LogLimits(),
        mirror=None if mirror is None else MirrorOptions(folder=mirror, include=tuple(mirror_include or ())),
    )
    try:
        reported = report.open("ab") if report else None
    except OSError as error:
        raise UsageError(f"cannot write the report to {str(report)!r}: {error.strerror}") from None
    sink = _JsonLines(reported) if reported else NullSink()
    try:
        exit_code = run_command(
            command,
            options,
            clock=SystemClock(),
            sink=sink,
            say=_say,
            rng=random.Random(),
            environment=environment,
            open_store=open_store,
        )
    finally:
        if reported:
            reported.close()
    raise typer.Exit(exit_code)


def _price_of(text: str | None) -> float | None:
    """What the launcher has said, if it can be read; a limit that needs it is refused later where it cannot."""
    try:
        price = float(text or "nan")
    except ValueError:
        return None
    return price if 0 <= price < float("inf") else None


def _say(line: str) -> None:
    # Standard output belongs to the command. A terminal that has gone away must not end the run.
    with suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class _JsonLines:
    """Appends events to a file as they come; a full disk costs the report, not the run."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def emit(self, event: Event) -> None:
        import msgspec

        with suppress(OSError):
            self._file.write(msgspec.json.encode(event) + b"\n")
            self._file.flush()
