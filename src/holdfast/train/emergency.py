"""From a notice to the last save: what is decided at each step boundary, and what happens when no boundary comes in time.

    notice (any thread) → at every boundary: measured figures → policy.deadline → train on | save | leave
                        → no boundary by the latest safe moment: what can be given up is given up (an evaluation, a wait for data)
                        → nothing helps (a compile, a long step): the snapshot that lies in memory is committed, the process ends

The decision is arithmetic (`policy/deadline.py`); here are only its figures and its consequences. Every decision that differs from
the one before is recorded with its reasons.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from statistics import fmean, pstdev

from holdfast.core.clock import Clock
from holdfast.core.contract import EXIT_PREEMPTED, Phase
from holdfast.notice.base import Notice, NoticeKind
from holdfast.policy.deadline import (
    DeadlineAction,
    DeadlineContext,
    DeadlineDecision,
    InFlightSave,
    MemorySnapshot,
    Spread,
    decide_save,
)
from holdfast.train.place import Place
from holdfast.train.record import Record
from holdfast.train.saves import Saves
from holdfast.train.signals import Signals

__all__ = ["Emergency"]

_LEAVE_S = 2.0
"""Flushing figures and logs, and the end of the process."""
_MARGIN_S = 2.0
"""Machines go a little early."""
_ONE_SAMPLE_SD = 0.5
"""How uncertain a bandwidth is that was measured once."""
_LOST_STEPS = 5
"""A step that takes so many times its usual time is no ordinary step: nobody knows when it ends."""


class Emergency:
    """What stands against this process, and what is done about it.

    Thread safety: `heard` may be called from any thread, the rest belongs to the loop's. A thread of its own watches the deadline.
    """

    def __init__(
        self, clock: Clock, record: Record, signals: Signals, place: Place, acknowledge: Callable[[Notice], None]
    ) -> None:
        self._clock, self._record, self._signals, self._place = clock, record, signals, place
        self._acknowledge = acknowledge
        self._lock = threading.Condition()
        self._standing: dict[str, Notice] = {}
        self._saves: Saves | None = None
        self._insured_since: int | None = None
        """The step at which the first of the standing notices was acted on."""
        self._told: tuple[object, ...] | None = None
        self._latest_s: float | None = None
        self._boundary_s = clock.monotonic_s()
        self._leaving = False
        self.saves_nothing = False
        """The decision was that no further save fits, or is needed."""
        self._closed = False
        self._watch: threading.Thread | None = None

    # ---- hearing

    def heard(self, notice: Notice) -> None:
        """Take note, from any thread. A withdrawn notice lets training go on as if nothing had been said."""
        with self._lock:
            if notice.kind is NoticeKind.WITHDRAWN:
                self._standing.pop(notice.id, None)
                if not self._standing:
                    self._insured_since = self._told = self._latest_s = None
            else:
                self._standing[notice.id] = notice
            if self._watch is None and not self._closed:
                self._watch = threading.Thread(target=self._keep_watch, name="holdfast-deadline", daemon=True)
                self._watch.start()
            self._lock.notify_all()

    def attend(self, saves: Saves) -> None:
        """The run is open: from now on something can be done."""
        with self._lock:
            self._saves = saves
            self._boundary_s = self._clock.monotonic_s()
            self._lock.notify_all()

    @property
    def stands(self) -> bool:
        """Whether a notice stands; read at every boundary, so it is no more than one look."""
        return bool(self._standing)

    def close(self) -> None:
        """The loop leaves or is done: the watch ends."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    # ---- the loop's thread

    def boundary(self, saves: Saves) -> None:
        """A step is complete. Saves as insurance, or wishes to leave; the caller grants that wish as any other."""
        with self._lock:
            self._boundary_s = self._clock.monotonic_s()
        decision = self._decide(saves, boundary_in_s=0.0)
        if decision.action is DeadlineAction.TRAIN_ON or not saves.may_copy():
            return
        if decision.action in (DeadlineAction.SAVE_NOW, DeadlineAction.SAVE_LOCALLY) and (
            decision.save_again or self._deadline() is None
        ):
            self._insured_since = self._place.step
            saves.save("notice")
            return
        self.saves_nothing = decision.action in (DeadlineAction.FINISH_IN_FLIGHT, DeadlineAction.NOTHING)
        self._signals.leave(EXIT_PREEMPTED)

    def within_s(self) -> float | None:
        """How long the last save may take; None where no deadline is known."""
        deadline = self._deadline()
        return None if deadline is None else max(0.0, deadline - self._clock.unix_s() - _LEAVE_S)

    def left(self) -> None:
        """What could be made durable is durable: whoever waits for that word gets it."""
        self.close()
        for notice in list(self._standing.values()):
            self._acknowledge(notice)

    # ---- figures and decision

    def _deadline(self) -> float | None:
        with self._lock:
            known = [n.deadline_unix_s for n in self._standing.values() if n.deadline_unix_s is not None]
        return min(known, default=None)

    def _decide(self, saves: Saves, *, boundary_in_s: float | None) -> DeadlineDecision:
        decision = decide_save(self._context(saves, boundary_in_s))
        latest = decision.save_at_latest_s
        with self._lock:
            self._latest_s = None if latest is None else self._clock.monotonic_s() + latest
            self._lock.notify_all()
        # Which step it is about changes at every boundary; what is done, and why, does not.
        told = (decision.action, decision.save_again, decision.fits)
        if told != self._told:
            self._told = told
            self._record.emit(
                "notice.decided", action=decision.action.value, reasons=list(decision.reasons), step=self._place.step,
                durable_step=decision.durable_step, fits=decision.fits, save_again=decision.save_again,
                save_at_latest_s=latest,
            )  # fmt: skip
            if boundary_in_s == 0.0:
                self._record.say(f"{decision.action.value}: {'; '.join(decision.reasons)}")
        return decision

    def _context(self, saves: Saves, boundary_in_s: float | None) -> DeadlineContext:
        deadline = self._deadline()
        bandwidth = _bandwidth(saves)
        under_way, held_step = saves.under_way(), saves.held_step()
        send_bytes = saves.expected_send_bytes()
        in_flight = None
        if under_way is not None:
            gone_bytes = under_way.since_s * bandwidth.mean if bandwidth else 0.0
            in_flight = InFlightSave(under_way.step, max(0, math.ceil(send_bytes - gone_bytes)))
        return DeadlineContext(
            seconds_left=None if deadline is None else deadline - self._clock.unix_s(),
            step=self._place.step,
            send_bytes=send_bytes,
            durable_step=saves.durable_step,
            in_flight=in_flight,
            snapshot=None if held_step is None else MemorySnapshot(held_step, send_bytes),
            bandwidth=bandwidth,
            # The measured time of a save includes its commit.
            commit_latency_s=1.0 if bandwidth is None else 0.2,
            snapshot_s=saves.snapshot_s,
            step_time=saves.step_time(),
            boundary_in_s=boundary_in_s,
            leave_s=_LEAVE_S,
            margin_s=_MARGIN_S,
            insured=self._insured_since is not None,
        )

    # ---- when no boundary comes

    def _keep_watch(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or (self._standing and self._saves is not None), None)
                if self._closed:
                    return
                saves = self._saves
            assert saves is not None
            if self._watch_until_next(saves):
                return

    def _watch_until_next(self, saves: Saves) -> bool:
        """One look, and a pause until the next moment that matters. True when there is nothing left to do."""
        now_s, deadline = self._clock.monotonic_s(), self._deadline()
        if deadline is None:
            with self._lock:
                return self._closed or (self._lock.wait(1.0) and self._closed)
        left_s = deadline - self._clock.unix_s()
        if self._latest_s is None and not self._is_leaving():
            self._decide(saves, boundary_in_s=self._until_boundary_s(saves))
        latest_s = self._latest_s
        if self._signals.leaving is None and self._signals.region is not None and (latest_s or 0.0) <= now_s:
            # An evaluation and a wait for data are done again after the resume; a step goes on to its end.
            self._signals.interrupt()
        last_call_s = left_s - _LEAVE_S - _MARGIN_S - self._memory_s(saves)
        if last_call_s <= 0 and not self._is_leaving():
            return self._end_without_the_loop(saves, left_s)
        pause_s = min(0.5, max(0.02, last_call_s), max(0.02, (latest_s or math.inf) - now_s))
        with self._lock:
            return self._closed or (self._lock.wait(pause_s) and self._closed)

    def _until_boundary_s(self, saves: Saves) -> float | None:
        if self._signals.region is not None:
            return 0.0
        step_time = saves.step_time()
        if step_time is None:
            return None
        since_s = self._clock.monotonic_s() - self._boundary_s
        usual_s = step_time.quantile(0.95)
        return None if since_s > _LOST_STEPS * usual_s else max(0.0, usual_s - since_s)

    def _memory_s(self, saves: Saves) -> float:
        """What committing the snapshot in memory takes, planned with care."""
        if saves.held_step() is None and saves.under_way() is None:
            return 0.0
        bandwidth = _bandwidth(saves) or Spread(100 * 2**20, 1.0)
        return saves.expected_send_bytes() / max(1.0, bandwidth.quantile(0.05)) + 0.5

    def _is_leaving(self) -> bool:
        return self._leaving or self._closed

    def begin_to_leave(self) -> None:
        """The loop's thread is on its way out and saves by itself."""
        self._leaving = True

    def _end_without_the_loop(self, saves: Saves, left_s: float) -> bool:
        """No boundary came. What lies in memory is committed from here; then there is nothing that this process is good for."""
        held, under_way = saves.held_step(), saves.under_way()
        if held is None and under_way is None:
            self._record.emit("notice.too_late", step=self._place.step, durable_step=saves.durable_step)
            self._record.say("the machine goes, no step boundary came, and there is no newer snapshot in memory")
            return True
        self._record.say("no step boundary came in time: the newest snapshot in memory is committed")
        durable = saves.commit_held_from_outside(max(0.1, left_s - _LEAVE_S))
        self._record.emit(
            "attempt.leaving", **self._record.stopwatch.totals(), code=EXIT_PREEMPTED, drained=durable,
            notice_to_durable_s=None, without_boundary=True,
        )  # fmt: skip
        if self._is_leaving():
            return True
        self._record.entered(Phase.LEAVING)
        if durable:
            self.left()
        ledger = self._record.ledger
        if ledger is not None:
            ledger.close()
        self._record.say(f"leaving with exit code {EXIT_PREEMPTED} from step {saves.durable_step}")
        os._exit(EXIT_PREEMPTED)


def _bandwidth(saves: Saves) -> Spread | None:
    """Bytes per second of the newest saves, commit included; None before one that was worth measuring."""
    speeds = [sent.sent_bytes / sent.durable_s for sent in saves.sent() if sent.sent_bytes and sent.durable_s > 0]
    if not speeds:
        return None
    average = fmean(speeds)
    return Spread(average, pstdev(speeds) / average if len(speeds) > 1 else _ONE_SAMPLE_SD)
