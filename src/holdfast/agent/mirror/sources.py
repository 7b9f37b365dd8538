"""Where the bytes of a mirrored file come from while a state is written: the folder, a copy, or the store.

A script may rewrite, replace, cut short or delete any file at any moment, also while it is being sent. So a large file is held open
from the look on: a replaced or deleted one stays readable, and one that is written in place is found out, because its times move.
A small file is copied first, and so is a large one that was found to be rewritten while it was sent: the copy stands still.
Nothing is mapped into memory: touching a page beyond a file's new end would kill the agent.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from holdfast.agent.mirror.folder import Signature, signature_of
from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.format import Chunk
from holdfast.checkpoint.read import CheckpointReader, Target
from holdfast.core.errors import FormatError, SaveError

__all__ = ["KnownFile", "Source", "StoredFile", "Taker"]

_SMALL_BYTES = 4 << 20
"""Files up to this size are copied before they are sent."""
_COPY_BYTES = 8 << 20


class Source(Protocol):
    """A file's bytes. Thread-safe."""

    def read(self, start: int, length: int) -> memoryview: ...

    def hashes(self, start: int, length: int) -> bytes:
        """Block hashes of a piece that is known without reading it, else b""."""
        ...


class _HeldFile:
    """A file of the folder, opened while it is as it was seen. Raises SaveError when it is not that any more."""

    def __init__(self, path: Path, signature: Signature) -> None:
        self.path, self._signature = path, signature
        self._descriptor = _open_as_seen(path, signature)

    def read(self, start: int, length: int) -> memoryview:
        return _read(self._descriptor, start, length, self.path)

    def hashes(self, start: int, length: int) -> bytes:
        return b""

    def is_unchanged(self) -> bool:
        """Whether nobody has written to it. That its name is gone or means another file by now does not matter."""
        now = signature_of(os.fstat(self._descriptor))
        return (now.size_bytes, now.mtime_ns) == (self._signature.size_bytes, self._signature.mtime_ns)

    def close(self) -> None:
        os.close(self._descriptor)


class _Spool:
    """Copies of files in one file without a name, which is gone when the state is written or the agent dies."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".holdfast-spool-")  # noqa: SIM115 - closed by `close`
        self._end = 0

    def add(self, path: Path, signature: Signature) -> Source:
        """A copy of the file as it was seen. Raises SaveError when it is not that any more, or there is no space."""
        source = _open_as_seen(path, signature)
        start, left = self._end, signature.size_bytes
        try:
            while left:
                data = os.pread(source, min(left, _COPY_BYTES), signature.size_bytes - left)
                if not data:
                    break
                self._file.seek(start + signature.size_bytes - left)
                self._file.write(data)
                left -= len(data)
            self._file.flush()
            if left or signature_of(os.fstat(source)) != signature:
                raise SaveError(f"{path} changed while it was copied; it is taken again when it has settled")
        except OSError as error:
            raise SaveError(f"{path} cannot be copied before it is sent: {error.strerror}") from None
        finally:
            os.close(source)
        self._end = start + signature.size_bytes
        return _Copy(self._file.fileno(), start, path)

    def close(self) -> None:
        self._file.close()


class _Copy:
    def __init__(self, descriptor: int, offset: int, path: Path) -> None:
        self._descriptor, self._offset, self._path = descriptor, offset, path

    def read(self, start: int, length: int) -> memoryview:
        return _read(self._descriptor, self._offset + start, length, self._path)

    def hashes(self, start: int, length: int) -> bytes:
        return b""


class Taker:
    """Holds or copies the files of one state until it is written. `restless` ones are copied whatever their size.

    Failure contract: `take` raises SaveError when a file is not what was seen, or cannot be read or copied.
    """

    def __init__(self, folder: Path, restless: frozenset[Path]) -> None:
        self._spool, self._restless = _Spool(folder), restless
        self._held: list[_HeldFile] = []

    def take(self, path: Path, signature: Signature) -> Source:
        if signature.size_bytes <= _SMALL_BYTES or path in self._restless:
            return self._spool.add(path, signature)
        held = _HeldFile(path, signature)
        self._held.append(held)
        return held

    def changed(self) -> list[Path]:
        """Held files that somebody has written to since."""
        return [held.path for held in self._held if not held.is_unchanged()]

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._spool.close()


class KnownFile:
    """A file of the folder that is as the newest state has it: its hashes are known; it is read only if its bytes are needed."""

    def __init__(self, path: Path, signature: Signature, stored: Assembled) -> None:
        self._path, self._signature = path, signature
        self._chunks = _chunks_by_start(stored)

    def read(self, start: int, length: int) -> memoryview:
        descriptor = _open_as_seen(self._path, self._signature)
        try:
            data = _read(descriptor, start, length, self._path)
            if signature_of(os.fstat(descriptor)) != self._signature:
                raise SaveError(f"{self._path} changed while it was read; it is taken again when it has settled")
            return data
        finally:
            os.close(descriptor)

    def hashes(self, start: int, length: int) -> bytes:
        chunk = self._chunks.get(start)
        return chunk.hashes if chunk is not None and chunk.length == length else b""


class StoredFile:
    """A file as the store has it, for when the folder's own is not complete or is gone for the moment."""

    def __init__(self, stored: Assembled, reader: Callable[[], CheckpointReader], pool: ThreadPoolExecutor) -> None:
        self._name, self._reader, self._pool = stored.name, reader, pool
        self._chunks = _chunks_by_start(stored)

    def read(self, start: int, length: int) -> memoryview:
        buffer, reader = memoryview(bytearray(length)), self._reader()
        reader.read([Target(reader.arrays[self._name], buffer, start_byte=start)], self._pool)
        return buffer

    def hashes(self, start: int, length: int) -> bytes:
        return self._chunk(start, length).hashes

    def _chunk(self, start: int, length: int) -> Chunk:
        chunk = self._chunks.get(start)
        if chunk is None or chunk.length != length:
            raise FormatError(f"the stored file {self._name!r} is cut into other pieces than this version makes")
        return chunk


def _chunks_by_start(stored: Assembled) -> dict[int, Chunk]:
    chunks, start = {}, 0
    for chunk in (chunk for piece in stored.pieces for chunk in piece.entry.chunks):
        chunks[start] = chunk
        start += chunk.length
    return chunks


def _open_as_seen(path: Path, signature: Signature) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror}; it is taken again when it has settled") from None
    if signature_of(os.fstat(descriptor)) != signature:
        os.close(descriptor)
        raise SaveError(f"{path} has changed since it was looked at; it is taken again when it has settled")
    return descriptor


def _read(descriptor: int, start: int, length: int, path: Path) -> memoryview:
    view, done = memoryview(bytearray(length)), 0
    try:
        while done < length and (count := os.preadv(descriptor, [view[done:]], start + done)):
            done += count
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror}") from None
    if done < length:
        raise SaveError(f"{path} was cut short while it was sent; it is taken again when it has settled")
    return view
