"""States that trainers have left in memory when they died: which one is worth having, and how it becomes a checkpoint.

    shares (handover.py) → newest state of which all shares are there → every part written → root, head (EstateCommitter)

The agent does it for one machine, by itself; the next trainers of a job do it together (train/ranks/inheriting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import CheckpointRef, Head, Part
from holdfast.checkpoint.handover import Inherited, Share
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.joint import begin_word, left_in_store, put_joint_root, ready_parts
from holdfast.checkpoint.phases import Begin, Cannot, HandedIn, Ready
from holdfast.checkpoint.promote import keep_segments
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.retain import Keep, StoreOpener
from holdfast.checkpoint.snapshot import Layout, Snapshot
from holdfast.checkpoint.write import KnownChunks, Written, checkpoint_name, write_part
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, IntegrityError, NotFound, StoreFull
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import FORMAT_VERSION
from holdfast.store.base import Store

__all__ = [
    "EstateCommitter",
    "PartWriter",
    "bare_snapshot",
    "commit_estate",
    "commit_left_behind",
    "held_shares",
    "newest_whole",
]

_THREADS = 4
_NO_INDEX = Part(FORMAT_VERSION, 0, [], [], [], b"")


def newest_whole(shares: Collection[Share], truth: Head) -> list[Share] | None:
    """The shares of the newest state that continues the run and is whole, by the number of their part; None where there is none.

    Invariant: only what was taken under the newest claim continues: whoever has claimed since goes on from elsewhere.
    """
    if truth.finished or truth.removed:
        return None
    newest = max((ref.step for ref in truth.checkpoints if ref.generation == truth.generation), default=-1)
    states: dict[tuple[int, int, tuple[int, ...]], dict[int, Share]] = {}
    for share in shares:
        claim = (share.run_id, share.owner, share.generation)
        if claim == (truth.run_id, truth.owner, truth.generation) and share.step > newest and share.rank in share.ranks:
            states.setdefault((share.step, share.take, share.ranks), {})[share.rank] = share
    whole = [(key, held) for key, held in states.items() if held.keys() == set(key[2])]
    if not whole:
        return None
    (_, _, ranks), held = max(whole, key=lambda found: found[0][:2])
    return [held[rank] for rank in ranks]


class EstateCommitter(Committer):
    """Commits a state whose parts `gather` has written, wherever their memory is. Contract as `Committer`."""

    def __init__(
        self, store: Store, lineage: Lineage, *, gather: Callable[[Begin], list[Ready | Cannot]], **options: Any
    ) -> None:
        super().__init__(store, lineage, keep=Keep(last=None), **options)
        self._gather = gather

    def _write(self, snapshot: Snapshot, store: Store, uploaded: set[str], known: KnownChunks) -> Written:
        head = self._lineage.head
        name = checkpoint_name(head.number + 1, head.attempt, self._tokens)
        words = self._gather(begin_word(name, head, snapshot))
        uploaded |= left_in_store(words)
        parts = ready_parts(HandedIn(dict(zip(snapshot.ranks, words, strict=True)), None))
        return put_joint_root(store, head.run_id, name, parts, _NO_INDEX, snapshot.metadata, uploaded)


class PartWriter:
    """Writes shares that lie in this process's memory. Used with `with`."""

    def __init__(self, store: Store, tokens: TokenSource) -> None:
        self._store, self._tokens = store, tokens
        self.known = KnownChunks()
        """What need not be sent."""
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-send")

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def write(self, share: Inherited, begin: Begin) -> Ready | Cannot:
        """Never raises: what went wrong is the answer."""
        uploaded: set[str] = set()
        self.known.retain(set(begin.retained), set(begin.homes))
        try:
            part, _ = write_part(
                share.snapshot(), self._store, name=begin.name, rank=share.left.share.number, attempt=begin.attempt,
                known=self.known, tokens=self._tokens, hashing=self.pool, sending=self.pool, uploaded=uploaded,
            )  # fmt: skip
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            return Cannot(name=begin.name, why=why, left=sorted(uploaded), is_full=isinstance(error, StoreFull))
        return Ready(name=begin.name, part=part)


def bare_snapshot(share: Share, epoch: int, metadata: dict[str, Any]) -> Snapshot:
    """What a committer must know of a state whose bytes others have."""
    return Snapshot(b"", Layout((), (), 0), share.step, epoch, metadata, None, ranks=share.ranks, take=share.take)


def held_shares(found: Sequence[Inherited], truth: Head | None) -> list[Inherited] | None:
    """The newest whole state that this process has in memory, and that continues the run; by the number of its parts."""
    shares = None if truth is None else newest_whole([one.left.share for one in found], truth)
    if shares is None:
        return None
    by_share = {one.left.share: one for one in found}
    return [by_share[share] for share in shares]


def commit_estate(
    parts: Sequence[Inherited],
    store: Store,
    lineage: Lineage,
    *,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
) -> CheckpointRef:
    """Commit a whole state under this claim, all of it from this process's memory. What the newest checkpoint has is not sent
    again. Raises what the store raises, Fenced and SaveError."""
    for part in parts:
        keep_segments(store, part.left.segments)
    first, head = parts[0].left, lineage.head
    with PartWriter(store, tokens) as writer:
        committer = EstateCommitter(
            store, lineage, gather=lambda begin: [writer.write(part, begin) for part in parts],
            open_home=open_home, clock=clock, tokens=tokens, hashing=writer.pool, sending=writer.pool,
        )  # fmt: skip
        current = [ref for ref in head.checkpoints if ref.generation == head.generation]
        with suppress(IntegrityError, NotFound):
            if current:
                reader = open_checkpoint(store, current[-1], open_home)
                writer.known.add(reader.ref.name, *reader.parts, home=reader.ref.home)
                committer.roots.remember(reader.root)
        return committer.commit(bare_snapshot(first.share, first.epoch, first.metadata)).ref


def commit_left_behind(
    found: Sequence[Inherited],
    store: Store,
    *,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
) -> CheckpointRef | None:
    """Claim the run, and commit the newest state that trainers of this machine have left. None when none is whole, newer than what
    is committed, and continues it. Raises what the store raises, Fenced when somebody claims at the same moment.
    """
    truth = read_truth(store, found[0].left.share.run_id).head if found else None
    parts = held_shares(found, truth)
    if truth is None or parts is None:
        return None
    nonce = truth.nonce

    def change(body: Head) -> Head:
        if body.nonce != nonce:
            raise Fenced(f"{store.url}: somebody else has claimed the run meanwhile")
        return body

    lineage = Lineage(store, truth.run_id, clock=clock, tokens=tokens)
    lineage.claim(change)
    return commit_estate(parts, store, lineage, open_home=open_home, clock=clock, tokens=tokens)
