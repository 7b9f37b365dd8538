"""What a provider shows, looked at once for all the runs that are there: its machines, its prices, what a machine has cost.

    provider ──→ look_for_machines, look_for_offers (whoever has the time) ──→ newest answers ──→ listed, offered (each run)

An answer carries the moment before its request was sent: a list that is kept never looks younger than it is, and a run that takes
the same one twice has learned nothing new.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError
from holdfast.fleet.pace import USUAL_PACE, Pace
from holdfast.fleet.view import Listed, Metered, Offered
from holdfast.provider.base import Instances, Machine, Wanted

__all__ = ["Lookout"]

_AGAIN_S = 5.0
"""What could not be had is asked for again after this, or after its usual time where that is shorter."""


class Lookout:
    """At one provider, for one fleet; for one run of it where `run_id` is given.

    Thread safety: every method. Each question is asked by one thread at a time; whoever comes meanwhile goes on with what is
    known. Failure: what cannot be had is said once, and again when it can.
    """

    def __init__(
        self,
        provider: Instances,
        fleet: str,
        *,
        clock: Clock,
        pace: Pace = USUAL_PACE,
        say: Callable[[str], None] = lambda line: None,
        run_id: str | None = None,
    ) -> None:
        self.provider, self.fleet = provider, fleet
        self._clock, self._pace, self._say, self._run_id = clock, pace, say, run_id
        self._listing, self._offering, self._lock = Lock(), Lock(), Lock()
        self._asked_s: int | None = None
        self._by_run: dict[str, tuple[Machine, ...]] = {}
        self._list_due_s = -float("inf")
        self._offers: dict[Wanted, Offered | None] = {}
        self._offers_due_s: dict[Wanted, float] = {}
        self._metered_s: dict[str, float] = {}
        self._troubles: set[str] = set()

    # ---- asking

    def want(self, wanted: Wanted) -> None:
        """Prices for this are asked for from now on."""
        with self._lock:
            self._offers.setdefault(wanted, None)

    def want_only(self, wanted: set[Wanted]) -> None:
        """Nobody asks for any others any more."""
        with self._lock:
            for each in [each for each in self._offers if each not in wanted]:
                del self._offers[each]
                self._offers_due_s.pop(each, None)

    def look_for_machines(self) -> bool:
        """If it is time to. Whether there is a new list."""
        if not self._listing.acquire(blocking=False):
            return False
        try:
            now_s = self._clock.monotonic_s()
            if now_s < self._list_due_s:
                return False
            asked_s = int(self.provider.clock.unix_s())
            try:
                machines = self.provider.machines(self.fleet, self._run_id)
            except HoldfastError as error:
                self._list_due_s = now_s + min(_AGAIN_S, self._pace.list_s)
                self._trouble("the list of machines", error)
                return False
            self._list_due_s = now_s + self._pace.list_s
            self._trouble("the list of machines", None)
            by_run: dict[str, list[Machine]] = {}
            for machine in machines:
                by_run.setdefault(machine.run_id, []).append(machine)
            shown = {machine.id for machine in machines}
            with self._lock:
                self._by_run = {run_id: tuple(found) for run_id, found in by_run.items()}
                self._asked_s = asked_s
                self._metered_s = {each: at_s for each, at_s in self._metered_s.items() if each in shown}
            return True
        finally:
            self._listing.release()

    def look_for_offers(self) -> bool:
        """For everything that is wanted and due. Whether there is anything new."""
        if not self._offering.acquire(blocking=False):
            return False
        try:
            with self._lock:
                due = [
                    each
                    for each in self._offers
                    if self._clock.monotonic_s() >= self._offers_due_s.get(each, -float("inf"))
                ]
            answered = [self._ask_for_offers(wanted) for wanted in due]
            return any(answered)
        finally:
            self._offering.release()

    def _ask_for_offers(self, wanted: Wanted) -> bool:
        now_s, asked_s = self._clock.monotonic_s(), int(self.provider.clock.unix_s())
        offered, next_s = None, now_s + min(_AGAIN_S, self._pace.offers_s)
        try:
            offered = Offered(asked_s, tuple(self.provider.offers(wanted)))
            next_s = now_s + self._pace.offers_s
        except HoldfastError as error:
            self._trouble(_named(wanted), error)
        else:
            self._trouble(_named(wanted), None)
        with self._lock:
            if wanted in self._offers:
                self._offers_due_s[wanted] = next_s
                self._offers[wanted] = offered or self._offers[wanted]
        return offered is not None

    # ---- what is known

    def listed(self, run_id: str) -> Listed | None:
        """The newest list, as far as it tells of this run. None: there was none yet."""
        with self._lock:
            return None if self._asked_s is None else Listed(self._asked_s, self._by_run.get(run_id, ()))

    def present(self) -> set[str]:
        """The runs of which machines are there."""
        with self._lock:
            return {run_id for run_id, found in self._by_run.items() if any(each.state != "gone" for each in found)}

    def offered(self, wanted: Wanted) -> Offered | None:
        with self._lock:
            return self._offers.get(wanted)

    def meter(self, machine: Machine) -> Metered | None:
        """What it has cost so far, asked of the provider now. None: that was a moment ago, or it does not answer."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            if now_s - self._metered_s.get(machine.id, -float("inf")) < self._pace.meter_s:
                return None
            self._metered_s[machine.id] = now_s
        what = f"what {machine.id} has cost so far"
        try:
            bill = self.provider.bill(machine)
        except HoldfastError as error:
            self._trouble(what, error)
            return None
        self._trouble(what, None)
        return Metered(machine.launch, bill.billed_s, bill.microusd)

    def _trouble(self, what: str, error: HoldfastError | None) -> None:
        with self._lock:
            if (error is not None) is (what in self._troubles):
                return
            self._troubles ^= {what}
        self._say(f"{what}: had again" if error is None else f"{what} could not be had: {error}; asking on")


def _named(wanted: Wanted) -> str:
    said = [f"{name}:{count}" for name, count in wanted.accelerators] or list(wanted.instance_types)
    return f"prices of {' or '.join(said) or 'machines'}{' in ' if wanted.regions else ''}{', '.join(wanted.regions)}"
