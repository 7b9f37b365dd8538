"""A snapshot that outlives its process: what a trainer leaves in memory, for the agent or for the next trainers of this machine.

    trainer: slot memory (memfd, its descriptor handed over once) + a description per complete snapshot, in the control folder
    it dies → descriptions, and the memory that they speak of → shares of states (estate.py: one that is whole can be committed)

A description is removed before its slot is filled anew, and put back when the copy is complete; so what is described is whole.
Hashes are computed from the same memory by whoever writes, as in any save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from holdfast.checkpoint.arrays import ArraySpec
from holdfast.checkpoint.format import Head
from holdfast.checkpoint.snapshot import Layout, Snapshot
from holdfast.checkpoint.staging import Slot

__all__ = ["Heir", "Inherited", "LeftBehind", "Legacy", "Share", "inherited", "left_behind"]

_PREFIX = "snapshot-"


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Which rank's share of which state: taken under that claim, at that step, and shared out among `ranks`. `take` tells snapshots
    of one step apart."""

    run_id: str
    owner: str
    generation: int
    step: int
    take: int
    ranks: tuple[int, ...]
    rank: int

    @property
    def number(self) -> int:
        """Of the part that it becomes."""
        return self.ranks.index(self.rank)


class LeftBehind(msgspec.Struct, frozen=True, kw_only=True):
    """One complete snapshot in a slot, and under whose claim it was taken."""

    memory: int
    """Which memory the slot was (its inode), so that a description is never read with the bytes of another one."""
    url: str
    share: Share
    epoch: int
    document: bytes
    specs: tuple[ArraySpec, ...]
    offsets: tuple[int, ...]
    total_bytes: int
    metadata: dict[str, Any]
    segments: dict[str, bytes]
    """What was logged up to this step and is not known to be in the ledger yet."""


class Inherited(NamedTuple):
    """A snapshot that somebody who is gone has left, and its memory."""

    left: LeftBehind
    slot: Slot

    def snapshot(self) -> Snapshot:
        """As the saver had it; it reads from the slot."""
        left, share = self.left, self.left.share
        layout = Layout(left.specs, left.offsets, left.total_bytes)
        return Snapshot(
            left.document, layout, share.step, left.epoch, left.metadata, self.slot, ranks=share.ranks, take=share.take
        )


class Heir(Protocol):
    """Takes the memory of slots. Never raises: an heir that is gone is no reason to stop."""

    def take_slots(self, slots: Sequence[Slot], rank: int) -> None:
        """What this rank has handed over before is void."""
        ...


class Legacy:
    """The trainer's side. Owned by the saver; `begins` is called by the loop's thread, `complete` by any."""

    def __init__(
        self, folder: Path, heir: Heir, url: str, head: Head, rank: int, unsent: Callable[[], dict[str, bytes]] = dict
    ) -> None:
        """`head`: any of this claim."""
        self._folder, self._heir, self._url, self._head, self._rank = folder, heir, url, head, rank
        self._unsent = unsent
        self._slots: list[Slot] = []

    def slots_made(self, slots: Sequence[Slot]) -> None:
        with suppress(OSError):
            for path in self._folder.glob(f"{_PREFIX}{self._rank}-*"):
                path.unlink(missing_ok=True)
        self._slots = list(slots)
        self._heir.take_slots(slots, self._rank)

    def begins(self, slot: Slot) -> None:
        """The slot is about to be filled anew: what it held is not described any more."""
        with suppress(OSError):
            self._path(self._slots.index(slot)).unlink(missing_ok=True)

    def complete(self, snapshot: Snapshot) -> None:
        """Every byte of the snapshot is in its slot."""
        if snapshot.slot is None or snapshot.slot not in self._slots:
            return
        head, layout = self._head, snapshot.layout
        share = Share(
            run_id=head.run_id, owner=head.owner, generation=head.generation, step=snapshot.step, take=snapshot.take,
            ranks=snapshot.ranks, rank=self._rank,
        )  # fmt: skip
        left = LeftBehind(
            memory=snapshot.slot.memory_id, url=self._url, share=share, epoch=snapshot.epoch,
            document=snapshot.document, specs=layout.specs, offsets=layout.offsets, total_bytes=layout.total_bytes,
            metadata=snapshot.metadata, segments=self._unsent(),
        )  # fmt: skip
        path = self._path(self._slots.index(snapshot.slot))
        # A disk that is full costs the insurance, not the save.
        with suppress(OSError):
            temporary = path.with_suffix(".new")
            temporary.write_bytes(msgspec.msgpack.encode(left))
            os.replace(temporary, path)

    def _path(self, number: int) -> Path:
        return self._folder / f"{_PREFIX}{self._rank}-{number}"


def left_behind(folder: Path) -> list[LeftBehind]:
    """The complete snapshots that are described in the control folder. What cannot be read is passed over."""
    found = []
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        if path.suffix:
            continue
        with suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.msgpack.decode(path.read_bytes(), type=LeftBehind))
    return found


def inherited(folder: Path, slots: Mapping[int, Slot]) -> list[Inherited]:
    """What is described there and whose memory is among `slots`, by their `memory_id`."""
    return [
        Inherited(left, slot)
        for left in left_behind(folder)
        if (slot := slots.get(left.memory)) is not None and slot.size_bytes >= left.total_bytes
    ]
