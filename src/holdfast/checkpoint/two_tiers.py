"""Saves by way of the machine's disk: staged there, which frees the snapshot's memory, then promoted in the background.

    saver: snapshot → stage (commit.Committer, tier.Tier) → Promoter → committed, told to the saver

Whatever the disk says, the run goes on: a save that does not fit is written to the store directly, a disk that fails is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from holdfast.checkpoint.commit import Committed, Committer
from holdfast.checkpoint.outcomes import SaveTask
from holdfast.checkpoint.promote import Promoter
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.checkpoint.tier import Staged, Tier, keys_of
from holdfast.core.errors import HoldfastError, IntegrityError, StoreError, StoreFull

__all__ = ["Promotion", "TwoTiers"]

_LINGER_S = 5.0
"""How long leaving waits for a promotion where the disk outlives the machine: the next attempt goes on with it."""
_INDEX_BYTES_PER_ARRAY = 512
"""What an array takes in the part at most, but for hashes of 32 bytes per MiB; so that the cap covers the index too."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """A staged checkpoint on its way to the store."""

    staged: Staged
    task: SaveTask


class TwoTiers:
    """Thread safety: `adopt`, `stage`, `promote`, `stand_aside` and `overtaken` belong to the saver's thread; the rest to any.

    `told` gets what became of each promotion, from the promoter's thread.

    Invariant: the disk holds the newest checkpoint that was staged until one that is at least as new is in the store, or on the
    disk as well. Objects are removed by the saver's thread only, and only while nothing is being staged.
    """

    def __init__(
        self,
        tier: Tier,
        committer: Committer,
        *,
        told: Callable[[SaveTask, Committed | BaseException], None],
        note: Callable[[str], None],
    ) -> None:
        self.tier = tier
        self._committer, self._told, self._note = committer, told, note
        self._promoter: Promoter[Promotion] = Promoter(
            self._promote, lambda older, newer: _supersede(older.task, newer.task)
        )
        self._committed_keys: set[str] = set()
        self._newest: Staged | None = None
        """What was handed over last, while it is not committed."""
        self._is_off = self._has_told = False

    def adopt(self, promotion: Promotion) -> None:
        """Go on with what an earlier attempt has staged, and this one has resumed from. Before the first `stage`."""
        self._newest = promotion.staged
        if promotion.staged.may_commit:
            self._promoter.offer(promotion)

    def stage(self, snapshot: Snapshot) -> Staged | None:
        """Put the snapshot on the disk. None when it cannot be: then it goes to the store."""
        if self._is_off:
            return None
        under_way = [job.staged for job in self._promoter.jobs()]
        keys = {key for staged in under_way for key in keys_of(staged)} | self._keys_of_newest()
        try:
            self.tier.check_in_place()
            # What is committed is asked for last: a promotion may end between the lines above.
            self.tier.keep_only(keys | self._committed_keys)
            self.tier.make_room(_bytes_on_disk(snapshot), keep=keys)
            return self._committer.stage(snapshot, self.tier, under_way)
        except StoreFull as error:
            if not self._has_told:
                self._has_told = True
                self._note(f"saves that do not fit on the local disk go to the store directly: {error}")
            with suppress(HoldfastError):
                self.tier.keep_only(keys | self._committed_keys)
        except (StoreError, IntegrityError, OSError) as error:
            self._leave_alone(error)
        return None

    def _leave_alone(self, error: Exception) -> None:
        if not self._is_off:
            self._is_off = True
            self._note(f"the local disk is not used any more: {error}. Saves go to the store directly")

    def promote(self, promotion: Promotion) -> None:
        """Commit it in the background; one that still waits is replaced."""
        self._newest = promotion.staged
        self._promoter.offer(promotion)

    def stand_aside(self, newer: SaveTask) -> None:
        """Before something newer is committed another way: one thread at a time writes heads."""
        self._promoter.withdraw(lambda older: _supersede(older.task, newer))

    def overtaken(self) -> None:
        """Something newer has been committed another way: nothing on the disk is needed any more."""
        self._newest, self._committed_keys = None, set()

    def tasks(self) -> list[SaveTask]:
        """What is on its way to the store or waits, the oldest first."""
        return [job.task for job in self._promoter.jobs()]

    def drain(self, timeout_s: float | None) -> bool:
        return self._promoter.drain(timeout_s)

    def close(self, timeout_s: float | None) -> bool:
        """Finish what is under way. Then the disk holds the newest checkpoint, and no other than one that is not committed."""
        if self.tier.outlives:
            timeout_s = _LINGER_S if timeout_s is None else min(timeout_s, _LINGER_S)
        if not self._promoter.close(timeout_s):
            return False
        with suppress(HoldfastError, OSError):
            self.tier.check_in_place()
            self.tier.keep_only(self._keys_of_newest() | self._committed_keys)
        self.tier.close()
        return True

    def _keys_of_newest(self) -> set[str]:
        newest = self._newest
        return set() if newest is None else keys_of(newest)

    def _promote(self, promotion: Promotion) -> None:
        try:
            done = self._committer.promote(promotion.staged, self.tier, finish=promotion.task.finish)
        except BaseException as error:
            if isinstance(error, IntegrityError):
                self._leave_alone(error)
            self._told(promotion.task, error)
            return
        # A run that is done is not resumed.
        self._committed_keys = set() if promotion.task.finish else keys_of(promotion.staged)
        if self._newest is promotion.staged:
            self._newest = None
        self._told(promotion.task, done)


def _supersede(older: SaveTask, newer: SaveTask) -> None:
    # Where the disk outlives the machine, the older one counts already.
    if not older.handle.done():
        older.handle.supersede(newer.handle)


def _bytes_on_disk(snapshot: Snapshot) -> int:
    """At most, index included; what the store has already is not written."""
    layout = snapshot.layout
    hashes_bytes = layout.total_bytes >> 15
    return layout.total_bytes + hashes_bytes + len(snapshot.document) + _INDEX_BYTES_PER_ARRAY * (1 + len(layout.specs))
