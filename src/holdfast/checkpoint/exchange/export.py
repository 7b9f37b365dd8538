"""From a checkpoint to a file that other tools read: safetensors, `torch.save`, or torch's distributed checkpoint (DCP).

    head → root → part → Outgoing (exchange.py) → bytes, each block verified → a temporary neighbour → fsync → the output's own name

Whoever looks at the output's name sees nothing, or all of it. safetensors is written in a stream with bounded memory and without
torch; the other two are made by torch itself, which takes the whole state in host memory (torch_files.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.exchange.note import FORMATS, NOTE_KEY, Format, Outgoing, outgoing, write_note
from holdfast.checkpoint.exchange.safetensors_file import encode_header, file_order
from holdfast.checkpoint.format import CHUNK_BYTES, CheckpointRef
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import CheckpointReader, Target, open_checkpoint, read_threads
from holdfast.checkpoint.retain import StoreOpener
from holdfast.checkpoint.runs.inspect import find_checkpoint, read_run
from holdfast.checkpoint.runs.verify import Progress
from holdfast.core.errors import NotFound, RunConflict, UsageError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.store.posix import fsync_folder, opened, translated

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Exported", "export_checkpoint", "torch_files"]

_WINDOW_BYTES = 64 << 20
"""How much of a state is in memory at once while it is streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written. `aliases` are names of tied arrays that the file holds under another name (safetensors only);
    `array_bytes` are those of the arrays, `file_bytes` all that lies at `path`."""

    url: str
    checkpoint: CheckpointRef
    path: str
    format: Format
    names: tuple[str, ...]
    arrays: int
    array_bytes: int
    file_bytes: int
    aliases: dict[str, str]


def export_checkpoint(
    store: Store,
    out: Path,
    format: Format = "safetensors",
    which: str | int = "latest",
    *,
    only: Sequence[str] = (),
    bare: bool = False,
    force: bool = False,
    open_home: StoreOpener,
    tokens: TokenSource,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write one checkpoint's tracked objects (those called `only`, or all) to `out`; `which` as in `find_checkpoint`.

    Arrays are called like the way to them, `model.layer.weight`; with `bare` (one object only) without the object's name. What is
    already at `out` stays unless `force` says otherwise. Raises UsageError, UnsupportedState for what the format cannot hold,
    IntegrityError when bytes do not verify (nothing is left at `out` then), and what the store raises.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    _check_output(out, force=force, folder=format == "dcp")
    head = read_run(store).head
    ref = find_checkpoint(head, which, url=store.url)
    try:
        reader = open_checkpoint(store, ref, open_home)
        chosen = outgoing(reader, only, bare=bare)
        with (
            ThreadPoolExecutor(read_threads(store), thread_name_prefix="holdfast-read") as pool,
            _new_output(out, force=force, folder=format == "dcp", tokens=tokens) as temporary,
        ):
            if format == "safetensors":
                _write_safetensors(temporary, chosen, reader, pool, progress)
            else:
                torch_files("export to torch's formats").write(temporary, format, chosen, reader, pool, progress)
    except NotFound as error:
        _still_retained(store, ref, error)
        raise
    sizes = [path.stat().st_size for path in ([out] if out.is_file() else out.iterdir())]
    return Exported(
        url=store.url, checkpoint=ref, path=str(out), format=format, names=tuple(chosen.note.state),
        arrays=len(chosen.arrays), array_bytes=chosen.total_bytes, file_bytes=sum(sizes),
        aliases=chosen.aliases if format == "safetensors" else {},
    )  # fmt: skip


def torch_files(purpose: str) -> ModuleType:
    """The module that knows torch's own formats, imported only when one of them is asked for."""
    try:
        from holdfast.checkpoint.exchange import torch_files as module
    except ImportError as error:
        raise UsageError(
            f"to {purpose}, torch must be installed (pip install 'holdfast[torch]'); safetensors needs no torch: {error}"
        ) from None
    return module


def _still_retained(store: Store, ref: CheckpointRef, error: NotFound) -> None:
    """The source may train on and drop the checkpoint while it is read: that is no damage."""
    head = read_truth(store).head
    if head is None or all(other.name != ref.name for other in head.checkpoints):
        raise RunConflict(
            f"{store.url}: the checkpoint of step {ref.step} was dropped while it was exported; choose a newer one"
        ) from error


# ---- safetensors


def _write_safetensors(
    path: Path, chosen: Outgoing, reader: CheckpointReader, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    names = file_order({name: array.dtype for name, array in chosen.arrays.items()})
    arrays = [(name, chosen.arrays[name]) for name in names]
    # `pt` is what readers of published models look for; an alias line is how other writers say which arrays are tied.
    metadata = chosen.aliases | {"format": "pt", NOTE_KEY: write_note(chosen.note)}
    header = encode_header([(name, array.dtype, array.shape) for name, array in arrays], metadata)
    window = memoryview(bytearray(min(_WINDOW_BYTES, max(1, chosen.total_bytes))))
    done = 0
    progress(0, chosen.total_bytes)
    with translated("writing", path.name, str(path.parent)), path.open("xb") as file:
        file.write(header)
        for pieces in _windows([array for _, array in arrays], len(window)):
            filled = 0
            targets = []
            for array, start, size_bytes in pieces:
                targets.append(Target(array, window[filled : filled + size_bytes], start_byte=start))
                filled += size_bytes
            reader.read(targets, pool)
            file.write(window[:filled])
            done += filled
            progress(done, chosen.total_bytes)


def _windows(arrays: Sequence[Assembled], window_bytes: int) -> Iterator[list[tuple[Assembled, int, int]]]:
    """The arrays' bytes in order, cut as whole arrays are cut into chunks, in groups that fit into the window: each the array,
    where the bytes begin in it, and how many they are."""
    group: list[tuple[Assembled, int, int]] = []
    group_bytes = 0
    for array in arrays:
        for start in range(0, array.nbytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, array.nbytes - start)
            if group and group_bytes + length > window_bytes:
                yield group
                group, group_bytes = [], 0
            group.append((array, start, length))
            group_bytes += length
    if group:
        yield group


# ---- outputs that are whole or absent


def _check_output(out: Path, *, force: bool, folder: bool) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: there is no such folder; make it first")
    if not os.path.lexists(out):
        return
    if folder != out.is_dir():
        raise UsageError(
            f"{out} is {'not ' if folder else ''}a folder; this format makes a {'folder' if folder else 'file'}"
        )
    if not force:
        raise UsageError(f"{out} exists already; choose another name, or replace it with --force (force=True)")
    # Replacing takes away everything that lies in a folder, so it must be what an earlier export made.
    if folder and any(out.iterdir()) and not (out / ".metadata").is_file():
        raise UsageError(f"{out} is a folder with something else in it than a DCP checkpoint; choose another name")


@contextmanager
def _new_output(out: Path, *, force: bool, folder: bool, tokens: TokenSource) -> Iterator[Path]:
    """A path to write to, which becomes `out` when the block is left without an error. Nothing stays behind otherwise."""
    temporary = out.with_name(f".{out.name}.{tokens()}")
    try:
        if folder:
            with translated("making", temporary.name, str(out.parent)):
                temporary.mkdir()
        yield temporary
        with translated("writing", out.name, str(out.parent)):
            _flush(temporary)
            (_publish_folder if folder else _publish_file)(temporary, out, force)
            with opened(os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
                fsync_folder(parent)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make a file, or a folder and the files in it, durable."""
    is_folder = path.is_dir()
    for inner in path.iterdir() if is_folder else ():
        _flush(inner)
    with opened(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
        (fsync_folder if is_folder else os.fsync)(descriptor)


def _publish_file(temporary: Path, out: Path, force: bool) -> None:
    if force:
        temporary.replace(out)
        return
    try:
        os.link(temporary, out)
    except FileExistsError:
        raise UsageError(f"{out} was made by somebody else in the meantime; choose another name") from None


def _publish_folder(temporary: Path, out: Path, force: bool) -> None:
    aside: Path | None = None
    if force and out.exists():
        aside = temporary.with_name(f"{temporary.name}.old")
        out.rename(aside)
    try:
        temporary.rename(out)
    except OSError:
        if aside is not None:
            aside.rename(out)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
