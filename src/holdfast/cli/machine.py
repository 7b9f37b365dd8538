"""`holdfast machine`: what the bootstrap script of a fresh machine ends in; not for people."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

__all__ = ["machine"]


def machine(
    url: Annotated[str, typer.Option("--run", "--url", metavar="URL", help="Where the run lives.")],
    launch: Annotated[int, typer.Option(metavar="N", min=1, help="The launch that this machine has come of.")],
    end_command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help='Run once when this machine\'s part is over, whatever ended it: "shutdown -h now" where that terminates. In the '
            "rehearsal cloud only that cloud's own command is ever run.",
        ),
    ] = None,
) -> None:
    """Work as one machine of a run: claim the launch, set up, train, hand over, end.

    Started by the script that `holdfast launch` gives a machine. It does nothing without a grant under the run's URL, stops at the
    grant's end, and runs the end command however it ends.

    \b
    Exit codes: those of `holdfast run`; 143 when told to stop before the work began.
    """
    import os
    import random

    from holdfast.agent.machine.machine import run_machine
    from holdfast.core.clock import SystemClock
    from holdfast.store.open import open_store

    exit_code = run_machine(
        url,
        launch,
        end_command=end_command,
        environment=os.environ,
        clock=SystemClock(),
        open_store=open_store,
        rng=random.Random(),
        say=_say,
    )
    raise typer.Exit(exit_code)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
