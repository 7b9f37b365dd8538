"""`holdfast checkpoints export` and `import`: to and from the files of other tools."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.checkpoint_tables import print_json
from holdfast.cli.terminal import STEP_HELP, Json, Url, opened_stores, progress_bar
from holdfast.core.config import format_bytes

__all__ = ["export_command", "import_command"]


class _Format(StrEnum):
    safetensors = "safetensors"
    torch = "torch"
    dcp = "dcp"


class _AnyFormat(StrEnum):
    auto = "auto"
    safetensors = "safetensors"
    torch = "torch"
    dcp = "dcp"


def export_command(
    url: Url,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to make, or for dcp the folder.")],
    format: Annotated[
        _Format,
        typer.Option(help="safetensors; torch: a file for torch.load; dcp: a folder for torch.distributed.checkpoint."),
    ] = _Format.safetensors,
    step: Annotated[str, typer.Option(metavar="STEP", help=STEP_HELP)] = "latest",
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this tracked object; may be repeated.")
    ] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="With one --only: names as in the object's own state_dict, without its name.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint as a file that other tools read.

    All tracked objects are written, without the loop's own state. Every byte is verified on the way, and OUT appears only when
    it is whole. safetensors is written with bounded memory and without torch; the other formats take the state's size of memory.

    \b
    Examples:
      holdfast checkpoints export s3://bucket/runs/gpt gpt.safetensors --only model --bare
      holdfast checkpoints export ./runs/train train.pt --format torch --step 1200

    \b
    JSON keys: url, checkpoint, path, format, names[], arrays, array_bytes, file_bytes, aliases (tied arrays that the
      safetensors file holds under another name).
    """
    from holdfast.checkpoint.exchange.export import export_checkpoint
    from holdfast.core.ids import random_token

    with opened_stores() as open_home, progress_bar("Exporting") as progress:
        done = export_checkpoint(
            open_home(url), out, format.value, step, only=only or (), bare=bare, force=force,
            open_home=open_home, tokens=random_token, progress=progress,
        )  # fmt: skip
    if json:
        print_json(done)
        return
    tied = f" (tied ones once: {_listed(sorted(done.aliases))})" if done.aliases else ""
    typer.echo(
        f"{done.path}: step {done.checkpoint.step} of {done.url} as {done.format}: {_listed(done.names)}, "
        f"{done.arrays} arrays{tied}, {format_bytes(done.file_bytes)}."
    )


def import_command(
    url: Url,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The file or folder to read.")],
    format: Annotated[_AnyFormat, typer.Option(help="What it is; auto looks into it.")] = _AnyFormat.auto,
    step: Annotated[int, typer.Option(metavar="N", min=0, help="Where the loop's count of steps begins.")] = 0,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the script tracks it as; or which of the file's objects to take.",
            show_default="as in the file, else model",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The entry of a torch or dcp file that holds the state, like state_dict."),
    ] = None,
    json: Json = False,
) -> None:
    """Begin a new run with the arrays in a file of another tool.

    A script that tracks the same names at URL then starts from them: from the beginning of its loop, with everything else that it
    tracks as it made it. Pickles are never run: torch files are read as weights only.

    \b
    Examples:
      holdfast checkpoints import ./runs/finetune pretrained.safetensors
      holdfast checkpoints import s3://bucket/runs/gpt old.ckpt --key state_dict --name model --step 12000

    \b
    JSON keys: url, run_id, checkpoint, source, format, names[], arrays, array_bytes, sent_bytes, left_out[].
    """
    from holdfast.checkpoint.exchange.adopt import import_checkpoint
    from holdfast.core.clock import SystemClock
    from holdfast.core.ids import random_token

    with opened_stores() as open_home, progress_bar("Importing") as progress:
        done = import_checkpoint(
            open_home(url), source, format.value, step=step, name=name, key=key, clock=SystemClock(),
            tokens=random_token, progress=progress,
        )  # fmt: skip
    if json:
        print_json(done)
        return
    typer.echo(
        f"{done.url}: begins at step {done.checkpoint.step} with {_listed(done.names)} from {done.source} ({done.format}), "
        f"{done.arrays} arrays, {format_bytes(done.array_bytes)}."
    )
    if done.left_out:
        typer.echo(f"Left out of it: {_listed(done.left_out)}.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
