"""`holdfast run -- CMD…`: start a command on this machine, and start it again when it was preempted or crashed."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

if TYPE_CHECKING:
    from holdfast.core.events import Event

__all__ = ["run"]


def run(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="The command and its arguments.")],
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where the run lives (s3://bucket/runs/gpt, ./runs/gpt), for scripts that name no URL."
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
) -> None:
    """Run a command, and run it again when it was preempted or crashed.

    Works with any command. One that uses holdfast resumes where it saved, and reports its progress: after two attempts
    in a row without a new checkpoint the run stops, because something is wrong that another start would not mend.

    \b
    Examples:
      holdfast run -- python train.py --lr 3e-4
      holdfast run --url s3://bucket/runs/gpt -- torchrun --nproc-per-node 8 train.py
      holdfast run --grace "100 s" --max-preemptions 20 -- python train.py

    \b
    Exit codes: the command's own (128 + n when signal n ended it), of which
      0    done
      2    a wrong argument, or another run than expected: starting again would fail again
      75   preempted, and the state is saved: start it again
      76   another attempt owns the run now: do not start it again
      77   no progress: somebody must look
      130  interrupted from the keyboard (a second Ctrl-C kills at once)

    \b
    Signals: SIGTERM is passed to the command's main process, which has the grace period to save. In a shell script, start
    the training with `exec`, so that the training is that process.
    """
    import random

    from holdfast.agent.restart import RunOptions, run_command
    from holdfast.core.clock import SystemClock
    from holdfast.core.config import parse_duration_s
    from holdfast.core.errors import UsageError
    from holdfast.core.events import NullSink
    from holdfast.policy.restart import RestartLimits

    limits = RestartLimits(
        max_errors=max_errors,
        max_errors_total=max_errors_total,
        max_preemptions=max_preemptions,
        no_progress_limit=no_progress_limit,
    )
    options = RunOptions(url=url, fresh=fresh, grace_s=parse_duration_s(grace), limits=limits)
    try:
        reported = report.open("ab") if report else None
    except OSError as error:
        raise UsageError(f"cannot write the report to {str(report)!r}: {error.strerror}") from None
    sink = _JsonLines(reported) if reported else NullSink()
    try:
        exit_code = run_command(command, options, clock=SystemClock(), sink=sink, say=_say, rng=random.Random())
    finally:
        if reported:
            reported.close()
    raise typer.Exit(exit_code)


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
