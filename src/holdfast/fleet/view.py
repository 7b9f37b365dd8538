"""What a controller knows of a run: the records, what the provider has shown, what has been called. Frozen; events make new ones.

    Read, Listed, Offered, Won, Called, Metered ──→ see ──→ RunView

Everything that must survive a controller is in the records; the rest (evidence, offers, which calls this process has made) can be
forgotten at any moment, and is only waited for again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from holdfast.core.launches import (
    Answer,
    Cancel,
    Command,
    Ended,
    GrantRecord,
    Holder,
    Intent,
    MachineWord,
    Pulse,
    Reservation,
)
from holdfast.policy.market.facts import PolicyState
from holdfast.provider.base import Machine, Offer

__all__ = [
    "Called",
    "Event",
    "Evidence",
    "LaunchView",
    "Listed",
    "MarketView",
    "Metered",
    "Offered",
    "Read",
    "Record",
    "RunView",
    "see",
]

_Parted = TypeVar("_Parted", GrantRecord, Command, MachineWord)
Record: TypeAlias = (
    Intent | Answer | Ended | GrantRecord | Command | Holder | MachineWord | Pulse | Cancel | Reservation
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What lists have shown of one launch."""

    machines: tuple[Machine, ...] = ()
    """As they were when they were last seen."""
    absent_since_s: int | None = None
    """When the first of a row of lists was asked for that showed none; None: the newest one shows some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchView:
    """One launch."""

    launch: int
    intent: Intent | None = None
    """None: its record is not read yet; the number is taken all the same."""
    answer: Answer | None = None
    ended: Ended | None = None
    grants: tuple[GrantRecord, ...] = ()
    commands: tuple[Command, ...] = ()
    holder: Holder | None = None
    words: tuple[MachineWord, ...] = ()
    pulse: Pulse | None = None
    evidence: Evidence = Evidence()
    won: bool = False
    """This process has written the intent, so nobody has called for it before."""
    called_s: int | None = None
    """When this process called for it last."""
    heard: tuple[tuple[int, int], ...] = ()
    """When this process has read the machine's words, by their numbers. The machine's own clock is not asked."""
    metered_s: int = 0
    metered_microusd: int = 0

    def word(self, kind: str) -> MachineWord | None:
        """The newest of that kind."""
        return next((word for word in reversed(self.words) if word.kind == kind), None)

    @property
    def claimed(self) -> MachineWord | None:
        return self.word("claimed")

    @property
    def released(self) -> MachineWord | None:
        return self.word("released")

    @property
    def notice(self) -> MachineWord | None:
        """The one that stands."""
        last = next((word for word in reversed(self.words) if word.kind in ("notice", "withdrawn")), None)
        return last if last is not None and last.kind == "notice" else None

    @property
    def machine(self) -> Machine | None:
        """The one that was answered, as it was last seen."""
        name = None if self.answer is None else self.answer.machine
        return next((each for each in self.evidence.machines if each.id == name), None)

    @property
    def strays(self) -> tuple[Machine, ...]:
        """Machines of this launch that nobody waits for: a second one, or one that came after it was given up."""
        name = None if self.answer is None else self.answer.machine
        known = self.answer is not None
        return tuple(each for each in self.evidence.machines if known and each.id != name and each.state != "gone")

    def told(self, kind: str) -> bool:
        return any(command.kind == kind for command in self.commands)

    def heard_s(self, word: MachineWord) -> int:
        return dict(self.heard).get(word.part, int(word.at_unix_s))


@dataclass(frozen=True, slots=True)
class MarketView:
    """What the market policy has decided last, and what it remembered before."""

    asked_s: int
    before: PolicyState
    after: PolicyState
    market: str
    pool: str | None
    reasons: tuple[str, ...]
    unavailable: tuple[str, ...]
    """The pools that could not be had when it was asked."""
    here: str | None
    """The pool of what ran, or was on its way."""
    launch: int | None
    """Of what ran."""


@dataclass(frozen=True, slots=True)
class RunView:
    launches: tuple[LaunchView, ...] = ()
    """By number, without gaps in what was read."""
    reservations: tuple[Reservation, ...] = ()
    """By number."""
    cancel: Cancel | None = None
    offers: tuple[Offer, ...] = ()
    offered_s: int | None = None
    listed_s: int | None = None
    market: MarketView | None = None

    def of(self, launch: int) -> LaunchView:
        return next((each for each in self.launches if each.launch == launch), LaunchView(launch=launch))

    def with_launch(self, launch: LaunchView) -> RunView:
        others = [each for each in self.launches if each.launch != launch.launch]
        return replace(self, launches=tuple(sorted([*others, launch], key=lambda each: each.launch)))

    def reserved(self, launch: int, part: int) -> Reservation | None:
        """What is set aside for this grant."""
        found = (each for each in self.reservations if (each.grant.launch, each.grant.part) == (launch, part))
        return next(found, None)

    @property
    def next_reservation(self) -> int:
        return 1 + max((each.number for each in self.reservations), default=0)

    @property
    def next_launch(self) -> int:
        return 1 + max((each.launch for each in self.launches), default=0)


@dataclass(frozen=True, slots=True)
class Read:
    """A record stands in the store."""

    launch: int
    """0: of the run."""
    record: Record
    at_s: int = 0
    """Now."""


@dataclass(frozen=True, slots=True)
class Listed:
    """The provider's list of this run's machines."""

    asked_s: int
    """Before the request was sent: what the answer leaves out may have come since."""
    machines: tuple[Machine, ...]


@dataclass(frozen=True, slots=True)
class Offered:
    asked_s: int
    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class Won:
    """The intent of this launch is this process's own."""

    launch: int


@dataclass(frozen=True, slots=True)
class Called:
    """This process sends the create call now."""

    launch: int
    at_s: int


@dataclass(frozen=True, slots=True)
class Metered:
    """So much of a machine's billed time has cost so much, by the provider's prices."""

    launch: int
    billed_s: int
    microusd: int


Event: TypeAlias = Read | Listed | Offered | Won | Called | Metered


def see(view: RunView, event: Event) -> RunView:
    """The view after this event. What was known already changes nothing."""
    match event:
        case Read(launch, record, at_s):
            return _read(view, launch, record, at_s)
        case Listed(asked_s, machines):
            return _listed(view, asked_s, machines)
        case Offered(asked_s, offers):
            return replace(view, offers=offers, offered_s=asked_s)
        case Won(launch):
            return view.with_launch(replace(view.of(launch), won=True))
        case Called(launch, at_s):
            return view.with_launch(replace(view.of(launch), called_s=at_s))
        case Metered(launch, billed_s, microusd):
            return view.with_launch(replace(view.of(launch), metered_s=billed_s, metered_microusd=microusd))


def _read(view: RunView, launch: int, record: Record, at_s: int) -> RunView:
    if isinstance(record, Cancel):
        return replace(view, cancel=record)
    if isinstance(record, Reservation):
        numbered = {each.number: each for each in view.reservations} | {record.number: record}
        return replace(view, reservations=tuple(numbered[number] for number in sorted(numbered)))
    known = view.of(launch)
    match record:
        case Intent():
            known = replace(known, intent=record)
        case Answer():
            known = replace(known, answer=record)
        case Ended():
            known = replace(known, ended=record)
        case GrantRecord():
            known = replace(known, grants=_by_part(known.grants, record))
        case Command():
            known = replace(known, commands=_by_part(known.commands, record))
        case MachineWord():
            heard = known.heard if record.part in dict(known.heard) else (*known.heard, (record.part, at_s))
            known = replace(known, words=_by_part(known.words, record), heard=heard)
        case Holder():
            known = replace(known, holder=record)
        case Pulse():
            known = replace(known, pulse=record)
    return view.with_launch(known)


def _by_part(known: tuple[_Parted, ...], record: _Parted) -> tuple[_Parted, ...]:
    parts = {each.part: each for each in known} | {record.part: record}
    return tuple(parts[part] for part in sorted(parts))


def _listed(view: RunView, asked_s: int, machines: tuple[Machine, ...]) -> RunView:
    found: dict[int, list[Machine]] = {}
    for machine in machines:
        found.setdefault(machine.launch, []).append(machine)
    for number in sorted({*found, *(each.launch for each in view.launches)}):
        known = view.of(number)
        before = known.evidence
        if number in found:
            shown = {each.id for each in found[number]}
            # A list that leaves out one of two machines says of that one what no list at all would say.
            kept = [each for each in before.machines if each.id not in shown]
            evidence = Evidence((*kept, *found[number]))
        else:
            since_s = asked_s if before.absent_since_s is None else before.absent_since_s
            evidence = Evidence(before.machines, since_s)
        view = view.with_launch(replace(known, evidence=evidence))
    return replace(view, listed_s=asked_s)
