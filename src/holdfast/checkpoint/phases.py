"""What ranks tell each other to commit one checkpoint together. Who carries the words is not known here (`train/ranks`).

rank 0: Begin → all          phase one: each member Ready or Cannot → rank 0          phase two: root, head; rank 0: Done → all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.write import WrittenPart

__all__ = ["Begin", "Cannot", "Chair", "Done", "HandedIn", "Member", "Ready", "stretches"]


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Rank 0 to all: phase one of the save of `step`. Only what `retained` checkpoints and pinned `homes` hold may be referred
    to."""

    name: str
    step: int
    take: int
    """Of the snapshots of this step, the how manieth; from 0."""
    attempt: int
    retained: list[str]
    homes: list[str]
    ranks: list[tuple[int, int]]
    """Who makes it, all or those that are left, as stretches [first, last]: every rank is told, so it must be short."""


def stretches(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending `ranks` as stretches of consecutive ones: the first and the last of each."""
    found: list[tuple[int, int]] = []
    for rank in ranks:
        if found and found[-1][1] == rank - 1:
            found[-1] = (found[-1][0], rank)
        else:
            found.append((rank, rank))
    return found


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Member to rank 0: every byte of its part is durable."""

    name: str
    part: WrittenPart


class Cannot(msgspec.Struct, frozen=True, kw_only=True, tag="cannot"):
    """Member to rank 0: not this save. `left` may lie in the store because of it; `is_full`: the store is."""

    name: str
    why: str
    left: list[str]
    is_full: bool = False
    is_gone: bool = False
    """A newer snapshot has taken its place."""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Rank 0 to all: the save counts, or why not. `again`: the same save is begun once more, under another name."""

    name: str
    ref: CheckpointRef | None = None
    error: str = ""
    again: bool = False
    gone: list[int] = []
    """Ranks that have ended before their part was durable. What comes next is made without them."""


@dataclass(frozen=True, slots=True)
class HandedIn:
    """What the members have handed in, by rank; and what is the matter with those that have not."""

    words: Mapping[int, Ready | Cannot]
    missing: str | None
    gone: tuple[int, ...] = ()
    """Those that will never hand in anything."""


class Chair(Protocol):
    """Rank 0's way to the members. Called from the saver's thread."""

    def begin(self, word: Begin) -> None: ...

    def gather(self, name: str, ranks: Sequence[int]) -> HandedIn:
        """Waits, for a bounded time, until all of `ranks` but 0 have handed in or are gone."""
        ...

    def done(self, word: Done) -> None: ...


class Member(Protocol):
    """A member's way to rank 0. Called from the saver's thread. Every wait is bounded, and ends in SaveError."""

    rank: int

    def next_begin(self, step: int, take: int) -> Begin:
        """The save of that snapshot, or of a later one. Those of earlier ones are turned down."""
        ...

    def put_back(self, begin: Begin) -> None:
        """It is of a later snapshot than the one at hand."""
        ...

    def hand_in(self, word: Ready | Cannot) -> None: ...

    def outcome(self, name: str) -> Done: ...
