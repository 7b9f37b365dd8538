"""An S3 bucket as a contestant: holdfast on it, and the bare client that holdfast uses, moving raw objects in parallel."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import torch
from contestants import DONE, Contestant, Holdfast, Pending
from obstore.store import S3Store
from states import State, named_tensors

from holdfast.testing.servers import ObjectServer

__all__ = ["HoldfastOnS3", "RawClient"]

_OBJECT_BYTES = 64 << 20
_THREADS = 4


def _client(url: str, server: ObjectServer) -> S3Store:
    settings: Any = dict(server.options)
    return S3Store(url.removeprefix("s3://"), config=settings, client_options={"allow_http": True})


class RawClient(Contestant):
    """Objects of 64 MiB, four at a time; on the way back into memory that is ready. No hashes, no index."""

    name = "raw client"
    restores_into_moments = True

    def __init__(self, folder: Path, url: str, server: ObjectServer) -> None:
        super().__init__(folder)
        self._store = _client(url, server)
        self._pool = ThreadPoolExecutor(_THREADS)

    def _objects(self, state: State) -> list[tuple[str, list[memoryview]]]:
        """The state's memory as the buffers of objects of up to 64 MiB."""
        objects: list[tuple[str, list[memoryview]]] = []
        filled_bytes = _OBJECT_BYTES
        for tensor in named_tensors(state.tree()).values():
            if filled_bytes + tensor.nbytes > _OBJECT_BYTES:
                objects.append((f"raw/{self.number}/{len(objects)}", []))
                filled_bytes = 0
            objects[-1][1].append(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
            filled_bytes += tensor.nbytes
        return objects

    def _all(self, move: Callable[[str, list[memoryview]], None], state: State) -> None:
        list(self._pool.map(lambda item: move(*item), self._objects(state)))

    def save(self, state: State) -> Pending:
        self.number += 1
        self._all(lambda key, buffers: _put(self._store, key, buffers), state)
        return DONE

    def restore(self, target: State) -> None:
        self._all(lambda key, buffers: _get(self._store, key, buffers), target)

    def tidy(self) -> None:
        """Remove what the newest has replaced, as holdfast does."""
        for page in obstore.list(self._store, f"raw/{self.number - 1}"):
            obstore.delete(self._store, [item["path"] for item in page])

    def cache_files(self, *, wanted: bool) -> None:
        """The server keeps everything in memory."""

    def close(self) -> None:
        self._pool.shutdown()


def _put(store: S3Store, key: str, buffers: list[memoryview]) -> None:
    obstore.put(store, key, buffers, use_multipart=False)


def _get(store: S3Store, key: str, buffers: list[memoryview]) -> None:
    body, position = memoryview(obstore.get(store, key).bytes()), 0
    for buffer in buffers:
        buffer[:] = body[position : position + len(buffer)]
        position += len(buffer)


class HoldfastOnS3(Holdfast):
    def __init__(self, folder: Path, url: str, server: ObjectServer) -> None:
        super().__init__(folder, f"{url}/run", server.options)
        self._store = _client(url, server)

    def cache_files(self, *, wanted: bool) -> None:
        """The server keeps everything in memory."""

    def objects(self) -> dict[str, int]:
        return {item["path"]: item["size"] for page in obstore.list(self._store, "run") for item in page}
