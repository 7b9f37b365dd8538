"""Machines in a simulated world: the real protocol, one thread for each machine, of which only one runs at a time.

Time passes when everybody sleeps, and every request to the store sleeps a drawn moment before and after it, so that machines and
controller meet between any two requests. A machine whose guard's time is over is dead at its next breath: that is what the watchdog
does, and it needs no cooperation.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.agent.machine.bell import Bell
from holdfast.agent.machine.boot import ThisMachine
from holdfast.agent.machine.life import Life, Pace, Task
from holdfast.agent.machine.prepare import Prepared
from holdfast.agent.machine.records import TROUBLE, Records
from holdfast.agent.watchdog import Limits
from holdfast.core.contract import EXIT_LIMIT, EXIT_PREEMPTED, Phase, Progress
from holdfast.core.ids import seeded_tokens
from holdfast.core.job_record import JobRecord
from holdfast.store.base import Body, Entry
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation, seeded

__all__ = ["FAULTS", "Killed", "SimMachine", "World"]

FAULTS = (
    Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.LATE, Fault.TAKEN_BY_ITSELF, Fault.TIMED_OUT, Fault.TRUNCATED,
    Fault.FLIPPED, Fault.STALE, Fault.SLOW, Fault.DENIED, Fault.FULL,
)  # fmt: skip
GIVE_UP_S = 60.0
"""Real time; only ends a broken test."""


class Killed(BaseException):
    """The machine is gone."""


@dataclass(slots=True)
class _Actor:
    name: str
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    dies_at_s: Callable[[], float] = lambda: float("inf")
    stopped: tuple[float, float] = (float("inf"), float("inf"))
    """From when until when it is suspended."""


class World:
    """The scheduler, and the clock of everybody."""

    def __init__(self, seed: int) -> None:
        self.now_s = 1000.0
        self.store = MemoryStore()
        self.rng = random.Random(seed)
        self._queue: list[tuple[float, int, _Actor]] = []
        self._order = 0
        self._back = threading.Semaphore(0)
        self._here = threading.local()
        self.errors: list[BaseException] = []

    # ---- holdfast.core.clock.Clock

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return 1_700_000_000.0 + self.now_s

    def sleep(self, seconds: float) -> None:
        actor: _Actor = self._here.actor
        self._push(self.now_s + max(0.0, seconds), actor)
        self._back.release()
        self._take_turn(actor)

    # ---- actors

    def start(self, at_s: float, name: str, act: Callable[[], None]) -> _Actor:
        actor = _Actor(name)

        def live() -> None:
            self._here.actor = actor
            try:
                self._take_turn(actor)
                act()
            except Killed:
                pass
            except BaseException as error:
                self.errors.append(error)
            finally:
                self._back.release()

        threading.Thread(target=live, name=name, daemon=True).start()
        self._push(1000.0 + at_s, actor)
        return actor

    def run(self) -> None:
        """Until nobody has anything left to do."""
        while self._queue:
            at_s, _, actor = heapq.heappop(self._queue)
            begins_s, ends_s = actor.stopped
            if begins_s <= at_s < ends_s:
                self._push(ends_s, actor)
                continue
            self.now_s = max(self.now_s, at_s)
            actor.turn.release()
            assert self._back.acquire(timeout=GIVE_UP_S), f"{actor.name} does not come back"
        if self.errors:
            raise self.errors[0]

    def _push(self, at_s: float, actor: _Actor) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at_s, self._order, actor))

    def _take_turn(self, actor: _Actor) -> None:
        assert actor.turn.acquire(timeout=GIVE_UP_S)
        if self.now_s >= actor.dies_at_s():
            raise Killed


class _Slow:
    """A store whose requests take a moment on both ways."""

    def __init__(self, inner: MemoryStore, world: World, near: bool) -> None:
        self._inner, self._world, self.is_near = inner, world, near
        self.url = inner.url

    def _way(self) -> None:
        self._world.sleep(self._world.rng.choice((0.01, 0.05, 0.3)))

    def put(self, key: str, body: Body) -> None:
        self._way()
        self._inner.put(key, body)
        self._way()

    def put_new(self, key: str, body: bytes) -> bool:
        self._way()
        created = self._inner.put_new(key, body)
        self._way()
        return created

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self._way()
        return self._inner.get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._inner.read_into(key, offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self._way()
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()


@dataclass(slots=True)
class SimMachine:
    """A machine, and all that it ever did. Implements `life.Guard` as well: nobody else ends it."""

    world: World
    launch: int
    name: str
    boots_at_s: float
    fault_seed: int = 0
    fault_rate: float = 0.0
    near: bool = True
    needs_s: float = 600.0
    """Work until it is done."""
    setup_s: float = 20.0
    save_s: float = 5.0
    ignores_stop: bool = False
    killed_at_s: float = float("inf")
    boot_limit_s: float = 300.0
    life: Life | None = None
    limits: Limits = field(default_factory=Limits)
    all_limits: list[Limits] = field(default_factory=list)
    prepared_s: list[float] = field(default_factory=list)
    worked: list[tuple[float, float]] = field(default_factory=list)
    """From, until; the end moves while it works."""
    saved_s: list[float] = field(default_factory=list)
    exit_code: int | None = None
    left_s: float | None = None
    actor: _Actor | None = None

    def begin(self) -> SimMachine:
        self.actor = self.world.start(self.boots_at_s, self.name, self._live)
        self.actor.dies_at_s = lambda: min(1000.0 + self.killed_at_s, self.limits.end_at_s)
        return self

    @property
    def boot_s(self) -> float:
        return 1000.0 + self.boots_at_s

    # ---- life.Guard

    def granted(self, limits: Limits) -> None:
        self.limits = limits
        self.all_limits.append(limits)

    def extend(self, limits: Limits) -> None:
        self.limits = self.limits.or_later(limits)
        self.all_limits.append(self.limits)

    def look(self) -> None:
        """It does not die by itself."""

    # ---- what it does

    def _live(self) -> None:
        unborn_s = self.boot_s + self.boot_limit_s
        self.limits = Limits(stop_at_s=unborn_s, kill_at_s=unborn_s + 20, end_at_s=unborn_s + 40)
        plan = seeded(self.fault_seed, self.fault_rate, FAULTS) if self.fault_rate else lambda operation: None
        slow = _Slow(self.world.store, self.world, self.near)
        store = FaultyStore(slow, lambda operation: self._fault(plan, operation), clock=self.world, slow_s=12.0)  # type: ignore[arg-type]
        self.life = Life(
            bell=Bell(self.launch, MemoryStore, print),
            records=Records(store), launch=self.launch, clock=self.world, tokens=seeded_tokens(hash(self.name) & 0xFFFF),
            machine=ThisMachine(
                name=self.name, boot=f"boot-{self.name}", boot_s=self.boot_s, unborn_at_s=unborn_s, folder=Path("/nowhere"),
                end_command=None,
            ),
            guard=self, prepare=self._prepare, work=lambda life, task: self._work(life, task, store), say=lambda line: None,
            pace=Pace(poll_s=5.0, pulse_s=30.0),
        )  # fmt: skip
        self.exit_code = self.life.run()
        self.left_s = self.world.now_s

    def _fault(self, plan: Callable[[Operation], Fault | None], operation: Operation) -> Fault | None:
        return plan(operation)

    def _prepare(self, job: JobRecord, tick: Callable[[], None]) -> Prepared:
        self.prepared_s.append(self.world.now_s)
        until_s = self.world.now_s + self.setup_s
        while self.world.now_s < until_s:
            tick()
            self.world.sleep(1.0)
        return Prepared(command=("true",), environment={}, setup_s=self.setup_s)

    def _work(self, life: Life, task: Task, store: FaultyStore) -> int:
        began_s = self.world.now_s
        self.worked.append((began_s, began_s))
        heard_s, step, committed = began_s, 0, 0
        stopping_s: float | None = None
        while True:
            self.world.sleep(2.0)
            now_s = self.world.now_s
            self.worked[-1] = (began_s, now_s)
            if store.pending and self.world.rng.random() < 0.2:
                store.land(self.world.rng.randrange(len(store.pending)))
            if now_s - heard_s >= 5.0:
                heard_s = now_s
                life.listen()
            with suppress(*TROUBLE):
                life.speak()
            step = int(now_s - began_s)
            if step - committed >= 30:
                committed = step
                self.saved_s.append(now_s)
            why = life.look(Progress(1, step, -1, committed or -1, Phase.TRAINING))
            if now_s >= self.limits.stop_at_s:
                why = life.limit()
            if why is not None and stopping_s is None:
                stopping_s = now_s
            if stopping_s is not None and not self.ignores_stop and now_s >= stopping_s + self.save_s:
                self.saved_s.append(now_s)
                return EXIT_LIMIT if now_s >= self.limits.stop_at_s else EXIT_PREEMPTED
            if now_s - began_s >= self.needs_s:
                self.saved_s.append(now_s)
                return 0
