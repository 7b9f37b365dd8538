"""What became of each save: told to its handle, to the ledger, and to the loop at its next step boundary."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from holdfast.checkpoint.commit import Committed
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.request import SaveHandle, SaveState
from holdfast.checkpoint.tier import Staged
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, PassedOver, SaveError, TooManyUnsaved
from holdfast.core.events import Event, Sink

__all__ = ["Outcomes", "SaveTask", "Sent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTask:
    """One save on its way. `taken_s`: when its snapshot was complete; `stall_s`: how long the loop stood still for it, None when
    that was until it was durable."""

    handle: SaveHandle
    step: int
    reason: str
    finish: bool
    taken_s: float
    stall_s: float | None


class Sent(NamedTuple):
    """What a save had to write after deduplication, and the seconds from its snapshot until it counted."""

    sent_bytes: int
    durable_s: float


_REMEMBERED = 9


class Outcomes:
    """Thread safety: every method; `check` belongs to the loop's thread."""

    def __init__(
        self, *, max_unsaved: int, clock: Clock, sink: Sink, committed: Callable[[CheckpointRef], None]
    ) -> None:
        self._max_unsaved, self._clock, self._sink, self._committed = max_unsaved, clock, sink, committed
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []
        self._unreported: list[str] = []
        self.durable_s_of_last = 0.0
        """From the snapshot until the newest save counted."""
        self.durable_step: int | None = None
        """The newest step whose save counts, of this attempt."""
        self.sent: deque[Sent] = deque(maxlen=_REMEMBERED)
        """How quick the newest saves were: to the store, or to a disk that outlives the machine."""

    def committed(self, task: SaveTask, done: Committed) -> None:
        ref = done.ref
        counted = task.handle.done()  # when it was staged, on a disk that outlives the machine
        durable_s = self._counts(task, done.sent_bytes)
        self.emit(
            "save.committed",
            step=ref.step, epoch=ref.epoch, checkpoint=ref.name, reason=task.reason,
            stall_s=durable_s if task.stall_s is None else task.stall_s, durable_s=durable_s,
            total_bytes=done.total_bytes, sent_bytes=done.sent_bytes, deduplicated_bytes=done.deduplicated_bytes,
        )  # fmt: skip
        if not counted:
            self._tell(task, ref)

    def staged(self, task: SaveTask, staged: Staged, *, counts: bool) -> None:
        """On the machine's disk. `counts`: the disk outlives the machine, so nothing more is waited for."""
        task.handle.state = SaveState.STAGED
        staged_s = self._clock.monotonic_s() - task.taken_s
        self.emit(
            "save.staged", step=task.step, checkpoint=staged.ref.name, staged_s=staged_s,
            written_bytes=staged.written.sent_bytes, counts=counts,
        )  # fmt: skip
        if counts and not task.finish:
            self._counts(task, staged.written.sent_bytes)
            self._tell(task, staged.ref)

    def _counts(self, task: SaveTask, sent_bytes: int) -> float:
        durable_s = self._clock.monotonic_s() - task.taken_s
        with self._lock:
            # Who has been fenced never saves again, whatever its disk says.
            self._failures = [failure for failure in self._failures if isinstance(failure, Fenced)]
            if not task.handle.done():
                self.durable_s_of_last = durable_s
                self.sent.append(Sent(sent_bytes, durable_s))
            self.durable_step = max(task.step, self.durable_step or 0)
        return durable_s

    def _tell(self, task: SaveTask, ref: CheckpointRef) -> None:
        task.handle.finish(SaveState.COMMITTED, checkpoint=ref)
        try:
            self._committed(ref)
        except Exception as error:
            # The checkpoint stands; what failed is telling others about it.
            self.note(f"after the save of step {task.step}: {type(error).__name__}: {error}")

    def failed(self, task: SaveTask, error: BaseException) -> None:
        if isinstance(error, PassedOver):
            # A newer one follows, so nothing is amiss.
            self.emit("save.passed_over", step=task.step, reason=task.reason, error=str(error))
            task.handle.finish(SaveState.FAILED, error=error)
            return
        wrapped = error
        if not isinstance(error, SaveError | Fenced):
            wrapped = SaveError(f"the save of step {task.step} failed: {error}")
            wrapped.__cause__ = error
        with self._lock:
            self._failures.append(wrapped)
            self._unreported.append(f"{wrapped}. The run goes on; the checkpoint before it still stands")
        self.emit("save.failed", step=task.step, reason=task.reason, error=str(wrapped))
        if not task.handle.done():
            task.handle.finish(SaveState.FAILED, error=wrapped)

    def note(self, message: str) -> None:
        """Something that the user is told at the next boundary."""
        with self._lock:
            self._unreported.append(message)

    def check(self, warn: Callable[[str], None]) -> None:
        """Surface failures of background saves at a step boundary: warn up to `max_unsaved` times in a row, then raise.

        Raises Fenced at once, and TooManyUnsaved.
        """
        if not self._unreported and not self._failures:
            return
        with self._lock:
            messages, self._unreported = self._unreported, []
            failures = list(self._failures)
        for failure in failures:
            if isinstance(failure, Fenced):
                raise failure
        for message in messages:
            warn(message)
        if len(failures) > self._max_unsaved:
            raise TooManyUnsaved(
                f"{len(failures)} saves in a row have failed; max_unsaved={self._max_unsaved} allows "
                f"{self._max_unsaved}. The last error: {failures[-1]}"
            ) from failures[-1]

    def emit(self, name: str, **fields: Any) -> None:
        self._sink.emit(Event(name, self._clock.unix_s(), fields))
