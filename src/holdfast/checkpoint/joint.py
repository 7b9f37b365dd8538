"""One checkpoint by several ranks: rank 0 begins and names it, all write their parts, rank 0 writes root and head.

    JointCommitter (rank 0): settle → Begin → own part → gather → root → head → Done
    MemberCommitter:         Begin → own part → Ready → Done

A rank that cannot, is gone or too slow fails the save; the checkpoint before it stands. What the others have written for it is
condemned by rank 0's next head. The end of a save tells who is gone: a state that is shared out among those that are left can be
saved by them, as by a job of so many ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any

from holdfast.checkpoint.commit import Committed, Committer
from holdfast.checkpoint.format import Head, Part
from holdfast.checkpoint.phases import Begin, Cannot, Chair, Done, HandedIn, Member, Ready, stretches
from holdfast.checkpoint.retain import Roots, StoreOpener, root_key
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.checkpoint.write import (
    KnownChunks,
    Written,
    WrittenPart,
    checkpoint_name,
    put_root,
    write_part,
)
from holdfast.core.errors import HoldfastError, PassedOver, SaveError, StoreFull
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["JointCommitter", "MemberCommitter", "begin_word", "left_in_store", "put_joint_root", "ready_parts"]


class JointCommitter(Committer):
    """Rank 0's. Thread safety and failure contract as `Committer`; members are told of every end."""

    def __init__(self, store: Store, *arguments: Any, chair: Chair, **options: Any) -> None:
        super().__init__(store, *arguments, **options)
        self._chair = chair
        self._begun = ""
        """The name of the save that members know of; empty: of none."""
        self._gone: tuple[int, ...] = ()

    def commit(self, snapshot: Snapshot, *, finish: bool = False) -> Committed:
        """As `Committer.commit`. A store that is full is swept, and all try once more. Raises PassedOver too."""
        try:
            return self._together(snapshot, finish)
        except StoreFull as error:
            again = self._make_room()
            self._tell(error, again=again)
            if not again:
                raise
        try:
            return self._together(snapshot, finish)
        except StoreFull as error:
            self._tell(error)
            raise

    def _together(self, snapshot: Snapshot, finish: bool) -> Committed:
        self._begun, self._gone = "", ()
        try:
            committed = self._commit(snapshot, finish)
        except StoreFull:
            raise
        except BaseException as error:
            self._tell(error)
            raise
        if self._begun:
            self._chair.done(Done(name=self._begun, ref=committed.ref))
        return committed

    def _tell(self, error: BaseException, *, again: bool = False) -> None:
        if self._begun:
            self._chair.done(
                Done(name=self._begun, error=f"{type(error).__name__}: {error}", again=again, gone=list(self._gone))
            )

    def _write(self, snapshot: Snapshot, store: Store, uploaded: set[str], known: KnownChunks) -> Written:
        head = self._lineage.head
        name = self._begun = checkpoint_name(head.number + 1, head.attempt, self._tokens)
        self._chair.begin(begin_word(name, head, snapshot))
        try:
            mine, index = write_part(
                snapshot, store, name=name, rank=0, attempt=head.attempt, known=known, tokens=self._tokens,
                hashing=self._hashing, sending=self._sending, uploaded=uploaded,
            )  # fmt: skip
        finally:
            # Whatever became of the own part: what the others leave must be known, to be condemned.
            handed_in = self._chair.gather(name, snapshot.ranks)
            self._gone = handed_in.gone
            uploaded |= left_in_store(handed_in.words.values())
        parts = [mine, *ready_parts(handed_in)]
        return put_joint_root(store, head.run_id, name, parts, index, snapshot.metadata, uploaded)


def begin_word(name: str, head: Head, snapshot: Snapshot) -> Begin:
    """What whoever writes a part of the checkpoint called `name` must know."""
    return Begin(
        name=name, step=snapshot.step, take=snapshot.take, attempt=head.attempt,
        retained=[ref.name for ref in head.checkpoints], homes=sorted({pin.home for pin in head.pins}),
        ranks=stretches(snapshot.ranks),
    )  # fmt: skip


def left_in_store(words: Iterable[Ready | Cannot]) -> set[str]:
    """The names of what lies there because of these, or may."""
    found: set[str] = set()
    for word in words:
        found |= {word.part.key, *word.part.sent_objects} if isinstance(word, Ready) else set(word.left)
    return found


def ready_parts(handed_in: HandedIn) -> list[WrittenPart]:
    """All parts, in order. Raises SaveError, StoreFull or PassedOver when one is missing."""
    words = handed_in.words
    refusals = {rank: word for rank, word in sorted(words.items()) if isinstance(word, Cannot)}
    if handed_in.missing is not None and not refusals:
        raise SaveError(handed_in.missing)
    for rank, word in refusals.items():
        kind = StoreFull if word.is_full else PassedOver if word.is_gone else SaveError
        raise kind(f"rank {rank}: {word.why}")
    return [word.part for _, word in sorted(words.items()) if isinstance(word, Ready)]


def put_joint_root(
    store: Store,
    run_id: str,
    name: str,
    parts: list[WrittenPart],
    index: Part,
    metadata: dict[str, Any],
    uploaded: set[str],
) -> Written:
    """The root of a checkpoint whose parts are durable; `index` is the part that this process has written."""
    uploaded.add(root_key(name))
    root, root_blake3 = put_root(store, run_id, name, parts, metadata)
    total_bytes, sent_bytes = sum(part.total_bytes for part in parts), sum(part.sent_bytes for part in parts)
    sent_objects = frozenset(key for part in parts for key in part.sent_objects)
    return Written(root, root_blake3, index, total_bytes, sent_bytes, total_bytes - sent_bytes, sent_objects)


class MemberCommitter:
    """Every other rank's. It has no claim: rank 0's covers what it writes. One thread at a time."""

    def __init__(
        self,
        store: Store,
        *,
        member: Member,
        open_home: StoreOpener,
        tokens: TokenSource,
        hashing: Executor,
        sending: Executor,
    ) -> None:
        self._store, self._member, self._tokens = store, member, tokens
        self._hashing, self._sending = hashing, sending
        self.known = KnownChunks()
        self.roots = Roots(store, open_home)

    def commit(self, snapshot: Snapshot, *, finish: bool = False) -> Committed:
        """This rank's part of the checkpoint of that snapshot. Raises SaveError when it does not come to be, PassedOver when
        rank 0 saves a later one instead."""
        while True:
            begin = self._member.next_begin(snapshot.step, snapshot.take)
            if (begin.step, begin.take) != (snapshot.step, snapshot.take):
                self._member.put_back(begin)
                raise PassedOver(f"the save of step {snapshot.step} was passed over: rank 0 saves step {begin.step}")
            mine, index = self._phase_one(snapshot, begin)
            done = self._member.outcome(begin.name)
            if done.ref is not None and mine is not None and index is not None:
                self.known.add(done.ref.name, index)
                return Committed(done.ref, mine.total_bytes, mine.sent_bytes)
            if not done.again:
                raise SaveError(f"the save of step {snapshot.step} failed: {done.error}")

    def _phase_one(self, snapshot: Snapshot, begin: Begin) -> tuple[WrittenPart | None, Part | None]:
        """None, None: it failed, and rank 0 knows why."""
        self.known.retain(set(begin.retained), set(begin.homes))
        uploaded: set[str] = set()
        try:
            if stretches(snapshot.ranks) != begin.ranks:
                raise SaveError(
                    f"its state is shared out among {len(snapshot.ranks)} ranks, the save's among {begin.ranks}"
                )
            mine, index = write_part(
                snapshot, self._store, name=begin.name, rank=snapshot.ranks.index(self._member.rank),
                attempt=begin.attempt, known=self.known, tokens=self._tokens, hashing=self._hashing,
                sending=self._sending, uploaded=uploaded,
            )  # fmt: skip
        except Exception as error:
            refusal = Cannot(
                name=begin.name, why=f"{type(error).__name__}: {error}", left=sorted(uploaded),
                is_full=isinstance(error, StoreFull),
            )  # fmt: skip
            self._member.hand_in(refusal)
            if not isinstance(error, HoldfastError):
                raise
            return None, None
        self._member.hand_in(Ready(name=begin.name, part=mine))
        return mine, index

    def sweep(self) -> set[str]:
        """Rank 0 sweeps."""
        return set()
