"""What a file's own format says about whether it is whole. Most say nothing; the two that training writes most often do.

A zip (torch.save, .npz, .ckpt) ends with a directory that is written last; a safetensors file begins with a header that says how
long it is. So a file that was cut short while it was written in place is found out whatever its times and sizes looked like.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

__all__ = ["says_whole"]

_ZIP_START = b"PK\x03\x04"
_ZIP_END = struct.Struct("<4s4H2LH")
_ZIP_END_MAGIC = b"PK\x05\x06"
_IN_ZIP64 = 0xFFFFFFFF
_MAX_COMMENT_BYTES = 0xFFFF
_MAX_HEADER_BYTES = 100 << 20  # what the safetensors library itself accepts


def says_whole(path: Path) -> bool | None:
    """True: whole by its own format. False: cut short. None: its format does not say. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start.startswith(_ZIP_START):
            tail_bytes = min(size_bytes, _ZIP_END.size + _MAX_COMMENT_BYTES)
            file.seek(size_bytes - tail_bytes)
            return _ends_like_a_zip(file.read(tail_bytes), size_bytes)
        if path.suffix == ".safetensors":
            if len(start) < 8:
                return False
            header_bytes = int.from_bytes(start, "little")
            if header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
                return False
            return _is_as_long_as_it_says(file.read(header_bytes), size_bytes - 8 - header_bytes)
    return None


def _ends_like_a_zip(tail: bytes, size_bytes: int) -> bool:
    at = tail.rfind(_ZIP_END_MAGIC)
    while at >= 0:
        if len(tail) - at >= _ZIP_END.size:
            *_, directory_bytes, directory_at, comment_bytes = _ZIP_END.unpack_from(tail, at)
            position = size_bytes - len(tail) + at
            fits = _IN_ZIP64 in (directory_bytes, directory_at) or directory_at + directory_bytes <= position
            if fits and at + _ZIP_END.size + comment_bytes == len(tail):
                return True
        at = tail.rfind(_ZIP_END_MAGIC, 0, at)
    return False


def _is_as_long_as_it_says(header: bytes, data_bytes: int) -> bool:
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        return bool(max(ends, default=0) == data_bytes)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False
