"""Restore: every byte is checked against its hash before anybody computes with it.

The chain of trust is head → root → part → block. A missing object or a hash that does not match makes the caller fall back to an
older checkpoint (`restore_newest`); a store that answers 403, 5xx or nothing does not, because throttling must not cost a day of
work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple, TypeVar

from blake3 import blake3

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import (
    BLOCK_BYTES,
    MAX_PART_BYTES,
    ArrayEntry,
    CheckpointRef,
    Chunk,
    Head,
    Part,
    Root,
    decode_part,
    digest,
)
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.retain import StoreOpener, read_root
from holdfast.checkpoint.write import block_hashes
from holdfast.core.errors import (
    FormatError,
    HoldfastError,
    IntegrityError,
    NotFound,
    RestoreError,
    RunRemoved,
    UsageError,
)
from holdfast.store.base import Store

__all__ = ["CheckpointReader", "Fallback", "open_checkpoint", "read_threads", "restore_newest"]

_SMALL_BYTES = 1 << 20
_JOIN_GAP_BYTES = 64 << 10
_JOIN_BYTES = 8 << 20
_FAR_THREADS = 8
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Fallback:
    """A checkpoint that did not verify, and why."""

    checkpoint: CheckpointRef
    reason: str


class _Wanted(NamedTuple):
    """One chunk and the memory that it goes to."""

    object: int
    offset: int
    chunk: Chunk
    target: memoryview
    array: str


class CheckpointReader:
    """One verified index and access to the bytes behind it. Thread-safe.

    `near` is a disk of this machine that may hold copies of the run's own objects: what is there and verifies is read from there.
    """

    def __init__(
        self,
        store: Store,
        ref: CheckpointRef,
        root: Root,
        part: Part,
        open_home: StoreOpener,
        near: Store | None = None,
    ) -> None:
        self._near = near
        self._near_keys = set() if near is None else _keys_on(near)
        self.ref = ref
        self.root = root
        self.part = part
        self.entries: dict[str, ArrayEntry] = {entry.name: entry for entry in part.arrays}
        self._stores = [store, *(open_home(home) for home in part.homes)]
        self._label = f"{store.url}/{ref.name}"

    def read(
        self,
        wanted: Iterable[tuple[ArrayEntry, memoryview]],
        pool: ThreadPoolExecutor,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Fill each buffer with its array's bytes, verified. `progress` is told the bytes as they arrive, from any thread.

        Raises IntegrityError when bytes do not match, NotFound when an object is missing, UsageError for a buffer of the wrong
        size; the buffers then hold no usable data.
        """
        with collector_paused():
            tasks = self._tasks(wanted, progress or (lambda count: None))
        futures = [pool.submit(task) for task in tasks]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        done |= wait(pending).done
        errors = [error for future in done if not future.cancelled() and (error := future.exception()) is not None]
        # A store that is unavailable outranks lost bytes: nothing may be declared lost while requests fail.
        for error in sorted(errors, key=lambda error: isinstance(error, IntegrityError | NotFound)):
            raise error

    def _tasks(
        self, wanted: Iterable[tuple[ArrayEntry, memoryview]], progress: Callable[[int], None]
    ) -> list[Callable[[], None]]:
        tasks: list[Callable[[], None]] = []
        small: list[_Wanted] = []
        for entry, buffer in wanted:
            position, size_bytes = 0, len(buffer)
            for chunk in entry.chunks:
                length = chunk.length
                target = buffer if length == size_bytes else buffer[position : position + length]
                item = _Wanted(chunk.object, chunk.offset, chunk, target, entry.name)
                position += length
                if length >= _SMALL_BYTES:
                    tasks.append(partial(self._read_chunk, item, progress))
                else:
                    small.append(item)
            if position != size_bytes:
                raise UsageError(f"array {entry.name!r} has {position} bytes, its buffer {size_bytes}")
        tasks.extend(partial(self._read_group, group, progress) for group in _groups(small))
        return tasks

    def _read_chunk(self, item: _Wanted, progress: Callable[[int], None]) -> None:
        self._read_nearest(item.object, lambda store, key: None if _fill(store, key, item) else item)
        progress(item.chunk.length)

    def _read_group(self, group: Sequence[_Wanted], progress: Callable[[int], None]) -> None:
        self._read_nearest(group[0].object, lambda store, key: _fill_group(store, key, group))
        progress(sum(item.chunk.length for item in group))

    def _read_nearest(self, number: int, fill: Callable[[Store, str], _Wanted | None]) -> None:
        """`fill` reads from a store and returns what does not verify. What the disk lacks or has altered comes from the store."""
        reference = self.part.objects[number]
        if self._near is not None and reference.home == 0 and reference.key in self._near_keys:
            with suppress(HoldfastError):
                if fill(self._near, reference.key) is None:
                    return
        altered = fill(self._stores[reference.home], reference.key)
        if altered is not None:
            raise IntegrityError(
                f"{self._label}: array {altered.array!r}: bytes do not match their hash; the object has been altered or torn"
            )


def _keys_on(disk: Store) -> set[str]:
    try:
        return {entry.key for entry in disk.list("data/")}
    except HoldfastError:
        return set()


def _fill(store: Store, key: str, item: _Wanted) -> bool:
    """From a disk block by block, each hashed while it is in the CPU's cache; over a network by one request."""
    step_bytes = BLOCK_BYTES if store.is_near else item.chunk.length
    hashes = []
    for start in range(0, item.chunk.length, step_bytes):
        piece = item.target[start : start + step_bytes]
        store.read_into(key, item.offset + start, piece)
        hashes.append(block_hashes(piece))
    return b"".join(hashes) == item.chunk.hashes


def _fill_group(store: Store, key: str, group: Sequence[_Wanted]) -> _Wanted | None:
    start = group[0].offset
    together = memoryview(bytearray(max(item.offset + item.chunk.length for item in group) - start))
    store.read_into(key, start, together)
    for item in group:
        chunk, offset = item.chunk, item.offset - start
        data = together[offset : offset + chunk.length]
        if blake3(data).digest() != chunk.hashes:
            return item
        item.target[:] = data
    return None


def _groups(small: list[_Wanted]) -> list[list[_Wanted]]:
    """Small chunks that lie close together are fetched by one request."""
    groups: list[list[_Wanted]] = []
    number, first, end = -1, 0, 0
    for item in sorted(small, key=itemgetter(0, 1)):
        last = item.offset + item.chunk.length
        if item.object != number or item.offset - end > _JOIN_GAP_BYTES or last - first > _JOIN_BYTES:
            number, first, end = item.object, item.offset, last
            groups.append([item])
        else:
            end = last
            groups[-1].append(item)
    return groups


def read_threads(store: Store) -> int:
    """How many threads to read with."""
    return (os.cpu_count() or 1) if store.is_near else _FAR_THREADS


def open_checkpoint(
    store: Store, ref: CheckpointRef, open_home: StoreOpener, near: Store | None = None
) -> CheckpointReader:
    """Read and verify root and parts. A checkpoint that a fork borrows is read from its home.

    Raises IntegrityError or NotFound.
    """
    where = store if ref.home is None else open_home(ref.home)
    root = read_root(where, ref)
    if root.world_size != 1 or len(root.parts) != 1:
        raise FormatError(
            f"{where.url}/{ref.name}: written by {root.world_size} ranks; this version reads single-rank checkpoints"
        )
    reference = root.parts[0]
    data = where.get(reference.key, max_bytes=min(MAX_PART_BYTES, reference.size_bytes))
    label = f"{where.url}/{reference.key}"
    if digest(data) != reference.blake3:
        raise IntegrityError(f"{label}: the bytes do not match the hash in the root")
    with collector_paused():
        part = decode_part(data, what=label)
    # What a restore allocates is known, and was shown to people, before any of it is allocated.
    if sum(entry.spec().nbytes for entry in part.arrays) != ref.total_bytes:
        raise FormatError(f"{label}: its arrays do not have the {ref.total_bytes} bytes that the head says")
    return CheckpointReader(where, ref, root, part, open_home, near if ref.home is None else None)


def restore_newest(
    store: Store,
    head: Head,
    open_home: StoreOpener,
    load: Callable[[CheckpointReader], Result],
    *,
    fell_back: Callable[[Fallback], None],
    near: Store | None = None,
) -> Result | None:
    """Load the newest checkpoint of the current generation that verifies; None when the head retains none (any more).

    `load` raises IntegrityError or NotFound to say that the checkpoint is unusable. Before a checkpoint is called lost the truth is
    read again: retention may have removed it meanwhile. `fell_back` is told of every checkpoint that was passed over. Raises
    RestoreError when none verifies.
    """
    failures: list[Fallback] = []
    candidates = [ref for ref in head.checkpoints if ref.generation == head.generation]
    if not candidates:
        return None
    while candidates:
        ref = candidates.pop()
        try:
            return load(open_checkpoint(store, ref, open_home, near))
        except (IntegrityError, NotFound) as error:
            newest = read_truth(store, head.run_id).head
            if newest is not None and newest.number > head.number:
                head = newest
                if head.removed:
                    raise RunRemoved(f"{store.url}: the run was removed while it was read") from error
                tried = {failure.checkpoint.name for failure in failures}
                retained = [other for other in head.checkpoints if other.generation == head.generation]
                candidates = [other for other in retained if other.name not in tried and other.name != ref.name]
                if all(other.name != ref.name for other in retained):
                    continue
            failures.append(Fallback(ref, str(error)))
            fell_back(failures[-1])
    if not failures:
        return None
    reasons = "\n".join(f"  step {failure.checkpoint.step}: {failure.reason}" for failure in failures)
    raise RestoreError(
        f"{store.url}: none of the {len(failures)} retained checkpoints verifies:\n{reasons}\n"
        "The tracked objects must not be used. Look with `holdfast checkpoints verify`, or start a new generation with fresh=True"
    )
