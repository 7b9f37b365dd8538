"""When the state is saved: what is due, what was asked for, what must wait for a step boundary, and what is lost if we leave now.

    boundary → due? asked for? → is this a boundary? → snapshot (saver) → how long until the next (pacing)

The saver knows how to save, the gate knows whether the state may be copied, the pacing knows when. Here they meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.outcomes import Sent
from holdfast.checkpoint.saver import SaveHandle, Saver, SaveRequest, SaveState, SaveUnderWay
from holdfast.core.errors import Fenced, SaveError, UsageError
from holdfast.ledger.doings import Doing
from holdfast.policy.spread import Spread
from holdfast.train.boundary import StepGate
from holdfast.train.pacing import Pacing
from holdfast.train.place import Place
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.words import Wish
from holdfast.train.record import Record

__all__ = ["LAST_SAVES", "Capture", "Saves"]

_LEAVING, _LEAVING_AGAIN, _BETWEEN_LOOPS = "leaving", "leaving, second try", "interrupted between loops"
LAST_SAVES = frozenset({_LEAVING, _LEAVING_AGAIN, _BETWEEN_LOOPS})
"""Reasons of saves after which an attempt ends with nothing lost."""

_DEFERRAL_WARNING = 500
"""Steps for which a save may wait before the user is told: longer than accumulations are."""
_LIKE_THE_LAST = 3
"""So many saves tell what the next one has to send. The last alone may have come just after another, with nothing new to send."""
Capture = Callable[[str, bool], SaveRequest]
"""Makes a request from the live state: (reason, finish)."""


class _Asked(SaveHandle):
    """A save that the user asked for inside an iteration, before it is made at the iteration's end."""

    def __init__(self, step: int, make_now: Callable[[], None]) -> None:
        super().__init__(step)
        self.is_made = False
        self._make_now = make_now
        self._thread = threading.get_ident()

    def wait(self, timeout_s: float | None = None) -> CheckpointRef:
        if not self.is_made and not self.done() and threading.get_ident() == self._thread:
            self._make_now()
        return super().wait(timeout_s)


class Saves:
    """Owned by the loop's thread."""

    def __init__(
        self,
        saver: Saver,
        gate: StepGate,
        pacing: Pacing,
        place: Place,
        capture: Capture,
        record: Record,
        together: Together | None = None,
    ) -> None:
        self._together = together
        self._saver, self._gate, self._pacing, self._place = saver, gate, pacing, place
        self._capture, self._record = capture, record
        self._asked: _Asked | None = None
        self._put_off: str | None = None
        self._put_off_at = 0
        self._last: SaveHandle | None = None
        self._mutating = 0
        self._is_prepared = False

    @property
    def elapsed_s(self) -> float:
        return self._pacing.elapsed_s

    # ---- at boundaries

    def boundary(self, *, epoch_ended: bool, may_begin: bool = True, agreed: str | None = None) -> None:
        """Save if it is time, or as soon as it may be. `may_begin`: False when the time that is left belongs to a last save.
        `agreed`: why all ranks save at this very boundary."""
        step = self._place.step
        if self._gate.any_stepped:
            self.prepare()
        due = self._pacing.boundary(step, epoch_ended=epoch_ended, busy=self._saver.busy)
        reason = self._put_off or agreed
        for why, everywhere in (due, ("asked for" if self._asked is not None else None, False)):
            if why is not None and reason is None and (everywhere or not self._wish(why)):
                reason = why
        if reason is not None and may_begin:
            if self.may_copy():
                self.save(reason)
            else:
                self._defer(reason)

    def _wish(self, reason: str) -> bool:
        """Let all ranks save at a common step. False where this one is alone, and may save by itself."""
        if self._together is None:
            return False
        self._together.wish(Wish("save", reason))
        return True

    def insure(self) -> None:
        """Save because of what stands against this machine: now, or at the step that all ranks agree on."""
        if not self._wish("notice"):
            self.save("notice")

    def prepare(self) -> None:
        """Make room, once the state has its full size: from the first step of an optimizer on. Later calls do nothing."""
        if not self._is_prepared:
            self._is_prepared = self._gate.any_stepped
            with self._record.stopwatch.during(Doing.STALL):
                self._saver.prepare(self._capture("preparing", False).flat)

    def check(self) -> None:
        """Tell of background saves that have failed. Raises Fenced and TooManyUnsaved."""
        self._saver.check(self._record.warn)

    def may_copy(self) -> bool:
        """False in a region where the state must not be copied, and in the middle of a gradient accumulation."""
        return not self._mutating and self._gate.accumulating() is None

    def _defer(self, reason: str) -> None:
        step = self._place.step
        if self._put_off is None:
            self._put_off, self._put_off_at = reason, step
        elif step - self._put_off_at == _DEFERRAL_WARNING:
            name = self._gate.accumulating()
            why = f"{name!r} keeps collecting gradients and does not step" if name else "of run.mutating()"
            self._record.warn(f"a save has been put off for {_DEFERRAL_WARNING} steps, because {why}")

    # ---- saving

    @collector_paused()  # until the request is gone: its thousands of parts live no longer than this
    def save(self, reason: str, *, finish: bool = False) -> SaveHandle:
        """Snapshot the live state now."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.is_made = True
        self._put_off = None
        self._record.progress(snapshot=True)
        with self._record.stopwatch.during(Doing.STALL):
            self._last = self._saver.save(self._capture(reason, finish), asked)
        self._pacing.saved(self._place.step, self._saver.stall_s_of_last)
        self._pacing.decide(self._saver.durable_s_of_last, self._expected_runtime_s())
        return self._last

    def ask(self) -> SaveHandle:
        """What `run.save()` does: now where the state is at a boundary, otherwise at the end of the iteration."""
        if not self._place.in_iteration and self.may_copy():
            return self.save("asked for")
        if self._asked is None:
            self._asked = _Asked(self._place.step + self._place.in_batch, self._make_asked)
        return self._asked

    def _make_asked(self) -> None:
        if self._place.in_iteration or not self.may_copy():
            raise UsageError(
                "this save is made when the iteration of the loop is complete, so wait() here would wait for ever. Wait after "
                "the loop, or look at handle.done() in a later iteration"
            )
        self.save("asked for")

    def _expected_runtime_s(self) -> float | None:
        """From the pace of this attempt, when the loop's length is known."""
        steps, step_s = self._place.expected_steps(), self._pacing.seconds_per_step(self._place.step)
        return step_s * steps if steps and step_s else None

    # ---- between loops

    @collector_paused()
    def hold(self) -> None:
        """Keep the state as it is now in memory, in case the code that follows is interrupted."""
        # Among several ranks all must come to the same answer, and some hear of a failure later than others.
        is_new = self._pacing.unsaved_steps(self._place.step) > 0 if self._together else self._has_unsaved()
        if is_new and self.may_copy():
            self._record.progress(snapshot=True)
            with self._record.stopwatch.during(Doing.STALL):
                self._saver.hold(self._capture(_BETWEEN_LOOPS, False))

    def drop_held(self) -> None:
        self._saver.drop_held()

    @contextmanager
    def mutating(self) -> Iterator[None]:
        self._saver.release()
        self._mutating += 1
        try:
            yield
        finally:
            self._mutating -= 1

    # ---- figures for a deadline

    @property
    def durable_step(self) -> int | None:
        """The newest step that a commit of this attempt, or the one it resumed from, holds."""
        mine = self._saver.durable_step
        return self._pacing.began_at if mine is None else mine

    @property
    def snapshot_s(self) -> float:
        """How long the newest copy of the state took."""
        return self._saver.stall_s_of_last

    def step_time(self) -> Spread | None:
        return self._pacing.meter.step_time()

    def sent(self) -> list[Sent]:
        return self._saver.sent()

    def under_way(self) -> SaveUnderWay | None:
        return self._saver.under_way()

    def held_step(self) -> int | None:
        return self._saver.held_step()

    def expected_send_bytes(self) -> int:
        """What the next save has to send: as much as the last few at most, or everything."""
        sent = self._saver.sent()[-_LIKE_THE_LAST:]
        return max((one.sent_bytes for one in sent), default=self._saver.snapshot_bytes)

    def commit_held(self) -> bool:
        """From any thread: begin to make the held snapshot durable. False when there is none."""
        return self._saver.commit_held() is not None

    # ---- leaving

    def leave_as_it_is(self, within_s: float) -> bool:
        """Start nothing; wait for what is being written. False when something is lost."""
        self._saver.drop_waiting()
        return self._settle(within_s)

    def commit_held_from_outside(self, within_s: float) -> bool:
        """From another thread than the loop's: make the newest snapshot in memory durable. False when it did not get there."""
        self._saver.commit_held()
        return self._saver.drain(within_s)

    def leave_with_held(self, within_s: float) -> bool:
        """Commit what was held. False when something is lost."""
        if self._has_unsaved():
            self._last = self._saver.commit_held() or self._last
        return self._settle(within_s)

    def leave_with_live(self, within_s: float) -> bool:
        """Save what is new and wait for it; a save that fails is tried once more. False when something is lost."""
        if self._has_unsaved() or self._asked is not None:
            self.save(_LEAVING)
        durable = self._settle(within_s)
        if not durable and self._last_failed():
            try:
                self.save(_LEAVING_AGAIN)
            except SaveError as error:
                self._record.warn(str(error))
                return False
            durable = self._settle(within_s)
        return durable

    def _settle(self, within_s: float) -> bool:
        """What counts is what is durable: a held snapshot that was committed holds this step as well."""
        return self._saver.drain(within_s) and (self.durable_step or 0) >= self._place.step and not self._last_failed()

    def _has_unsaved(self) -> bool:
        return self._pacing.unsaved_steps(self._place.step) > 0 or self._last_failed()

    def _last_failed(self) -> bool:
        return self._last is not None and self._last.failed

    def close(self, timeout_s: float) -> None:
        """Finish what is under way within `timeout_s`; a save that was asked for and never made has failed."""
        self._gate.remove()
        if self._asked is not None:
            self._asked.finish(
                SaveState.FAILED,
                error=SaveError("the run was closed before the iteration was complete: nothing was saved"),
            )
        self._saver.close(timeout_s=timeout_s)

    def stop_if_fenced(self) -> None:
        """Raises Fenced when another attempt has taken over; other failures are told as warnings."""
        try:
            self._saver.check(self._record.warn)
        except Fenced:
            raise
        except SaveError as error:
            self._record.warn(str(error))
