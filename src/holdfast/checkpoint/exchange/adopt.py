"""A new run that begins with arrays from another tool's file: safetensors, `torch.save`, or a DCP folder.

    the file, checked → Incoming (exchange.py) → claim of an empty URL → chunks, hashes, objects → the first head that names it

Such a checkpoint holds tracked objects, but nothing of a loop: whoever restores it starts the loop from its beginning with these
weights, with the random generators as the script has set them. safetensors needs no torch here; files that can be mapped are never
in memory as a whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from holdfast.checkpoint.exchange.export import torch_files
from holdfast.checkpoint.exchange.note import (
    FORMATS,
    NOTE_FORMAT,
    NOTE_KEY,
    ArrayPath,
    Format,
    Found,
    Incoming,
    IncomingArray,
    Note,
    choose_objects,
    incoming_from_note,
    read_note,
)
from holdfast.checkpoint.exchange.safetensors_file import SafetensorsFile
from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.runs.begin import check_empty, claim_empty
from holdfast.checkpoint.runs.verify import Progress
from holdfast.checkpoint.snapshot import Layout, Snapshot
from holdfast.checkpoint.write import Written, write_checkpoint
from holdfast.core.clock import Clock
from holdfast.core.errors import FormatError, IntegrityError, UsageError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.store.posix import translated

__all__ = ["AnyFormat", "Imported", "import_checkpoint"]

AnyFormat = Literal["auto", "safetensors", "torch", "dcp"]
_HASH_THREADS = 2
_SEND_THREADS = 4
_DEFAULT_NAME = "model"
_INDEX_SUFFIX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A run that has been begun. `names` are what a script must track; `left_out` are entries of the file that were not taken."""

    url: str
    run_id: str
    checkpoint: CheckpointRef
    source: str
    format: Format
    names: tuple[str, ...]
    arrays: int
    array_bytes: int
    sent_bytes: int
    left_out: tuple[str, ...]


@dataclass(slots=True)
class _FileSnapshot(Snapshot):
    """A snapshot whose bytes lie in a file. `tell` hears of every read: each byte is read once to be hashed and once to be sent."""

    arrays: tuple[IncomingArray, ...] = ()
    tell: Callable[[int], None] = lambda count: None

    def read(self, index: int, start: int, length: int) -> memoryview:
        data = self.arrays[index].read(start, length)
        self.tell(length)
        return data


def import_checkpoint(
    store: Store,
    source: Path,
    format: AnyFormat = "auto",
    *,
    step: int = 0,
    name: str | None = None,
    key: str | None = None,
    clock: Clock,
    tokens: TokenSource,
    progress: Progress = lambda done, total: None,
) -> Imported:
    """Make the run at `store`, where nothing may be yet, begin with the arrays in `source`.

    A file that an export wrote brings its objects back under their own names. Of another file, each state dict in it becomes an
    object (a flat one becomes `model`); `name` chooses one of them, or names the file's only one, and `key` says which entry of a
    torch or DCP file it is. The loop counts its steps from `step`. Raises UsageError, FormatError or IntegrityError for a file that
    is not whole or not safe (nothing is written then), RunConflict when the URL is not empty, Fenced, and what the store raises.
    """
    if format not in get_args(AnyFormat):
        raise UsageError(f"unknown format {format!r}; known: {', '.join(get_args(AnyFormat))}")
    if name is not None and not name.isidentifier():
        raise UsageError(f"{name!r} is not a name that can be tracked")
    if step < 0:
        raise UsageError(f"step must not be negative: {step}")
    chosen = _detect(source) if format == "auto" else format
    check_empty(read_truth(store).head, store.url)
    before = _stamps(source)
    with translated("reading", source.name, str(source.parent), absent=UsageError):
        if chosen == "safetensors":
            incoming = _read_safetensors(source, name=name, key=key, step=step)
        else:
            incoming = torch_files(f"import {source}").read(source, chosen, name=name, key=key, step=step)
    lineage = claim_empty(store, clock=clock, tokens=tokens)
    written = _write(store, lineage.head, incoming, _metadata(incoming, source, chosen, step), step, tokens, progress)
    if _stamps(source) != before:
        raise IntegrityError(f"{source}: has been changed while it was imported; nothing was imported. Try again")
    ref = CheckpointRef(
        name=written.root.name, root_blake3=written.root_blake3, step=step, epoch=0, generation=lineage.head.generation,
        attempt=lineage.head.attempt, unix_s=clock.unix_s(), total_bytes=written.total_bytes,
    )  # fmt: skip
    head = lineage.advance("import", lambda current: msgspec.structs.replace(current, checkpoints=[ref]))
    return Imported(
        url=store.url, run_id=head.run_id, checkpoint=ref, source=str(source), format=chosen, names=incoming.names,
        arrays=len(incoming.arrays), array_bytes=written.total_bytes, sent_bytes=written.sent_bytes,
        left_out=incoming.left_out,
    )  # fmt: skip


def _metadata(incoming: Incoming, source: Path, format: Format, step: int) -> dict[str, Any]:
    return {
        "step": step, "epoch": 0, "tracked": list(incoming.names),
        "imported": {"source": source.name, "format": format, "left_out": list(incoming.left_out)},
    }  # fmt: skip


def _write(
    store: Store,
    head: Head,
    incoming: Incoming,
    metadata: dict[str, Any],
    step: int,
    tokens: TokenSource,
    progress: Progress,
) -> Written:
    specs = tuple(array.spec for array in incoming.arrays)
    total = 2 * sum(spec.nbytes for spec in specs)
    done, lock = 0, threading.Lock()

    def tell(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    progress(0, total)
    layout = Layout(specs, (0,) * len(specs), total // 2)
    snapshot = _FileSnapshot(
        incoming.document, layout, step, 0, metadata, None, arrays=incoming.arrays, tell=tell
    )  # fmt: skip
    with (
        ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="holdfast-hash") as hashing,
        ThreadPoolExecutor(_SEND_THREADS, thread_name_prefix="holdfast-send") as sending,
    ):
        written = write_checkpoint(
            snapshot, store, run_id=head.run_id, attempt=head.attempt, sequence=head.number + 1, known=KnownChunks(),
            tokens=tokens, hashing=hashing, sending=sending, uploaded=set(),
        )  # fmt: skip
    progress(total, total)
    return written


# ---- which files


def _detect(source: Path) -> Format:
    """What `source` is, by its content. Raises UsageError when it is nothing that is known."""
    if source.is_dir():
        if (source / ".metadata").is_file():
            return "dcp"
        if any(source.glob("*.safetensors")):
            return "safetensors"
        raise UsageError(f"{source}: neither a DCP checkpoint (no .metadata) nor a folder of safetensors files")
    with translated("reading", source.name, str(source.parent), absent=UsageError), source.open("rb") as file:
        begin = file.read(9)
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < _MAX_INDEX_BYTES:
        return "safetensors"
    # A zip archive, or the bare pickle of older versions.
    if begin[:4] == b"PK\x03\x04" or begin[:1] == b"\x80":
        return "torch"
    raise UsageError(
        f"{source}: not a file of a known format ({', '.join(FORMATS)}); name it with --format if it is one"
    )


def _stamps(source: Path) -> list[tuple[str, int, int, int]]:
    """What changes when somebody writes to the source."""
    with translated("reading", source.name, str(source.parent), absent=UsageError):
        paths = [source, *(sorted(source.iterdir()) if source.is_dir() else ())]
        stats = [(str(path), path.stat()) for path in paths]
        return [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _safetensors_paths(source: Path) -> list[Path]:
    """One file; or a folder with one, or with an index of several as published models have it."""
    if not source.is_dir():
        return [source]
    indices = sorted(source.glob(f"*{_INDEX_SUFFIX}"))
    found = sorted(source.glob("*.safetensors"))
    if not indices and len(found) == 1:
        return found
    if len(indices) != 1:
        raise UsageError(f"{source}: holds {len(found)} safetensors files and {len(indices)} indices; name one file")
    if indices[0].stat().st_size > _MAX_INDEX_BYTES:
        raise FormatError(f"{indices[0]}: larger than any index")
    try:
        names = set(json.loads(indices[0].read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{indices[0]}: not an index of safetensors files: {error}") from None
    known = {path.name: path for path in found}
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise FormatError(f"{indices[0]}: names {missing[0] if missing else 'no files'!r}, which is not in the folder")
    return [known[name] for name in sorted(names)]


# ---- safetensors


def _read_safetensors(source: Path, *, name: str | None, key: str | None, step: int) -> Incoming:
    if key is not None:
        raise UsageError("a safetensors file is flat: it has no entries to choose from with key")
    files = [SafetensorsFile(path) for path in _safetensors_paths(source)]
    places = {array: file for file in files for array in file.arrays}
    if len(places) != sum(len(file.arrays) for file in files):
        raise FormatError(f"{source}: several of its files hold an array of the same name")

    def find(path: ArrayPath, flat: str) -> Found:
        file = places.get(flat)
        if file is None:
            raise FormatError(f"{source}: the array {flat!r} that its note names is not in it")
        stored = file.arrays[flat]
        return Found(stored.dtype, stored.shape, lambda start, length: file.read(flat, start, length))

    text = files[0].metadata.get(NOTE_KEY) if len(files) == 1 else None
    note = _flat_note(files, name or _DEFAULT_NAME) if text is None else read_note(text, what=str(source))
    several = name is not None and len(note.state) > 1
    chosen = tuple(choose_objects(note.state, [name] if several and name else [], what=str(source)))
    return incoming_from_note(note, chosen, name if len(chosen) == 1 else None, find, step=step)


def _flat_note(files: Sequence[SafetensorsFile], name: str) -> Note:
    """What a file without a note means: one object, a flat dict of its arrays, and of the tied ones that its metadata names."""
    kept = {array: array for file in files for array in file.arrays}
    for file in files:
        kept |= {alias: array for alias, array in file.metadata.items() if array in kept and alias not in kept}
    arrays = {key: {"$": "array", "name": array, "of": "torch"} for key, array in kept.items()}
    # Keys that begin with `$` cannot stand in a plain object of the document.
    is_plain = not any(key.startswith("$") for key in arrays)
    state = arrays if is_plain else {"$": "dict", "v": [[key, item] for key, item in arrays.items()]}
    return Note(
        format=NOTE_FORMAT, run_id="", checkpoint="", step=0, epoch=0, bare=True, state={name: state}, parameters={}
    )  # fmt: skip
