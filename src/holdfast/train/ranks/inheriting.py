"""What the last trainers have left in memory becomes a checkpoint, before the next ones restore.

    each rank: shares in this machine's memory ─ exchange → rank 0: newest state that is whole, who writes which part
    rank 0 begins (EstateCommitter) ─ exchange → parts written ─ exchange → root, head ─ exchange → all know the new head

A worker group that was started anew on the same machines loses nothing that was in memory, wherever its ranks are now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from holdfast.checkpoint.estate import (
    EstateCommitter,
    PartWriter,
    bare_snapshot,
    commit_estate,
    held_shares,
    newest_whole,
)
from holdfast.checkpoint.format import Head
from holdfast.checkpoint.handover import Inherited, Share
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.phases import Begin, Cannot, Ready
from holdfast.checkpoint.promote import keep_segments
from holdfast.core.errors import HoldfastError
from holdfast.store.base import Store
from holdfast.train.ranks.together import Together

__all__ = ["Heritage", "commit_heritage", "commit_heritage_together"]


class _Held(msgspec.Struct, frozen=True):
    """A share that a rank has found; of the first of a state, also what the root must say."""

    share: Share
    epoch: int
    metadata: dict[str, Any]


class _Chosen(msgspec.Struct, frozen=True):
    """The state that is committed, and those of its shares that one rank writes."""

    step: int
    shares: list[Share]


class _Turn(msgspec.Struct, frozen=True):
    """Rank 0 to all: write your parts of this; or nothing more, this is the head now, and what went wrong, if anything."""

    begin: Begin | None
    head: Head | None = None
    error: str = ""


class Heritage(msgspec.Struct, frozen=True):
    """What became of it. `step`: of the state that was committed, or that could not be because of `error`."""

    head: Head
    step: int
    error: str = ""


def commit_heritage(
    found: Sequence[Inherited], before: Head, lineage: Lineage, store: Store, options: dict[str, Any]
) -> Heritage | None:
    """Commit the newest whole state, by a rank that is alone. `before`: the head before this claim. None where there is none."""
    parts = held_shares(found, before)
    if parts is None:
        return None
    error = ""
    try:
        commit_estate(parts, store, lineage, **options)
    except HoldfastError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Heritage(lineage.head, parts[0].left.share.step, error)


def commit_heritage_together(
    together: Together,
    found: Sequence[Inherited],
    before: Head | None,
    lineage: Lineage | None,
    store: Store,
    options: dict[str, Any],
) -> Heritage | None:
    """The same, by all ranks. `before` and `lineage` are rank 0's. Raises RanksApart."""
    heard: dict[Share, _Held] = {}

    whole: list[Share] = []

    def choose(payloads: list[bytes]) -> bytes | list[bytes]:
        writers: dict[Share, int] = {}
        for rank, payload in enumerate(payloads):
            for held in msgspec.msgpack.decode(payload, type=list[_Held]):
                writers.setdefault(held.share, rank)
                heard.setdefault(held.share, held)
        shares = None if before is None else newest_whole(writers.keys(), before)
        if shares is None:
            return msgspec.msgpack.encode(None)
        whole.extend(shares)
        each: list[list[Share]] = [[] for _ in payloads]
        for share in shares:
            each[writers[share]].append(share)
        return [msgspec.msgpack.encode(_Chosen(shares[0].step, its)) for its in each]

    mine = [
        _Held(one.left.share, one.left.epoch, one.left.metadata if one.left.share.number == 0 else {}) for one in found
    ]
    what = "looking for what was left in memory"
    answer = together.exchange("heritage", msgspec.msgpack.encode(mine), choose, what=what)
    chosen = msgspec.msgpack.decode(answer, type=_Chosen | None)
    if chosen is None:
        return None
    by_share = {one.left.share: one for one in found}
    with PartWriter(store, options["tokens"]) as writer:
        ours = [by_share[share] for share in chosen.shares]
        turns = _Turns(together, lambda begin: {one.left.share.number: writer.write(one, begin) for one in ours})
        if lineage is None:
            return turns.follow(chosen.step)
        error = ""
        try:
            first = heard[whole[0]]
            for one in ours:
                keep_segments(store, one.left.segments)
            committer = EstateCommitter(
                store, lineage, gather=turns.lead, hashing=writer.pool, sending=writer.pool, **options
            )
            committer.commit(bare_snapshot(first.share, first.epoch, first.metadata))
        except HoldfastError as raised:
            error = f"{type(raised).__name__}: {raised}"
        return turns.end(chosen.step, lineage.head, error)


_Words = dict[int, Ready | Cannot]


class _Turns:
    """All ranks write their parts, as often as rank 0 says: a store that is full is swept, and all try once more."""

    def __init__(self, together: Together, write: Callable[[Begin], _Words]) -> None:
        self._together, self._write = together, write
        self._number = 0

    def lead(self, begin: Begin) -> list[Ready | Cannot]:
        """Rank 0: the words of all parts, in order."""
        self._turn(_Turn(begin))
        words: _Words = {}

        def join(payloads: list[bytes]) -> bytes:
            for payload in payloads:
                words.update(msgspec.msgpack.decode(payload, type=_Words))
            return b""

        self._parts(begin, join)
        return [words[number] for number in sorted(words)]

    def end(self, step: int, head: Head, error: str) -> Heritage:
        self._turn(_Turn(None, head, error))
        return Heritage(head, step, error)

    def follow(self, step: int) -> Heritage:
        """The other ranks: until rank 0 says that it is over."""
        while True:
            turn = self._turn(None)
            if turn.begin is None:
                assert turn.head is not None
                return Heritage(turn.head, step, turn.error)
            self._parts(turn.begin, lambda payloads: b"")

    def _turn(self, turn: _Turn | None) -> _Turn:
        self._number += 1
        answer = self._together.exchange(
            f"heritage turn {self._number}", b"", lambda payloads: msgspec.msgpack.encode(turn),
            what="committing what was left in memory",
        )  # fmt: skip
        return msgspec.msgpack.decode(answer, type=_Turn)

    def _parts(self, begin: Begin, join: Callable[[list[bytes]], bytes]) -> None:
        payload = msgspec.msgpack.encode(self._write(begin))
        self._together.exchange(
            f"heritage parts {self._number}", payload, join, what="writing what was left in memory", timeout_s=600.0
        )
