"""Memory for snapshots: shared, pre-faulted, kept out of forked children, and under a hard cap.

A slot is one anonymous shared mapping (memfd). It is not inherited by forked loader workers (`MADV_DONTFORK`): a child that copied
written staging pages would break the cap. Pages are faulted in beside the first steps (`fault_in`), so that
the first save does not pay for them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.core.errors import UsageError

__all__ = ["Slot", "StagingBudget", "available_memory_bytes", "plan_slots"]

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; not named by Python 3.11
_FAULT_BYTES = 64 << 20
_LIBC = ctypes.CDLL(None)  # unlike mmap.madvise, a foreign call lets other threads run
_DEFAULT_SHARE_OF_FREE = 0.4
_DEFAULT_SNAPSHOTS = 2
_UNLIMITED_BYTES = 1 << 60


class _CgroupFiles(NamedTuple):
    """Where a version of cgroups says what. `cache` and `shared` are lines of memory.stat: cache includes shared memory."""

    limit: str
    usage: str
    cache: str
    shared: str


_V2 = _CgroupFiles("memory.max", "memory.current", "file", "shmem")
_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")


@dataclass(frozen=True, slots=True)
class StagingBudget:
    """How much staging this process may use. `slots` snapshots of `slot_bytes` each; 0 slots means: stream without staging."""

    slots: int
    slot_bytes: int
    cap_bytes: int


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process's cgroup (v2 or v1), or the machine where there is none, can still give.

    Page cache counts as free, as the kernel reclaims it. Raises nothing: what cannot be read does not limit.
    """
    machine = _UNLIMITED_BYTES
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                machine = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return max(0, min(machine, _cgroup_free_bytes(root)))


def _cgroup_free_bytes(root: Path) -> int:
    free = _UNLIMITED_BYTES
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator:
            continue
        if controllers == "":
            base, files = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            base, files = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        # A limit may stand at any ancestor; inside a container the path may not exist below the mount, so the mount itself counts.
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            free = min(free, _level_free_bytes(level, files))
    return free


def _level_free_bytes(level: Path, files: _CgroupFiles) -> int:
    limit_bytes = _number(level / files.limit)
    if limit_bytes is None or limit_bytes >= _UNLIMITED_BYTES:
        return _UNLIMITED_BYTES
    cached_bytes = 0
    try:
        stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        cached_bytes = max(0, int(stat.get(files.cache, 0)) - int(stat.get(files.shared, 0)))
    except (OSError, ValueError):
        pass
    return max(0, limit_bytes - (_number(level / files.usage) or 0) + cached_bytes)


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and for what cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def plan_slots(snapshot_bytes: int, *, cap_bytes: int | None, available_bytes: int, local_ranks: int) -> StagingBudget:
    """How many snapshots are staged.

    `cap_bytes` is the user's cap for the whole machine, shared by its `local_ranks`; None means two snapshots or 40 % of what is
    available, whichever is less. Below one snapshot there is no staging.
    """
    if cap_bytes is not None and cap_bytes < 0:
        raise UsageError(f"staging_cap must not be negative: {cap_bytes}")
    slot_bytes = -(-max(1, snapshot_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    if cap_bytes is None:
        share = int(_DEFAULT_SHARE_OF_FREE * available_bytes) // local_ranks
        cap = min(_DEFAULT_SNAPSHOTS * slot_bytes, share)
    else:
        cap = min(cap_bytes, available_bytes) // local_ranks
    return StagingBudget(min(_DEFAULT_SNAPSHOTS, cap // slot_bytes), slot_bytes, cap)


class Slot:
    """Room for one snapshot. `targets` are its memory seen as the arrays of `layout` (snapshot.py makes and uses them).

    Ownership: whoever took it from the saver fills or reads it; nobody else touches it meanwhile.
    """

    def __init__(self, size_bytes: int, descriptor: int | None = None) -> None:
        """`descriptor`: memory that another process has made, and that is this slot's to close from now on."""
        self.size_bytes = size_bytes
        made = descriptor is None
        self._descriptor = os.memfd_create("holdfast-staging", os.MFD_CLOEXEC) if descriptor is None else descriptor
        try:
            if made:
                os.ftruncate(self._descriptor, size_bytes)
            elif os.fstat(self._descriptor).st_size < size_bytes:
                raise UsageError(f"the memory handed over is smaller than the {size_bytes} bytes announced")
            self._mapping = mmap.mmap(self._descriptor, size_bytes, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._mapping.madvise(mmap.MADV_DONTFORK)
        # A saver that is given up while its store hangs never closes its slots: they go when its thread has ended.
        self._let_go = weakref.finalize(self, os.close, self._descriptor)
        self._let_go.atexit = False
        self.memory = memoryview(self._mapping)
        self.layout: object = None
        self.targets: list[Any] = []
        self.unpin: Callable[[], None] | None = None
        """Undoes what page-locks the memory for a device, once something has."""

    @property
    def descriptor(self) -> int:
        """Of the memory, for another process to map; closed with the slot."""
        return self._descriptor

    @property
    def memory_id(self) -> int:
        """The same in every process that has this memory, and never that of other memory at the same time."""
        return os.fstat(self._descriptor).st_ino

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def fault_in(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Have the kernel provide the pages now. Runs beside the loop: the interpreter is not held, and `stop` ends it early.

        Writes nothing, so it does no harm to a snapshot that is being copied meanwhile. Kernels before 5.14 cannot do it; then the
        first copy into the slot takes the time.
        """
        for start in range(0, self.size_bytes, _FAULT_BYTES):
            length = min(_FAULT_BYTES, self.size_bytes - start)
            if stop() or _LIBC.madvise(ctypes.c_void_p(self.address + start), ctypes.c_size_t(length), _POPULATE_WRITE):
                return

    def close(self) -> None:
        """Unmap. Views that somebody else still holds keep the mapping until they are gone."""
        if self.unpin is not None:
            self.unpin()
        self.layout, self.targets = None, []
        self.memory.release()
        try:
            self._mapping.close()
        except BufferError:
            pass
        self._let_go()
