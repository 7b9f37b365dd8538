"""A store in this process's memory: for tests, simulations and examples, with the same promises except durability.

Plain Python on purpose: it survives fork, holds private copies of what it is given, and starts no threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

from holdfast.core.errors import FormatError, IntegrityError, NotFound
from holdfast.store.base import Body, Entry, check_key, check_prefix, flat_buffers

__all__ = ["MemoryStore"]


@dataclass(slots=True)
class _Contents:
    objects: dict[str, bytes] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)


_named: dict[str, _Contents] = {}


class MemoryStore:
    """Objects in a dictionary. With a name, every store of that name in this process holds the same objects; without one,
    the objects are this instance's own.

    Thread safety: every method. Durability: none, the objects die with the process.
    """

    def __init__(self, name: str | None = None) -> None:
        self._url = f"memory://{name or 'private'}"
        self._contents = _Contents() if name is None else _named.setdefault(name, _Contents())

    @property
    def url(self) -> str:
        return self._url

    @property
    def is_near(self) -> bool:
        return True

    def put(self, key: str, body: Body) -> None:
        copied = b"".join(flat_buffers(body))
        with self._contents.lock:
            self._contents.objects[check_key(key)] = copied

    def put_new(self, key: str, body: bytes) -> bool:
        copied = b"".join(flat_buffers(body))
        with self._contents.lock:
            return self._contents.objects.setdefault(check_key(key), copied) is copied

    def get(self, key: str, *, max_bytes: int) -> bytes:
        body = self._body(key)
        if len(body) > max_bytes:
            raise FormatError(f"{key!r} in {self.url} has {len(body)} bytes, more than the {max_bytes} expected")
        return body

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        body, flat = self._body(key), buffer.cast("B")
        if offset + len(flat) > len(body):
            raise IntegrityError(
                f"{key!r} in {self.url} has {len(body)} bytes, too short for [{offset}, {offset + len(flat)})"
            )
        flat[:] = body[offset : offset + len(flat)]

    def list(self, prefix: str = "") -> Iterator[Entry]:
        check_prefix(prefix)
        with self._contents.lock:
            found = [Entry(key, len(body)) for key, body in self._contents.objects.items() if key.startswith(prefix)]
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        with self._contents.lock:
            self._contents.objects.pop(check_key(key), None)

    def close(self) -> None:
        """Named contents stay for the next store of that name."""

    def _body(self, key: str) -> bytes:
        with self._contents.lock:
            body = self._contents.objects.get(check_key(key))
        if body is None:
            raise NotFound(f"{key!r} is not in {self.url}")
        return body
