"""The whole surface that holdfast needs of an object store, and what each implementation promises.

Keys are relative to the run's URL, `/`-separated, of the characters `A-Za-z0-9._-` and never with an empty, `.` or `..`
component (`check_key`). Objects are written whole: a reader sees all of an object or none of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from holdfast.core.errors import UsageError

__all__ = ["PAGE_BYTES", "Body", "Entry", "Store", "check_key", "check_prefix", "flat_buffers", "is_key"]

PAGE_BYTES = 4096
"""Bodies that begin with large buffers on page boundaries, of whole pages, are what a disk takes fastest: a multiple of every
disk's block."""

Body = memoryview | bytes | Sequence[memoryview | bytes]
"""What `put` takes: one buffer, or several that become one object."""

_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class Entry(NamedTuple):
    """One listed object."""

    key: str
    size_bytes: int


def is_key(name: str) -> bool:
    """True when `name` could be one of ours; stores do not list what is not (markers of folders, hidden files)."""
    return len(name) <= 900 and all(_COMPONENT.fullmatch(component) for component in name.split("/"))


def check_key(key: str) -> str:
    """Return `key`, or raise UsageError when it could name something outside the run (path tricks, empty parts)."""
    if not is_key(key):
        raise UsageError(f"not a valid object key: {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`, or raise UsageError when it is neither empty nor whole components ending in "/"."""
    if prefix and not prefix.endswith("/"):
        raise UsageError(f'a prefix is empty or ends in "/", not {prefix!r}')
    if prefix:
        check_key(prefix[:-1])
    return prefix


def flat_buffers(body: Body) -> list[memoryview]:
    """The body as one-dimensional views of bytes over the caller's memory, empty ones left out."""
    try:
        parts: Sequence[memoryview | bytes] = [memoryview(body)]  # type: ignore[arg-type]
    except TypeError:
        parts = body  # type: ignore[assignment]
    views = [memoryview(part) for part in parts]
    if not all(view.c_contiguous for view in views):
        raise UsageError("a buffer is not contiguous in memory; copy it first")
    return [view.cast("B") for view in views if view.nbytes]


class Store(Protocol):
    """Objects below one URL.

    Thread safety: every method may be called from any thread at the same time.
    Ownership: buffers passed in are only read, and only until the call returns; buffers returned belong to the caller.
    Failure contract: every error is one of `holdfast.core.errors`. `NotFound` means confirmed absent. After a write,
    `StoreUnavailable` means that the outcome is unknown: it may have been applied, may never be, or may land later.
    Durability: when a write has returned, the object survives a power cut (local: file and folders are fsynced).
    """

    @property
    def url(self) -> str:
        """The URL without credentials; safe to log."""
        ...

    @property
    def is_near(self) -> bool:
        """Whether a request is only work for this machine (a disk, memory): then a thread for each CPU and small requests are
        fastest. Over a network a request mostly waits: then many at once, and large ones."""
        ...

    def put(self, key: str, body: memoryview | bytes | Sequence[memoryview | bytes]) -> None:
        """Create an object under a name that no one else uses. Repeating it with the same bytes is harmless.

        A sequence of buffers is written one after the other as one object.
        """
        ...

    def put_new(self, key: str, body: bytes) -> bool:
        """Create an object if the name is free. True: this call created it. False: the name is taken, *possibly by this
        very call*, because clients retry inside; the caller compares what is there with what it wrote (a nonce)."""
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """The whole object. Raises FormatError, without reading it all, when it is larger than `max_bytes`."""
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, contiguous bytes) from the object's range [offset, offset + len(buffer)).

        Raises IntegrityError when the object is too short for the range, NotFound when it is absent.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix` (whole components: "" or ending in "/"), ascending by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; removing what is absent is no error."""
        ...

    def close(self) -> None:
        """Give back connections and descriptors. The store is not used afterwards."""
        ...
