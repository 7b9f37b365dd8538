"""A world in which a controller is tried a thousand times a minute: a cloud, machines that keep the protocol, a store, one clock.

Everything is real but the machines: the controller's own code, its records in a store, its provider behind the real interface. The
machines do what `agent.machine` does, told in a page: holder, grant, standby, claim, words, pulse, and an end of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.core.errors import LaunchFailed, NotFound, OutcomeUnknown, ProviderError
from holdfast.core.failures import Failure
from holdfast.core.launches import (
    Answer,
    Command,
    Ended,
    GrantRecord,
    Holder,
    Intent,
    MachineWord,
    Pool,
    Pulse,
    answer_key,
    command_key,
    ended_key,
    grant_key,
    holder_key,
    intent_key,
    pulse_key,
    word_key,
)
from holdfast.core.sealed import seal, unseal
from holdfast.provider.base import Bill, Check, Guarantees, Leftover, Machine, MachineSpec, Offer, Order, Wanted
from holdfast.store.base import Store
from holdfast.testing.clock import ManualClock

__all__ = ["BOOT_S", "NOTICE_S", "Fuse", "GivenUp", "ImaginedCloud", "ImaginedMachine", "pool"]

BOOT_S, STOP_S, NOTICE_S = 60, 20, 120
GIVES_UP_S = 300
"""A machine without a grant ends itself so long after its boot."""
SAVE_S, SETUP_S, FINAL_S = 10, 30, 60
LOOKS_S = 5
"""How often a machine reads its records."""


class GivenUp(BaseException):
    """The controller's process ends here."""


class Fuse:
    """Ends the process before or after its k-th request, whichever it goes to."""

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.count, self._at, self._after = 0, at, after

    def around(self, call: Callable[[], Any]) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self._at and not self._after:
            raise GivenUp
        try:
            result = call()
        except Exception:
            if number == self._at:
                raise GivenUp from None
            raise
        if number == self._at:
            raise GivenUp
        return result


def pool(zone: str, market: str = "spot") -> Pool:
    return Pool.named(f"imagined/here/{zone}/m1/{market}")


@dataclass
class Spec:
    """One pool as the cloud knows it."""

    microusd_h: Callable[[int], int]
    capacity: Callable[[int], bool]


@dataclass
class ImaginedMachine:
    """A machine, and the agent on it. `advance` lets a second pass."""

    cloud: ImaginedCloud
    id: str
    pool: Pool
    launch: int
    token: str
    created_s: int
    gone_s: int | None = None
    ended_by: str | None = None
    ending_at_s: int | None = None
    preempt_at_s: int | None = None
    told_at_s: int | None = None
    withdraw_at_s: int | None = None
    never_claims: bool = False
    partitioned: bool = False
    """It cannot reach the store, and works on."""
    phase: str = "boot"
    words: int = 0
    ready_s: int | None = None
    claimed_s: int | None = None
    kept_s: int = 0
    done_s: int = 0
    saved_at_s: int = 0
    stopping_s: int | None = None
    seen_notice_of: int | None = None
    heard_notice: bool = False
    exit_code: int | None = None
    epoch: int = 0
    start_kept_s: int = 0

    @property
    def uptime_s(self) -> int:
        return self.cloud.now_s - self.created_s - BOOT_S

    def advance(self) -> None:
        now_s = self.cloud.now_s
        if self.gone_s is not None:
            return None
        if self.preempt_at_s is not None and now_s >= self.preempt_at_s:
            return self.die("provider")
        if self.ending_at_s is not None:
            if now_s >= self.ending_at_s:
                self.die(self.ended_by or "itself")
            return None
        if self.uptime_s < 0:
            return None
        self.act(now_s)
        return None

    def die(self, by: str) -> None:
        self.gone_s, self.ended_by, self.phase = self.cloud.now_s, by, "gone"

    def shut_down(self, by: str = "itself") -> None:
        if self.ending_at_s is None and self.gone_s is None:
            self.ending_at_s, self.ended_by = self.cloud.now_s + STOP_S, by

    # ---- what the agent does

    def act(self, now_s: int) -> None:
        if self.never_claims:
            return self.give_up()
        if self.phase == "working":
            self.work(now_s)
        if self.partitioned:
            lifetime_s = self.cloud.lifetimes.get(self.id, 0)
            return self.shut_down() if self.uptime_s >= lifetime_s else None
        match self.phase:
            case "boot":
                self.boot()
            case "waiting" if now_s % LOOKS_S == 0:
                self.wait()
            case "standby" if now_s % LOOKS_S == 0:
                self.stand_by(now_s)
            case "working":
                self.listen(now_s)
        return None

    def give_up(self) -> None:
        if self.uptime_s > GIVES_UP_S:
            self.shut_down()

    def read(self, key: str, kind: Any) -> Any:
        try:
            return unseal(self.cloud.store.get(key, max_bytes=1 << 20), kind, what=key)
        except NotFound:
            return None

    def boot(self) -> None:
        answer = self.read(answer_key(self.launch), Answer)
        if (answer is not None and answer.outcome != "machine") or self.read(ended_key(self.launch), Ended) is not None:
            return self.shut_down()
        mine = Holder(format=1, launch=self.launch, machine=self.id, boot=self.id, at_unix_s=float(self.cloud.now_s))
        self.cloud.store.put_new(holder_key(self.launch), seal(mine))
        if self.read(holder_key(self.launch), Holder).machine != self.id:
            return self.shut_down()
        self.phase = "waiting"
        return None

    def lifetime_s(self) -> int:
        longest, part = 0, 0
        while (grant := self.read(grant_key(self.launch, part), GrantRecord)) is not None:
            longest, part = max(longest, grant.lifetime_s), part + 1
        self.cloud.lifetimes[self.id] = longest
        return longest

    def commanded(self) -> str | None:
        part, last = 0, None
        while (command := self.read(command_key(self.launch, part), Command)) is not None:
            last, part = command.kind, part + 1
        return last

    def wait(self) -> None:
        answer = self.read(answer_key(self.launch), Answer)
        if self.lifetime_s() <= self.uptime_s or (answer is not None and answer.outcome != "machine"):
            return self.give_up()
        if self.uptime_s >= SETUP_S:
            self.say("ready")
            self.ready_s, self.phase = self.cloud.now_s, "standby"
        return None

    def stand_by(self, now_s: int) -> None:
        if self.lifetime_s() <= self.uptime_s or self.commanded() is not None:
            return self.shut_down()
        intent: Intent = self.read(intent_key(self.launch), Intent)
        if intent.predecessor is not None and not self.may_claim(intent.predecessor, now_s):
            return None
        self.cloud.claim(self, intent.predecessor)
        self.say("claimed", attempt=self.epoch)
        self.phase, self.claimed_s, self.saved_at_s = "working", now_s, now_s
        self.done_s = self.kept_s = self.cloud.durable_s
        self.start_kept_s = self.cloud.durable_s
        return None

    def may_claim(self, other: int, now_s: int) -> bool:
        if self.read(ended_key(other), Ended) is not None:
            return True
        part, standing = 0, None
        while (word := self.read(word_key(other, part), MachineWord)) is not None:
            if word.kind == "released":
                return True
            standing = word if word.kind == "notice" else None if word.kind == "withdrawn" else standing
            part += 1
        if standing is None or standing.deadline_s is None:
            self.seen_notice_of = None
            return False
        self.seen_notice_of = now_s if self.seen_notice_of is None else self.seen_notice_of
        return now_s > self.seen_notice_of + standing.deadline_s + FINAL_S

    def work(self, now_s: int) -> None:
        self.done_s += 1
        if self.stopping_s is None and self.done_s >= self.cloud.work_s:
            self.stopping_s, self.exit_code = now_s + SAVE_S, 0
        if not self.partitioned and now_s - self.saved_at_s >= self.cloud.save_every_s and self.stopping_s is None:
            self.save()

    def save(self) -> None:
        self.saved_at_s = self.cloud.now_s
        if self.cloud.commit(self):
            self.kept_s = self.done_s
        else:
            self.leave(76)

    def listen(self, now_s: int) -> None:
        if self.told_at_s is not None and now_s >= self.told_at_s and not self.heard_notice:
            self.heard_notice = True
            if self.withdraw_at_s is None:
                assert self.preempt_at_s is not None
                self.say("notice", notice="preemption", deadline_s=self.preempt_at_s - now_s)
                self.stopping_s, self.exit_code = self.preempt_at_s - SAVE_S - 20, 75
            else:
                self.say("notice", notice="rebalance" if self.cloud.advice else "preemption",
                         deadline_s=None if self.cloud.advice else NOTICE_S)  # fmt: skip
        if self.withdraw_at_s is not None and self.heard_notice and now_s >= self.withdraw_at_s:
            self.say("withdrawn")
            self.withdraw_at_s = self.told_at_s = None
        looks = now_s % LOOKS_S == 0 and self.stopping_s is None
        if looks and (self.commanded() == "stop" or self.uptime_s >= self.lifetime_s()):
            self.stopping_s, self.exit_code = now_s + SAVE_S, 78
        if now_s % 30 == 0:
            pulse = Pulse(
                format=1, launch=self.launch, machine=self.id, uptime_s=self.uptime_s, step=self.done_s, kept_step=self.kept_s,
                kept_work_s=self.kept_s - self.start_kept_s, at_unix_s=float(now_s),
            )  # fmt: skip
            self.cloud.store.put(pulse_key(self.launch), seal(pulse))
        if self.stopping_s is not None and now_s >= self.stopping_s:
            assert self.exit_code is not None
            if self.exit_code == 0 and self.done_s < self.cloud.work_s:
                raise AssertionError("finished without the work")
            saved = self.cloud.commit(self)
            self.leave(self.exit_code if saved else 76)

    def leave(self, exit_code: int) -> None:
        if exit_code == 0:
            self.cloud.finished += 1
        self.say("released", exit_code=exit_code)
        self.phase = "left"
        self.shut_down()

    def say(self, kind: str, **more: Any) -> None:
        word = MachineWord(
            format=1, launch=self.launch, part=self.words, machine=self.id, kind=kind, uptime_s=self.uptime_s,  # type: ignore[arg-type]
            at_unix_s=float(self.cloud.now_s), **more,
        )  # fmt: skip
        assert self.cloud.store.put_new(word_key(self.launch, self.words), seal(word))
        self.words += 1


@dataclass
class Faults:
    """What the cloud does wrong, drawn per call."""

    lost_answer: float = 0.0
    error: float = 0.0
    list_error: float = 0.0
    never_claims: float = 0.0


@dataclass
class ImaginedCloud:
    """Implements `provider.base.Instances`. `advance` lets seconds pass, on every machine too."""

    store: Store
    clock: ManualClock
    pools: dict[Pool, Spec]
    on_demand_microusd_h: int
    work_s: int = 3600
    save_every_s: int = 120
    list_delay_s: int = 30
    honours_tokens: bool = True
    first_hour_free: bool = False
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    advice: bool = False
    fuse: Fuse = field(default_factory=Fuse)
    name: str = "imagined"
    machines_: list[ImaginedMachine] = field(default_factory=list)
    history: list[tuple[int, list[Machine]]] = field(default_factory=list)
    lifetimes: dict[str, int] = field(default_factory=dict)
    durable_s: int = 0
    owner: tuple[int, str] = (0, "")
    finished: int = 0
    claims: list[tuple[int, int, str]] = field(default_factory=list)
    thefts: list[str] = field(default_factory=list)
    creates: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.guarantees = Guarantees(
            honours_tokens=self.honours_tokens, shutdown_terminates=True, enforces_lifetime=False, tags_at_birth=True,
            list_delay_s=self.list_delay_s, notice_s=NOTICE_S, minimum_s=60, boot_s=BOOT_S, stop_s=STOP_S,
        )  # fmt: skip

    @property
    def now_s(self) -> int:
        return int(self.clock.unix_s())

    # ---- the world

    def advance(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.advance(1)
            for machine in self.machines_:
                machine.advance()
        self.history.append((self.now_s, [self.shown(machine) for machine in self.machines_]))

    def alive(self) -> list[ImaginedMachine]:
        return [machine for machine in self.machines_ if machine.gone_s is None]

    def preempt(self, machine: ImaginedMachine, notice_s: int) -> None:
        machine.told_at_s = self.now_s if notice_s else None
        machine.preempt_at_s = self.now_s + notice_s

    def claim(self, machine: ImaginedMachine, predecessor: int | None) -> None:
        """The run's own fence; and whether somebody's last save was cut off by it."""
        before = next((each for each in self.machines_ if each.id == self.owner[1]), None)
        if before is not None and before.gone_s is None and before.phase == "working" and not before.partitioned:
            past_deadline = before.told_at_s is not None and self.now_s > before.told_at_s + NOTICE_S
            if not past_deadline:
                self.thefts.append(f"{machine.id} of launch {machine.launch} claims while {before.id} works")
        machine.epoch = self.owner[0] + 1
        self.owner = (machine.epoch, machine.id)
        self.claims.append((self.now_s, machine.launch, machine.id))

    def commit(self, machine: ImaginedMachine) -> bool:
        if machine.partitioned or self.owner != (machine.epoch, machine.id):
            return False
        assert machine.done_s >= self.durable_s
        self.durable_s = machine.done_s
        return True

    def true_bill(self, machine: ImaginedMachine) -> int:
        """Second by second, for the one that must be found out by records alone."""
        end_s = machine.gone_s if machine.gone_s is not None else self.now_s
        billed_s = max(60, end_s - machine.created_s)
        if machine.ended_by == "provider" and self.first_hour_free and end_s - machine.created_s < 3600:
            return 0
        price = self.pools[machine.pool].microusd_h
        total = sum(price(machine.created_s + second) for second in range(billed_s))
        return -(-total // 3600)

    def spent_microusd(self) -> int:
        return sum(self.true_bill(machine) for machine in self.machines_)

    # ---- the interface

    def shown(self, machine: ImaginedMachine) -> Machine:
        gone = machine.gone_s is not None
        state = "gone" if gone else "ending" if machine.ending_at_s is not None else "running"
        return Machine(
            id=machine.id, pool=machine.pool, state=state, fleet="fleet", run_id="run", launch=machine.launch,  # type: ignore[arg-type]
            token=machine.token, microusd_h=self.pools[machine.pool].microusd_h(self.now_s),
            created_unix_s=float(machine.created_s), gone_unix_s=None if machine.gone_s is None else float(machine.gone_s),
            ended_by=machine.ended_by if gone else None,  # type: ignore[arg-type]
        )  # fmt: skip

    def offers(self, wanted: Wanted) -> list[Offer]:
        return [
            Offer(pool=pool, microusd_h=spec.microusd_h(self.now_s), on_demand_microusd_h=self.on_demand_microusd_h)
            for pool, spec in self.pools.items()
        ]

    def request(self, order: Order) -> dict[str, Any]:
        return {
            "token": order.token, "launch": order.launch,
            "pools": [[each.pool.name, each.ceiling_microusd_h] for each in order.allowed],
        }  # fmt: skip

    def create(self, request: Mapping[str, Any]) -> Machine:
        result: Machine = self.fuse.around(lambda: self._create(request))
        return result

    def _create(self, request: Mapping[str, Any]) -> Machine:
        known = next((each for each in self.machines_ if each.token == request["token"]), None)
        if known is not None and self.honours_tokens:
            return self.shown(known)
        if self.rng.random() < self.faults.error:
            raise LaunchFailed("500", Failure.ERROR)
        lost = self.rng.random() < self.faults.lost_answer
        for name, ceiling in request["pools"]:
            spec = self.pools[Pool.named(name)]
            if spec.capacity(self.now_s) and spec.microusd_h(self.now_s) <= ceiling:
                break
        else:
            raise LaunchFailed("no capacity", Failure.NO_CAPACITY)
        machine = ImaginedMachine(
            self, f"i-{len(self.machines_):04d}", Pool.named(name), request["launch"], request["token"], self.now_s,
            never_claims=self.rng.random() < self.faults.never_claims,
        )  # fmt: skip
        self.machines_.append(machine)
        if lost:
            raise OutcomeUnknown("the connection was closed")
        return self.shown(machine)

    def machines(self, fleet: str, run_id: str | None = None) -> list[Machine]:
        def answer() -> list[Machine]:
            if self.rng.random() < self.faults.list_error:
                raise ProviderError("503")
            old = [shown for at_s, shown in self.history if at_s <= self.now_s - self.list_delay_s]
            return old[-1] if old else []

        result: list[Machine] = self.fuse.around(answer)
        return result

    def bill(self, machine: Machine) -> Bill:
        known = next(each for each in self.machines_ if each.id == machine.id)
        end_s = known.gone_s if known.gone_s is not None else self.now_s
        return Bill(
            billed_s=max(60, end_s - known.created_s), microusd=self.true_bill(known), final=known.gone_s is not None
        )

    def terminate(self, machines: Sequence[Machine]) -> None:
        def end() -> None:
            for machine in machines:
                known = next(each for each in self.machines_ if each.id == machine.id)
                works = known.phase == "working" and self.owner[1] == known.id and not known.partitioned
                in_time = known.uptime_s < self.lifetimes.get(known.id, 0)
                if works and in_time and known.commanded() is None:
                    self.thefts.append(f"{known.id} of launch {known.launch} is ended while it works")
                known.shut_down("owner")

        self.fuse.around(end)

    def extras_microusd_h(self, spec: MachineSpec, region: str) -> int:
        return 0

    def extend(self, machine: Machine, expires_unix_s: int) -> None:
        return None

    def leftovers(self, fleet: str) -> list[Leftover]:
        return []

    def remove(self, leftovers: Sequence[Leftover]) -> None:
        return None

    def preflight(self, order: Order) -> list[Check]:
        return []
