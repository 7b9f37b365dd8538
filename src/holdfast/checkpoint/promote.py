"""From the disk to the store: a staged checkpoint is sent under the names that it has, newest first, beside training.

    offer → (a newer one replaces an older that waits) → read back, verify, put → head → told

What the disk gives back is checked before it is sent: a rotten block must not become the only copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np

from holdfast.checkpoint.format import MAX_PART_BYTES, ObjectRef
from holdfast.checkpoint.retain import root_key
from holdfast.checkpoint.threads import DaemonPool
from holdfast.checkpoint.tier import Staged
from holdfast.checkpoint.write import block_hashes
from holdfast.core.errors import HoldfastError, IntegrityError
from holdfast.core.sealed import MAX_RECORD_BYTES, digest
from holdfast.store.base import Store

__all__ = ["PROMOTION_BYTES", "Promoter", "keep_segments", "send"]

_AT_ONCE = 2
PROMOTION_BYTES = _AT_ONCE * (64 << 20)
"""Host memory that a promotion uses: so many objects of full size are on their way at once."""

Job = TypeVar("Job")


def send(staged: Staged, disk: Store, store: Store, *, uploaded: set[str]) -> None:
    """Put every object of a staged checkpoint that the store does not have, then its part and root.

    `uploaded` collects the names before they are sent. Raises IntegrityError when the disk has altered or lost something, or cannot
    be read, and what `store` raises.
    """
    part, root = staged.written.part, staged.written.root
    expected: dict[int, set[tuple[int, int, bytes]]] = {}
    for entry in part.arrays:
        for chunk in entry.chunks:
            if part.objects[chunk.object].key in staged.written.sent_objects:
                expected.setdefault(chunk.object, set()).add((chunk.offset, chunk.length, chunk.hashes))
    uploaded |= {part.objects[number].key for number in expected}
    # Threads of its own: the next checkpoint is staged meanwhile, and must not queue behind a slow store.
    pool = DaemonPool(_AT_ONCE, "holdfast-promote")
    tasks = [pool.submit(_send_object, part.objects[number], expected[number], disk, store) for number in expected]
    try:
        for task in tasks:
            task.result()
    except BaseException:
        for task in tasks:
            task.cancel()
        wait(tasks)
        raise
    finally:
        pool.shutdown(wait=False)
    part_ref = root.parts[0]
    uploaded |= {part_ref.key, root_key(root.name)}
    with _from(disk, root.name):
        part_data = disk.get(part_ref.key, max_bytes=MAX_PART_BYTES)
        root_data = disk.get(root_key(root.name), max_bytes=MAX_RECORD_BYTES)
    if digest(part_data) != part_ref.blake3 or digest(root_data) != staged.written.root_blake3:
        raise IntegrityError(f"{disk.url}/{root.name}: the disk has altered the index of a staged checkpoint")
    store.put(part_ref.key, part_data)
    store.put(root_key(root.name), root_data)


def keep_segments(store: Store, segments: Mapping[str, bytes]) -> None:
    """Put what a dead trainer had logged and not sent. What is there already was sent by itself, and holds at least as much."""
    for key, body in segments.items():
        if key.startswith("events/"):
            store.put_new(key, body)


def _send_object(reference: ObjectRef, expected: set[tuple[int, int, bytes]], disk: Store, store: Store) -> None:
    body = np.empty(reference.size_bytes, np.uint8).data
    with _from(disk, reference.key):
        disk.read_into(reference.key, 0, body)
    for offset, length, hashes in expected:
        if block_hashes(body[offset : offset + length]) != hashes:
            raise IntegrityError(f"{disk.url}/{reference.key}: the disk has altered a staged object; it is not sent")
    store.put(reference.key, body)


@contextmanager
def _from(disk: Store, key: str) -> Iterator[None]:
    """Whatever keeps a staged object from being read is the disk's fault, and no news about the store."""
    try:
        yield
    except HoldfastError as error:
        raise IntegrityError(f"{disk.url}/{key}: the disk does not give back a staged object: {error}") from error


class Promoter(Generic[Job]):
    """One background thread that works on the newest job it was offered. `promote` must not raise.

    Thread safety: every method.
    """

    def __init__(self, promote: Callable[[Job], None], superseded: Callable[[Job, Job], None]) -> None:
        self._promote, self._superseded = promote, superseded
        self._waiting: Job | None = None
        self._working: Job | None = None
        self._closing = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="holdfast-promoter", daemon=True)
        self._thread.start()

    def offer(self, job: Job) -> None:
        """Promote this next; one that still waits has become history."""
        with self._condition:
            if self._waiting is not None:
                self._superseded(self._waiting, job)
            self._waiting = job
            self._condition.notify_all()

    def withdraw(self, superseded: Callable[[Job], None]) -> None:
        """What waits is not needed any more. Returns when nothing is under way either."""
        with self._condition:
            if self._waiting is not None:
                superseded(self._waiting)
                self._waiting = None
            self._condition.wait_for(lambda: self._working is None)

    def jobs(self) -> list[Job]:
        """What is on its way or waits."""
        with self._condition:
            return [job for job in (self._working, self._waiting) if job is not None]

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing waits or is on its way. False when `timeout_s` passed first."""
        with self._condition:
            return self._condition.wait_for(lambda: self._waiting is None and self._working is None, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish, then stop. False when something is still on its way after `timeout_s`."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting is not None or self._closing)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                self._working = job
            try:
                self._promote(job)
            finally:
                with self._condition:
                    self._working = None
                    self._condition.notify_all()
