"""A state of the folder ↔ a checkpoint: a document of names, modes and times, and one array of bytes per file.

    {"mirror": 1, "files": {path: {"mode", "mtime_ns", "bytes": array}}, "links": {path: target}, "folders": {path: mode}}

A file is never in memory as a whole: the writer asks for pieces, which `sources.py` finds, and restore reads piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from holdfast.agent.mirror.folder import OWN_PREFIX, is_inside
from holdfast.agent.mirror.sources import Source
from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.read import CheckpointReader
from holdfast.checkpoint.snapshot import Snapshot, lay_out
from holdfast.checkpoint.tree import decode_document, flatten, unflatten
from holdfast.core.errors import FormatError

__all__ = ["FileNote", "FolderSnapshot", "FolderState", "read_state", "take"]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileNote:
    """What a file is besides its bytes. `array` is the name of its array in the checkpoint, "" while it has none."""

    mode: int
    mtime_ns: int
    size_bytes: int
    array: str = ""


@dataclass(frozen=True, slots=True)
class FolderState:
    """All that is mirrored, by relative path."""

    files: Mapping[str, FileNote] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(note.size_bytes for note in self.files.values())


@dataclass(slots=True)
class FolderSnapshot(Snapshot):
    """What a checkpoint of the folder is made from: pieces come from `sources`, in the order of the layout."""

    sources: list[Source] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    """The files' paths, in the same order."""

    def read(self, index: int, start: int, length: int) -> memoryview:
        return self.sources[index].read(start, length)

    def hashes(self, index: int, start: int, length: int) -> bytes:
        return self.sources[index].hashes(start, length)


def take(state: FolderState, sources: Mapping[str, Source], *, number: int, metadata: dict[str, Any]) -> FolderSnapshot:
    """The snapshot of a state. `sources` has one for every file."""
    # Arrays of the right length that occupy one byte each: only their names and sizes go into the document.
    stand_ins = {path: np.broadcast_to(np.zeros(1, np.uint8), (note.size_bytes,)) for path, note in state.files.items()}
    paths = {id(stand_in): path for path, stand_in in stand_ins.items()}
    flat = flatten(
        {
            "mirror": _VERSION,
            "files": {
                path: {"mode": note.mode, "mtime_ns": note.mtime_ns, "bytes": stand_ins[path]}
                for path, note in state.files.items()
            },
            "links": dict(state.links),
            "folders": dict(state.folders),
        }
    )
    layout = lay_out(flat)
    ordered = [paths[id(leaf.value)] for leaf in flat.leaves]
    found = [sources[path] for path in ordered]
    return FolderSnapshot(flat.document, layout, number, 0, metadata, None, sources=found, paths=ordered)


def read_state(reader: CheckpointReader) -> FolderState:
    """The state that a checkpoint holds. Raises FormatError when it is not one, or names anything outside the folder."""
    tree = unflatten(decode_document(reader.document()), reader.arrays.get)
    label = f"{reader.ref.name}: not a state of a mirrored folder"
    if not isinstance(tree, dict) or tree.get("mirror") != _VERSION:
        raise FormatError(f"{label} that this version reads")
    try:
        files = {path: _note(path, told) for path, told in tree["files"].items()}
        links, folders = dict(tree["links"]), dict(tree["folders"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{label}: {error}") from error
    for path in (*files, *links, *folders):
        _check_path(path, label)
    for path, target in links.items():
        if not isinstance(target, str) or not is_inside(path, target):
            raise FormatError(f"{label}: the link {path!r} leads outside the folder")
    for path, mode in folders.items():
        _check_mode(path, mode)
    _check_parents(files, links, label)
    return FolderState(files, links, folders)


def _note(path: str, told: dict[str, Any]) -> FileNote:
    array, mtime_ns = told["bytes"], told["mtime_ns"]
    if not isinstance(array, Assembled) or array.dtype != "u8" or len(array.shape) != 1 or len(array.pieces) > 1:
        raise FormatError(f"the file {path!r} of a mirrored folder has no bytes")
    if type(mtime_ns) is not int or not -(2**63) <= mtime_ns < 2**63:
        raise FormatError(f"the file {path!r} of a mirrored folder has an impossible time")
    _check_mode(path, told["mode"])
    return FileNote(told["mode"], mtime_ns, array.shape[0], array.name)


def _check_mode(path: str, mode: object) -> None:
    if type(mode) is not int or not 0 <= mode <= 0o777:
        raise FormatError(f"{path!r} in a mirrored folder has the impossible mode {mode!r}")


def _check_path(path: object, label: str) -> None:
    if not isinstance(path, str) or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise FormatError(f"{label}: it names {path!r}, which could lie outside the folder")
    if any(part.startswith(OWN_PREFIX) for part in path.split("/")):
        raise FormatError(f"{label}: it names {path!r}, which is holdfast's own")


def _check_parents(files: Mapping[str, FileNote], links: Mapping[str, str], label: str) -> None:
    """Nothing lies below a file or a link: a link could be made first and then written through."""
    leaves = {*files, *links}
    if len(leaves) < len(files) + len(links):
        raise FormatError(f"{label}: a path is both a file and a link")
    for path in leaves:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in leaves:
                raise FormatError(f"{label}: {path!r} lies below {parent!r}, which is no folder")
            parent = parent.rpartition("/")[0]
