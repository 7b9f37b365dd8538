"""`holdfast checkpoints …`: look at a run's checkpoints, prove that they are whole, go back, fork, remove.

What is asked for goes to standard output, as a table for people or as JSON (`--json`); questions, progress and remarks go to
standard error. Nothing that takes something away happens before a yes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.checkpoint_exchange import export_command, import_command
from holdfast.cli.checkpoint_pins import unpin_command
from holdfast.cli.checkpoint_promote import promote_command
from holdfast.cli.checkpoint_tables import print_details, print_json, print_listing, print_report
from holdfast.cli.terminal import STEP_HELP, DryRun, Json, Url, Yes, ask_first, opened_stores, progress_bar
from holdfast.core.config import format_bytes
from holdfast.core.errors import StoreError, UsageError

if TYPE_CHECKING:
    from holdfast.checkpoint.format import CheckpointRef
    from holdfast.checkpoint.runs.rollback import Dropping

__all__ = ["EXIT_UNKNOWN", "EXIT_UNSOUND", "checkpoints_app"]

EXIT_UNSOUND = 1
"""A checkpoint is missing bytes or has altered ones."""
EXIT_UNKNOWN = 3
"""The store did not answer or did not allow it: nothing is known about the bytes."""

checkpoints_app = typer.Typer(
    help="Look at a run's checkpoints, verify them, go back to one, fork a run, export, import, remove, unpin.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@checkpoints_app.command("ls")
def ls(url: Url, json: Json = False) -> None:
    """List the checkpoints that a run retains.

    FREES is what the store would get back if that one were dropped: checkpoints share the bytes that did not change between them.

    \b
    Examples:
      holdfast checkpoints ls s3://bucket/runs/gpt
      holdfast checkpoints ls ./runs/train --json | jq '.checkpoints[-1].step'

    \b
    JSON keys: url, run_id, name, created_unix_s, head, attempt, generation, finished, removed, stored_bytes,
      unreached_bytes, altered, forks[target, step, checkpoint, pin], and checkpoints[name, step, epoch, generation,
      attempt, unix_s, age_s, total_bytes, own_bytes, home], oldest first.
    """
    from holdfast.checkpoint.runs.inspect import list_checkpoints
    from holdfast.core.clock import SystemClock

    with opened_stores() as open_home:
        listing = list_checkpoints(open_home(url), clock=SystemClock())
    if json:
        print_json(listing)
    else:
        print_listing(listing)


@checkpoints_app.command("show")
def show(
    url: Url, step: Annotated[str, typer.Option(metavar="STEP", help=STEP_HELP)] = "latest", json: Json = False
) -> None:
    """Show one checkpoint: its metadata, its arrays, its objects, and what changed since the one before.

    \b
    Examples:
      holdfast checkpoints show s3://bucket/runs/gpt
      holdfast checkpoints show ./runs/train --step 1200 --json | jq .metadata.learning_rates

    \b
    JSON keys: url, newest, checkpoint (as in ls), metadata, arrays[name, dtype, shape, size_bytes, library],
      objects[key, home, size_bytes, live_bytes], total_bytes, new_bytes, shared_bytes, borrowed_bytes, previous,
      changes[path, before, now].
    """
    from holdfast.checkpoint.runs.inspect import show as look
    from holdfast.core.clock import SystemClock

    with opened_stores() as open_home:
        details = look(open_home(url), step, open_home=open_home, clock=SystemClock())
    if json:
        print_json(details)
    else:
        print_details(details)


@checkpoints_app.command("verify")
def verify(
    url: Url,
    step: Annotated[
        str | None, typer.Option(metavar="STEP", help=STEP_HELP, show_default="every retained checkpoint")
    ] = None,
    json: Json = False,
) -> None:
    """Read every byte of a run's checkpoints and check every hash.

    \b
    Examples:
      holdfast checkpoints verify s3://bucket/runs/gpt
      holdfast checkpoints verify ./runs/train --step latest

    \b
    Exit codes:
      0  everything is whole
      1  bytes are missing or altered; restore passes such checkpoints over
      2  a wrong argument, or no such run
      3  the store did not answer or refused: nothing is known about the bytes

    \b
    JSON keys: url, head, good, read_bytes, altered (records of the run itself), checkpoints[name, step, generation,
      status (ok, missing, altered, dropped), problems[kind, key, home, detail, arrays]].
    """
    from holdfast.checkpoint.runs.verify import verify as check

    try:
        with opened_stores() as open_home, progress_bar("Verifying") as progress:
            report = check(open_home(url), step, open_home=open_home, progress=progress)
    except StoreError as error:
        typer.echo(f"holdfast: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(EXIT_UNKNOWN) from None
    if json:
        print_json(report)
    else:
        print_report(report)
    if not report.good:
        raise typer.Exit(EXIT_UNSOUND)


@checkpoints_app.command("rollback")
def rollback(
    url: Url,
    step: Annotated[str, typer.Option("--to", metavar="STEP", help=STEP_HELP)],
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Go back: make an older checkpoint the newest, and remove the later ones.

    The checkpoint is verified first. A trainer that runs on it is fenced: it stops at its next save (exit code 76). The next start
    goes on from the older checkpoint. To keep the later ones as well, fork instead.

    \b
    Examples:
      holdfast checkpoints rollback s3://bucket/runs/gpt --to 1200 --dry-run
      holdfast checkpoints rollback ./runs/train --to 1200 --yes

    \b
    JSON keys: url, target, dropped[], freed_bytes, was_finished, head (0: nothing was changed), deleted_objects.
    """
    from holdfast.checkpoint.runs.rollback import plan_rollback
    from holdfast.checkpoint.runs.rollback import rollback as go_back
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token

    with opened_stores() as open_home:
        store = open_home(url)
        plan = plan_rollback(store, step)
        if not dry_run:
            _say(f"{plan.url}: back to {_named(plan.target)}. {_loss(plan)} {_FENCES}")
            ask_first(yes)
        with progress_bar("Verifying") as progress:
            done = go_back(
                store, step, open_home=open_home, clock=SystemClock(), tokens=random_token, dry_run=dry_run,
                progress=progress,
            )  # fmt: skip
    if json:
        print_json(done)
    elif dry_run:
        typer.echo(
            f"{done.url}: {_named(done.target)} verifies. {_loss(done, would=True)} {_FENCES} Nothing was changed."
        )
    else:
        typer.echo(f"{done.url}: the next start goes on from {_named(done.target)}.")


@checkpoints_app.command("fork")
def fork(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The run to begin with.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The new run's URL; nothing may be there yet.")],
    step: Annotated[str, typer.Option("--at", metavar="STEP", help=STEP_HELP)] = "latest",
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy the bytes, so that the new run stands alone (other bucket, cloud or disk)."),
    ] = False,
    json: Json = False,
) -> None:
    """Begin a new run with a checkpoint of another one.

    Without --copy nothing is copied: the new run refers to the source's bytes, and the source, which may go on training, keeps them
    for as long as the new run needs them. Do not move or delete the source by hand then; `holdfast checkpoints rm` knows its forks.

    \b
    Examples:
      holdfast checkpoints fork s3://bucket/runs/gpt s3://bucket/runs/gpt-lower-lr --at 1200
      holdfast checkpoints fork s3://bucket/runs/gpt ./runs/debug --copy

    \b
    JSON keys: source, target, mode, checkpoint, homes[] (runs that are referred to), copied_bytes.
    """
    from holdfast.checkpoint.runs.fork import fork as begin
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token

    with opened_stores() as open_home, progress_bar("Copying") as progress:
        forked = begin(
            source, target, step, "copy" if copy else "reference", open_home=open_home, clock=SystemClock(),
            tokens=random_token, progress=progress,
        )  # fmt: skip
    if json:
        print_json(forked)
    else:
        how = f"{format_bytes(forked.copied_bytes)} copied" if copy else f"referring to {', '.join(forked.homes)}"
        typer.echo(f"{forked.target}: begins with {_named(forked.checkpoint)} of {forked.source}, {how}.")


@checkpoints_app.command("rm")
def rm(
    url: Url,
    step: Annotated[
        str | None,
        typer.Option(metavar="STEP", help=f"Only this checkpoint. {STEP_HELP}", show_default="the whole run"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also when forks refer to the run: they lose what they borrowed.")
    ] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Remove a run with all its checkpoints, events and logs, or one checkpoint of it.

    A trainer that runs on it is fenced. Of a removed run a small record stays (run.json and one head), so that nothing that was
    thought dead brings it back to life. Repeat the command to finish a removal that was cut short.

    \b
    Examples:
      holdfast checkpoints rm s3://bucket/runs/old --dry-run
      holdfast checkpoints rm ./runs/train --step 400 --yes

    \b
    JSON keys, whole run: url, objects, removed_bytes, kept_objects, forks[], head (0: nothing was changed).
    JSON keys, one checkpoint: as in rollback.
    """
    from holdfast.checkpoint.runs import remove as removing
    from holdfast.checkpoint.runs import rollback as dropping
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token

    if step is not None and force:
        raise UsageError(
            "--force is for whole runs: a single checkpoint that forks refer to is dropped, and kept for them"
        )
    with opened_stores() as open_home:
        store = open_home(url)
        outcome: Any
        if step is not None:
            outcome = dropping.plan_drop(store, step)
            _say(f"{outcome.url}: remove {_named(outcome.dropped[0])}. {_loss(outcome)} {_FENCES}")
        else:
            outcome = removing.plan_removal(store, open_home=open_home, force=force)
            _say(
                f"{outcome.url}: remove the whole run, {outcome.objects} objects, {format_bytes(outcome.removed_bytes)}. {_FENCES}"
            )
            if outcome.forks:
                _say(f"Forks refer to it: {', '.join(outcome.forks)}")
        if not dry_run:
            ask_first(yes)
            if step is not None:
                outcome = dropping.drop(store, step, open_home=open_home, clock=SystemClock(), tokens=random_token)
            else:
                with progress_bar("Removing", unit="objects") as progress:
                    outcome = removing.remove(
                        store,
                        open_home=open_home,
                        clock=SystemClock(),
                        tokens=random_token,
                        force=force,
                        progress=progress,
                    )
    if json:
        print_json(outcome)
    elif dry_run:
        typer.echo("Nothing was changed.")
    else:
        typer.echo(f"{outcome.url}: removed.")
        if step is None and outcome.kept_objects:
            typer.echo(f"{outcome.kept_objects} objects stay, because {', '.join(outcome.forks)} refers to them.")


checkpoints_app.command("export")(export_command)
checkpoints_app.command("import")(import_command)
checkpoints_app.command("unpin")(unpin_command)
checkpoints_app.command("promote")(promote_command)


# ---- asking and telling

_FENCES = "A trainer that is running on it stops at its next save."


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _named(ref: CheckpointRef | None) -> str:
    return "no checkpoint" if ref is None else f"step {ref.step} (epoch {ref.epoch}, {format_bytes(ref.total_bytes)})"


def _loss(dropping: Dropping, *, would: bool = False) -> str:
    if not dropping.dropped:
        what = "No later checkpoint is removed."
    else:
        steps = ", ".join(str(ref.step) for ref in dropping.dropped)
        verb = "would be removed" if would else "are removed"
        what = f"The checkpoints of step {steps} {verb}, which frees {format_bytes(dropping.freed_bytes)}."
        if len(dropping.dropped) == 1:
            what = what.replace("The checkpoints", "The checkpoint").replace(" are ", " is ")
    return f"{what} The run is no longer finished." if dropping.was_finished and dropping.target else what
