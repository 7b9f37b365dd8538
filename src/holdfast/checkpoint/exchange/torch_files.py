"""torch's own formats: files of `torch.save`, and folders of `torch.distributed.checkpoint` (DCP). Loaded only when asked for one.

What is written is plain: nested dicts of tensors and values that load with `weights_only=True`; numpy arrays become tensors, and
the note beside them remembers what they were. What is read is never trusted: tensors and values only with `weights_only=True`, and
DCP's index with a reader of our own (dcp_files.py).
"""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from holdfast.checkpoint.exchange.dcp_files import read_dcp
from holdfast.checkpoint.exchange.note import (
    NOTE_KEY,
    ArrayPath,
    Format,
    Found,
    Incoming,
    Outgoing,
    choose_objects,
    incoming_from_note,
    incoming_from_tree,
    own_state,
    read_note,
    without_codecs,
    write_note,
)
from holdfast.checkpoint.read import CheckpointReader, Target
from holdfast.checkpoint.runs.verify import Progress
from holdfast.checkpoint.torch_arrays import TorchAdapter
from holdfast.checkpoint.tree import flatten, unflatten
from holdfast.core.errors import FormatError, IntegrityError, StoreError, UnsupportedState, UsageError
from holdfast.store.posix import translated

__all__ = ["read", "write"]

_PLAIN_CODECS = ("torch.Size", "torch.dtype", "torch.device")
"""Registered types that `weights_only=True` loads."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_PIECE_BYTES = 1 << 20
_ADAPTER = TorchAdapter()


# ---- writing


def write(
    path: Path,
    format: Format,
    chosen: Outgoing,
    reader: CheckpointReader,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> None:
    """Write the state to `path`: a new file, or for DCP an empty folder. Raises UnsupportedState for what torch cannot write."""
    state = _plain_state(chosen, reader, pool, progress)
    if chosen.note.bare:
        state = next(iter(state.values()))
    else:
        state[NOTE_KEY] = write_note(chosen.note)
    try:
        with translated("writing", path.name, str(path.parent)):
            if format == "torch":
                torch.save(state, path)
            else:
                _save_dcp(state, path)
    except CheckpointException as error:
        # Not an Exception of python's; what went wrong is inside.
        reason = next(iter(error.failures.values()), (error, None))[0]
        if isinstance(reason, OSError):
            with translated("writing", path.name, str(path.parent)):
                raise reason from None
        raise UnsupportedState(f"torch cannot write this state as {format}: {reason}") from error
    except RuntimeError as error:
        raise StoreError(f"torch could not write {path}: {str(error).splitlines()[0]}; is the disk full?") from error


def _save_dcp(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        # One process and no process group is what is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save_dcp(state, storage_writer=FileSystemWriter(folder, thread_count=1), no_dist=True)


def _plain_state(
    chosen: Outgoing, reader: CheckpointReader, pool: ThreadPoolExecutor, progress: Progress
) -> dict[str, Any]:
    """The objects as nested dicts of tensors and plain values, read and verified. Tied arrays are one tensor."""
    tensors = {name: _ADAPTER.allocate(array.spec()) for name, array in chosen.arrays.items()}
    wanted = []
    for name, tensor in tensors.items():
        memory = _ADAPTER.writable(tensor)
        if memory is not None:
            wanted.append(Target(chosen.arrays[name], memory))
    done = 0

    def arrived(count: int) -> None:
        nonlocal done
        done += count
        progress(done, chosen.total_bytes)

    progress(0, chosen.total_bytes)
    reader.read(wanted, pool, arrived)
    tree = unflatten(without_codecs(chosen.note.state, _PLAIN_CODECS), tensors.__getitem__)
    plain: dict[str, Any] = _loadable(tree)
    return plain


def _loadable(value: Any) -> Any:
    """The value in types that `weights_only=True` takes: numpy's scalars become numbers, text that UTF-8 cannot say is replaced."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        pairs = [(_loadable(key), _loadable(item)) for key, item in value.items()]
        return Counter(dict(pairs)) if isinstance(value, Counter) else type(value)(pairs)  # type: ignore[call-arg]
    if type(value) in (list, tuple, set):
        return type(value)(_loadable(item) for item in value)
    return value


# ---- reading


def read(path: Path, format: Format, *, name: str | None, key: str | None, step: int) -> Incoming:
    """The state in a file or a DCP folder.

    With a note (written by an export) its objects come back as they were, all or the one called `name`. Otherwise every entry of
    the file that is a state dict of its own becomes an object, or, with `name`, that entry or the file as a whole; `key` names the
    entry that is meant. Raises FormatError, IntegrityError, UnsupportedState and UsageError.
    """
    loaded = load_torch(path) if format == "torch" else read_dcp(path)
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {type(loaded).__qualname__} where a state dict is expected")
    text = loaded.pop(NOTE_KEY, None)
    if text is not None and key is None:
        return _with_note(path, loaded, text, name, step)
    chosen, left_out = _objects(path, loaded, name, key)
    flat = flatten({"tracked": chosen, "holdfast": own_state(step)})
    return incoming_from_tree(flat, tuple(chosen), left_out)


def _with_note(path: Path, loaded: dict[Any, Any], text: object, name: str | None, step: int) -> Incoming:
    note = read_note(text, what=str(path))
    names = (
        tuple(choose_objects(note.state, [name], what=str(path))) if name and len(note.state) > 1 else tuple(note.state)
    )

    def find(where: ArrayPath, flat: str) -> Found:
        value: Any = loaded
        try:
            for component in where:
                # DCP turns the keys of dicts into text.
                is_text = isinstance(value, dict) and component not in value
                value = value[str(component) if is_text else component]
        except (KeyError, IndexError, TypeError):
            value = None
        if not isinstance(value, torch.Tensor):
            raise FormatError(f"{path}: the array {flat!r} that its note names is not in it")
        tensor, spec = value, _ADAPTER.spec(flat, value)
        return Found(spec.dtype, spec.shape, lambda start, length: _ADAPTER.stream(tensor, start, length))

    return incoming_from_note(note, names, name if len(names) == 1 else None, find, step=step)


def _objects(
    path: Path, loaded: dict[Any, Any], name: str | None, key: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Which entries become which objects, and which are left out."""
    states = {entry: value for entry, value in loaded.items() if isinstance(value, Mapping)}
    if key is not None:
        if key not in states:
            raise UsageError(f"{path}: no entry {key!r} that is a state dict; there are {_listed(states) or 'none'}")
        name = name or key
        chosen = {name: states[key]}
    elif name is not None:
        chosen = {name: states.get(name, loaded)}
    elif states and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        chosen = {str(entry): value for entry, value in states.items() if str(entry).isidentifier()}
    else:
        chosen = {"model": loaded}
    if not chosen:
        raise UsageError(
            f"{path}: none of its entries ({_listed(states)}) has a name that could be tracked; choose one by its key"
        )
    taken = {id(value) for value in chosen.values()}
    whole = id(loaded) in taken
    return chosen, () if whole else tuple(str(entry) for entry, value in loaded.items() if id(value) not in taken)


def _listed(names: Mapping[Any, Any]) -> str:
    return ", ".join(str(name) for name in names)


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped where the file allows it. Raises FormatError or IntegrityError for anything else.

    `weights_only=True` builds tensors and plain values and calls nothing else.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_sums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        named = _GLOBAL.search(str(error))
        if named is not None:
            raise FormatError(
                f"{path}: holds Python objects ({named[1]}) that could run code when loaded, so it is refused; save it again with "
                "state dicts of tensors and plain values only"
            ) from None
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path}: not a whole file of torch.save: {said}") from None


def _check_sums(path: Path) -> None:
    """torch writes a checksum for every record and does not look at them. All wrong: it was told to leave them out."""
    wrong, records = [], 0
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                records += 1
                if not _sum_matches(archive, record):
                    wrong.append(record.filename)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path}: not a whole file of torch.save: {error}") from None
    if wrong and len(wrong) < records:
        raise IntegrityError(f"{path}: altered: the checksum of {wrong[0]} does not match")


def _sum_matches(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    found = 0
    try:
        with archive.open(record) as stream:
            while piece := stream.read(_PIECE_BYTES):
                found = zlib.crc32(piece, found)
    except zipfile.BadZipFile as error:
        if "CRC" not in str(error):
            raise
        return False
    return found == record.CRC
