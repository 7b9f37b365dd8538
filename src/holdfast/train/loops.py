"""The loops over epochs and batches.

    epochs → batches → next micro-batch (a wait that a notice may end) → the script's work on it → was it the step's last? →
    the step boundary (crossing.py)

Place (place.py) says where the run stands; a finished run's loops yield nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from holdfast.core.contract import Phase
from holdfast.ledger.doings import Doing
from holdfast.train.crossing import Crossing
from holdfast.train.leaving import Leaving
from holdfast.train.place import Place
from holdfast.train.record import Record
from holdfast.train.session import Session
from holdfast.train.signals import LeaveNow, Signals
from holdfast.train.tracked import Tracker

__all__ = ["Loops"]

Batch = TypeVar("Batch")
_END = object()


class Loops:
    """Owned by the run, and by the loop's thread. The session is open before anything is asked."""

    def __init__(
        self,
        session: Session,
        tracker: Tracker,
        place: Place,
        record: Record,
        signals: Signals,
        leaving: Leaving,
        crossing: Crossing,
    ) -> None:
        self._session, self._tracker, self._place, self._record = session, tracker, place, record
        self._signals, self._leaving, self._crossing = signals, leaving, crossing

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left, starting in the one that the checkpoint was made in."""
        if self._session.saves is None:
            return
        token = self._place.enter_epochs(total)
        before = self._record.stopwatch.enter(Doing.STEP)
        try:
            while self._place.position.epoch < total:
                yield self._place.begin_epoch()
                self._place.leave_open_loop(counts=self._session.gate.any_stepped)
                self._place.end_epoch()
                self._crossing.cross(self._session.saves, epoch_ended=True)
        finally:
            self._record.stopwatch.enter(before)
            self._place.leave_epochs(token)

    def batches(
        self,
        loader: Iterable[Batch],
        epochs: int | None,
        global_batch: int | None = None,
        batches_per_step: int = 1,
    ) -> Iterator[Batch]:
        """Those that are left of this epoch, or of that many epochs."""
        if epochs is None and self._place.in_iteration:
            yield from self._one_loop(loader, global_batch, batches_per_step, nested=True)
            return
        self._place.refuse_second_loop()
        if epochs is None:
            self._place.refuse_second_pass()
        for _ in self.epochs(1 if epochs is None else epochs):
            yield from self._one_loop(loader, global_batch, batches_per_step, nested=False)

    def _one_loop(
        self, loader: Iterable[Batch], global_batch: int | None, batches_per_step: int, *, nested: bool
    ) -> Iterator[Batch]:
        place, gate, saves = self._place, self._session.gate, self._session.saves
        token = place.enter_loop(loader, global_batch, batches_per_step)
        if token is None or saves is None:
            return
        self._tracker.driven(loader)
        # What is only held in memory was for leaving during the code between two loops.
        saves.drop_held()
        # Among several ranks all leave at the same step, which others may be computing already.
        can_stop: Literal["waiting"] | None = "waiting" if place.can_stop_waiting and self._crossing.is_alone else None
        stream, stopwatch = place.rest(), self._record.stopwatch
        try:
            while True:
                stopwatch.enter(Doing.DATA)
                try:
                    # Between two micro-batches of a step gradients are pending: nothing may be saved there.
                    self._signals.region = None if place.in_batch else can_stop
                    batch = next(stream, _END)
                    self._signals.region = None
                except LeaveNow:
                    self._leaving.with_live_state(saves)
                if batch is _END:
                    break
                stopwatch.enter(Doing.STEP)
                if place.micro_begins():
                    gate.begin_iteration()
                yield batch  # type: ignore[misc]
                # The user may let go of a batch while the next one is made: so must we.
                del batch
                if place.micro_done():
                    self._crossing.cross(saves, epoch_ended=False)
        finally:
            self._signals.region = None
            # Around this loop is one over epochs.
            stopwatch.enter(Doing.STEP)
            place.leave_loop(token, counts=gate.any_stepped)
        if nested:
            saves.hold()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Run.evaluating`."""
        saves, place = self._session.saves, self._place
        self._record.entered(Phase.EVALUATING)
        if saves is not None and not place.in_iteration:
            saves.hold()
        before = self._record.stopwatch.enter(Doing.EVALUATION)
        try:
            # After a `break` nothing is held: it cannot be told from an exception, which must not make a checkpoint.
            can_stop = saves is not None and not place.in_batch and not place.cut and self._crossing.is_alone
            self._signals.region = "evaluating" if can_stop else None
            if self._signals.region and self._signals.leaving is not None:
                self._signals.region = None
                raise LeaveNow
            yield
            self._signals.region = None
        except LeaveNow:
            if saves is not None:
                self._leaving.with_held_state(saves)
        finally:
            self._signals.region = None
            self._record.stopwatch.enter(before)
            self._record.entered(Phase.FINISHED if saves is None else Phase.TRAINING)
