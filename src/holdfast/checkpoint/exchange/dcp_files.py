"""Reading a folder of `torch.distributed.checkpoint` (DCP) without trusting it.

Its index, `.metadata`, is a pickle. It is read with an unpickler that knows a short list of names and builds inert records for
them, so nothing that the file says can run; torch's own classes are not touched, so their private changes do not matter either.
The tensors, sharded over ranks or not, are put together from the files that the index names, each read with `weights_only=True`.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from holdfast.core.errors import FormatError

__all__ = ["read_dcp"]

_INDEX = ".metadata"
_MAX_INDEX_BYTES = 1 << 30
_MAX_DIMENSIONS = 64
_MAX_LIST = 1 << 20


class _Record:
    """An inert stand-in for one of DCP's classes: keeps the state that it was given, and ignores how it was made."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Index(_Record):
    """`Metadata`."""


class _Tensor(_Record):
    """`TensorStorageMetadata`."""


class _Bytes(_Record):
    """`BytesStorageMetadata`."""


class _Piece(_Record):
    """`ChunkStorageMetadata`."""


class _Properties(_Record):
    """`TensorProperties`, whose state is a tuple that begins with the dtype."""


class _Lookup(_Record):
    """`MetadataIndex`."""


class _Stored(_Record):
    """`_StorageInfo`."""


_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Index,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Piece,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Lookup,
    (_METADATA, "StorageMeta"): _Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Stored,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "PurePosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the names above and torch's dtypes. Everything else is refused before it is even looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            dtype = vars(torch).get(name)
            if isinstance(dtype, torch.dtype):
                return dtype
        known = _ALLOWED.get((module, name))
        if known is None:
            raise FormatError(f"refers to {module}.{name}, which has no place in such an index and could run code")
        return known


def read_dcp(folder: Path) -> dict[str, Any]:
    """The state in a DCP folder as nested dicts and lists, tensors whole. Raises FormatError for anything that is not valid."""
    index = _read_index(folder)
    stored = _stored_by_name(folder, index.field("storage_data"))
    paths = index.field("planner_data")
    tree: dict[Any, Any] = {}
    for name, item in _items(folder, index.field("state_dict_metadata")):
        if isinstance(item, _Tensor):
            value: Any = _read_tensor(folder, name, item, stored)
        elif isinstance(item, _Bytes):
            value = _load(folder, name, _only(folder, name, stored))
        else:
            raise _broken(folder, f"{name!r} is neither a tensor nor a value")
        path = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        _insert(folder, tree, path, value)
    nested: dict[str, Any] = _nested(folder, tree)
    return nested


def _broken(folder: Path, why: str) -> FormatError:
    return FormatError(f"{folder}: not a whole DCP checkpoint: {why}")


def _read_index(folder: Path) -> _Index:
    path = folder / _INDEX
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise _broken(folder, f"{_INDEX} is larger than any index")
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except Exception as error:
        # A torn or hostile pickle can raise anything.
        raise _broken(folder, f"{_INDEX} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(index, _Index):
        raise _broken(folder, f"{_INDEX} is no index")
    return index


def _items(folder: Path, entries: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise _broken(folder, f"{_INDEX} lists no entries")
    yield from entries.items()


_Pieces = dict[str, list[tuple[tuple[int, ...] | None, _Stored]]]


def _stored_by_name(folder: Path, storage: Any) -> _Pieces:
    """By entry: where each of its pieces begins in the tensor (None for a value), and where its bytes are."""
    pieces: _Pieces = {}
    if not isinstance(storage, dict):
        raise _broken(folder, f"{_INDEX} does not say where the bytes are")
    for lookup, info in storage.items():
        if not isinstance(lookup, _Lookup) or not isinstance(info, _Stored) or not isinstance(lookup.field("fqn"), str):
            raise _broken(folder, f"{_INDEX} does not say where the bytes are")
        offset = lookup.field("offset")
        if offset is not None:
            offset = _counts(folder, offset)
        pieces.setdefault(lookup.field("fqn"), []).append((offset, info))
    return pieces


def _counts(folder: Path, value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) > _MAX_DIMENSIONS
        or not all(type(x) is int and x >= 0 for x in value)
    ):
        raise _broken(folder, "a shape or an offset does not consist of counts")
    return value


def _only(folder: Path, name: str, stored: _Pieces) -> _Stored:
    found = stored.get(name, [])
    if len(found) != 1:
        raise _broken(folder, f"{len(found)} places are named for {name!r}")
    return found[0][1]


def _read_tensor(folder: Path, name: str, item: _Tensor, stored: _Pieces) -> torch.Tensor:
    shape, properties, chunks = _counts(folder, item.field("size")), item.field("properties"), item.field("chunks")
    dtype = properties.state[0] if isinstance(properties, _Properties) and isinstance(properties.state, tuple) else None
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise _broken(folder, f"{name!r} is not described")
    boxes = []
    for chunk in chunks:
        if not isinstance(chunk, _Piece):
            raise _broken(folder, f"{name!r} is not described")
        boxes.append((_counts(folder, chunk.field("offsets")), _counts(folder, chunk.field("sizes"))))
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    boxes = [box for box in boxes if math.prod(box[1])]
    places = {offset: info for offset, info in stored.get(name, []) if offset is not None}
    stored_bytes = sum(info.field("length") or 0 for info in places.values())
    if math.prod(shape) * dtype.itemsize > stored_bytes or not _fill(shape, boxes):
        raise _broken(folder, f"the pieces of {name!r} do not make up the whole")
    whole = torch.empty(shape if len(boxes) > 1 else (0,), dtype=dtype)
    for offsets, sizes in boxes:
        piece = _load(folder, name, places[offsets]) if offsets in places else None
        if not isinstance(piece, torch.Tensor) or tuple(piece.shape) != sizes or piece.dtype != dtype:
            raise _broken(folder, f"a piece of {name!r} is missing, or is not what the index says")
        if len(boxes) == 1:
            return piece
        target = whole
        for dimension, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            target = target.narrow(dimension, offset, size)
        target.copy_(piece)
    return whole


def _fill(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether the boxes (offsets, sizes) fill the shape exactly: inside it, disjoint, and as many elements."""
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        return False
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    begin = np.array([offsets for offsets, _ in boxes], dtype=object).reshape(len(boxes), len(shape))
    end = begin + np.array([sizes for _, sizes in boxes], dtype=object).reshape(begin.shape)
    if (end > np.array(shape, dtype=object)).any():
        return False
    begin, end = begin.astype(np.int64), end.astype(np.int64)
    overlaps = np.ones((len(boxes), len(boxes)), dtype=bool)
    for dimension in range(len(shape)):
        overlaps &= begin[:, None, dimension] < end[None, :, dimension]
        overlaps &= begin[None, :, dimension] < end[:, None, dimension]
    return int(overlaps.sum()) == len(boxes)


def _load(folder: Path, name: str, info: _Stored) -> Any:
    """What lies at one place, a tensor or a value."""
    relative, offset, length = info.field("relative_path"), info.field("offset"), info.field("length")
    if not isinstance(relative, str) or not all(type(count) is int and count >= 0 for count in (offset, length)):
        raise _broken(folder, f"{name!r} has no valid place")
    parts = PurePosixPath(relative).parts
    if not parts or any(part in ("..", "/") for part in parts) or PurePosixPath(relative).is_absolute():
        raise _broken(folder, f"{name!r} lies outside of the folder")
    if info.field("transform_descriptors"):
        raise _broken(folder, f"{name!r} is stored with an extension ({info.field('transform_descriptors')})")
    try:
        with folder.joinpath(*parts).open("rb") as file:
            if offset + length > file.seek(0, 2):
                raise _broken(folder, f"{relative} is cut off")
            file.seek(offset)
            data = file.read(length)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except FileNotFoundError:
        raise _broken(folder, f"{relative} is missing") from None
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _broken(folder, f"{name!r} in {relative} cannot be read: {said}") from None


# ---- the nested form


class _List(dict[int, Any]):
    """A list while its elements arrive in any order."""


def _insert(folder: Path, tree: dict[Any, Any], path: Any, value: Any) -> None:
    if not isinstance(path, tuple) or not path or not all(type(key) in (str, int) for key in path):
        raise _broken(folder, "an entry has no valid path")
    node: Any = tree
    for key, following in pairwise(path):
        node = node.setdefault(key, _List() if type(following) is int else {})
        if not isinstance(node, dict):
            raise _broken(folder, "two entries have the same path")
    if path[-1] in node:
        raise _broken(folder, "two entries have the same path")
    node[path[-1]] = value


def _nested(folder: Path, node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if isinstance(node, _List):
        if any(type(index) is not int or not 0 <= index < _MAX_LIST for index in node):
            raise _broken(folder, "a list has impossible indices")
        # DCP leaves out what is empty.
        return [_nested(folder, node.get(index, {})) for index in range(max(node) + 1)]
    tree = {key: _nested(folder, item) for key, item in node.items() if key != "state" or "param_groups" not in node}
    state = node.get("state")
    if "param_groups" in node and isinstance(state, dict):
        # An optimizer numbers its parameters. DCP turns such keys into text; older versions of it keep them.
        is_numbered = all(str(key).isdecimal() for key in state)
        tree["state"] = {int(key) if is_numbered else key: _nested(folder, item) for key, item in state.items()}
    return tree
