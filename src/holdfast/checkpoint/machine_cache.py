"""Objects that several ranks of one machine need are fetched once, into memory that all of them read.

    what each rank wants → who fetches what (`share_fetching`) → files in shared memory (`MachineCache`) → restored from there

For stores behind a network: a disk of this machine is read by each rank itself, through the page cache. What is not in the cache,
or does not verify, every rank fetches by itself. So nothing here can fail a restore.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

import msgspec
from blake3 import blake3

from holdfast.checkpoint.staging import available_memory_bytes
from holdfast.core.errors import HoldfastError, NotFound
from holdfast.store.base import Store

__all__ = ["Fetching", "MachineCache", "WantedHere", "room_bytes", "share_fetching", "this_machine"]

_MEMORY = Path("/dev/shm")
_PREFIX = "holdfast-restore-"
_SHARE_OF_FREE = 0.5


class WantedHere(msgspec.Struct, frozen=True):
    """What one rank wants: sizes by key. `room_bytes`: how much memory its machine has for it."""

    machine: str
    room_bytes: int
    sizes_bytes: dict[str, int]


class Fetching(msgspec.Struct, frozen=True):
    """What one rank fetches for its machine, and where to; `is_shared`: the ranks there fetch anything for each other at all."""

    folder: str
    keys: list[str]
    is_shared: bool


def this_machine(memory: Path = _MEMORY) -> str:
    """The same for processes that see the same shared memory."""
    try:
        boot, device = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat(memory).st_dev
        return f"{boot}-{device}"
    except OSError:
        return ""


def room_bytes(memory: Path = _MEMORY) -> int:
    """How much of this machine's memory a restore may use for a while."""
    try:
        free = os.statvfs(memory)
        shared = free.f_bavail * free.f_frsize
    except OSError:
        return 0
    return int(_SHARE_OF_FREE * min(available_memory_bytes(), shared))


def share_fetching(ranks: Sequence[WantedHere], run: str, attempt: int) -> list[Fetching]:
    """By rank: what more than one rank of a machine wants, spread evenly over those that want it, as far as there is room."""
    fetched: list[list[str]] = [[] for _ in ranks]
    machines: dict[str, list[int]] = {}
    for rank, wanted in enumerate(ranks):
        if wanted.machine:
            machines.setdefault(wanted.machine, []).append(rank)
    shared: set[int] = set()
    for here in machines.values():
        room = min(ranks[rank].room_bytes for rank in here)
        load = dict.fromkeys(here, 0)
        holders: dict[str, list[int]] = {}
        for rank in here:
            for key in ranks[rank].sizes_bytes:
                holders.setdefault(key, []).append(rank)
        for key, who in holders.items():
            size = ranks[who[0]].sizes_bytes[key]
            if len(who) > 1 and size <= room:
                room -= size
                fetcher = min(who, key=lambda rank: (load[rank], rank))
                load[fetcher] += size
                fetched[fetcher].append(key)
                shared.update(who)
    return [Fetching(f"{_PREFIX}{run}-{attempt}", keys, rank in shared) for rank, keys in enumerate(fetched)]


class MachineCache:
    """A folder of objects in shared memory, under the hashes of their names. Complete ones only are seen."""

    is_near = True

    def __init__(self, folder: str, keys: Collection[str], memory: Path = _MEMORY) -> None:
        """`keys`: those that this rank wants."""
        self._folder = memory / folder
        self._descriptors: dict[str, int] = {}
        self._wanted = keys

    @property
    def keys(self) -> Collection[str]:
        return self._descriptors.keys()

    def fetch(self, store: Store, keys: Sequence[str], sizes_bytes: Mapping[str, int], pool: Executor) -> int:
        """Get these objects of `store`. Returns the bytes that came; what does not is left to whoever needs it."""
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
        run, _, _ = self._folder.name.rpartition("-")
        for path in self._folder.parent.glob(f"{run}-*"):
            # An earlier attempt was killed while it restored.
            if path != self._folder:
                shutil.rmtree(path, ignore_errors=True)
        return sum(pool.map(lambda key: self._fetch(store, key, sizes_bytes[key]), keys))

    def _fetch(self, store: Store, key: str, size_bytes: int) -> int:
        path = self._path(key)
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("xb+") as file:
                # Now, and not by a signal when a page that is not there is written.
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                with mmap.mmap(file.fileno(), size_bytes) as mapping, memoryview(mapping) as view:
                    store.read_into(key, 0, view)
            temporary.rename(path)
        except (HoldfastError, OSError):
            with suppress(OSError):
                temporary.unlink()
            return 0
        return size_bytes

    def open(self) -> None:
        """All ranks have fetched: take what is there."""
        for key in self._wanted:
            with suppress(OSError):
                self._descriptors[key] = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Raises NotFound for a copy that is shorter."""
        descriptor, done = self._descriptors[key], 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise NotFound(f"{key}: the copy in shared memory ends too early")
            done += count

    def close(self) -> None:
        """All ranks have read. Safe to call on each of them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self._folder / blake3(key.encode()).hexdigest()
