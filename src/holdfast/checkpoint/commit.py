"""One checkpoint after the other for one claim: write, name it in a head, retain, condemn, sweep.

    snapshot → write_checkpoint → before_commit → head (names the checkpoint, condemns what it replaces) → sweep

Called from one thread at a time (the saver's); nothing here knows of threads, slots or training.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.retain import Keep, Roots, StoreOpener, condemn, find_orphans, sweep
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.checkpoint.write import KnownChunks, Written, write_checkpoint
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, SaveError, StoreFull
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["Committed", "Committer"]


class Committed(NamedTuple):
    """A checkpoint that a confirmed head names."""

    ref: CheckpointRef
    written: Written


class Committer:
    """What a claim knows of the run's checkpoints, and the order in which they are made.

    Thread safety: none; one thread at a time.
    Failure contract: when `commit` raises, the previous checkpoint still stands; the outcome may be unknown, and the next call
    finds it out first. Restore may add what it has read to `known` and `roots`.
    """

    def __init__(
        self,
        store: Store,
        lineage: Lineage,
        *,
        keep: Keep,
        open_home: StoreOpener,
        clock: Clock,
        tokens: TokenSource,
        hashing: Executor,
        sending: Executor,
        before_commit: Callable[[], None] = lambda: None,
        figure: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self._figure = figure
        self._store, self._lineage, self._keep, self._open_home = store, lineage, keep, open_home
        self._clock, self._tokens, self._before_commit = clock, tokens, before_commit
        self._hashing, self._sending = hashing, sending
        self.roots = Roots(store, open_home)
        self.known = KnownChunks()
        self._orphans: set[str] | None = None
        self._abandoned: set[str] = set()
        """What failed writes of this claim may have left; the next head condemns it."""
        self._deleted: set[str] = set()

    def commit(self, snapshot: Snapshot, *, finish: bool = False) -> Committed:
        """Make the snapshot the run's newest checkpoint. Raises Fenced, SaveError, and what the store raises.

        When the store is full, garbage is swept (orphans of dead attempts may be what fills it) and the save is tried once more.
        """
        try:
            return self._commit(snapshot, finish)
        except StoreFull:
            if not self._make_room():
                raise
            return self._commit(snapshot, finish)

    def _make_room(self) -> bool:
        """Sweep without a new checkpoint. Whether anything was deleted."""
        self._lineage.settle()
        orphans = (self._orphans or set()) | self._abandoned
        if orphans - set(self._lineage.head.condemned):
            self._lineage.advance(
                "sweep",
                lambda head: msgspec.structs.replace(
                    head, condemned=sorted({*head.condemned, *orphans} - self._deleted)
                ),
            )
            self._abandoned = set()
        return bool(self.sweep())

    def _commit(self, snapshot: Snapshot, finish: bool) -> Committed:
        # Deduplication is decided against the head that the commit is built on, so an unknown outcome is resolved first.
        self._lineage.settle()
        head = self._lineage.head
        if self._orphans is None:
            self._orphans = find_orphans(self._store, head, self.roots)
        self.known.retain({ref.name for ref in head.checkpoints})
        uploaded: set[str] = set()
        try:
            written = write_checkpoint(
                snapshot, self._store, run_id=head.run_id, attempt=head.attempt, sequence=head.number + 1,
                known=self.known, tokens=self._tokens, hashing=self._hashing, sending=self._sending, uploaded=uploaded,
            )  # fmt: skip
        except HoldfastError:
            # No head that names these was ever put, so the next head may condemn them.
            self._abandoned |= uploaded
            raise
        self._before_commit()
        ref = CheckpointRef(
            name=written.root.name, root_blake3=written.root_blake3, step=snapshot.step, epoch=snapshot.epoch,
            generation=head.generation, attempt=head.attempt, unix_s=self._clock.unix_s(), total_bytes=written.total_bytes,
            figure=self._figure(snapshot.step),
        )  # fmt: skip
        self.roots.remember(written.root)
        head = self._lineage.advance(
            "finish" if finish else "save", lambda current: self._next(current, ref, written, finish)
        )
        self._abandoned = set()
        self.known.add(ref.name, written.part)
        self.roots.forget_except(head.checkpoints)
        return Committed(ref, written)

    def sweep(self) -> set[str]:
        """Delete what the newest head condemns; returns the names. Raises what the store raises: garbage is a cost, no danger."""
        deleted = sweep(self._store, self._lineage, self._open_home)
        self._orphans = set()
        self._deleted = deleted
        return deleted

    def _next(self, current: Head, ref: CheckpointRef, written: Written, finish: bool) -> Head:
        """The head that names `ref`, computed from the newest of this claim.

        Invariant: every old object that the checkpoint refers to is still reached by a checkpoint retained there and not condemned.
        """
        reached = set(written.root.objects)
        lost_homes = set(written.root.homes) - {pin.home for pin in current.pins}
        old = reached - written.sent_objects
        if lost_homes or (old and not old <= self._retained_objects(current)) or reached & set(current.condemned):
            raise SaveError("an object that this save refers to is no longer retained; the next save sends it again")
        kept = self._keep.select([*current.checkpoints, ref], current.generation)
        following = condemn(current, kept, self.roots, deleted=self._deleted)
        orphans = ((self._orphans or set()) | self._abandoned) - reached
        condemned = sorted(set(following.condemned) | orphans)
        return msgspec.structs.replace(following, condemned=condemned, finished=finish)

    def _retained_objects(self, head: Head) -> set[str]:
        """Data objects that a retained checkpoint reaches. One whose root does not verify vouches for nothing."""
        objects: set[str] = set()
        for ref in head.checkpoints:
            if ref.home is None:
                try:
                    objects |= set(self.roots.get(ref).objects)
                except (IntegrityError, NotFound):
                    continue
        return objects
