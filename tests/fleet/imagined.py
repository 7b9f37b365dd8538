"""A world in which a controller is tried a thousand times a minute: a cloud, machines that keep the protocol, a store, one clock.

Everything is real but the machines: the controller's own code, its records in a store, its provider behind the real interface.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imagined_machine import BOOT_S, NOTICE_S, STOP_S, ImaginedMachine

from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError
from holdfast.core.failures import Failure
from holdfast.core.launches import Pool
from holdfast.provider.base import Bill, Check, Guarantees, Leftover, Machine, MachineSpec, Offer, Order, Wanted
from holdfast.store.base import Store
from holdfast.testing.clock import ManualClock

__all__ = ["BOOT_S", "NOTICE_S", "STOP_S", "Fuse", "GivenUp", "ImaginedCloud", "ImaginedMachine", "pool"]


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
    run_id: str = "run"
    bell: Callable[[int, int], None] = lambda launch, part: None
    """Launch and number of each word that a machine has written."""
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
            id=machine.id, pool=machine.pool, state=state, fleet="fleet", run_id=self.run_id, launch=machine.launch,  # type: ignore[arg-type]
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
