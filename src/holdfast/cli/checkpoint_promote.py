"""`holdfast checkpoints promote`: what a dead trainer left on this machine's disk, into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.checkpoint_tables import print_json
from holdfast.cli.terminal import DryRun, Json, Url, opened_stores
from holdfast.core.config import format_bytes

__all__ = ["promote_command"]


def promote_command(
    url: Url,
    local: Annotated[Path, typer.Option("--local", metavar="DIR", help="The folder that the run was given as local=.")],
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Commit the newest checkpoint that a trainer with `local=DIR` left on this machine's disk when it died.

    Needed only when no trainer starts here again: the next one does it by itself. It is done only if the checkpoint continues the
    run, that is, when no other machine has saved a newer one meanwhile. A trainer of the run elsewhere is fenced.

    \b
    Examples:
      holdfast checkpoints promote s3://bucket/runs/gpt --local /mnt/nvme --dry-run
      holdfast checkpoints promote s3://bucket/runs/gpt --local /mnt/nvme

    \b
    JSON keys: url, step (null: there is nothing to promote), checkpoint, total_bytes, promoted.
    """
    from holdfast.checkpoint.runs.promote_staged import find_staged, promote_staged
    from holdfast.checkpoint.tier import LocalTier
    from holdfast.core.clock import SystemClock
    from holdfast.core.errors import UsageError
    from holdfast.core.ids import random_token

    if not local.is_dir():
        raise UsageError(f"{local} is not a folder on this machine; name the one that the run was given as local=")
    with opened_stores() as open_home:
        store = open_home(url)
        if dry_run:
            ref = find_staged(store, LocalTier(local))
        else:
            ref = promote_staged(store, LocalTier(local), open_home=open_home, clock=SystemClock(), tokens=random_token)
    promoted = ref is not None and not dry_run
    if json:
        print_json(
            {
                "url": store.url,
                "step": ref.step if ref else None,
                "checkpoint": ref.name if ref else None,
                "total_bytes": ref.total_bytes if ref else 0,
                "promoted": promoted,
            }
        )
    elif ref is None:
        typer.echo(f"{store.url}: nothing in {local} continues this run; it has what there is.")
    else:
        verb = "is now" if promoted else "would become"
        typer.echo(f"{store.url}: step {ref.step} ({format_bytes(ref.total_bytes)}) {verb} the newest checkpoint.")
