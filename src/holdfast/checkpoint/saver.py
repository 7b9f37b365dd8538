"""From the newest snapshot to a committed checkpoint, beside the training loop.

The loop's thread fills a slot at a step boundary and goes on; one background thread writes, commits, retains and sweeps. Memory is
bounded by the slots: when the store is slower than the saves, a newer snapshot replaces the one that waits. A *held* snapshot lies
ready in memory and is committed only if somebody asks (a notice during evaluation).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.retain import Keep, Roots, StoreOpener, condemn, find_orphans, sweep
from holdfast.checkpoint.snapshot import Layout, Snapshot, lay_out, stage, stream
from holdfast.checkpoint.staging import Slot, StagingBudget, available_memory_bytes, plan_slots
from holdfast.checkpoint.tree import FlatTree, Leaf
from holdfast.checkpoint.write import KnownChunks, Written, write_checkpoint
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, HoldfastError, SaveError, TooManyUnsaved
from holdfast.core.events import Event, Sink
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["SaveHandle", "SaveRequest", "SaveState", "Saver", "SaverOptions"]


class SaveState(Enum):
    """Where a save is."""

    HELD = "held"
    WAITING = "waiting"
    WRITING = "writing"
    COMMITTED = "committed"
    SUPERSEDED = "superseded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaverOptions:
    """`staging_cap_bytes`: for the machine, shared by `local_ranks`; None for the default. `max_unsaved`: how many saves in a row may
    fail with a warning; the next one raises."""

    keep: Keep
    staging_cap_bytes: int | None = None
    local_ranks: int = 1
    max_unsaved: int = 3
    hash_threads: int = 2
    send_threads: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What a save is of. `deferrable` marks arrays that only optimizers write. `finish` makes it the run's last."""

    flat: FlatTree
    step: int
    epoch: int
    metadata: dict[str, Any]
    reason: str
    deferrable: Callable[[Leaf], bool]
    finish: bool = False


class SaveHandle:
    """One save, as its caller sees it. Thread-safe."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state = SaveState.WAITING
        self._done = threading.Event()
        self._checkpoint: CheckpointRef | None = None
        self._error: BaseException | None = None
        self._successor: SaveHandle | None = None

    def done(self) -> bool:
        """True when the outcome is known (committed, failed, or its successor's is)."""
        if self._successor is not None:
            return self._successor.done()
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> CheckpointRef:
        """Block until this state, or a newer one that replaced it while it waited, is durable and committed.

        Raises SaveError (or Fenced) when it was not, TimeoutError when `timeout_s` passed first.
        """
        handle = self
        while True:
            if not handle._done.wait(timeout_s):
                raise TimeoutError(f"the save of step {self.step} is still {handle.state.value}")
            if handle._successor is None:
                break
            handle = handle._successor
        if handle._error is not None:
            raise handle._error
        if handle._checkpoint is None:
            raise SaveError(f"the save of step {self.step} was given up before it was written")
        return handle._checkpoint

    def _finish(
        self, state: SaveState, checkpoint: CheckpointRef | None = None, error: BaseException | None = None
    ) -> None:
        self.state, self._checkpoint, self._error = state, checkpoint, error
        self._done.set()

    def _supersede(self, successor: SaveHandle) -> None:
        self.state, self._successor = SaveState.SUPERSEDED, successor
        self._done.set()


@dataclass(slots=True)
class _Job:
    snapshot: Snapshot
    handle: SaveHandle
    request: SaveRequest
    taken_s: float
    stall_s: float


class Saver:
    """Owns the lineage, the staging slots and the background thread.

    Thread safety: `save`, `hold`, `commit_held`, `release`, `check` and `close` belong to the loop's thread.
    """

    def __init__(
        self,
        store: Store,
        lineage: Lineage,
        *,
        options: SaverOptions,
        open_home: StoreOpener,
        clock: Clock,
        tokens: TokenSource,
        sink: Sink,
        before_commit: Callable[[], None] = lambda: None,
        committed: Callable[[CheckpointRef], None] = lambda ref: None,
    ) -> None:
        self._store, self._lineage, self._options, self._open_home = store, lineage, options, open_home
        self._clock, self._tokens, self._sink = clock, tokens, sink
        self._before_commit, self._committed = before_commit, committed
        self.roots = Roots(store, open_home)
        self.known = KnownChunks()
        self._budget: StagingBudget | None = None
        self._free: list[Slot] = []
        self._slots: list[Slot] = []
        self._waiting: _Job | None = None
        self._held: _Job | None = None
        self._writing: _Job | None = None
        self._newest: Snapshot | None = None
        self._condition = threading.Condition()
        self._closing = False
        self._failures: list[BaseException] = []
        self._unreported: list[str] = []
        self._deleted: set[str] = set()
        self._orphans: set[str] | None = None
        self._hashing = ThreadPoolExecutor(options.hash_threads, thread_name_prefix="holdfast-hash")
        self._sending = ThreadPoolExecutor(options.send_threads, thread_name_prefix="holdfast-send")
        self._thread = threading.Thread(target=self._work, name="holdfast-saver", daemon=True)
        self._thread.start()
        self.stall_s_of_last: float = 0.0
        self.durable_s_of_last: float = 0.0

    # ---- the loop's side

    def save(self, request: SaveRequest, handle: SaveHandle | None = None) -> SaveHandle:
        """Snapshot now; write in the background. Returns once the loop may go on. `handle` is one that was given out before."""
        return self._take(request, handle or SaveHandle(request.step), hold=False)

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written right now."""
        return self._writing is not None

    def hold(self, request: SaveRequest) -> None:
        """Snapshot now and keep it in memory; `commit_held` writes it. A later save or hold replaces it.

        Does nothing where fewer than two snapshots fit, since it would have to wait for the writer. When an older snapshot still waits
        for the writer, this one takes its place in the queue instead.
        """
        if self._plan(lay_out(request.flat)).slots > 1:
            self._take(request, SaveHandle(request.step), hold=self._waiting is None)

    def commit_held(self) -> SaveHandle | None:
        """Write the held snapshot, if there is one."""
        with self._condition:
            job, self._held = self._held, None
            if job is None:
                return None
            self._enqueue(job)
            return job.handle

    def drop_held(self) -> None:
        """The held state is history: what would be committed from it is older than what the loop does now."""
        with self._condition:
            job, self._held = self._held, None
            if job is not None:
                self._give_back(job)

    def release(self) -> None:
        """Before an optimizer writes: the newest snapshot's copy must be safe from it."""
        snapshot = self._newest
        if snapshot is not None:
            snapshot.release()
            self._newest = None

    def check(self, warn: Callable[[str], None]) -> None:
        """Surface failures of background saves at a step boundary: warn up to `max_unsaved` times in a row, then raise.

        Raises Fenced at once, and TooManyUnsaved.
        """
        if not self._unreported and not self._failures:
            return
        with self._condition:
            messages, self._unreported = self._unreported, []
            failures = list(self._failures)
        for failure in failures:
            if isinstance(failure, Fenced):
                raise failure
        for message in messages:
            warn(message)
        if len(failures) > self._options.max_unsaved:
            raise TooManyUnsaved(
                f"{len(failures)} saves in a row have failed; max_unsaved={self._options.max_unsaved} allows "
                f"{self._options.max_unsaved}. The last error: {failures[-1]}"
            ) from failures[-1]

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is waiting or being written. False when `timeout_s` passed first."""
        with self._condition:
            return self._condition.wait_for(lambda: self._waiting is None and self._writing is None, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what is queued, then stop the thread and give the memory back. What is not done within `timeout_s` is given up."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._hashing.shutdown(wait=False, cancel_futures=True)
            self._sending.shutdown(wait=False, cancel_futures=True)
            return
        self._hashing.shutdown()
        self._sending.shutdown()
        self._newest = self._held = None
        self._free = []
        for slot in self._slots:
            slot.close()
        self._slots = []

    # ---- snapshots and slots

    def _take(self, request: SaveRequest, handle: SaveHandle, *, hold: bool) -> SaveHandle:
        started_s = self._clock.monotonic_s()
        layout = lay_out(request.flat)
        budget = self._plan(layout)
        handle.step = request.step
        if budget.slots == 0:
            self._stream(request, layout, handle, started_s)
            return handle
        slot = self._slot_for(handle)
        snapshot = stage(
            request.flat, layout, slot, step=request.step, epoch=request.epoch, metadata=request.metadata,
            deferrable=request.deferrable,
        )  # fmt: skip
        self._newest = snapshot
        now_s = self._clock.monotonic_s()
        job = _Job(snapshot, handle, request, now_s, now_s - started_s)
        self.stall_s_of_last = job.stall_s
        with self._condition:
            if hold:
                handle.state = SaveState.HELD
                self._held = job
            else:
                self._enqueue(job)
        return handle

    def _enqueue(self, job: _Job) -> None:
        job.handle.state = SaveState.WAITING
        self._waiting = job
        self._condition.notify_all()

    def _plan(self, layout: Layout) -> StagingBudget:
        """Room for this layout. States grow once (optimizers make theirs at the first step), so slots are made anew when too small."""
        budget = self._budget
        if budget is not None and layout.total_bytes <= budget.slot_bytes:
            return budget
        self.drain()
        with self._condition:
            for job in (self._held, self._waiting):
                if job is not None:
                    self._give_back(job)
            self._held = self._waiting = self._newest = None
            for slot in self._slots:
                slot.close()
            self._slots, self._free = [], []
        budget = plan_slots(
            layout.total_bytes,
            cap_bytes=self._options.staging_cap_bytes,
            available_bytes=available_memory_bytes(),
            local_ranks=self._options.local_ranks,
        )
        self._slots = [Slot(budget.slot_bytes) for _ in range(budget.slots)]
        self._free = list(self._slots)
        self._budget = budget
        self._emit("staging.planned", slots=budget.slots, slot_bytes=budget.slot_bytes, cap_bytes=budget.cap_bytes)
        if budget.slots == 0:
            self._note(
                f"one snapshot ({layout.total_bytes} bytes) does not fit under the staging cap ({budget.cap_bytes} bytes): "
                "saves now stop the loop until they are durable. Raise staging_cap or give the machine more memory"
            )
        return budget

    def _slot_for(self, handle: SaveHandle) -> Slot:
        """A free slot, or the one of a snapshot that still waits and is now history. With one slot, wait for the writer."""
        with self._condition:
            if self._held is not None:
                self._give_back(self._held)
                self._held = None
            if not self._free and self._waiting is not None:
                self._waiting.handle._supersede(handle)
                self._give_back(self._waiting)
                self._waiting = None
            self._condition.wait_for(lambda: bool(self._free))
            if self._waiting is not None:
                self._waiting.handle._supersede(handle)
                self._give_back(self._waiting)
                self._waiting = None
            return self._free.pop()

    def _give_back(self, job: _Job) -> None:
        if job.snapshot.slot is not None and job.snapshot.slot in self._slots:
            job.snapshot.complete()
            self._free.append(job.snapshot.slot)
        self._condition.notify_all()

    def _stream(self, request: SaveRequest, layout: Layout, handle: SaveHandle, started_s: float) -> None:
        snapshot = stream(request.flat, layout, step=request.step, epoch=request.epoch, metadata=request.metadata)
        with self._condition:
            self._enqueue(_Job(snapshot, handle, request, started_s, 0.0))
        self.drain()
        self.stall_s_of_last = self._clock.monotonic_s() - started_s

    # ---- the background thread

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting is not None or self._closing)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                job.handle.state = SaveState.WRITING
                self._writing = job
            try:
                self._process(job)
            finally:
                with self._condition:
                    self._writing = None
                    self._give_back(job)

    def _process(self, job: _Job) -> None:
        try:
            ref, written = self._commit(job)
        except BaseException as error:
            self._failed(job, error)
            return
        self.durable_s_of_last = self._clock.monotonic_s() - job.taken_s
        self._failures = []
        self._emit(
            "save.committed",
            step=ref.step, epoch=ref.epoch, checkpoint=ref.name, reason=job.request.reason, stall_s=job.stall_s,
            durable_s=self.durable_s_of_last, total_bytes=written.total_bytes, sent_bytes=written.sent_bytes,
            deduplicated_bytes=written.deduplicated_bytes,
        )  # fmt: skip
        self._committed(ref)
        job.handle._finish(SaveState.COMMITTED, checkpoint=ref)
        self._sweep()

    def _commit(self, job: _Job) -> tuple[CheckpointRef, Written]:
        head = self._lineage.head
        if self._orphans is None:
            self._orphans = find_orphans(self._store, head, self.roots)
        self.known.retain({ref.name for ref in head.checkpoints})
        written = write_checkpoint(
            job.snapshot, self._store, run_id=head.run_id, attempt=head.attempt, sequence=head.number + 1,
            known=self.known, tokens=self._tokens, hashing=self._hashing, sending=self._sending,
        )  # fmt: skip
        self._before_commit()
        ref = CheckpointRef(
            name=written.root.name, root_blake3=written.root_blake3, step=job.request.step, epoch=job.request.epoch,
            generation=head.generation, attempt=head.attempt, unix_s=self._clock.unix_s(), total_bytes=written.total_bytes,
        )  # fmt: skip
        self.roots.remember(written.root)
        committed = self._lineage.advance(
            "finish" if job.request.finish else "save",
            lambda current: self._next(current, ref, written, job.request.finish),
        )
        self.known.add(ref.name, written.part)
        self.roots.forget_except(committed.checkpoints)
        return ref, written

    def _next(self, current: Head, ref: CheckpointRef, written: Written, finish: bool) -> Head:
        """The head that names `ref`, computed from the newest of this claim.

        Invariant: every old object that the checkpoint refers to is still reached by a checkpoint retained there, and not condemned.
        """
        reached = set(written.root.objects)
        retained = {key for other in current.checkpoints if other.home is None for key in self.roots.get(other).objects}
        lost_homes = set(written.root.homes) - {pin.home for pin in current.pins}
        if lost_homes or not reached - written.sent_objects <= retained or reached & set(current.condemned):
            raise SaveError("an object that this save refers to is no longer retained; the next save sends it again")
        kept = self._options.keep.select([*current.checkpoints, ref], current.generation)
        following = condemn(current, kept, self.roots, deleted=self._deleted)
        orphans = (self._orphans or set()) - reached
        condemned = sorted(set(following.condemned) | orphans)
        return msgspec.structs.replace(following, condemned=condemned, finished=finish)

    def _failed(self, job: _Job, error: BaseException) -> None:
        wrapped = error
        if not isinstance(error, SaveError | Fenced):
            wrapped = SaveError(f"the save of step {job.request.step} failed: {error}")
            wrapped.__cause__ = error
        with self._condition:
            self._failures.append(wrapped)
            self._unreported.append(f"{wrapped}. The run goes on; the checkpoint before it still stands")
        self._emit("save.failed", step=job.request.step, reason=job.request.reason, error=str(wrapped))
        job.handle._finish(SaveState.FAILED, error=wrapped)

    def _sweep(self) -> None:
        try:
            deleted = sweep(self._store, self._lineage, self._open_home)
        except HoldfastError as error:
            self._emit("sweep.failed", error=str(error))
            return
        self._orphans = set()
        self._deleted = deleted
        if deleted:
            self._emit("sweep.deleted", objects=len(deleted))

    def _note(self, message: str) -> None:
        with self._condition:
            self._unreported.append(message)

    def _emit(self, name: str, **fields: Any) -> None:
        self._sink.emit(Event(name, self._clock.unix_s(), fields))
