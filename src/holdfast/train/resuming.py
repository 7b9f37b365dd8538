"""How an opened run comes to its state: from memory, this machine's disk, or the store.

memory that the last trainers left → a checkpoint of its own, if it is newer (ranks/inheriting.py)
    → the newest checkpoint that verifies, on all ranks → tracked objects (restoring.py), read from the nearest copy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.handover import Inherited
from holdfast.checkpoint.near import NearDisk, NearFor, near_disk, near_memory
from holdfast.checkpoint.rank_reader import open_for_rank
from holdfast.checkpoint.read import CheckpointReader, Fallback, read_threads, restore_newest
from holdfast.checkpoint.saver import Saver
from holdfast.checkpoint.tier import Tier, load_staged
from holdfast.core.clock import Clock
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store
from holdfast.train.opening import Claim
from holdfast.train.place import Place
from holdfast.train.ranks.inheriting import commit_heritage, commit_heritage_together
from holdfast.train.ranks.joining import restore_together
from holdfast.train.ranks.reading import ReadingTogether
from holdfast.train.ranks.together import Together
from holdfast.train.record import Record
from holdfast.train.restoring import Loaded, load_checkpoint
from holdfast.train.tracked import Tracker

__all__ = ["Resuming"]


class Resuming:
    """One start's. Owned by the loop's thread; used with `with`, which gives inherited memory back. `tier` and `saver` are None
    where there is no disk to use, or the run is finished; `ahead` has what a standby has fetched onto this machine's disk."""

    def __init__(
        self,
        store: Store,
        home: Callable[[str], Store],
        tracker: Tracker,
        place: Place,
        record: Record,
        together: Together | None,
        tier: Tier | None,
        saver: Saver | None,
        *,
        inherited: Sequence[Inherited],
        ahead: Store | None,
        strict: bool,
        clock: Clock,
        tokens: TokenSource,
    ) -> None:
        self._store, self._home, self._tracker, self._place = store, home, tracker, place
        self._record, self._together, self._tier, self._saver = record, together, tier, saver
        self._inherited, self._strict, self._clock, self._tokens = inherited, strict, clock, tokens
        self._ahead = ahead

    def __enter__(self) -> Resuming:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._inherited:
            one.slot.close()

    def commit_inherited(self, claim: Claim) -> Claim:
        """What the last trainers have left in memory and is newer than what is durable. Keeps the memory for the restore."""
        if claim.finished or claim.head is None:
            return claim
        # Who begins anew on purpose takes nothing over.
        goes_on = claim.before is not None and claim.before.generation == claim.head.generation
        before = claim.before if goes_on else None
        options = {"open_home": self._home, "clock": self._clock, "tokens": self._tokens}
        heritage = None
        if self._together is not None:
            heritage = commit_heritage_together(
                self._together, self._inherited, before, claim.lineage, self._store, options
            )
        elif before is not None and claim.lineage is not None:
            heritage = commit_heritage(self._inherited, before, claim.lineage, self._store, options)
        if heritage is None:
            return claim
        if heritage.error:
            self._record.warn(
                f"the snapshot of step {heritage.step}, left in memory, could not be committed: {heritage.error}"
            )
            self._record.emit("snapshot.lost", step=heritage.step, error=heritage.error)
        else:
            self._record.say(f"committed the snapshot of step {heritage.step} that the last trainers left in memory")
            self._record.emit("snapshot.rescued", step=heritage.step)
        return replace(claim, head=heritage.head)

    def load(self, claim: Claim) -> tuple[CheckpointReader, Loaded] | None:
        """Make the tracked objects equal to the newest checkpoint that verifies. None where there is none at all."""
        head = claim.head
        if head is None:
            return None
        with ThreadPoolExecutor(read_threads(self._store), thread_name_prefix="holdfast-read") as pool:

            @collector_paused()
            def load(
                reader: CheckpointReader, reading: ReadingTogether | None = None
            ) -> tuple[CheckpointReader, Loaded]:
                return reader, load_checkpoint(
                    reader, self._tracker, pool, strict=self._strict, rank=self._place.rank,
                    world_size=self._place.world_size, prepare=None if reading is None else reading.prepare,
                )  # fmt: skip

            if self._together is not None:
                return self._load_together(self._together, head, load)
            return self._load_staged(head, load) or restore_newest(
                self._store, head, self._home, load, fell_back=self._fell_back, near=self._near(head)
            )

    def _load_together(
        self,
        together: Together,
        head: Head,
        load: Callable[[CheckpointReader, ReadingTogether], tuple[CheckpointReader, Loaded]],
    ) -> tuple[CheckpointReader, Loaded] | None:
        readings: list[ReadingTogether] = []
        at_hand = frozenset() if self._ahead is None else frozenset(NearDisk(self._ahead).keys)

        def load_one(ref: CheckpointRef) -> tuple[CheckpointReader, Loaded]:
            reading = ReadingTogether(
                together, self._store, ref.name, run_id=head.run_id, attempt=head.attempt, at_hand=at_hand
            )
            readings.append(reading)
            try:
                reader = open_for_rank(
                    self._store, ref, self._home, self._near(head), rank=together.rank, world_size=together.size
                )
                return load(reader, reading)
            finally:
                reading.pass_by()

        try:
            return restore_together(
                together, [ref for ref in head.checkpoints if ref.generation == head.generation], load_one,
                fell_back=self._fell_back, url=self._store.url,
            )  # fmt: skip
        finally:
            for reading in readings:
                reading.close()

    def _load_staged(
        self, head: Head, load: Callable[[CheckpointReader], tuple[CheckpointReader, Loaded]]
    ) -> tuple[CheckpointReader, Loaded] | None:
        """From this machine's disk, if an attempt left something there that is newer than the store's newest checkpoint."""
        if self._tier is None or self._saver is None:
            return None
        found = load_staged(self._tier, self._store, head, self._home, load, fell_back=self._fell_back)
        if found is None:
            return None
        staged, result = found
        self._saver.adopt(staged)
        return result

    def _near(self, head: Head) -> list[NearFor]:
        """Where on this machine copies of what is restored may be, the nearest first."""
        found = [near_memory(self._inherited, head.run_id)] if self._inherited else []
        disks = [*([] if self._tier is None else [self._tier.store]), *([] if self._ahead is None else [self._ahead])]
        return [*found, *(near_disk(disk) for disk in disks)]

    def _fell_back(self, fallback: Fallback) -> None:
        self._record.warn(
            f"the checkpoint of step {fallback.checkpoint.step} does not verify and is passed over for an older one: "
            f"{fallback.reason}"
        )
        self._record.emit("restore.fell_back", checkpoint=fallback.checkpoint.name, reason=fallback.reason)
