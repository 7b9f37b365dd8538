"""What happens at every step boundary: progress, failures of background saves, what a notice asks for, saves that are due, leaving.

A rank that is alone does what is due at once. Among several, what depends on time, on a notice or on one rank's user is wished
for, and done by all at the next boundary that all have agreed on (ranks/together.py); what depends on the number of the step is the
same everywhere and needs no words.
"""

from __future__ import annotations

from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.train.emergency import Emergency, WayOut
from holdfast.train.leaving import Leaving
from holdfast.train.place import Place
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.words import Act, Wish
from holdfast.train.record import Record
from holdfast.train.saves import Saves
from holdfast.train.signals import Signals

__all__ = ["Crossing"]


class Crossing:
    """Owned by the loop's thread."""

    def __init__(self, place: Place, record: Record, signals: Signals, emergency: Emergency, leaving: Leaving) -> None:
        self._place, self._record, self._signals = place, record, signals
        self._emergency, self._leaving = emergency, leaving
        self._together: Together | None = None
        self._has_wished = False
        self._leave: Act | None = None

    @property
    def is_alone(self) -> bool:
        """Whether this rank may leave when it likes."""
        return self._together is None

    def join(self, together: Together) -> None:
        """From now on this rank acts with the others."""
        self._together = together

    def cross(self, saves: Saves, *, epoch_ended: bool) -> None:
        """A step is complete, or an epoch. Raises Preempted when the run leaves here, and what failed saves raise."""
        self._record.stepped(self._place.step)
        self._record.display.step(self._place.step, self._place.position.epoch, self._place.expected_steps)
        saves.check()
        if self._together is not None:
            self._with_all(self._together, saves, epoch_ended)
        else:
            self._alone(saves, epoch_ended)

    def _alone(self, saves: Saves, epoch_ended: bool) -> None:
        if self._emergency.stands and self._signals.leaving is None:
            self._emergency.boundary(saves)
        if self._signals.leaving is None:
            may_begin = not self._emergency.stands or self._emergency.allows_save(saves)
            saves.boundary(epoch_ended=epoch_ended, may_begin=may_begin)
        elif saves.may_copy():
            self._leaving.with_live_state(saves)

    def _with_all(self, together: Together, saves: Saves, epoch_ended: bool) -> None:
        act = together.boundary(self._place.step)
        if act is not None and act.kind == "leave":
            self._leave = act
        if self._leave is not None:
            if saves.may_copy():
                self._depart(saves, self._leave)
            return
        if together.coordinates and self._emergency.stands and self._signals.leaving is None:
            self._emergency.boundary(saves)
        if self._signals.leaving is not None:
            self._wish_to_leave(together, saves)
        saves.boundary(epoch_ended=epoch_ended, agreed=act.reason if act is not None else None)

    def _wish_to_leave(self, together: Together, saves: Saves) -> None:
        code = self._signals.leaving or EXIT_PREEMPTED
        if together.gone and saves.may_copy():
            # There is nobody to agree with, and no checkpoint without all: what is durable is what there is.
            self._depart(saves, Act(0, self._place.step, "leave", "", code, WayOut.AS_IT_IS.name))
        if not self._has_wished:
            self._has_wished = True
            together.wish(Wish("leave", "leaving", code), self._emergency.way.name)

    def _depart(self, saves: Saves, act: Act) -> None:
        self._signals.leave(act.code)
        self._emergency.go(WayOut[act.way or WayOut.LIVE.name])
        self._leaving.with_live_state(saves)
