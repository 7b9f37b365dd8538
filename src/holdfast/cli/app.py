"""The `holdfast` command: puts the commands together and turns errors into one line and an exit code.

It must start fast, so nothing here or at the top of a command's module imports more than typer and `core`; what a command
needs, its function imports. Typer's rich help is off: it doubled the time of `holdfast --help`.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from holdfast.cli.checkpoints import checkpoints_app
from holdfast.cli.conformance import conformance
from holdfast.cli.drill import drill
from holdfast.cli.explain_save import explain_save
from holdfast.cli.launch import controller, launch
from holdfast.cli.logs import logs
from holdfast.cli.machine import machine
from holdfast.cli.notices import notices_app
from holdfast.cli.notify import notify
from holdfast.cli.plan import plan
from holdfast.cli.report import report
from holdfast.cli.run import run
from holdfast.cli.simulate import simulate
from holdfast.cli.status import cancel, cost, down, status
from holdfast.cli.sweep_leaks import sweep_leaks
from holdfast.core.contract import EXIT_USAGE
from holdfast.core.errors import HoldfastError, RunConflict, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="holdfast",
    help="Train on spot capacity as if it never went away.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"holdfast {version('holdfast')}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# All commands, in the order of the help; a group of commands is added with `app.add_typer`.
app.command(
    "run",
    options_metavar="[OPTIONS] --",
    # From its first word on, the rest of the line is the user's command, options included.
    context_settings={"allow_interspersed_args": False},
    no_args_is_help=True,
)(run)
app.command(
    "drill",
    options_metavar="[OPTIONS] --",
    context_settings={"allow_interspersed_args": False},
    no_args_is_help=True,
)(drill)
app.command("logs")(logs)
app.command("report")(report)
app.add_typer(checkpoints_app, name="checkpoints")
app.command("explain-save")(explain_save)
app.add_typer(notices_app, name="notices")
app.command("notify")(notify)
app.command("plan")(plan)
app.command("simulate")(simulate)
app.command("launch")(launch)
app.command("status")(status)
app.command("cost")(cost)
app.command("cancel")(cancel)
app.command("down")(down)
app.command("controller")(controller)
app.command("sweep-leaks")(sweep_leaks)
app.command("conformance")(conformance)
app.command("machine")(machine)


def main() -> NoReturn:
    """The entry point. Exit codes: the command's own; 2 for a wrong argument or another run than expected; else 1."""
    try:
        app(prog_name="holdfast")
    except HoldfastError as error:
        sys.stderr.write(f"holdfast: {' '.join(str(error).split())}\n")
        sys.exit(EXIT_USAGE if isinstance(error, (UsageError, RunConflict)) else 1)
    sys.exit(0)
