"""A second reader of checkpoints, written from docs/checkpoint-format.md alone: it shares no code with holdfast, so that what the
two have in common is the document.

    reader = Reader({url: folder, …});  state = reader.newest(url);  state["tracked"]["model"]["weight"] → Array(dtype, shape, data)
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

BLOCK_BYTES = 1 << 20
MAGIC = b"HOLDFAST-PART-1\n"
_NUMPY = {
    "bool": "?", "u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8",
    "f16": "<f2", "f32": "<f4", "f64": "<f8", "c64": "<c8", "c128": "<c16",
}  # fmt: skip
_ITEM_BYTES = {"bf16": 2, "f8_e4m3fn": 1, "f8_e4m3fnuz": 1, "f8_e5m2": 1, "f8_e5m2fnuz": 1}


class Array(NamedTuple):
    """An array as the file has it. `library` is the hint about what it was."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    library: str

    def numpy(self) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)


class Piece(NamedTuple):
    """What one rank holds of an array."""

    dtype: str
    shape: list[int]
    global_shape: list[int]
    offsets: list[int]
    library: str
    data: bytes


class Codec(NamedTuple):
    """A value of a registered type, as what it is made of."""

    name: str
    value: Any


def unseal(data: bytes) -> dict[str, Any]:
    body = data[84:-2]
    assert (data[:11], data[75:84], data[-2:]) == (b'{"blake3":"', b'","body":', b"}\n")
    assert blake3(body).hexdigest() == data[11:75].decode()
    record: dict[str, Any] = json.loads(body)
    assert record["format"] == 1
    return record


class Reader:
    """Reads runs that lie in folders. `folders` says where the run of each URL is."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders

    def head(self, url: str) -> dict[str, Any]:
        newest = max((self._folders[url] / "heads").glob("*.json"), key=lambda path: int(path.stem))
        head = unseal(newest.read_bytes())
        assert head["number"] == int(newest.stem)
        return head

    def newest(self, url: str) -> dict[str, Any]:
        head = self.head(url)
        return self.state(url, [ref for ref in head["checkpoints"] if ref["generation"] == head["generation"]][-1])

    def state(self, url: str, ref: dict[str, Any], rank: int = 0) -> dict[str, Any]:
        """The whole state of one rank in one checkpoint, every byte of the checkpoint verified."""
        url = ref["home"] or url
        data = (self._folders[url] / ref["name"] / "root.json").read_bytes()
        assert blake3(data).hexdigest() == ref["root_blake3"]
        root = unseal(data)
        assert root["world_size"] == len(root["parts"])
        pieces: dict[str, list[Piece]] = {}
        documents = [self._part(url, number, part, pieces) for number, part in enumerate(root["parts"])]
        arrays = {name: join(of_array) for name, of_array in pieces.items()}
        assert sum(len(array.data) for array in arrays.values()) == ref["total_bytes"]
        state: dict[str, Any] = build(json.loads(documents[rank]), arrays)
        return state

    def _part(self, url: str, number: int, part: dict[str, Any], pieces: dict[str, list[Piece]]) -> bytes:
        """Collect what one rank holds of each array. Returns its document."""
        data = (self._folders[url] / part["key"]).read_bytes()
        assert (len(data), blake3(data).hexdigest()) == (part["size_bytes"], part["blake3"])
        assert data.startswith(MAGIC)
        version, rank, homes, objects, entries, document = msgspec.msgpack.decode(data[len(MAGIC) :])
        assert (version, rank) == (1, number)
        places = [self._folders[[url, *homes][home]] / key for home, key, _ in objects]
        for name, dtype, shape, global_shape, offsets, library, chunks in entries:
            held = b"".join(read_chunk(places[number], *rest) for number, *rest in chunks)
            assert len(held) == math.prod(shape) * item_bytes(dtype)
            pieces.setdefault(name, []).append(Piece(dtype, shape, global_shape, offsets, library, held))
        assert isinstance(document, bytes)
        return document


def item_bytes(dtype: str) -> int:
    return _ITEM_BYTES.get(dtype) or np.dtype(_NUMPY[dtype]).itemsize


def join(pieces: list[Piece]) -> Array:
    """The whole array. Every element must come from exactly one rank."""
    dtype, shape, library = pieces[0].dtype, pieces[0].global_shape, pieces[0].library
    made = np.zeros(shape, f"V{item_bytes(dtype)}")
    times = np.zeros(shape, np.int8)
    for piece in pieces:
        assert (piece.dtype, piece.global_shape) == (dtype, shape)
        there = tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.shape, strict=True))
        made[there] = np.frombuffer(piece.data, made.dtype).reshape(piece.shape)
        times[there] += 1
    assert (times == 1).all()
    return Array(dtype, tuple(shape), made.tobytes(), library)


def read_chunk(path: Path, offset: int, length: int, hashes: bytes) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, length, BLOCK_BYTES)]
    assert len(data) == length
    assert b"".join(blake3(block).digest() for block in blocks) == hashes
    return data


def build(node: Any, arrays: dict[str, Array]) -> Any:
    """A node of the state document as python's own types."""
    if isinstance(node, list):
        return [build(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if "$" not in node:
        return {key: build(item, arrays) for key, item in node.items()}
    tag = node["$"]
    if tag == "array":
        return arrays[node["name"]]
    if tag in _KINDS_OF_PAIRS:
        return _KINDS_OF_PAIRS[tag]((build(key, arrays), build(item, arrays)) for key, item in node["v"])
    if tag in _KINDS_OF_ITEMS:
        return _KINDS_OF_ITEMS[tag](build(item, arrays) for item in node["v"])
    if tag == "codec":
        return Codec(node["name"], build(node["v"], arrays))
    if tag in ("int", "float"):
        return int(node["v"]) if tag == "int" else float(node["v"])
    raw = base64.b64decode(node["v"], validate=True)
    if tag == "npscalar":
        return np.frombuffer(raw, _NUMPY[node["dtype"]])[0]
    return {"str": lambda raw: raw.decode("utf-8", "surrogatepass"), "bytes": bytes, "bytearray": bytearray}[tag](raw)


_KINDS_OF_PAIRS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "dict": dict,
    "odict": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
}
_KINDS_OF_ITEMS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "complex": lambda parts: complex(*parts),
}
