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
from operator import attrgetter
from typing import TypeVar

import numpy as np
from blake3 import blake3

from holdfast.checkpoint.assemble import Assembled, assemble
from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import BLOCK_BYTES, MAX_PART_BYTES, CheckpointRef, Head, Part, Root, decode_part
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.near import Near, NearFor, Readable
from holdfast.checkpoint.retain import StoreOpener, read_root
from holdfast.checkpoint.targets import Target, Wanted, wanted_for
from holdfast.checkpoint.write import block_hashes
from holdfast.core.errors import (
    FormatError,
    HoldfastError,
    IntegrityError,
    NotFound,
    RestoreError,
    RunRemoved,
)
from holdfast.core.sealed import digest
from holdfast.store.base import Store

__all__ = [
    "CheckpointReader", "Fallback", "Target", "check_total", "find_root", "open_checkpoint", "read_part", "read_parts",
    "read_threads", "restore_newest",
]  # fmt: skip

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


class CheckpointReader:
    """One verified index and access to the bytes behind it. Thread-safe.

    `parts` are those of the root, by rank. `near` may have copies of the run's own objects on this machine: what is there and
    verifies is read from there. Raises FormatError when the parts do not fit together.
    """

    def __init__(
        self,
        store: Store,
        ref: CheckpointRef,
        root: Root,
        parts: Sequence[Part],
        open_home: StoreOpener,
        near: Sequence[Near] = (),
    ) -> None:
        self._near = near
        self._added: list[Near] = []
        self.ref = ref
        self.root = root
        self._store, self._open_home = store, open_home
        self._label = f"{store.url}/{ref.name}"
        self._lay_out(parts)

    def _lay_out(self, parts: Sequence[Part], *, is_whole: bool = True) -> None:
        """These parts are what is known of the checkpoint."""
        self._parts = tuple(parts)
        self._arrays = assemble(self._parts, what=self._label, is_whole=is_whole)
        homes = {home: self._open_home(home) for home in dict.fromkeys(home for part in parts for home in part.homes)}
        self._objects = [
            (homes[part.homes[target.home - 1]] if target.home else self._store, target)
            for part in parts for target in part.objects
        ]  # fmt: skip

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of all ranks."""
        return self._parts

    @property
    def arrays(self) -> dict[str, Assembled]:
        """All of them, by name."""
        return self._arrays

    def part(self, rank: int) -> Part:
        return self.parts[rank]

    def find(self, name: str) -> Assembled | None:
        """One of the arrays; None where there is none of that name."""
        return self.arrays.get(name)

    def document(self, rank: int = 0) -> bytes:
        """What the rank's state consists of."""
        return self.part(rank).document

    def objects_of(self, wanted: Iterable[Target]) -> dict[str, int]:
        """Sizes, by key, of the run's own objects that hold what is wanted."""
        numbers = {item.object for target in wanted for item in wanted_for(target)}
        found = [reference for number in sorted(numbers) if (reference := self._objects[number][1]).home == 0]
        return {reference.key: reference.size_bytes for reference in found}

    def add_near(self, near: Near) -> None:
        """From now on what it has is read there."""
        self._added.append(near)

    def read(
        self,
        wanted: Iterable[Target],
        pool: ThreadPoolExecutor,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Fill each target, verified. `progress` is told the bytes as they arrive, from any thread.

        Raises IntegrityError when bytes do not match, NotFound when an object is missing, UsageError for memory of the wrong size;
        the memory then holds no usable data.
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

    def _tasks(self, targets: Iterable[Target], progress: Callable[[int], None]) -> list[Callable[[], None]]:
        tasks: list[Callable[[], None]] = []
        small: list[Wanted] = []
        for target in targets:
            for item in wanted_for(target):
                if item.length >= _SMALL_BYTES:
                    tasks.append(partial(self._read_blocks, item, progress))
                else:
                    small.append(item)
        tasks.extend(partial(self._read_group, group, progress) for group in _groups(small))
        return tasks

    def _read_blocks(self, item: Wanted, progress: Callable[[int], None]) -> None:
        target = np.empty(item.length, np.uint8).data if item.target is None else item.target
        self._read_nearest(item.object, lambda store, key: None if _fill(store, key, item, target) else item)
        if item.place is not None:
            item.place(target)
        progress(item.length)

    def _read_group(self, group: Sequence[Wanted], progress: Callable[[int], None]) -> None:
        self._read_nearest(group[0].object, lambda store, key: _fill_group(store, key, group))
        progress(sum(item.length for item in group))

    def _read_nearest(self, number: int, fill: Callable[[Readable, str], Wanted | None]) -> None:
        """`fill` reads from somewhere and returns what does not verify. What nobody near has unaltered comes from the store."""
        store, reference = self._objects[number]
        for near in (*self._near, *self._added):
            if reference.home == 0 and reference.key in near.keys:
                with suppress(HoldfastError):
                    if fill(near, reference.key) is None:
                        return
        altered = fill(store, reference.key)
        if altered is not None:
            raise IntegrityError(
                f"{self._label}: array {altered.array!r}: bytes do not match their hash; the object has been altered or torn"
            )


def _fill(store: Readable, key: str, item: Wanted, target: memoryview) -> bool:
    """From a disk block by block, each hashed while it is in the CPU's cache; over a network by one request."""
    step_bytes = BLOCK_BYTES if store.is_near else item.length
    hashes = []
    for start in range(0, item.length, step_bytes):
        piece = target[start : start + step_bytes]
        store.read_into(key, item.offset + start, piece)
        hashes.append(block_hashes(piece))
    return b"".join(hashes) == item.hashes


def _fill_group(store: Readable, key: str, group: Sequence[Wanted]) -> Wanted | None:
    start = group[0].offset
    together = memoryview(bytearray(max(item.offset + item.length for item in group) - start))
    store.read_into(key, start, together)
    for item in group:
        offset = item.offset - start
        data = together[offset : offset + item.length]
        # Less than a block has one hash.
        if blake3(data).digest() != item.hashes:
            return item
        if item.target is not None:
            item.target[:] = data
        elif item.place is not None:
            item.place(data)
    return None


def _groups(small: list[Wanted]) -> list[list[Wanted]]:
    """Small chunks that lie close together are fetched by one request."""
    groups: list[list[Wanted]] = []
    number, first, end = -1, 0, 0
    for item in sorted(small, key=attrgetter("object", "offset")):
        last = item.offset + item.length
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
    store: Store,
    ref: CheckpointRef,
    open_home: StoreOpener,
    near: Sequence[NearFor] = (),
    pool: ThreadPoolExecutor | None = None,
) -> CheckpointReader:
    """Read and verify the root and the parts of all ranks. A checkpoint that a fork borrows is read from its home. Parts are read
    by `pool`, or by some threads of its own.

    Raises IntegrityError or NotFound.
    """
    where, root = find_root(store, ref, open_home)
    parts = read_parts(where, root, range(len(root.parts)), pool)
    found = [one for look in near if (one := look(ref, parts)) is not None] if ref.home is None else []
    reader = CheckpointReader(where, ref, root, parts, open_home, found)
    # What a restore allocates is known, and was shown to people, before any of it is allocated.
    check_total(reader)
    return reader


def find_root(store: Store, ref: CheckpointRef, open_home: StoreOpener) -> tuple[Store, Root]:
    """The root, verified, and the store that it lies in. Raises IntegrityError or NotFound."""
    where = store if ref.home is None else open_home(ref.home)
    root = read_root(where, ref)
    if root.world_size != len(root.parts) or not root.parts:
        raise FormatError(
            f"{where.url}/{ref.name}: written by {root.world_size} ranks, but it has {len(root.parts)} parts"
        )
    return where, root


def check_total(reader: CheckpointReader) -> None:
    """Raises FormatError when the checkpoint does not have the size that the head says."""
    if sum(array.nbytes for array in reader.arrays.values()) != reader.ref.total_bytes:
        raise FormatError(
            f"{reader.ref.name}: its arrays do not have the {reader.ref.total_bytes} bytes that the head says"
        )


def read_parts(store: Store, root: Root, ranks: Sequence[int], pool: ThreadPoolExecutor | None = None) -> list[Part]:
    """The parts of these ranks, verified. `store` is the one that the root lies in. Raises IntegrityError or NotFound."""
    if len(ranks) == 1:
        return [read_part(store, root, ranks[0])]
    if pool is None:
        with ThreadPoolExecutor(min(len(ranks), _FAR_THREADS), thread_name_prefix="holdfast-read") as own:
            return read_parts(store, root, ranks, own)
    tasks = [pool.submit(read_part, store, root, rank) for rank in ranks]
    try:
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def read_part(store: Store, root: Root, rank: int) -> Part:
    """One rank's part, verified. `store` is the one that the root lies in. Raises IntegrityError or NotFound."""
    reference = root.parts[rank]
    data = store.get(reference.key, max_bytes=min(MAX_PART_BYTES, reference.size_bytes))
    label = f"{store.url}/{reference.key}"
    if digest(data) != reference.blake3:
        raise IntegrityError(f"{label}: the bytes do not match the hash in the root")
    with collector_paused():
        part = decode_part(data, what=label)
    if part.rank != rank:
        raise FormatError(f"{label}: the part of rank {part.rank} where that of rank {rank} is expected")
    return part


def restore_newest(
    store: Store,
    head: Head,
    open_home: StoreOpener,
    load: Callable[[CheckpointReader], Result],
    *,
    fell_back: Callable[[Fallback], None],
    near: Sequence[NearFor] = (),
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
