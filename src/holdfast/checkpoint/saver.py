"""From the newest snapshot to a committed checkpoint, beside the training loop.

The loop's thread fills a slot at a step boundary and goes on; one background thread writes, commits, retains and sweeps. Memory is
bounded by the slots: when the store is slower than the saves, a newer snapshot replaces the one that waits. A *held* snapshot lies
ready in memory and is committed only if somebody asks (a notice during evaluation).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.request import SaveHandle, SaveRequest, SaveState
from holdfast.checkpoint.retain import Keep, Roots, StoreOpener
from holdfast.checkpoint.snapshot import Layout, Snapshot, lay_out, stage, stream
from holdfast.checkpoint.staging import Slot, StagingBudget, available_memory_bytes, plan_slots
from holdfast.checkpoint.threads import DaemonPool
from holdfast.checkpoint.tree import FlatTree, collector_paused
from holdfast.checkpoint.write import KnownChunks
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, HoldfastError, SaveError, TooManyUnsaved, UsageError
from holdfast.core.events import Event, Sink
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["SaveHandle", "SaveRequest", "SaveState", "Saver", "SaverOptions"]


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
        figure: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self._options, self._clock, self._sink, self._committed = options, clock, sink, committed
        self._hashing = DaemonPool(options.hash_threads, "holdfast-hash")
        self._sending = DaemonPool(options.send_threads, "holdfast-send")
        self._committer = Committer(
            store, lineage, keep=options.keep, open_home=open_home, clock=clock, tokens=tokens, hashing=self._hashing,
            sending=self._sending, before_commit=before_commit, figure=figure,
        )  # fmt: skip
        self._layout: Layout | None = None
        self._budget: StagingBudget | None = None
        self._free: list[Slot] = []
        self._slots: list[Slot] = []
        self._slots_given_up = threading.Event()
        self._faulting: threading.Thread | None = None
        self._waiting: _Job | None = None
        self._held: _Job | None = None
        self._writing: _Job | None = None
        self._newest: Snapshot | None = None
        self._condition = threading.Condition()
        self._closing = False
        self._failures: list[BaseException] = []
        self._unreported: list[str] = []
        self._thread = threading.Thread(target=self._work, name="holdfast-saver", daemon=True)
        self._thread.start()
        self.stall_s_of_last: float = 0.0
        self.durable_s_of_last: float = 0.0

    @property
    def known(self) -> KnownChunks:
        """Chunks that need not be sent again. Restore adds those of the checkpoint that it has read, before the first save."""
        return self._committer.known

    @property
    def roots(self) -> Roots:
        """Roots that need not be read again. Restore adds the one that it has read, before the first save."""
        return self._committer.roots

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

        Does nothing where fewer than two snapshots fit, since it would have to wait for the writer. When an older snapshot still
        waits for the writer, this one takes its place in the queue instead.
        """
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
        self._close_slots()

    # ---- snapshots and slots

    def prepare(self, flat: FlatTree) -> None:
        """Make room for a state like this one now, so that the first save need not. Pages come in the background."""
        self._layout = lay_out(flat, self._layout)
        self._plan(self._layout)

    def _provide(self, slots: list[Slot]) -> None:
        """In an order that serves a first save as early as possible. Ends early when the slots are to be closed."""
        given_up = self._slots_given_up = threading.Event()

        def fault_in() -> None:
            for slot in slots:
                slot.fault_in(given_up.is_set)

        self._faulting = threading.Thread(target=fault_in, name="holdfast-staging", daemon=True)
        self._faulting.start()

    def _close_slots(self) -> None:
        self._slots_given_up.set()
        if self._faulting is not None:
            self._faulting.join()
        for slot in self._slots:
            slot.close()
        self._slots, self._free = [], []

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
        try:
            with collector_paused():
                snapshot = stage(
                    request.flat, layout, slot, step=request.step, epoch=request.epoch, metadata=request.metadata,
                    deferrable=request.deferrable,
                )  # fmt: skip
        except BaseException as error:
            with self._condition:
                self._free.append(slot)
            handle.finish(
                SaveState.FAILED, error=SaveError(f"the state of step {request.step} could not be copied: {error}")
            )
            raise
        self._newest = snapshot
        now_s = self._clock.monotonic_s()
        # The copy is all that the writer needs: the live arrays must not be kept alive by a save that waits.
        request = replace(request, flat=FlatTree(request.flat.document, ()))
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
        """Room for this layout. States grow once (optimizers make theirs at the first step); slots too small are made anew."""
        budget = self._budget
        if budget is not None and layout.total_bytes <= budget.slot_bytes:
            return budget
        self.drain()
        with self._condition:
            for job in (self._held, self._waiting):
                if job is not None:
                    self._give_back(job)
            self._held = self._waiting = self._newest = None
            self._close_slots()
        budget = plan_slots(
            layout.total_bytes,
            cap_bytes=self._options.staging_cap_bytes,
            available_bytes=available_memory_bytes(),
            local_ranks=self._options.local_ranks,
        )
        self._slots = [Slot(budget.slot_bytes) for _ in range(budget.slots)]
        self._free = list(self._slots)
        self._budget = budget
        self._provide(self._slots)
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
                self._waiting.handle.supersede(handle)
                self._give_back(self._waiting)
                self._waiting = None
            self._condition.wait_for(lambda: bool(self._free))
            if self._waiting is not None:
                self._waiting.handle.supersede(handle)
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
            except Exception as error:
                # The checkpoint is committed; what failed is telling others about it. The thread must live on.
                self._note(f"after the save of step {job.request.step}: {type(error).__name__}: {error}")
            finally:
                with self._condition:
                    self._writing = None
                    self._give_back(job)

    def _process(self, job: _Job) -> None:
        try:
            ref, written = self._committer.commit(job.snapshot, finish=job.request.finish)
        except BaseException as error:
            self._failed(job, error)
            return
        self.durable_s_of_last = self._clock.monotonic_s() - job.taken_s
        with self._condition:
            self._failures = []
        job.handle.finish(SaveState.COMMITTED, checkpoint=ref)
        self._emit(
            "save.committed",
            step=ref.step, epoch=ref.epoch, checkpoint=ref.name, reason=job.request.reason,
            stall_s=self.durable_s_of_last if job.snapshot.slot is None else job.stall_s,
            durable_s=self.durable_s_of_last, total_bytes=written.total_bytes, sent_bytes=written.sent_bytes,
            deduplicated_bytes=written.deduplicated_bytes,
        )  # fmt: skip
        self._committed(ref)
        self._sweep()

    def _failed(self, job: _Job, error: BaseException) -> None:
        wrapped = error
        if not isinstance(error, SaveError | Fenced):
            wrapped = SaveError(f"the save of step {job.request.step} failed: {error}")
            wrapped.__cause__ = error
        with self._condition:
            self._failures.append(wrapped)
            self._unreported.append(f"{wrapped}. The run goes on; the checkpoint before it still stands")
        self._emit("save.failed", step=job.request.step, reason=job.request.reason, error=str(wrapped))
        job.handle.finish(SaveState.FAILED, error=wrapped)

    def _sweep(self) -> None:
        try:
            deleted = self._committer.sweep()
        except HoldfastError as error:
            self._emit("sweep.failed", error=str(error))
            return
        if deleted:
            self._emit("sweep.deleted", objects=len(deleted))

    def _note(self, message: str) -> None:
        with self._condition:
            self._unreported.append(message)

    def _emit(self, name: str, **fields: Any) -> None:
        self._sink.emit(Event(name, self._clock.unix_s(), fields))
