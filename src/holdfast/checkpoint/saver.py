"""From the newest snapshot to a committed checkpoint, beside the training loop.

The loop's thread fills a slot at a step boundary and goes on; one background thread writes, commits, retains and sweeps. Memory is
bounded by the slots: when the store is slower than the saves, a newer snapshot replaces the one that waits. A *held* snapshot lies
ready in memory and is committed only if somebody asks (a notice during evaluation).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.commit import Committed, Committer
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.handover import Legacy
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.joint import JointCommitter, MemberCommitter
from holdfast.checkpoint.outcomes import Outcomes, SaveTask, Sent
from holdfast.checkpoint.phases import Chair, Member
from holdfast.checkpoint.request import SaveHandle, SaveRequest, SaveState
from holdfast.checkpoint.retain import Keep, Roots, StoreOpener
from holdfast.checkpoint.slot_room import SlotRoom
from holdfast.checkpoint.snapshot import Layout, Snapshot, lay_out, stage, stream
from holdfast.checkpoint.staging import Slot, StagingBudget
from holdfast.checkpoint.threads import DaemonPool
from holdfast.checkpoint.tier import Staged, Tier
from holdfast.checkpoint.tree import FlatTree
from holdfast.checkpoint.two_tiers import Promotion, TwoTiers
from holdfast.checkpoint.write import KnownChunks
from holdfast.core.clock import Clock
from holdfast.core.errors import SaveError, UsageError
from holdfast.core.events import Sink
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["SaveHandle", "SaveRequest", "SaveState", "SaveUnderWay", "Saver", "SaverOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaverOptions:
    """`staging_cap_bytes`: for the machine, shared by `local_ranks`; None for the default. `max_unsaved`: how many saves in a row
    may fail with a warning; the next one raises."""

    keep: Keep
    staging_cap_bytes: int | None = None
    local_ranks: int = 1
    max_unsaved: int = 3
    hash_threads: int = 2
    send_threads: int = 4


@dataclass(frozen=True, slots=True)
class _Job:
    """A snapshot and what it is for."""

    snapshot: Snapshot
    task: SaveTask


class SaveUnderWay(NamedTuple):
    """A save that is being made durable, and for how long it has been."""

    step: int
    since_s: float


class Saver:
    """Owns the lineage, the staging slots and the background thread.

    Thread safety: `save`, `hold`, `release`, `check` and `close` belong to the loop's thread; the rest to any.
    """

    def __init__(
        self,
        store: Store,
        lineage: Lineage | None,
        *,
        options: SaverOptions,
        open_home: StoreOpener,
        clock: Clock,
        tokens: TokenSource,
        sink: Sink,
        before_commit: Callable[[], None] = lambda: None,
        committed: Callable[[CheckpointRef], None] = lambda ref: None,
        figure: Callable[[int], float | None] = lambda step: None,
        unsent: Callable[[], dict[str, bytes]] = dict,
        tier: Tier | None = None,
        legacy: Legacy | None = None,
        party: Chair | Member | None = None,
    ) -> None:
        """`party`: the other ranks of the job; a member's has no lineage, and writes its part of what rank 0 commits."""
        self._options, self._clock = options, clock
        self._outcomes = Outcomes(max_unsaved=options.max_unsaved, clock=clock, sink=sink, committed=committed)
        self._hashing = DaemonPool(options.hash_threads, "holdfast-hash")
        self._sending = DaemonPool(options.send_threads, "holdfast-send")
        workers = {"hashing": self._hashing, "sending": self._sending}
        self._committer: Committer | MemberCommitter
        self._tiers: TwoTiers | None = None
        if lineage is None:
            self._committer = MemberCommitter(
                store, member=cast("Member", party), open_home=open_home, tokens=tokens, **workers
            )
        else:
            whole: dict[str, Any] = {
                "keep": options.keep, "open_home": open_home, "clock": clock, "tokens": tokens, "unsent": unsent,
                "before_commit": before_commit, "figure": figure, **workers,
            }  # fmt: skip
            committer = (
                Committer(store, lineage, **whole)
                if party is None
                else JointCommitter(store, lineage, chair=cast("Chair", party), **whole)
            )
            self._committer = committer
            if tier is not None:
                self._tiers = TwoTiers(tier, committer, told=self._promoted, note=self._outcomes.note)
        self._legacy = legacy
        self._layout: Layout | None = None
        self._room = SlotRoom(
            cap_bytes=options.staging_cap_bytes, local_ranks=options.local_ranks, promotes=self._tiers is not None,
            legacy=legacy, outcomes=self._outcomes,
        )  # fmt: skip
        self._waiting: _Job | None = None
        self._held: _Job | None = None
        self._writing: _Job | None = None
        self._newest: Snapshot | None = None
        self._taken = (-1, 0)
        """The step of the newest snapshot, and how many of that step were taken before it."""
        self._condition = threading.Condition()
        self._closing = self._given_up = False
        self._thread = threading.Thread(target=self._work, name="holdfast-saver", daemon=True)
        self._thread.start()
        self.stall_s_of_last: float = 0.0

    @property
    def known(self) -> KnownChunks:
        """Chunks that need not be sent again. Restore adds those of the checkpoint that it has read, before the first save."""
        return self._committer.known

    @property
    def roots(self) -> Roots:
        """Roots that need not be read again. Restore adds the one that it has read, before the first save."""
        return self._committer.roots

    @property
    def durable_s_of_last(self) -> float:
        """From the snapshot until the newest save counted."""
        return self._outcomes.durable_s_of_last

    @property
    def durable_step(self) -> int | None:
        """The newest step whose save counts, of this attempt."""
        return self._outcomes.durable_step

    def sent(self) -> list[Sent]:
        """How quick the newest saves were, the oldest first."""
        return list(self._outcomes.sent)

    def under_way(self) -> SaveUnderWay | None:
        """The save that is being written or promoted right now."""
        job = self._writing
        tasks = [job.task] if job is not None else [] if self._tiers is None else self._tiers.tasks()
        if not tasks:
            return None
        return SaveUnderWay(tasks[0].step, self._clock.monotonic_s() - tasks[0].taken_s)

    def held_step(self) -> int | None:
        """The step of the newest snapshot that lies in memory and is not being written yet."""
        job = self._held or self._waiting
        return None if job is None else job.task.step

    @property
    def snapshot_bytes(self) -> int:
        """What a snapshot weighs; 0 before the first."""
        return 0 if self._layout is None else self._layout.total_bytes

    # ---- the loop's side

    def save(self, request: SaveRequest, handle: SaveHandle | None = None) -> SaveHandle:
        """Snapshot now; write in the background. Returns once the loop may go on. `handle` is one that was given out before."""
        self._count(request.step)
        return self._take(request, handle or SaveHandle(request.step), hold=False)

    def _count(self, step: int) -> None:
        """Invariant: all ranks of a job count alike, whatever room they have for snapshots."""
        self._taken = (step, self._taken[1] + 1 if self._taken[0] == step else 0)

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written right now."""
        return self._writing is not None

    def hold(self, request: SaveRequest) -> None:
        """Snapshot now and keep it in memory; `commit_held` writes it. A later save or hold replaces it.

        Does nothing where fewer than two snapshots fit, since it would have to wait for the writer. When an older snapshot still
        waits for the writer, this one takes its place in the queue instead.
        """
        self._count(request.step)
        self._layout = lay_out(request.flat, self._layout)
        if self._plan(self._layout).slots > 1:
            self._take(request, SaveHandle(request.step), hold=self._waiting is None)

    def commit_held(self) -> SaveHandle | None:
        """Write the held snapshot, if there is one."""
        with self._condition:
            job, self._held = self._held, None
            if job is None:
                return None
            self._enqueue(job)
            return job.task.handle

    def drop_held(self) -> None:
        """The held state is history: what would be committed from it is older than what the loop does now."""
        with self._condition:
            job, self._held = self._held, None
            if job is not None:
                self._give_back(job)

    def drop_waiting(self) -> None:
        """A save that has not been begun is given up; its snapshot stays described for an heir."""
        with self._condition:
            job, self._waiting = self._waiting, None
            if job is not None:
                self._give_back(job)
                error = SaveError(f"the save of step {job.task.step} was given up: there was no time left for it")
                job.task.handle.finish(SaveState.FAILED, error=error)

    def release(self) -> None:
        """Before an optimizer writes: the newest snapshot's copy must be safe from it."""
        snapshot = self._newest
        if snapshot is not None:
            snapshot.release()
            self._newest = None

    def check(self, warn: Callable[[str], None]) -> None:
        """Surface failures of background saves at a step boundary. Raises Fenced at once, and TooManyUnsaved."""
        self._outcomes.check(warn)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until every save that was asked for counts, or has failed. False when `timeout_s` passed first."""
        until_s = None if timeout_s is None else self._clock.monotonic_s() + timeout_s
        if not self._drain_snapshots(timeout_s):
            return False
        if self._tiers is None or self._tiers.tier.outlives:
            return True
        return self._tiers.drain(None if until_s is None else until_s - self._clock.monotonic_s())

    def _drain_snapshots(self, timeout_s: float | None = None) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self._waiting is None and self._writing is None, timeout_s)

    def adopt(self, staged: Staged) -> None:
        """Commit what an earlier attempt left on this machine's disk, from which this one has resumed. Before the first save."""
        assert self._tiers is not None
        task = SaveTask(
            handle=SaveHandle(staged.ref.step), step=staged.ref.step, reason="left on the disk", finish=False,
            taken_s=self._clock.monotonic_s(), stall_s=0.0,
        )  # fmt: skip
        self._tiers.adopt(Promotion(staged, task))

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what is queued, then stop the threads and give the memory back. What is not done in `timeout_s` is given up."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        ending = threading.Thread(target=self._end, name="holdfast-saver-end", daemon=True)
        ending.start()
        ending.join(timeout_s)
        if ending.is_alive():
            self._given_up = True
            self._hashing.shutdown(wait=False, cancel_futures=True)
            self._sending.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        """Beside whoever closes: what was given up still lets go of disk and memory when its store has answered."""
        self._thread.join()
        if self._tiers is not None:
            self._tiers.close(None)
        self._hashing.shutdown()
        self._sending.shutdown()
        self._newest = self._held = None
        # An heir may still need the memory of a save that was given up.
        self._room.close(inherited=self._given_up)

    # ---- snapshots and slots

    def prepare(self, flat: FlatTree) -> None:
        """Make room for a state like this one now, so that the first save need not. Pages come in the background."""
        self._layout = lay_out(flat, self._layout)
        self._plan(self._layout)

    def _take(self, request: SaveRequest, handle: SaveHandle, *, hold: bool) -> SaveHandle:
        if self._closing:
            raise UsageError("the saver is closed; nothing can be saved any more")
        started_s = self._clock.monotonic_s()
        layout = self._layout = lay_out(request.flat, self._layout)
        budget = self._plan(layout)
        handle.step = request.step
        if budget.slots == 0:
            self._stream(request, layout, handle, started_s)
            return handle
        slot = self._slot_for(handle)
        if self._legacy is not None:
            self._legacy.begins(slot)
        try:
            with collector_paused():
                snapshot = stage(
                    request.flat, layout, slot, step=request.step, epoch=request.epoch, metadata=request.metadata,
                    deferrable=request.deferrable, ranks=request.ranks,
                )  # fmt: skip
        except BaseException as error:
            with self._condition:
                self._room.free.append(slot)
            handle.finish(
                SaveState.FAILED, error=SaveError(f"the state of step {request.step} could not be copied: {error}")
            )
            raise
        snapshot.take = self._taken[1]
        self._newest = snapshot
        now_s = self._clock.monotonic_s()
        self.stall_s_of_last = now_s - started_s
        job = _Job(snapshot, self._task(request, handle, now_s, self.stall_s_of_last))
        if hold:
            self._describe(snapshot)
        with self._condition:
            if hold:
                handle.state = SaveState.HELD
                self._held = job
            else:
                self._enqueue(job)
                if self._legacy is not None and self._writing is not None:
                    self._hashing.submit(self._describe_waiting, job)
        return handle

    def _task(self, request: SaveRequest, handle: SaveHandle, taken_s: float, stall_s: float | None) -> SaveTask:
        """The copy is all that the writer needs: the live arrays must not be kept alive by a save that waits."""
        return SaveTask(
            handle=handle, step=request.step, reason=request.reason, finish=request.finish, taken_s=taken_s,
            stall_s=stall_s,
        )  # fmt: skip

    def _enqueue(self, job: _Job) -> None:
        job.task.handle.state = SaveState.WAITING
        self._waiting = job
        self._condition.notify_all()

    def _plan(self, layout: Layout) -> StagingBudget:
        """Room for this layout. States grow once (optimizers make theirs at the first step); slots too small are made anew."""
        if not self._room.fits(layout):
            self._drain_snapshots()
            with self._condition:
                for job in (self._held, self._waiting):
                    if job is not None:
                        self._give_back(job)
                self._held = self._waiting = self._newest = None
                self._room.close()
            self._room.make(layout)
        return self._room.budget

    def _slot_for(self, handle: SaveHandle) -> Slot:
        """A free slot, or the one of a snapshot that still waits and is now history. With one slot, wait for the writer."""
        with self._condition:
            if self._held is not None:
                self._give_back(self._held)
                self._held = None
            if not self._room.free and self._waiting is not None:
                self._waiting.task.handle.supersede(handle)
                self._give_back(self._waiting)
                self._waiting = None
            self._condition.wait_for(lambda: bool(self._room.free))
            if self._waiting is not None:
                self._waiting.task.handle.supersede(handle)
                self._give_back(self._waiting)
                self._waiting = None
            return self._room.free.pop()

    def _give_back(self, job: _Job) -> None:
        if job.snapshot.slot is not None and job.snapshot.slot in self._room.slots:
            job.snapshot.complete()
            self._room.free.append(job.snapshot.slot)
        self._condition.notify_all()

    def _stream(self, request: SaveRequest, layout: Layout, handle: SaveHandle, started_s: float) -> None:
        snapshot = stream(
            request.flat, layout, step=request.step, epoch=request.epoch, metadata=request.metadata, ranks=request.ranks
        )
        with self._condition:
            self._enqueue(_Job(snapshot, self._task(request, handle, started_s, None)))
        self._drain_snapshots()
        self.stall_s_of_last = self._clock.monotonic_s() - started_s

    # ---- the background thread

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting is not None or self._closing)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                job.task.handle.state = SaveState.WRITING
                self._writing = job
            try:
                self._process(job)
            finally:
                with self._condition:
                    self._writing = None
                    self._give_back(job)

    def _process(self, job: _Job) -> None:
        task = job.task
        try:
            self._describe(job.snapshot)
            if self._tiers is not None:
                staged = self._tiers.stage(job.snapshot)
                if staged is not None:
                    self._hand_over(task, staged)
                    return
                self._tiers.stand_aside(task)
            done = self._committer.commit(job.snapshot, finish=task.finish)
        except BaseException as error:
            self._outcomes.failed(task, error)
            return
        if self._tiers is not None:
            self._tiers.overtaken()
        self._outcomes.committed(task, done)
        self._sweep()

    def _describe(self, snapshot: Snapshot) -> None:
        """For whoever comes after us, should this process die before the snapshot is committed."""
        if self._legacy is not None:
            snapshot.complete()
            self._legacy.complete(snapshot)

    def _describe_waiting(self, job: _Job) -> None:
        """A snapshot that waits behind a slow save is the newest that an heir can have."""
        job.snapshot.complete()
        with self._condition:
            # Invariant: while it waits nobody fills its slot; whoever takes the slot, or writes, holds the condition first.
            if self._legacy is not None and self._waiting is job:
                self._legacy.complete(job.snapshot)

    def _hand_over(self, task: SaveTask, staged: Staged) -> None:
        assert self._tiers is not None
        if task.stall_s is None:
            task = replace(task, stall_s=self._clock.monotonic_s() - task.taken_s)
        self._outcomes.staged(task, staged, counts=self._tiers.tier.outlives)
        self._tiers.promote(Promotion(staged, task))

    def _promoted(self, task: SaveTask, outcome: Committed | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self._outcomes.failed(task, outcome)
        else:
            self._outcomes.committed(task, outcome)
            self._sweep()

    def _sweep(self) -> None:
        try:
            deleted = self._committer.sweep()
        except Exception as error:
            # Whatever it is: a thread that ends here would never save again.
            self._outcomes.emit("sweep.failed", error=f"{type(error).__name__}: {error}")
            return
        if deleted:
            self._outcomes.emit("sweep.deleted", objects=len(deleted))
