"""The controller of one run: reads records and lists, asks `state` what to do, does it, and sleeps. All I/O of the fleet is here.

    look (list, records, offers, bills) ──→ events ──→ view ──→ instruct ──→ carry out ──→ events ──→ … ──→ wait

It holds nothing that the store does not: it may be killed between any two lines, suspended for a day, or run twice at once.
By itself it looks by the clock (`run`); many under one roof are told when, and how closely (`fleet_controller`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError, StoreError
from holdfast.core.events import Event as LedgerEvent
from holdfast.core.events import Sink
from holdfast.core.failures import Failure
from holdfast.core.launches import (
    Answer,
    Command,
    Ended,
    GrantRecord,
    Intent,
    Reservation,
    answer_key,
    client_token,
    command_key,
    ended_key,
    grant_key,
    intent_key,
    reservation_key,
)
from holdfast.core.sealed import FORMAT_VERSION
from holdfast.fleet.instructions import Book, CallCreate, Close, End, Give, Instruction, Over, Propose, Tell
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.pace import USUAL_PACE, Pace
from holdfast.fleet.phases import Phase, phase_of
from holdfast.fleet.records import PREFIXES, WORDS, RunRecords
from holdfast.fleet.state import Outlook, instruct
from holdfast.fleet.terms import Terms
from holdfast.fleet.view import Called, Event, Listed, Read, RunView, Won, see
from holdfast.provider.base import Instances, Machine, Order

__all__ = ["Controller", "Look", "Pace"]

_MOST_ROUNDS = 50
"""Instructions lead to new ones (number, grant, call, answer); more rounds in one step than this are a flaw."""
_FRESH_S = 30.0
"""A create call is made on records that are no older than this: a process that was suspended reads them again."""


class Look(IntEnum):
    """How closely a run's records are looked at before what follows is decided."""

    AWAY = 0
    """Not at all: lists, prices and the time may say something."""
    WORDS = 1
    """What its machines say."""
    ALL = 2


class Controller:
    """One run's. `boot` makes the bootstrap script of a launch. `step` never waits; `run` does.

    Failure: a provider or store that does not answer is reported through `say` and tried again for ever.
    """

    def __init__(
        self,
        records: RunRecords,
        provider: Instances,
        terms: Terms,
        *,
        boot: Callable[[int], str],
        clock: Clock,
        sink: Sink,
        say: Callable[[str], None] = lambda line: None,
        pace: Pace = USUAL_PACE,
        lookout: Lookout | None = None,
    ) -> None:
        """`lookout`: shared with other runs, and kept up to date by somebody else. None: one of its own."""
        self._records, self._provider, self._terms, self._boot = records, provider, terms, boot
        self._clock, self._sink, self._say, self._pace = clock, sink, say, pace
        self._is_alone = lookout is None
        self._lookout = lookout or Lookout(provider, terms.fleet, clock=clock, pace=pace, say=say, run_id=terms.run_id)
        self._lookout.want(terms.wanted)
        self.view = RunView()
        self.outlook = Outlook(("nothing has been looked at yet",))
        self.over: Over | None = None
        self._read_at_s = (-float("inf"), -float("inf"))
        self._has_read = False
        self._asked_to_end_s: dict[str, float] = {}

    def run(self, is_stopped: Callable[[], bool] = lambda: False) -> Over | None:
        """Until the run is over, or somebody stops the controller: then None, and the run goes on without one, as far as its grants
        reach."""
        while not is_stopped():
            try:
                over = self.step()
            except (StoreError, ProviderError) as error:
                self._say(f"{type(error).__name__}: {error}")
                over = None
            if over is not None:
                return over
            self._clock.sleep(self._pause_s())
        return None

    def _pause_s(self) -> float:
        """While something is there, what it says is read all the time."""
        if self.is_live or self.outlook.until_s is None:
            return self._pace.step_s
        return min(max(self._pace.step_s, self.until_s()), self._pace.records_s)

    @property
    def is_live(self) -> bool:
        """Whether there is a launch that is not booked."""
        return any(launch.ended is None for launch in self.view.launches)

    def until_s(self) -> float:
        """Seconds until something is due, if nothing happens."""
        if self.outlook.until_s is None:
            return self._pace.longest_s
        return min(max(0.0, self.outlook.until_s - self._provider.clock.unix_s()), self._pace.longest_s)

    def step(self, look: Look | None = None) -> Over | None:
        """Look, and do what follows. The end of the run, once there is nothing left. `look`: how closely; None: as it is due.

        Nothing is done on what was known before: whatever the look, machines' words are read in the very step that does something,
        and everything else is no older than _FRESH_S.
        """
        self._look(self._due() if look is None else look)
        for _ in range(_MOST_ROUNDS):
            self.view, instructions, self.outlook = instruct(self.view, self._terms, self._now_s())
            if instructions and not self._has_read:
                self._read(Look.ALL if self._age_s() > _FRESH_S else Look.WORDS)
                continue
            if not self._carry_out(instructions):
                return self.over
        raise AssertionError(f"instructions without end: {instructions}")

    # ---- looking

    def _now_s(self) -> int:
        return int(self._provider.clock.unix_s())

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            self.view = see(self.view, event)

    def _read(self, look: Look = Look.ALL) -> None:
        at_s = (self._clock.monotonic_s(), self._clock.unix_s())
        self._take(self._records.read(PREFIXES if look is Look.ALL else WORDS))
        self._has_read = True
        if look is Look.ALL:
            self._read_at_s = at_s

    def _age_s(self) -> float:
        """Of the newest full look. The time of day counts as well: some machines' monotonic clocks stand still while they sleep."""
        monotonic_s, unix_s = self._read_at_s
        return max(self._clock.monotonic_s() - monotonic_s, self._clock.unix_s() - unix_s)

    def _due(self) -> Look:
        return Look.ALL if self._age_s() >= self._pace.records_s else Look.WORDS

    def _look(self, look: Look) -> None:
        """The list first: what machines have said before they went is then read, before anybody wonders where they are."""
        if self._is_alone:
            self._lookout.look_for_machines()
            self._lookout.look_for_offers()
        self._has_read = False
        listed, offered = self._lookout.listed(self._terms.run_id), self._lookout.offered(self._terms.wanted)
        if look is not Look.AWAY:
            self._read(look)
        if listed is not None and listed.asked_s != self.view.listed_s:
            self._take([listed])
            self._meter(listed)
        if offered is not None and offered.asked_s != self.view.offered_s:
            self._take([offered])

    def _meter(self, listed: Listed) -> None:
        for machine in listed.machines:
            launch = self.view.of(machine.launch)
            if phase_of(launch) is Phase.OVER or len(launch.evidence.machines) != 1:
                continue
            metered = self._lookout.meter(machine)
            if metered is not None:
                self._take([metered])

    # ---- doing

    def _carry_out(self, instructions: tuple[Instruction, ...]) -> bool:
        """Whether anything is known now that was not."""
        changed = False
        for instruction in instructions:
            match instruction:
                case Propose():
                    changed |= self._propose(instruction)
                case Give():
                    changed |= self._give(instruction)
                case CallCreate():
                    changed |= self._call(instruction.launch, again=instruction.again)
                case Close():
                    changed |= self._close(instruction)
                case Tell():
                    changed |= self._tell(instruction)
                case End():
                    self._end(instruction)
                case Book():
                    changed |= self._book(instruction)
                case Over():
                    self.over = instruction
        return changed

    def _propose(self, plan: Propose) -> bool:
        terms, now_s = self._terms, self._now_s()
        guarantees, token = terms.guarantees, client_token(terms.run_id, plan.launch)
        longest_s = terms.budget.slice_s + terms.outside_s + terms.grace_s
        order = Order(
            token=token, fleet=terms.fleet, run_id=terms.run_id, launch=plan.launch, allowed=plan.allowed, spec=terms.spec,
            user_data=self._boot(plan.launch), lifetime_s=longest_s if not guarantees.enforces_lifetime else _LONGEST_LIFE_S,
            expires_unix_s=now_s + longest_s, tags=terms.labels,
        )  # fmt: skip
        intent = Intent(
            format=FORMAT_VERSION, launch=plan.launch, nonce=self._records.nonce(), run_id=terms.run_id, fleet=terms.fleet,
            token=token, allowed=plan.allowed, request=self._provider.request(order), reasons=plan.reasons,
            predecessor=plan.predecessor, policy_state=plan.policy_state, created_unix_s=float(now_s),
        )  # fmt: skip
        won, found = self._records.write(intent_key(plan.launch), intent)
        self._take([Read(plan.launch, found, now_s)])
        if won:
            self._take([Won(plan.launch)])
            self._emit(
                "launch.proposed",
                plan.launch,
                pools=[each.pool.name for each in plan.allowed],
                reasons=list(plan.reasons),
            )
        else:
            self._read()
        return True

    def _give(self, given: Give) -> bool:
        """Set aside first, under the next number: two controllers that count at the same moment cannot both win it."""
        launch, now_s = given.grant.ask.launch, self._now_s()
        reserved = self.view.reserved(launch, given.part)
        if reserved is None:
            number = self.view.next_reservation
            ours = Reservation(
                format=FORMAT_VERSION, number=number, nonce=self._records.nonce(), grant=self._grant_record(given),
            )  # fmt: skip
            won, reserved = self._records.write(reservation_key(number), ours)
            self._take([Read(0, reserved, now_s)])
            if not won:
                self._read()
                return True
        won, found = self._records.write(grant_key(launch, given.part), reserved.grant)
        self._take([Read(launch, found, now_s)])
        if won:
            self._emit("launch.granted", launch, lifetime_s=given.grant.lifetime_s, reasons=list(given.reasons))
            self._extend(given)
        return True

    def _grant_record(self, given: Give) -> GrantRecord:
        ask = given.grant.ask
        return GrantRecord(
            format=FORMAT_VERSION, launch=ask.launch, part=given.part, nonce=self._records.nonce(),
            lifetime_s=given.grant.lifetime_s, machine_microusd_h=ask.machine_microusd_h, extras_microusd_h=ask.extras_microusd_h,
            once_microusd=ask.once_microusd, nodes=ask.nodes, uses=ask.uses, outside_s=ask.outside_s, grace_s=ask.grace_s,
            minimum_s=ask.minimum_s, least_s=ask.least_s, wants_s=ask.wants_s,
        )  # fmt: skip

    def _extend(self, given: Give) -> None:
        """The tag by which leaks are found follows the grant. Where that fails, the next renewal tries again."""
        machine, ask = self.view.of(given.grant.ask.launch).machine, given.grant.ask
        if machine is None:
            return
        try:
            self._provider.extend(machine, int(machine.created_unix_s) + ask.billed_s(given.grant.lifetime_s))
        except ProviderError as error:
            self._say(f"the tags of {machine.id} could not be renewed: {error}")

    def _call(self, launch: int, *, again: bool) -> bool:
        """On fresh knowledge: what was suspended between the decision and here must not act on it."""
        if self._age_s() > _FRESH_S:
            self._read()
            if self._age_s() > _FRESH_S:
                self._say(
                    f"launch {launch}: the records took more than {_FRESH_S:g} s to read; nothing is asked for on them"
                )
                return False
            return True
        intent, now_s = self.view.of(launch).intent, self._now_s()
        assert intent is not None
        self._take([Called(launch, now_s)])
        nonce = self._records.nonce()
        try:
            machine = self._provider.create(intent.request)
        except OutcomeUnknown as error:
            self._say(f"launch {launch}: the answer was lost ({error})")
            self._emit("launch.unknown", launch, said=str(error))
            return False
        except LaunchFailed as error:
            if again and error.failure in _SAYS_NOTHING:
                self._say(f"launch {launch}: {error}; what came of the first call is not known")
                return False
            record = Answer(
                format=FORMAT_VERSION, launch=launch, nonce=nonce, outcome="failed", failure=error.failure, detail=str(error),
                retry_after_s=error.retry_after_s, at_unix_s=float(self._now_s()),
            )  # fmt: skip
        else:
            record = Answer(
                format=FORMAT_VERSION, launch=launch, nonce=nonce, outcome="machine", machine=machine.id, pool=machine.pool,
                microusd_h=machine.microusd_h, at_unix_s=float(self._now_s()),
            )  # fmt: skip
        return self._answer(launch, record)

    def _close(self, closing: Close) -> bool:
        record = Answer(
            format=FORMAT_VERSION, launch=closing.launch, nonce=self._records.nonce(), outcome=closing.outcome,
            machine=closing.machine, pool=closing.pool, microusd_h=closing.microusd_h, detail=closing.detail,
            at_unix_s=float(self._now_s()),
        )  # fmt: skip
        return self._answer(closing.launch, record)

    def _answer(self, launch: int, record: Answer) -> bool:
        won, found = self._records.write(answer_key(launch), record)
        self._take([Read(launch, found, self._now_s())])
        if won:
            what: dict[str, Any] = {"machine": found.machine, "pool": None if found.pool is None else found.pool.name}
            failed = {} if found.failure is None else {"failure": found.failure.value}
            self._emit(f"launch.{found.outcome}", launch, **what, **failed, detail=found.detail)
        return True

    def _tell(self, told: Tell) -> bool:
        record = Command(
            format=FORMAT_VERSION, launch=told.launch, part=told.part, nonce=self._records.nonce(), kind=told.kind,
            reasons=told.reasons, at_unix_s=float(self._now_s()),
        )  # fmt: skip
        _, found = self._records.write(command_key(told.launch, told.part), record)
        self._take([Read(told.launch, found, self._now_s())])
        self._emit("launch.told", told.launch, command=told.kind, reasons=list(told.reasons))
        return True

    def _end(self, end: End) -> None:
        machine = end.machine if isinstance(end.machine, Machine) else self._unseen(end.launch, end.machine)
        now_s = self._clock.monotonic_s()
        if now_s - self._asked_to_end_s.get(machine.id, -float("inf")) < self._pace.list_s:
            return  # whether that has helped, the next list says
        self._asked_to_end_s[machine.id] = now_s
        self._emit("launch.ending", end.launch, machine=machine.id, reasons=list(end.reasons))
        self._provider.terminate([machine])

    def _unseen(self, launch: int, name: str) -> Machine:
        """Answered, and not in any list yet."""
        known = self.view.of(launch)
        assert known.answer is not None
        assert known.answer.pool is not None
        return Machine(
            id=name, pool=known.answer.pool, state="running", fleet=self._terms.fleet, run_id=self._terms.run_id, launch=launch,
            token=client_token(self._terms.run_id, launch), microusd_h=known.answer.microusd_h,
            created_unix_s=known.answer.at_unix_s,
        )  # fmt: skip

    def _book(self, book: Book) -> bool:
        bills = [self._provider.bill(machine) for machine in book.machines]
        record = Ended(
            format=FORMAT_VERSION, launch=book.launch, nonce=self._records.nonce(),
            machine=book.machines[0].id if book.machines else None, why=book.why, billed_s=sum(bill.billed_s for bill in bills),
            cost_microusd=sum(bill.microusd for bill in bills), at_unix_s=float(self._now_s()),
        )  # fmt: skip
        won, found = self._records.write(ended_key(book.launch), record)
        self._take([Read(book.launch, found, self._now_s())])
        if won:
            self._emit(
                "launch.ended", book.launch, why=found.why, billed_s=found.billed_s, cost_microusd=found.cost_microusd
            )
        return True

    def _emit(self, kind: str, launch: int, **data: Any) -> None:
        self._sink.emit(LedgerEvent(kind, self._clock.unix_s(), {"launch": launch, **data}))
        said = ", ".join(f"{name}={value}" for name, value in data.items() if value not in (None, "", []))
        self._say(f"{kind} {launch}: {said}")


_SAYS_NOTHING = (Failure.THROTTLED, Failure.NO_PERMISSION)
"""Refused before anything was looked up: of an earlier call with the same token it says nothing."""
_LONGEST_LIFE_S = 7 * 86400
"""Asked of a provider that ends machines by itself, where a grant can be renewed: renewals cannot move it."""
