"""One checkpoint after the other for one claim: write, name it in a head, retain, condemn, sweep.

    snapshot → write_checkpoint → before_commit → head (names the checkpoint, condemns what it replaces) → sweep

Called from one thread at a time (the saver's); nothing here knows of threads, slots or training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from copy import copy
from itertools import combinations
from typing import NamedTuple

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head, Root
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.promote import keep_segments, send
from holdfast.checkpoint.retain import Keep, Roots, StoreOpener, checkpoint_keys, condemn, find_orphans, sweep
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.checkpoint.tier import Staged, Tier
from holdfast.checkpoint.write import KnownChunks, Written, write_checkpoint
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, SaveError, StoreFull
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["Committed", "Committer"]


class Committed(NamedTuple):
    """A checkpoint that a confirmed head names. The bytes are those of the whole checkpoint; of its own part, for a rank that is
    not the first."""

    ref: CheckpointRef
    total_bytes: int
    sent_bytes: int
    written: Written | None = None
    """Of the whole checkpoint; None on a rank that has written a part of it."""

    @property
    def deduplicated_bytes(self) -> int:
        """They were there already."""
        return self.total_bytes - self.sent_bytes


class _Coming(NamedTuple):
    """A checkpoint that a head may come to name."""

    ref: CheckpointRef
    root: Root


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
        unsent: Callable[[], dict[str, bytes]] = dict,
    ) -> None:
        self._unsent = unsent
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
        self._named: _Coming | None = None
        """The checkpoint that a head was last asked to name. Whether it does may still be unknown."""

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

    def _make_room(self, spared: Iterable[str] = ()) -> bool:
        """Sweep without a new checkpoint, but not what is `spared`. Whether anything was deleted."""
        self._lineage.settle()
        orphans = ((self._orphans or set()) | self._abandoned) - set(spared)
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
        self._settle()
        uploaded: set[str] = set()
        try:
            written = self._write(snapshot, self._store, uploaded, self.known)
            self._before_commit()
        except HoldfastError:
            # No head that names these was ever put, so the next head may condemn them.
            self._abandoned |= uploaded
            raise
        return self._publish(self._ref(snapshot, written), written, finish)

    def stage(self, snapshot: Snapshot, tier: Tier, under_way: Sequence[Staged]) -> Staged:
        """Make the snapshot a whole checkpoint on this machine's disk. May run beside `promote`, from another thread.

        `under_way`: what was staged before it and may be committed before it. Raises what the disk raises.
        """
        coming = [_Coming(staged.ref, staged.written.root) for staged in under_way]
        named, head = self._named, self._lineage.head
        if named is not None and all(other.ref.name != named.ref.name for other in coming):
            coming.insert(0, named)
        written = self._write(snapshot, tier.store, set(), self._lasting(head, coming))
        current = [ref.name for ref in head.checkpoints if ref.generation == head.generation]
        built_on = {*(current[-1:] or [""]), *(other.ref.name for other in coming)}
        return tier.record(written, self._ref(snapshot, written), head, built_on, self._unsent())

    def _lasting(self, head: Head, coming: Sequence[_Coming]) -> KnownChunks:
        """What may be referred to by a checkpoint that is committed later: chunks of checkpoints, and of a base, that the run still
        retains then, whichever of `coming` are committed before."""
        retained, homes = {ref.name for ref in head.checkpoints}, {pin.home for pin in head.pins}
        new = [other for other in coming if other.ref.name not in retained]
        for some in (some for count in range(1, len(new) + 1) for some in combinations(new, count)):
            kept = list(head.checkpoints)
            for other in some:
                kept = self._keep.select([*kept, other.ref], head.generation)
            retained &= {ref.name for ref in kept}
        for other in new:
            homes &= set(other.root.homes)
        lasting = copy(self.known)
        lasting.retain(retained, homes)
        return lasting

    def promote(self, staged: Staged, tier: Tier, *, finish: bool = False) -> Committed:
        """Make a staged checkpoint the run's newest. Raises as `commit`, and IntegrityError when the disk has altered it."""
        uploaded: set[str] = set()
        try:
            try:
                self._send(staged, tier, uploaded)
            except StoreFull:
                if not self._make_room(spared=checkpoint_keys(staged.ref, staged.written.root)):
                    raise
                self._send(staged, tier, uploaded)
            self._before_commit()
        except HoldfastError:
            self._abandoned |= uploaded
            raise
        ref = msgspec.structs.replace(staged.ref, attempt=self._lineage.head.attempt)
        return self._publish(ref, staged.written, finish)

    def _send(self, staged: Staged, tier: Tier, uploaded: set[str]) -> None:
        self._settle()
        if staged.ref.attempt != self._lineage.head.attempt:
            keep_segments(self._store, {key: text.encode() for key, text in staged.record.segments.items()})
        self._check_reaches(self._lineage.head, staged.ref, staged.written)
        send(staged, tier.store, self._store, uploaded=uploaded)

    def _settle(self) -> None:
        """Deduplication is decided against the head that the commit is built on, so an unknown outcome is resolved first."""
        self._lineage.settle()
        head = self._lineage.head
        if self._orphans is None:
            self._orphans = find_orphans(self._store, head, self.roots)
        self.known.retain({ref.name for ref in head.checkpoints}, {pin.home for pin in head.pins})

    def _write(self, snapshot: Snapshot, store: Store, uploaded: set[str], known: KnownChunks) -> Written:
        head = self._lineage.head
        return write_checkpoint(
            snapshot, store, run_id=head.run_id, attempt=head.attempt, sequence=head.number + 1, known=known,
            tokens=self._tokens, hashing=self._hashing, sending=self._sending, uploaded=uploaded,
        )  # fmt: skip

    def _ref(self, snapshot: Snapshot, written: Written) -> CheckpointRef:
        head = self._lineage.head
        return CheckpointRef(
            name=written.root.name, root_blake3=written.root_blake3, step=snapshot.step, epoch=snapshot.epoch,
            generation=head.generation, attempt=head.attempt, unix_s=self._clock.unix_s(), total_bytes=written.total_bytes,
            figure=self._figure(snapshot.step),
        )  # fmt: skip

    def _publish(self, ref: CheckpointRef, written: Written, finish: bool) -> Committed:
        """Name a checkpoint whose every byte is durable in the store."""
        self.roots.remember(written.root)
        self._named = _Coming(ref, written.root)
        head = self._lineage.advance(
            "finish" if finish else "save", lambda current: self._next(current, ref, written, finish)
        )
        self._abandoned = set()
        self.known.add(ref.name, written.part)
        self.roots.forget_except(head.checkpoints)
        return Committed(ref, written.total_bytes, written.sent_bytes, written)

    def sweep(self) -> set[str]:
        """Delete what the newest head condemns; returns the names. Raises what the store raises: garbage is a cost, no danger."""
        deleted = sweep(self._store, self._lineage, self._open_home)
        self._orphans = set()
        self._deleted = deleted
        return deleted

    def _next(self, current: Head, ref: CheckpointRef, written: Written, finish: bool) -> Head:
        """The head that names `ref`, computed from the newest of this claim."""
        reached = self._check_reaches(current, ref, written)
        kept = self._keep.select([*current.checkpoints, ref], current.generation)
        following = condemn(current, kept, self.roots, deleted=self._deleted)
        orphans = ((self._orphans or set()) | self._abandoned) - reached
        condemned = sorted(set(following.condemned) | orphans)
        return msgspec.structs.replace(following, condemned=condemned, finished=finish)

    def _check_reaches(self, current: Head, ref: CheckpointRef, written: Written) -> set[str]:
        """Every object of this run that the checkpoint needs.

        Invariant: none of them is condemned, and every old one is still reached by a checkpoint retained there.
        """
        reached = checkpoint_keys(ref, written.root)
        lost_homes = set(written.root.homes) - {pin.home for pin in current.pins}
        old = set(written.root.objects) - written.sent_objects
        if lost_homes or (old and not old <= self._retained_objects(current)) or reached & set(current.condemned):
            raise SaveError("an object that this save refers to is no longer retained; the next save sends it again")
        return reached

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
