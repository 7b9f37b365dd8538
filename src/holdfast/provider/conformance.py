"""What the scripts for real accounts share: a cap that is checked before anything is asked for, and an end of everything.

    plan: the cheapest offer, the worst that it can cost → somebody agrees → findings, one by one → clear → is nothing left?

`aws.conformance` and `gcp.conformance` say what is looked at. The end comes after an error and after Ctrl-C too, and what may still
come of a create call that was broken off is waited for, as long as the provider's lists may be late.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from holdfast.core.errors import HoldfastError, LaunchFailed, UsageError
from holdfast.core.launches import Allowed, client_token
from holdfast.provider.base import Instances, Machine, MachineSpec, Offer, Order, Wanted

__all__ = ["POLL_S", "Finding", "Script", "carry_out", "cheapest", "dollars", "within"]

POLL_S = 5.0
_CLEAR_S = 1800.0
_LATE_S = 60.0
"""A call without an answer may be carried out so late."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise. None: it could not be found out."""

    name: str
    ok: bool | None
    said: str


class Script(ABC):
    """One run of a provider's script. `fleet` is a name that nobody has used."""

    machines_at_most: int
    """That it launches, those that come by a broken promise included."""
    longest_s: int
    """Of one machine."""

    def __init__(self, cloud: Instances, fleet: str, offer: Offer, spec: MachineSpec, ceiling_microusd_h: int) -> None:
        self.cloud, self.fleet, self.offer, self.spec = cloud, fleet, offer, spec
        self.ceiling_microusd_h = ceiling_microusd_h
        self.made: list[Machine] = []
        self._unanswered_s = -math.inf
        """When the newest call was begun that may still make a machine; on the monotonic clock."""
        self._last_s = -math.inf
        """When the newest call was begun that may have made one."""

    @property
    def worst_microusd(self) -> int:
        """The most that all of it can cost."""
        hourly = self.ceiling_microusd_h + self.cloud.extras_microusd_h(self.spec, self.offer.pool.region)
        return math.ceil(self.machines_at_most * hourly * self.longest_s / 3600)

    @abstractmethod
    def findings(self) -> Iterator[Finding]:
        """Stops at the first thing without which the rest makes no sense."""

    def remove_rest(self) -> None:
        """What is left beside machines, once they are gone."""
        self.cloud.remove(self.cloud.leftovers(self.fleet))

    def rest(self) -> list[str]:
        """What is left beside machines, for people."""
        return [f"{each.kind} {each.id}" for each in self.cloud.leftovers(self.fleet)]

    # ---- building blocks

    def order(self, launch: int, script: str, *, ceiling: int | None = None, lifetime_s: int | None = None) -> Order:
        allowed = Allowed(
            pool=self.offer.pool,
            ceiling_microusd_h=self.ceiling_microusd_h if ceiling is None else ceiling,
            on_demand_microusd_h=self.offer.on_demand_microusd_h,
        )
        return Order(
            token=client_token(f"{self.fleet}/conformance", launch),
            fleet=self.fleet,
            run_id="conformance",
            launch=launch,
            allowed=(allowed,),
            spec=self.spec,
            user_data=script,
            lifetime_s=self.longest_s if lifetime_s is None else lifetime_s,
            expires_unix_s=int(self.cloud.clock.unix_s()) + 2 * self.longest_s,
        )

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around each call that may make a machine: one that is left without an answer is remembered."""
        before_s, now_s = self._unanswered_s, self.cloud.clock.monotonic_s()
        self._unanswered_s = self._last_s = now_s
        try:
            yield
        except LaunchFailed:
            self._unanswered_s = before_s
            raise
        self._unanswered_s = before_s

    def create(self, request: Mapping[str, Any]) -> Machine:
        with self.asking():
            machine = self.cloud.create(request)
        self.made.append(machine)
        return machine

    def until(self, true: Callable[[], bool], limit_s: float | None = None) -> bool:
        for _ in range(max(1, int((self.longest_s if limit_s is None else limit_s) / POLL_S))):
            if true():
                return True
            self.cloud.clock.sleep(POLL_S)
        return False

    def now(self, machine: Machine) -> Machine | None:
        return next((each for each in self.cloud.machines(self.fleet) if each.id == machine.id), None)

    def living(self) -> set[str]:
        return {each.id for each in self.cloud.machines(self.fleet) if each.state in ("pending", "running")}

    def preflight(self, order: Order) -> Iterator[Finding]:
        yield from (Finding(f"preflight: {each.name}", each.ok, each.said) for each in self.cloud.preflight(order))

    def listed(self, machine: Machine, began_s: float) -> Finding:
        seen = self.until(lambda: self.shows(machine))
        after_s = self.cloud.clock.monotonic_s() - began_s
        promised = self.cloud.guarantees.list_delay_s
        said = f"{after_s:.0f} s after the call began; {promised} s are promised" if seen else "never"
        return Finding("it is in the list by its tags", seen and after_s <= promised, said)

    def shows(self, machine: Machine) -> bool:
        """Whether the provider's list does."""
        return self.now(machine) is not None

    def gone(self, machine: Machine) -> bool:
        def is_gone() -> bool:
            now = self.now(machine)
            return now is None or now.state == "gone"

        return self.until(is_gone)

    # ---- the end

    def clear(self) -> None:
        """Everything of this fleet ends. What does not answer is asked again; what stays all the same, `nothing_left` says."""
        clock = self.cloud.clock
        until_s = clock.monotonic_s() + _CLEAR_S
        while clock.monotonic_s() < until_s:
            try:
                if self._clear_once():
                    return
            except HoldfastError:
                # Asked again: a provider that does not answer now has not ended them.
                pass
            clock.sleep(POLL_S)

    def _clear_once(self) -> bool:
        """Whether nothing can be left."""
        now_s, window_s = self.cloud.clock.monotonic_s(), self.cloud.guarantees.list_delay_s
        listed = {each.id: each for each in self.cloud.machines(self.fleet)}
        unseen = [each for each in self.made if each.id not in listed and now_s < self._last_s + window_s]
        there = [each for each in listed.values() if each.state != "gone"]
        self.cloud.terminate([each for each in (*there, *unseen) if each.state != "ending"])
        may_come = now_s < self._unanswered_s + _LATE_S + window_s
        if there or unseen or may_come:
            return False
        self.remove_rest()
        return True

    def nothing_left(self) -> Finding:
        try:
            self.until(lambda: not self.rest(), limit_s=60)
            left = self.rest()
            left += [each.id for each in self.cloud.machines(self.fleet) if each.state != "gone"]
        except HoldfastError as error:
            return Finding("nothing is left", None, f"{error}; look for fleet {self.fleet} in the provider's console")
        return Finding("nothing is left", not left, ", ".join(left) or "no machine, disk, address or template")


def cheapest(cloud: Instances, wanted: Wanted, market: str) -> Offer:
    """UsageError where nothing fits."""
    offers = [each for each in cloud.offers(wanted) if each.pool.market == market]
    if not offers:
        raise UsageError(
            f"no {market} offer fits; name instance types, and a table of prices if {cloud.name}'s own cannot be read"
        )
    return min(offers, key=lambda each: each.microusd_h)


def within(script: Script, cap_microusd: int) -> None:
    """UsageError where it could cost more, or where it is not alone."""
    worst = script.worst_microusd
    if worst > cap_microusd:
        raise UsageError(
            f"this can cost up to ${dollars(worst)} with {script.offer.pool.name}; the cap is ${dollars(cap_microusd)}"
        )
    if script.cloud.machines(script.fleet):
        raise UsageError(f"there are machines of fleet {script.fleet!r}; give a name that nobody has used")


def carry_out(
    script: Script,
    say: Callable[[Finding], None] = lambda finding: None,
    ending: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """All findings, in order. Whatever is raised meanwhile, Ctrl-C included, is raised after everything has been ended. `ending` is
    called when that begins: from then on nobody should interrupt."""
    found: list[Finding] = []

    def note(finding: Finding) -> None:
        found.append(finding)
        say(finding)

    try:
        for finding in script.findings():
            note(finding)
    finally:
        last, interrupted = _ended(script, ending)
        note(last)
        if interrupted is not None:
            raise interrupted
    return found


def _ended(script: Script, ending: Callable[[], None]) -> tuple[Finding, KeyboardInterrupt | None]:
    """A Ctrl-C in the middle of it is remembered, and it is begun again; the third one leaves it."""
    interrupted = None
    for _ in range(3):
        try:
            ending()
            script.clear()
            return script.nothing_left(), interrupted
        except KeyboardInterrupt as error:
            interrupted = error
    said = f"stopped while it was ended; look for fleet {script.fleet} in the provider's console"
    return Finding("nothing is left", None, said), interrupted


def dollars(microusd: int) -> str:
    return f"{microusd / 1e6:.4f}"
