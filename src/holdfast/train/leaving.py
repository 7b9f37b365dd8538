"""The ends of an attempt: told to go (save, wait, exit code), or done (last checkpoint, marked as finished).

Leaving has a deadline, because somebody will pull the plug; finishing has none.
"""

from __future__ import annotations

from typing import NoReturn

from holdfast.core.config import format_duration
from holdfast.core.contract import Phase
from holdfast.core.errors import Preempted
from holdfast.ledger.doings import Doing
from holdfast.train.emergency import Emergency, WayOut
from holdfast.train.place import Place
from holdfast.train.record import Record
from holdfast.train.saves import Saves
from holdfast.train.signals import Signals

__all__ = ["LEAVE_WITHIN_S", "Leaving"]

LEAVE_WITHIN_S = 120.0


class Leaving:
    """Owned by the loop's thread."""

    def __init__(self, place: Place, record: Record, signals: Signals, emergency: Emergency) -> None:
        self._place, self._record, self._signals, self._emergency = place, record, signals, emergency

    def with_live_state(self, saves: Saves) -> NoReturn:
        """At a boundary: save what is new (where that still fits), wait until what is under way is durable, leave."""
        way = self._emergency.begin_to_leave(saves)
        how = {
            WayOut.LIVE: saves.leave_with_live,
            WayOut.MEMORY: saves.leave_with_held,
            WayOut.AS_IT_IS: saves.leave_as_it_is,
        }[way]
        self._depart(saves, how(self._begin()))

    def with_held_state(self, saves: Saves) -> NoReturn:
        """In code that is done again after the resume: save what was held before it (where that still fits), leave."""
        way = self._emergency.begin_to_leave(saves)
        how = saves.leave_as_it_is if way is WayOut.AS_IT_IS else saves.leave_with_held
        self._depart(saves, how(self._begin()))

    def _begin(self) -> float:
        """Returns how many seconds there are."""
        self._record.entered(Phase.LEAVING)
        self._record.stopwatch.enter(Doing.STALL)
        within_s = self._emergency.within_s()
        return LEAVE_WITHIN_S if within_s is None else within_s

    def _depart(self, saves: Saves, durable: bool) -> NoReturn:
        code, step = self._signals.leaving or 0, self._place.step
        totals, noticed_s = self._record.stopwatch.totals(), self._signals.since_s()
        self._record.emit(
            "attempt.leaving", **totals, code=code, drained=durable, notice_to_durable_s=noticed_s if durable else None
        )
        saves.stop_if_fenced()
        lost = "" if durable else "; the newest steps could NOT be saved and will be computed again"
        self._record.say(f"leaving at step {step} with exit code {code}{lost}; start the same command again to go on")
        self._emergency.left(durable=durable)
        raise Preempted(code) from None

    def finish(self, saves: Saves) -> None:
        """The loops are done. A wish to leave is granted by this as well: it costs the same one save, and nothing has to come back.

        Raises SaveError when the last checkpoint cannot be made: the run is then not finished.
        """
        self._emergency.finishing()
        self._record.stopwatch.enter(Doing.STALL)
        ref = saves.save("finished", finish=True).wait()
        self._record.entered(Phase.FINISHED)
        self._record.say(f"finished at step {ref.step} after {format_duration(saves.elapsed_s)}")
        self._record.emit("attempt.finished", **self._record.stopwatch.totals())
