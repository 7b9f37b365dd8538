"""The safetensors container: eight bytes of length, a JSON header, then the arrays' bytes without holes.

It is written here in a stream, since the library's writer wants the whole state in memory, and read here through a mapping of the
file, so that neither way needs torch or more memory than a few pieces. Every number in a header is checked before it is used.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from holdfast.checkpoint.arrays import DTYPE_BYTES
from holdfast.core.errors import FormatError, UnsupportedState, UsageError

__all__ = ["SafetensorsFile", "StoredArray", "encode_header", "file_order"]

_NAMES = {
    "bool": "BOOL", "u8": "U8", "u16": "U16", "u32": "U32", "u64": "U64", "i8": "I8", "i16": "I16", "i32": "I32", "i64": "I64",
    "f16": "F16", "bf16": "BF16", "f32": "F32", "f64": "F64", "c64": "C64", "f8_e4m3fn": "F8_E4M3",
    "f8_e4m3fnuz": "F8_E4M3FNUZ", "f8_e5m2": "F8_E5M2", "f8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
"""What the library reads at most."""
_ALIGN_BYTES = 8
_MAX_DIMENSIONS = 64


class StoredArray(NamedTuple):
    """One array of a file; its bytes are [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def file_order(dtypes: Mapping[str, str]) -> list[str]:
    """The names in the order in which their bytes are written: widest elements first, so that every array is aligned."""
    return sorted(dtypes, key=lambda name: -DTYPE_BYTES[dtypes[name]])


def encode_header(arrays: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file that holds (name, dtype, shape) in this order.

    Raises UnsupportedState for a dtype that the format does not know, UsageError when the header gets too large.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in arrays:
        if dtype not in _NAMES:
            raise UnsupportedState(
                f"{name}: safetensors has no dtype for {dtype}; export without it (only=…), or in the format torch or dcp"
            )
        size_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size_bytes]}
        position += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGN_BYTES)
    if len(text) > _MAX_HEADER_BYTES:
        raise UsageError(
            f"the header would have {len(text)} bytes, more than readers of safetensors take; export fewer objects"
        )
    return _LENGTH.pack(len(text)) + text


class SafetensorsFile:
    """A file that is open for reading, mapped. Thread-safe; views that it gave out keep the mapping alive.

    Raises FormatError for anything that is not a whole, valid file, UnsupportedState for a dtype that holdfast does not store.
    """

    def __init__(self, path: Path) -> None:
        self._what = str(path)
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(0)
            if size_bytes < _LENGTH.size:
                raise FormatError(f"{self._what}: too short for a safetensors file")
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > min(_MAX_HEADER_BYTES, size_bytes - _LENGTH.size):
                raise FormatError(
                    f"{self._what}: cut off, or not a safetensors file: its header would have {length} bytes"
                )
            header = self._parse(file.read(length))
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        begin = _LENGTH.size + length
        self.arrays = {name: self._stored(name, item, begin) for name, item in header.items()}
        self._check_layout(begin, size_bytes)

    def read(self, name: str, start: int, length: int) -> memoryview:
        first = self.arrays[name].start + start
        return self._data[first : first + length]

    def _parse(self, text: bytes) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len({key for key, _ in pairs}) != len(pairs):
                raise ValueError("a name is there twice")
            return dict(pairs)

        try:
            header = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self._what}: not a safetensors file: {error}") from None
        if not isinstance(header, dict):
            raise FormatError(f"{self._what}: not a safetensors file: its header is no JSON object")
        return header

    def _metadata(self, raw: Any) -> dict[str, str]:
        if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
            raise FormatError(f"{self._what}: its metadata does not consist of texts")
        return raw

    def _stored(self, name: str, item: Any, begin: int) -> StoredArray:
        what = f"{self._what}: array {name!r}"
        if not isinstance(item, dict) or not isinstance(item.get("dtype"), str):
            raise FormatError(f"{what} is not described")
        shape, offsets = item.get("shape"), item.get("data_offsets")
        if not (_is_counts(shape) and _is_counts(offsets) and len(offsets) == 2 and len(shape) <= _MAX_DIMENSIONS):
            raise FormatError(f"{what} has no valid shape or place")
        dtype = _DTYPES.get(item["dtype"])
        if dtype is None:
            raise UnsupportedState(f"{what} has the dtype {item['dtype']}, which holdfast does not store")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise FormatError(f"{what} has another number of bytes than its shape says")
        return StoredArray(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])

    def _check_layout(self, begin: int, size_bytes: int) -> None:
        position = begin
        for item in sorted(self.arrays.values(), key=lambda item: (item.start, item.stop)):
            if item.start != position:
                raise FormatError(f"{self._what}: arrays overlap or leave a hole at byte {position}")
            position = item.stop
        if position != size_bytes:
            raise FormatError(
                f"{self._what}: has {size_bytes} bytes where its header says {position}; cut off or altered"
            )


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
