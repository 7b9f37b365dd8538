"""Files that others have put somewhere, under whatever names: data sets, weights. They are listed and read, and never written.

    s3://bucket/data, gs://…, az://…, file:///…  →  what is there  →  ranges of bytes, each with the version they belong to

Our own stores show only what could be ours (`store.base.is_key`). Of somebody's data nothing may be left out in silence.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote

from holdfast.core.errors import IntegrityError, NotFound, UsageError
from holdfast.store import posix
from holdfast.store.open import normalise_url, open_store

__all__ = ["Foreign", "ForeignFile", "open_foreign"]


class ForeignFile(NamedTuple):
    """One file of the source."""

    name: str
    """Below the source, `/`-separated; empty where the source is this one file."""
    size_bytes: int
    version: str
    """Another one means other bytes; empty where the store has none. Compared with those of other listings only."""


class Foreign(Protocol):
    """One source. Thread safety: `read_into` may be called from any thread. Failure: errors of `holdfast.core.errors`."""

    @property
    def is_near(self) -> bool:
        """As of `store.base.Store`."""
        ...

    def files(self) -> list[ForeignFile]:
        """All, ascending by name. NotFound where there is nothing; UsageError for what cannot become files."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> str:
        """Fill the buffer from this offset on. Returns the version that was read, to be compared with those of other ranges of the
        same file; empty: not known. NotFound, IntegrityError where the file is too short."""
        ...

    def close(self) -> None: ...


def open_foreign(url: str) -> Foreign:
    """Nothing is read yet. UsageError for what is no URL of a store."""
    canonical = normalise_url(url)
    scheme, _, rest = canonical.partition("://")
    if scheme == "memory":
        raise UsageError(f"{url}: what is in one process's memory is nowhere else")
    return _Folder(Path(unquote(rest))) if scheme == "file" else _Bucket(canonical)


class _Bucket:
    def __init__(self, url: str) -> None:
        from holdfast.store.remote import ObjectStore

        scheme, _, rest = url.partition("://")
        place, _, self._name = rest.rpartition("/") if "/" in rest else (rest, "", "")
        store = open_store(f"{scheme}://{place}")
        assert isinstance(store, ObjectStore)
        self._store, self._url = store, url

    @property
    def is_near(self) -> bool:
        return False

    def files(self) -> list[ForeignFile]:
        start = f"{self._name}/" if self._name else ""
        below = [
            ForeignFile(path.removeprefix(start), size_bytes, version)
            for path, size_bytes, version in self._store.list_any(self._name)
            if path.startswith(start) and path != self._name
        ]
        if below:
            return _without_markers(below, self._url)
        if not self._name:
            raise NotFound(f"{self._url} is empty")
        size_bytes, version = self._store.look_at(self._name)
        return [ForeignFile("", size_bytes, version)]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> str:
        parts = [each for each in (self._name, name) if each]
        return self._store.read_any("/".join(parts), offset, buffer)

    def close(self) -> None:
        self._store.close()


def _without_markers(found: list[ForeignFile], url: str) -> list[ForeignFile]:
    """Consoles make empty objects that stand for folders. UsageError for a name that is a file and a folder."""
    folders = {folder for each in found for folder in _folders_of(each.name)}
    both = [each for each in found if each.name in folders and each.size_bytes]
    if both:
        raise UsageError(
            f"{url} holds {both[0].name!r} and files below it: on a disk it is a file or a folder, and not both"
        )
    return sorted(each for each in found if each.name not in folders)


def _folders_of(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


class _Folder:
    """Links are followed: what they lead to is copied. Caches of models are made of them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def is_near(self) -> bool:
        return True

    def files(self) -> list[ForeignFile]:
        with posix.translated("listing", "", str(self._path)):
            if not self._path.is_dir():
                return [_seen("", self._path.stat(), self._path)]
            return sorted(self._below(self._path, "", (self._identity(self._path),)))

    def _below(self, folder: Path, start: str, above: tuple[tuple[int, int], ...]) -> Iterator[ForeignFile]:
        for path in folder.iterdir():
            name = f"{start}{path.name}"
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                yield _seen(name, status, path)
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise UsageError(f"{path} is a link to a folder that it lies in")
            yield from self._below(path, f"{name}/", (*above, identity))

    def _identity(self, path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino

    def read_into(self, name: str, offset: int, buffer: memoryview) -> str:
        path = self._path / name if name else self._path
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        with posix.translated("reading", name, str(self._path)), posix.opened(os.open(path, flags)) as descriptor:
            count = posix.read_exactly(descriptor, offset, buffer)
            version = _version(os.fstat(descriptor))
        if count < len(buffer):
            raise IntegrityError(f"{path} ended after {offset + count} bytes; it has changed while it was read")
        return version

    def close(self) -> None:
        pass


def _seen(name: str, status: os.stat_result, path: Path) -> ForeignFile:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} is no plain file")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!r} has a name that is no UTF-8 text") from None
    return ForeignFile(name, status.st_size, _version(status))


def _version(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
