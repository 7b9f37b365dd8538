"""The controller of a fleet: every run under a home, in a few threads, with requests that hardly grow with their number.

    inbox (1 s) ──────── news of a run ─────→ its machines' words are read ─┐
    runs/ (15 s) ─────── a new one ─────────→ adopted, read in full ────────┤
    lists (15 s) ─────── something of it is there ─→ looked at, unread ─────┼──→ agenda ──→ a thread of the pool ──→ Controller.step
    its own moments ──── a back-off ends ───→ looked at, unread ────────────┤
    in turn ──────────── nothing said ──────→ read in full ─────────────────┘

Each run is looked after by the `Controller` that would look after it alone, and does nothing on what was known before (see there),
so whatever is missed here makes a run slower and never wrong: an inbox that nobody may write to, news that were lost, two
controllers. What fails in one run is said, counted and tried again later, and nobody else notices.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, StoreError, UsageError
from holdfast.core.fleet_home import Enrolment, RunOver
from holdfast.fleet.agenda import Agenda, Turn, Urgency
from holdfast.fleet.home import Home
from holdfast.fleet.index import Index
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.overview import overview_of
from holdfast.fleet.pace import FleetPace
from holdfast.fleet.shell import Controller, Look
from holdfast.provider.base import Wanted

__all__ = ["Adopted", "FleetController"]

_ASKED_S = 5.0
"""A launch that has no answer is looked at again after this."""
_GOLDEN = 0.6180339887498949
"""The fractions of its multiples are spread evenly, however many of them there are."""


class Adopted(Protocol):
    """A run in care."""

    controller: Controller
    lookout: Lookout
    """Shared with the other runs at the same place."""
    wanted: Wanted

    def flush(self) -> None:
        """Events that its controller has emitted become durable. StoreError: they wait."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Care:
    """What this process knows of one run, beside what stands in its records. In one thread's hands at a time."""

    run_id: str
    turn_s: float
    """When it is read in full next."""
    run: Enrolment | None = None
    adopted: Adopted | None = None
    failures: int = 0
    said: str = ""
    is_dropped: bool = False


class FleetController:
    """`hear`, `call_roll`, `look_out`, `price`, `beat`, `tidy` and `work` may each be called from a thread of its own, `work` from
    many (`crew`); or all of them from one (`turn`).

    `adopt` opens a run and makes its controller; it raises what opening raises. Failure: nothing but flaws of this file comes out
    of any of them; trouble is told to `say`.
    """

    def __init__(
        self,
        home: Home,
        adopt: Callable[[Enrolment], Adopted],
        *,
        clock: Clock,
        id: str,
        say: Callable[[str], None] = lambda line: None,
        pace: FleetPace | None = None,
        index: Index | None = None,
    ) -> None:
        self._home, self._adopt, self._clock, self._id, self._say = home, adopt, clock, id, say
        self._pace, self._index = pace or FleetPace(), index
        self._agenda = Agenda(clock.monotonic_s)
        self._lock = Lock()
        self._cares: dict[str, _Care] = {}
        self._adoptions = 0
        self._first_seen_s: dict[str, float] = {}
        self._troubles: dict[str, str] = {}
        self._due_s: dict[str, float] = {}
        self.over: dict[str, RunOver] = {}
        """Runs that have ended in this process's hands."""
        self.counts: Counter[str] = Counter()
        """rolls, steps, failures, flaws, adopted, over: since the start."""

    # ---- what is there

    def run_ids(self) -> list[str]:
        with self._lock:
            return list(self._cares)

    @property
    def is_empty(self) -> bool:
        """The roll was called, and no run is left."""
        with self._lock:
            return self.counts["rolls"] > 0 and not self._cares

    def lookouts(self) -> list[Lookout]:
        """Of the runs that are in care."""
        return list(self._by_lookout())

    def _by_lookout(self) -> dict[Lookout, list[tuple[str, Adopted]]]:
        found: dict[Lookout, list[tuple[str, Adopted]]] = {}
        with self._lock:
            for run_id, care in self._cares.items():
                if care.adopted is not None:
                    found.setdefault(care.adopted.lookout, []).append((run_id, care.adopted))
        return found

    # ---- hearing of them

    def hear(self) -> None:
        """One list of the inbox."""
        now_s = self._clock.monotonic_s()
        try:
            news = self._home.news()
        except StoreError as error:
            self._trouble("the inbox", error)
            return
        self._trouble("the inbox", None)
        with self._lock:
            new = [each for key, each in news.items() if key not in self._first_seen_s]
            self._first_seen_s = {key: self._first_seen_s.get(key, now_s) for key in news}
        for each in new:
            if each is None:
                continue
            if each.what == "enrolled" and each.run_id not in self._agenda:
                self._take_on([each.run_id])
            self._agenda.call(each.run_id, Look.WORDS if each.what == "word" else Look.ALL, Urgency.NEWS)

    def tidy(self) -> None:
        """News that were first seen some minutes ago are removed: other controllers have had the time to see them as well."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            old = [key for key, at_s in self._first_seen_s.items() if now_s - at_s >= self._pace.keep_news_s]
        try:
            for key in old:
                self._home.drop_news(key)
        except StoreError as error:
            self._trouble("old news", error)
            return
        self._trouble("old news", None)

    def call_roll(self) -> None:
        """One list of the runs: who is new, and who is there no more."""
        with self._lock:
            before = set(self._cares)
        try:
            run_ids = self._home.run_ids()
        except StoreError as error:
            self._trouble("the list of runs", error)
            return
        self._trouble("the list of runs", None)
        there = set(run_ids)
        self._take_on([run_id for run_id in run_ids if run_id not in before])
        self._count("rolls")
        for run_id in before - there:
            self._drop(run_id)
        wanted: dict[Lookout, set[Wanted]] = {
            lookout: {adopted.wanted for _, adopted in runs} for lookout, runs in self._by_lookout().items()
        }
        for lookout, needed in wanted.items():
            lookout.want_only(needed)

    def _take_on(self, run_ids: Iterable[str]) -> None:
        now_s, new = self._clock.monotonic_s(), []
        with self._lock:
            new = [run_id for run_id in run_ids if run_id not in self._cares]
            round_s = self._pace.round_s(len(self._cares) + len(new))
            for run_id in new:
                self._adoptions += 1
                first_s = now_s + round_s * (self._adoptions * _GOLDEN % 1.0)
                self._cares[run_id] = _Care(run_id, turn_s=first_s)
        for run_id in new:
            self._agenda.add(run_id)
            self._agenda.call(run_id, Look.ALL, Urgency.DUE)

    def _drop(self, run_id: str) -> None:
        """Its entry is gone: another controller has signed it off, or somebody has removed it."""
        with self._lock:
            care = self._cares.pop(run_id, None)
            if care is not None:
                care.is_dropped = True
        in_hand = self._agenda.remove(run_id)
        if care is not None and not in_hand:
            self._let_go(care)

    # ---- looking out

    def look_out(self, lookout: Lookout) -> None:
        """A list of machines, if one is due. Runs of which something is there, or thought to be there, look what it shows."""
        if not lookout.look_for_machines():
            return
        present = lookout.present()
        for run_id, adopted in self._by_lookout().get(lookout, []):
            if run_id in present or adopted.controller.is_live:
                self._agenda.call(run_id, Look.AWAY, Urgency.LISTED)

    def price(self, lookout: Lookout) -> None:
        """Prices, if they are due. Who has waited for the first ones goes on."""
        if not lookout.look_for_offers():
            return
        for run_id, adopted in self._by_lookout().get(lookout, []):
            if adopted.controller.view.offered_s is None:
                self._agenda.call(run_id, Look.AWAY, Urgency.DUE)

    def beat(self) -> None:
        """That this controller lives, for people; and the index onto the disk."""
        if self._index is not None:
            self._index.flush()
        try:
            self._home.beat(self._id, socket.gethostname(), os.getpid(), len(self._agenda))
        except StoreError as error:
            self._trouble("this controller's pulse", error)
            return
        self._trouble("this controller's pulse", None)

    # ---- looking after them

    def work(self, wait_s: float = 0.0) -> bool:
        """One step of the run that needs it most. False: nobody does, not within `wait_s`."""
        turn = self._agenda.take(wait_s)
        if turn is None:
            return False
        with self._lock:
            care = self._cares.get(turn.run_id)
        if care is None:
            return True
        try:
            self._step(care, turn.look)
        except (HoldfastError, OSError) as error:
            self._failed(care, turn, turn.look, error)
        except Exception as error:
            # A flaw. What it was in the middle of is forgotten; the records say how it really stands.
            self._count("flaws")
            self._let_go(care)
            self._failed(care, turn, Look.ALL, error)
        else:
            self._well(care)
            self._agenda.done(turn)
        if care.is_dropped:
            self._let_go(care)
        return True

    def _step(self, care: _Care, look: Look) -> None:
        if care.adopted is None:
            self._open(care)
            look = Look.ALL
        if care.adopted is None or care.run is None:
            return
        controller = care.adopted.controller
        self._count("steps")
        try:
            over = controller.step(look)
        finally:
            with suppress(StoreError):
                care.adopted.flush()
        if over is not None:
            overview = overview_of(controller.view, int(self._clock.unix_s()))
            signed = self._home.sign_off(care.run, over, overview)
            self._count("over")
            self.over[care.run_id] = signed
            self._say(f"{care.run.name} ({care.run.url}) is over: {over.outcome}: {'; '.join(over.reasons)}")
            if self._index is not None:
                self._index.forget(care.run_id)
            self._drop(care.run_id)
            return
        self._set_timers(care, controller)

    def _open(self, care: _Care) -> None:
        care.run = self._home.enrolment(care.run_id)
        if care.run is None:
            # Signed off between the list and now.
            self._drop(care.run_id)
            return
        if care.run.run_id != care.run_id:
            raise UsageError(f"the entry of run {care.run_id} names another one, {care.run.run_id}")
        adopted = self._adopt(care.run)
        with self._lock:
            care.adopted = adopted
        self._count("adopted")

    def _set_timers(self, care: _Care, controller: Controller) -> None:
        now_s = self._clock.monotonic_s()
        asked = any(launch.answer is None and launch.ended is None for launch in controller.view.launches)
        until_s = max(self._pace.run.step_s, min(controller.until_s(), _ASKED_S if asked else float("inf")))
        self._agenda.call_at(care.run_id, now_s + until_s, Look.AWAY, Urgency.DUE)
        if care.turn_s <= now_s:
            round_s = self._pace.round_s(len(self._agenda))
            care.turn_s += round_s * (1 + (now_s - care.turn_s) // round_s)
        self._agenda.call_at(care.run_id, care.turn_s, Look.ALL, Urgency.ROUND)

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _failed(self, care: _Care, turn: Turn, look: Look, error: Exception) -> None:
        care.failures += 1
        self._count("failures")
        retry_s = min(2.0 ** min(care.failures - 1, 30), self._pace.longest_back_off_s)
        said = f"{type(error).__name__}: {error}"
        if said != care.said:
            care.said = said
            name = care.run_id if care.run is None else f"{care.run.name} ({care.run.url})"
            self._say(f"{name}: {said}; tried again, after {self._pace.longest_back_off_s:g} s at the latest")
        self._agenda.failed(turn, look, retry_s)

    def _well(self, care: _Care) -> None:
        if care.failures and care.run is not None:
            self._say(f"{care.run.name} ({care.run.url}): goes on, after {care.failures} failures")
        care.failures, care.said = 0, ""

    def _let_go(self, care: _Care) -> None:
        with self._lock:
            adopted, care.adopted = care.adopted, None
        if adopted is not None:
            with suppress(HoldfastError, OSError):
                adopted.close()

    # ---- all of it

    def turn(self) -> None:
        """Everything that is due now, one after the other, in this thread."""
        for name, act, every_s in (
            ("roll", self.call_roll, self._pace.roll_s),
            ("inbox", self.hear, self._pace.hear_s),
            ("beat", self.beat, self._pace.beat_s),
            ("tidy", self.tidy, self._pace.beat_s),
        ):
            if self._clock.monotonic_s() >= self._due_s.get(name, -float("inf")):
                self._due_s[name] = self._clock.monotonic_s() + every_s
                act()
        while self.work():
            pass
        for lookout in self.lookouts():
            self.look_out(lookout)
            self.price(lookout)
        while self.work():
            pass

    def wake(self) -> None:
        """Whoever waits for work looks up."""
        self._agenda.wake()

    def leave(self) -> None:
        """Nobody works here any more: what was kept is given back. What runs goes on as far as its grants reach."""
        with self._lock:
            cares = list(self._cares.values())
        for care in cares:
            self._let_go(care)
        if self._index is not None:
            self._index.flush()
        with suppress(StoreError):
            self._home.leave(self._id)

    def _trouble(self, what: str, error: Exception | None) -> None:
        """Said when it begins and when it ends."""
        with self._lock:
            was = self._troubles.pop(what, None)
            if error is not None:
                self._troubles[what] = str(error)
        if error is not None and was is None:
            self._say(f"{what}: {error}; asking on")
        elif error is None and was is not None:
            self._say(f"{what}: had again")
