"""A folder of a store as a store of its own: many runs in one bucket share one client, and with it its connections.

A client costs some 10 ms and a connection some round trips; a controller of a thousand runs would pay that a thousand times.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock

from holdfast.store.base import Body, Entry, Store, check_key, check_prefix, is_key
from holdfast.store.open import normalise_url, open_store

__all__ = ["Beneath", "SharedStores"]


class Beneath:
    """Implements `Store` for what lies below `folder` ("runs/gpt") of `inner`, with all its promises.

    Thread safety: every method, as `inner`. Ownership: `inner` is shared and not closed.
    """

    def __init__(self, inner: Store, folder: str) -> None:
        self._inner, self._folder = inner, f"{check_key(folder)}/"

    @property
    def url(self) -> str:
        return f"{self._inner.url.rstrip('/')}/{self._folder[:-1]}"

    @property
    def is_near(self) -> bool:
        return self._inner.is_near

    def put(self, key: str, body: Body) -> None:
        self._inner.put(self._folder + check_key(key), body)

    def put_new(self, key: str, body: bytes) -> bool:
        return self._inner.put_new(self._folder + check_key(key), body)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._inner.get(self._folder + check_key(key), max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._inner.read_into(self._folder + check_key(key), offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = len(self._folder)
        found = self._inner.list(self._folder + check_prefix(prefix))
        return (Entry(entry.key[start:], entry.size_bytes) for entry in found)

    def delete(self, key: str) -> None:
        self._inner.delete(self._folder + check_key(key))

    def close(self) -> None:
        """The inner store is closed by whoever has opened it."""


class SharedStores:
    """Opens stores by URL; those in one bucket share its client. Thread safety: every method. `close` closes all of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._opened: dict[str, Store] = {}

    def __call__(self, url: str) -> Store:
        canonical = normalise_url(url)
        scheme, _, rest = canonical.partition("://")
        bucket, _, folder = rest.partition("/")
        if scheme in ("file", "memory") or not folder or not is_key(folder):
            return self._open(canonical)
        return Beneath(self._open(f"{scheme}://{bucket}"), folder)

    def _open(self, url: str) -> Store:
        with self._lock:
            if url not in self._opened:
                self._opened[url] = open_store(url)
            return self._opened[url]

    def close(self) -> None:
        with self._lock:
            for store in self._opened.values():
                store.close()
            self._opened.clear()
