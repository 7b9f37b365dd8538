"""`holdfast checkpoints unpin`: what other runs keep alive in this one, and the end of it."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.checkpoint_tables import print_json, print_pins
from holdfast.cli.terminal import DryRun, Json, Url, Yes, ask_first, opened_stores
from holdfast.core.errors import UsageError

__all__ = ["unpin_command"]


def unpin_command(
    url: Url,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Remove this run's pins; or the pin of this name (pins/….json).",
            show_default="only list",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also when TARGET refers to the run, or cannot be read: it may lose what it borrowed."
        ),
    ] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """List the pins in a run, or remove those of a run that is gone.

    A fork, and a run with a base, put a pin into the run whose bytes they refer to, and those bytes stay there as long as the pin
    counts. Removed with `holdfast checkpoints rm`, they take it back. Deleted by hand, they cannot: their pins stay until they are
    removed here. TARGET is looked at first, and it is refused while there is a run that refers to this one. The bytes go with the
    next sweep: the next save of the run at URL.

    \b
    STATE is one of
      in use     TARGET refers to this run
      released   TARGET does not any more; the next sweep removes the pin by itself
      no target  there is no run at TARGET: deleted by hand, or a folder that this machine does not see
      unknown    TARGET cannot be read now
      altered    the pin itself does not verify; nothing is swept in this run until it is removed

    \b
    Examples:
      holdfast checkpoints unpin s3://bucket/runs/base
      holdfast checkpoints unpin s3://bucket/runs/base s3://bucket/runs/trial-17

    \b
    JSON keys: url, removed, pins[pin, target, checkpoint, step, age_s (of that checkpoint), state, detail]: all of them,
      with TARGET those of it.
    """
    from holdfast.checkpoint.runs import unpin as pins
    from holdfast.core.clock import SystemClock
    from holdfast.store.open import normalise_url

    if target is None and force:
        raise UsageError("--force is for removing: name the TARGET whose pins are to go")
    clock, removed = SystemClock(), False
    with opened_stores() as open_home:
        store = open_home(url)
        lines = pins.list_pins(store, open_home=open_home, clock=clock)
        if target is not None:
            named = target if target.startswith("pins/") else normalise_url(target)
            lines = tuple(pins.select_pins(lines, named, url=store.url))
            if not force:
                pins.refuse_needed(lines, url=store.url)
            if not dry_run:
                for line in lines:
                    typer.echo(f"{store.url}: remove {line.pin}: {line.state}. {line.detail}".rstrip(), err=True)
                ask_first(yes)
                lines, removed = pins.unpin(store, named, open_home=open_home, clock=clock, force=force), True
    if json:
        print_json({"url": store.url, "removed": removed, "pins": lines})
    else:
        print_pins(store.url, lines)
        if target is not None:
            typer.echo(
                "Removed; the next save of the run sweeps what they kept." if removed else "Nothing was changed."
            )
