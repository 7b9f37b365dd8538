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
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from statistics import fmean, pstdev

from holdfast.core.clock import Clock
from holdfast.core.contract import EXIT_PREEMPTED, Phase
from holdfast.core.errors import HoldfastError
from holdfast.notice.base import Notice, NoticeKind
from holdfast.policy.deadline import (
    UNMEASURED_BANDWIDTH,
    DeadlineAction,
    DeadlineContext,
    DeadlineDecision,
    InFlightSave,
    MemorySnapshot,
    Spread,
    decide_save,
)
from holdfast.policy.reserves import Reserves, reserves
from holdfast.train.place import Place
from holdfast.train.record import Record
from holdfast.train.saves import Saves
from holdfast.train.signals import Signals

__all__ = ["Emergency", "WayOut"]

_ONE_SAMPLE_SD = 0.5
"""How uncertain a bandwidth is that was measured once."""
_LOST_STEPS = 5
"""A step that takes so many times its usual time is no ordinary step: nobody knows when it ends."""
_ASK_AGAIN_S = 1.0
"""While there is plenty of time, the decision is made anew this often at most, and not at every boundary."""
_SHARE_OF_WAIT = 0.25
_LOOK_S = 0.05
"""How exactly the latest moment is met, on the early side."""
_ROOM = 2.0
"""A save that is due anyway has to end, planned with care, in half the time that is left before the last one begins."""
_SLOW = 0.025
"""The share of saves that are slower than what is planned with."""
_FLUSH_OUTPUT_S = 0.2


class WayOut(Enum):
    """What a loop that leaves makes durable."""

    LIVE = "a save of the state as it is now"
    MEMORY = "the snapshot that lies in memory"
    AS_IT_IS = "nothing new: what is under way is waited for"


_WAYS = {
    DeadlineAction.COMMIT_NEWEST_SNAPSHOT: WayOut.MEMORY,
    DeadlineAction.FINISH_IN_FLIGHT: WayOut.AS_IT_IS,
    DeadlineAction.NOTHING: WayOut.AS_IT_IS,
}


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
        self._is_alone = self._decides = True
        self._insured = False
        """A save was begun because of what stands."""
        self._told: tuple[object, ...] | None = None
        self._latest_s: float | None = None
        """When the last save has to begin, on the monotonic clock; None: not decided yet, or there is no such moment."""
        self._ask_again_s = 0.0
        """No boundary before this moment changes anything."""
        self._boundary_s = clock.monotonic_s()
        self._way: WayOut | None = None
        self._given_up = False
        """No boundary came, and nothing lies in memory: nothing is left to be done about what stands."""
        self._leaving = self._closed = False
        self._watch: threading.Thread | None = None

    # ---- hearing

    def heard(self, notice: Notice) -> None:
        """Take note, from any thread. A withdrawn notice lets training go on as if nothing had been said."""
        deadline = notice.deadline_unix_s
        if deadline is not None and not math.isfinite(deadline):
            notice = replace(notice, deadline_unix_s=None)
        with self._lock:
            had_deadline = self._deadline() is not None
            if notice.kind is NoticeKind.WITHDRAWN:
                self._standing.pop(notice.id, None)
            else:
                self._standing[notice.id] = notice
            if not self._standing or (not had_deadline and self._deadline() is not None):
                # Advice may have been followed long ago: what was saved then insures nothing now.
                self._insured = False
            self._told = self._latest_s = None
            self._ask_again_s, self._given_up = 0.0, False
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

    @property
    def way(self) -> WayOut:
        """How this rank would leave now, as far as it has been decided."""
        return self._way or WayOut.LIVE

    def go(self, way: WayOut) -> None:
        """All ranks leave, and this way."""
        self._way = way

    def join(self, *, coordinates: bool) -> None:
        """Several ranks: only one decides, and nothing is given up or committed by one of them alone."""
        self._is_alone, self._decides = False, coordinates

    def close(self) -> None:
        """The loop leaves or is done: the watch ends."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    # ---- the loop's thread

    def boundary(self, saves: Saves) -> None:
        """A step is complete. Saves as insurance, or wishes to leave; the caller grants that wish as any other."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._boundary_s = now_s
            if now_s < self._ask_again_s:
                return
        if self._is_alone:
            saves.prepare()
        decision = self._decide(saves, boundary_in_s=0.0)
        if not saves.may_copy():
            return
        advice = self._deadline() is None
        if decision.action is DeadlineAction.TRAIN_ON:
            self._sleep(math.inf if advice else self._pause_s(decision, now_s))
        elif decision.action not in _WAYS and (decision.save_again or advice):
            self._insured = True
            saves.insure()
        else:
            self._way = _WAYS.get(decision.action, WayOut.LIVE)
            self._signals.leave(EXIT_PREEMPTED)

    def allows_save(self, saves: Saves) -> bool:
        """Whether a save that is due for another reason may begin: not when it could stand in the way of the last one."""
        if self._deadline() is None:
            return True
        latest_s = self._latest_s
        if latest_s is None:
            return False
        return self._clock.monotonic_s() + _ROOM * self._send_s(saves) < latest_s

    def begin_to_leave(self, saves: Saves) -> WayOut:
        """The loop's thread is on its way out and saves by itself. Returns how, by the arithmetic."""
        self._leaving = True
        if self._way is None and self._deadline() is not None:
            self._way = _WAYS.get(self._decide(saves, boundary_in_s=0.0).action, WayOut.LIVE)
        return self._way or WayOut.LIVE

    def finishing(self) -> None:
        """The loops are done; the last save is on its way, and there is nothing to leave for."""
        self._leaving = True

    def within_s(self) -> float | None:
        """How long the last save may take; None where no deadline is known."""
        left_s = self._left_s()
        return None if left_s is None else max(0.0, left_s - self._reserves().leave_s)

    def left(self, *, durable: bool) -> None:
        """The loop has saved what it could. Whoever waits for that word gets it, unless the agent has still something to rescue."""
        self.close()
        if durable and self._standing:
            # Figures and events first: the word may end the machine.
            with suppress(HoldfastError):
                self._record.flush()
            self._say_ready()

    def _say_ready(self) -> None:
        for notice in list(self._standing.values()):
            self._acknowledge(notice)

    # ---- figures and decision

    def _urgent(self) -> Notice | None:
        with self._lock:
            known = [notice for notice in self._standing.values() if notice.deadline_unix_s is not None]
        return min(known, key=lambda notice: notice.deadline_unix_s or 0.0, default=None)

    def _deadline(self) -> float | None:
        notice = self._urgent()
        return None if notice is None else notice.deadline_unix_s

    def _left_s(self) -> float | None:
        """Until the machine goes; negative when it should be gone already."""
        deadline = self._deadline()
        return None if deadline is None else deadline - self._clock.unix_s()

    def _reserves(self) -> Reserves:
        notice = self._urgent()
        return reserves(None if notice is None else notice.left_s(notice.heard_unix_s))

    def _pause_s(self, decision: DeadlineDecision, now_s: float) -> float:
        """How long no boundary decides otherwise: a share of the time until the last save, so that no step is begun too many."""
        if decision.save_at_latest_s is None:
            return now_s
        return now_s + min(_ASK_AGAIN_S, _SHARE_OF_WAIT * max(0.0, decision.save_at_latest_s))

    def _sleep(self, until_s: float) -> None:
        with self._lock:
            if self._told is not None:  # else somebody has spoken meanwhile
                self._ask_again_s = until_s

    def _decide(self, saves: Saves, *, boundary_in_s: float | None) -> DeadlineDecision:
        decision = decide_save(self._context(saves, boundary_in_s))
        latest = decision.save_at_latest_s
        # Which step it is about changes at every boundary; what is done, and why, does not.
        told = (decision.action, decision.save_again, decision.fits)
        with self._lock:
            self._latest_s = None if latest is None else self._clock.monotonic_s() + latest
            is_news, self._told = told != self._told, told
            self._lock.notify_all()
        if is_news:
            self._record.emit(
                "notice.decided", action=decision.action.value, reasons=list(decision.reasons), step=self._place.step,
                durable_step=decision.durable_step, fits=decision.fits, save_again=decision.save_again,
                save_at_latest_s=latest,
            )  # fmt: skip
            if boundary_in_s == 0.0:
                self._record.say(f"{decision.action.value}: {'; '.join(decision.reasons)}")
        return decision

    def _context(self, saves: Saves, boundary_in_s: float | None) -> DeadlineContext:
        bandwidth, kept = _bandwidth(saves), self._reserves()
        under_way, held_step = saves.under_way(), saves.held_step()
        send_bytes = saves.expected_send_bytes()
        in_flight = None
        if under_way is not None:
            gone_bytes = under_way.since_s * bandwidth.mean if bandwidth else 0.0
            in_flight = InFlightSave(under_way.step, max(0, math.ceil(send_bytes - gone_bytes)))
        return DeadlineContext(
            seconds_left=self._left_s(),
            step=self._place.step,
            send_bytes=send_bytes,
            durable_step=saves.durable_step,
            in_flight=in_flight,
            snapshot=None if held_step is None else MemorySnapshot(held_step, send_bytes),
            bandwidth=bandwidth,
            commit_latency_s=_latency_s(bandwidth),
            snapshot_s=saves.snapshot_s,
            step_time=saves.step_time(),
            boundary_in_s=boundary_in_s,
            leave_s=kept.leave_s,
            margin_s=kept.margin_s,
            insured=self._insured,
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
            try:
                pause_s = self._watch_once(saves)
            except Exception as error:  # A flaw here must cost neither the training nor the next look.
                self._record.emit("notice.trouble", source="deadline", what=f"{type(error).__name__}: {error}", times=1)
                pause_s = 1.0
            with self._lock:
                if not self._closed:
                    self._lock.wait(pause_s)

    def _watch_once(self, saves: Saves) -> float:
        """One look. Returns the seconds until the next moment that matters."""
        now_s, left_s, kept = self._clock.monotonic_s(), self._left_s(), self._reserves()
        if left_s is None or self._given_up or self._is_leaving():
            return 1.0
        if self._latest_s is None and self._decides:
            decision = self._decide(saves, boundary_in_s=self._until_boundary_s(saves))
            if decision.save_again and self._is_alone and saves.commit_held():
                # An evaluation, or code between two loops, goes on; what it would lose is made durable beside it.
                self._insured = True
        latest_s = self._latest_s
        if self._signals.leaving is None and self._signals.region is not None and (latest_s or 0.0) - _LOOK_S <= now_s:
            # An evaluation and a wait for data are done again after the resume; a step goes on to its end.
            self._signals.interrupt()
        last_call_s = left_s - kept.leave_s - kept.margin_s - self._memory_s(saves)
        if last_call_s <= 0:
            self._end_without_the_loop(saves)
            return _LOOK_S
        return min(0.5, max(_LOOK_S, last_call_s), max(_LOOK_S, (latest_s or math.inf) - _LOOK_S - now_s))

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
        return 0.0 if saves.held_step() is None and saves.under_way() is None else self._send_s(saves)

    def _send_s(self, saves: Saves) -> float:
        """What one save takes, planned with care."""
        bandwidth = _bandwidth(saves)
        slow = (bandwidth or UNMEASURED_BANDWIDTH).quantile(_SLOW)
        return saves.expected_send_bytes() / max(1.0, slow) + _latency_s(bandwidth)

    def _is_leaving(self) -> bool:
        return self._leaving or self._closed

    def _end_without_the_loop(self, saves: Saves) -> None:
        """No boundary came. What lies in memory is committed from here; then there is nothing that this process is good for."""
        held, under_way = saves.held_step(), saves.under_way()
        step = held if held is not None else under_way.step if under_way is not None else None
        if step is None:
            self._given_up = True
            self._record.emit("notice.too_late", step=self._place.step, durable_step=saves.durable_step)
            self._record.say("the machine goes, no step boundary came, and there is no newer snapshot in memory")
            return
        self._record.say("no step boundary came in time: the newest snapshot in memory is committed")
        drained = saves.commit_held_from_outside(max(0.1, self.within_s() or 0.0))
        if self._is_leaving() or self._deadline() is None:
            return
        durable = drained and (saves.durable_step or 0) >= step
        self._record.entered(Phase.LEAVING)
        self._record.emit(
            "attempt.leaving", **self._record.stopwatch.totals(), code=EXIT_PREEMPTED, drained=durable,
            notice_to_durable_s=None, without_boundary=True,
        )  # fmt: skip
        self._record.say(f"leaving with exit code {EXIT_PREEMPTED} from step {saves.durable_step}")
        ledger = self._record.ledger
        if ledger is not None:
            with suppress(HoldfastError):
                ledger.flush()
        if durable:
            self._say_ready()
        _flush_output()
        os._exit(EXIT_PREEMPTED)


def _flush_output() -> None:
    """What was printed and is still in Python's buffers. The loop's thread may hold their locks for good."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_OUTPUT_S)


def _latency_s(bandwidth: Spread | None) -> float:
    """What a commit takes whatever its size. The measured time of a save includes it."""
    return 1.0 if bandwidth is None else 0.2


def _bandwidth(saves: Saves) -> Spread | None:
    """Bytes per second of the newest saves, commit included; None before one that was worth measuring."""
    speeds = [sent.sent_bytes / sent.durable_s for sent in saves.sent() if sent.sent_bytes and sent.durable_s > 0]
    if not speeds:
        return None
    average = fmean(speeds)
    return Spread(average, pstdev(speeds) / average if len(speeds) > 1 else _ONE_SAMPLE_SD)
