"""Where the runs of these tests lie: memory, a folder, or a bucket behind real HTTP with a network that can misbehave.

Every example gets a place of its own; every attempt gets a client of its own. `open` is the clean view: nothing is in between.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from obstore.store import S3Store

from holdfast.core.clock import SystemClock
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.store.remote import ObjectStore
from holdfast.testing.http_faults import FaultyProxy, HttpFault
from holdfast.testing.servers import ObjectServer

if TYPE_CHECKING:
    from holdfast.store.remote import Client

__all__ = ["BUCKET", "BriskClock", "BucketPlace", "FolderPlace", "MemoryPlace", "Place", "WireStrike"]

BUCKET = "stateful"
_numbers = count(1)

WireStrike = tuple[int, HttpFault]
"""The request, counted from when the strike is called, and what happens to it."""


class Place(Protocol):
    """`url` is the run's; `fork_url` makes the URL of another run beside it."""

    url: str

    def client(self) -> Store:
        """A new client of the run, as a process makes one."""
        ...

    def open(self, url: str) -> Store:
        """A clean view of any run of this place."""
        ...

    def fork_url(self, name: str) -> str: ...

    def disturb(self, strikes: Sequence[WireStrike]) -> None:
        """What the network does to the next requests of the clients."""
        ...

    def close(self) -> None: ...


class MemoryPlace:
    def __init__(self) -> None:
        self.url = f"memory://stateful-{next(_numbers)}"
        self._opened: dict[str, MemoryStore] = {}

    def client(self) -> Store:
        return self.open(self.url)

    def open(self, url: str) -> Store:
        return self._opened.setdefault(url, MemoryStore(url.removeprefix("memory://")))

    def fork_url(self, name: str) -> str:
        return f"{self.url}-{name}"

    def disturb(self, strikes: Sequence[WireStrike]) -> None:
        assert not strikes, "there is no network here"

    def close(self) -> None:
        for store in self._opened.values():
            for entry in store.list():
                store.delete(entry.key)


class FolderPlace:
    def __init__(self, parent: Path) -> None:
        self._folder = parent / f"example-{next(_numbers)}"
        self.url = LocalStore(self._folder / "run").url
        self._opened: dict[str, LocalStore] = {}
        self._clients: list[LocalStore] = []

    def client(self) -> Store:
        self._clients.append(LocalStore(self._folder / "run"))
        return self._clients[-1]

    def open(self, url: str) -> Store:
        if url not in self._opened:
            self._opened[url] = LocalStore(Path(url.removeprefix("file://")))
        return self._opened[url]

    def fork_url(self, name: str) -> str:
        return f"file://{self._folder / name}"

    def disturb(self, strikes: Sequence[WireStrike]) -> None:
        assert not strikes, "there is no network here"

    def close(self) -> None:
        for store in (*self._opened.values(), *self._clients):
            store.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class BriskClock(SystemClock):
    """Real time, in which every pause of the client is short."""

    def sleep(self, seconds: float) -> None:
        super().sleep(min(seconds, 0.002))


class BucketPlace:
    """A fresh prefix of one bucket. While the network is disturbed, the attempts' requests go through the proxy."""

    def __init__(self, server: ObjectServer, proxy: FaultyProxy) -> None:
        self._server, self._proxy = server, proxy
        self.url = f"s3://{BUCKET}/example-{next(_numbers)}"
        self._opened: dict[str, ObjectStore] = {}
        self._client: _Rerouted | None = None

    def client(self) -> Store:
        if self._client is None:
            self._client = _Rerouted(
                _bucket_store(self.url, self._server, self._server.endpoint),
                _bucket_store(self.url, self._server, self._proxy.endpoint),
            )
        return self._client

    def open(self, url: str) -> Store:
        if url not in self._opened:
            self._opened[url] = _bucket_store(url, self._server, self._server.endpoint)
        return self._opened[url]

    def fork_url(self, name: str) -> str:
        return f"{self.url}-{name}"

    def disturb(self, strikes: Sequence[WireStrike]) -> None:
        self._proxy.forget()
        due = dict(strikes)
        self._proxy.plan = lambda exchange: due.get(exchange.number)
        if self._client is not None:
            self._client.disturbed = bool(strikes)

    def close(self) -> None:
        for store in self._opened.values():
            store.close()
        if self._client is not None:
            self._client.close()


class _Rerouted(ObjectStore):
    """One store with two ways to it; the second one, through the proxy, takes longer."""

    def __init__(self, straight: ObjectStore, proxied: ObjectStore) -> None:
        super().__init__(straight.url, lambda timeout_s: straight._client(0), clock=BriskClock())
        self.disturbed = False
        self._straight, self._proxied = straight, proxied

    def _client(self, size_bytes: int) -> Client:
        return (self._proxied if self.disturbed else self._straight)._client(size_bytes)

    def close(self) -> None:
        self._straight.close()
        self._proxied.close()


def _bucket_store(url: str, server: ObjectServer, endpoint: str) -> ObjectStore:
    """As `open_store` makes it, but for pauses between retries, which are short."""

    def connect(_: float) -> S3Store:
        return S3Store(
            BUCKET,
            prefix=url.removeprefix(f"s3://{BUCKET}/"),
            config={**server.options, "endpoint": endpoint},  # type: ignore[arg-type]
            client_options={"allow_http": True, "timeout": timedelta(seconds=20)},
            retry_config={
                "max_retries": 2,
                "retry_timeout": timedelta(seconds=20),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=1),
                    "max_backoff": timedelta(milliseconds=2),
                    "base": 2,
                },
            },
        )

    return ObjectStore(url, connect, clock=BriskClock())
