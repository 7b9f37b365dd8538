"""A snapshot that outlives its process: what the trainer leaves for the agent, and how the agent commits it.

    trainer: slot memory (memfd, its descriptor handed over once) + a description per complete snapshot, in the control folder
    trainer dies → agent: newest complete description, its memory → claim, if nobody else has claimed since → commit

A description is removed before its slot is filled anew, and put back when the copy is complete; so what is described is whole.
Hashes are computed from the same memory by whoever writes, as in any save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec

from holdfast.checkpoint.arrays import ArraySpec
from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.promote import keep_segments
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.retain import Keep, StoreOpener
from holdfast.checkpoint.snapshot import Layout, Snapshot
from holdfast.checkpoint.staging import Slot
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, IntegrityError, NotFound
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["Heir", "LeftBehind", "Legacy", "commit_left_behind", "newest_left_behind"]

_PREFIX = "snapshot-"
_THREADS = 4


class LeftBehind(msgspec.Struct, frozen=True, kw_only=True):
    """One complete snapshot in a slot, and under whose claim it was taken."""

    slot: int
    memory: int
    """Which memory the slot was (its inode), so that a description is never read with the bytes of another one."""
    url: str
    run_id: str
    owner: str
    generation: int
    step: int
    epoch: int
    document: bytes
    specs: tuple[ArraySpec, ...]
    offsets: tuple[int, ...]
    total_bytes: int
    metadata: dict[str, Any]
    segments: dict[str, bytes]
    """What was logged up to this step and is not known to be in the ledger yet."""

    def snapshot(self, slot: Slot) -> Snapshot:
        """The snapshot as the saver had it; it reads from `slot`."""
        layout = Layout(self.specs, self.offsets, self.total_bytes)
        return Snapshot(self.document, layout, self.step, self.epoch, self.metadata, slot)


class Heir(Protocol):
    """Takes the memory of slots. Never raises: an heir that is gone is no reason to stop."""

    def take_slots(self, slots: Sequence[Slot]) -> None:
        """From now on descriptions mean these, by their index."""
        ...


class Legacy:
    """The trainer's side. Owned by the saver; `begins` is called by the loop's thread, `complete` by any."""

    def __init__(
        self,
        folder: Path,
        heir: Heir,
        store: Store,
        lineage: Lineage,
        unsent: Callable[[], dict[str, bytes]] = dict,
    ) -> None:
        self._folder, self._heir, self._store, self._lineage, self._unsent = folder, heir, store, lineage, unsent
        self._slots: list[Slot] = []

    def slots_made(self, slots: Sequence[Slot]) -> None:
        with suppress(OSError):
            for path in self._folder.glob(f"{_PREFIX}*"):
                path.unlink(missing_ok=True)
        self._slots = list(slots)
        self._heir.take_slots(slots)

    def begins(self, slot: Slot) -> None:
        """The slot is about to be filled anew: what it held is not described any more."""
        with suppress(OSError):
            self._path(self._slots.index(slot)).unlink(missing_ok=True)

    def complete(self, snapshot: Snapshot) -> None:
        """Every byte of the snapshot is in its slot."""
        if snapshot.slot is None or snapshot.slot not in self._slots:
            return
        head, layout = self._lineage.head, snapshot.layout
        left = LeftBehind(
            slot=self._slots.index(snapshot.slot), memory=snapshot.slot.memory_id, url=self._store.url,
            run_id=head.run_id, owner=head.owner,
            generation=head.generation, step=snapshot.step, epoch=snapshot.epoch, document=snapshot.document,
            specs=layout.specs, offsets=layout.offsets, total_bytes=layout.total_bytes,
            metadata=snapshot.metadata, segments=self._unsent(),
        )  # fmt: skip
        path = self._path(left.slot)
        # A disk that is full costs the insurance, not the save.
        with suppress(OSError):
            temporary = path.with_suffix(".new")
            temporary.write_bytes(msgspec.msgpack.encode(left))
            os.replace(temporary, path)

    def _path(self, number: int) -> Path:
        return self._folder / f"{_PREFIX}{number}"


def newest_left_behind(folder: Path) -> LeftBehind | None:
    """The newest complete snapshot that is described in the control folder. What cannot be read is passed over."""
    found = []
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        if path.suffix:
            continue
        with suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.msgpack.decode(path.read_bytes(), type=LeftBehind))
    return max(found, key=lambda left: left.step, default=None)


def commit_left_behind(
    left: LeftBehind,
    slots: Mapping[int, Slot],
    store: Store,
    *,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
) -> CheckpointRef | None:
    """Commit the snapshot of a trainer that has died. None when it is not newer than what is committed, or no longer continues it.

    Invariant: only a snapshot that was taken under the newest claim is committed: whoever has claimed since goes on from elsewhere.
    Raises what the store raises, Fenced when somebody claims at the same moment.
    """
    truth = read_truth(store, left.run_id).head
    if truth is None or not _continues(left, truth) or left.slot not in slots:
        return None
    slot = slots[left.slot]
    if slot.memory_id != left.memory or slot.size_bytes < left.total_bytes:
        return None

    def change(body: Head) -> Head:
        if body.nonce != truth.nonce:
            raise Fenced(f"{store.url}: somebody else has claimed the run meanwhile")
        return body

    lineage = Lineage(store, left.run_id, clock=clock, tokens=tokens)
    lineage.claim(change)
    keep_segments(store, left.segments)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-send") as pool:
        committer = Committer(
            store, lineage, keep=Keep(last=None), open_home=open_home, clock=clock, tokens=tokens, hashing=pool,
            sending=pool,
        )  # fmt: skip
        current = [ref for ref in truth.checkpoints if ref.generation == truth.generation]
        with suppress(IntegrityError, NotFound):
            if current:
                reader = open_checkpoint(store, current[-1], open_home)
                committer.known.add(reader.ref.name, *reader.parts, home=reader.ref.home)
                committer.roots.remember(reader.root)
        return committer.commit(left.snapshot(slot)).ref


def _continues(left: LeftBehind, truth: Head) -> bool:
    if truth.owner != left.owner or truth.generation != left.generation or truth.finished or truth.removed:
        return False
    current = [ref.step for ref in truth.checkpoints if ref.generation == truth.generation]
    return left.step > max(current, default=-1)
