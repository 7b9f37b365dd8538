"""Random histories of one run on two machines: saves by way of the disk and without it, a store and disks that fail, crashes at any
operation, promotion by another process, rollbacks, and a network that stands still; against what must hold after each of them."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interleaved import RUN_ID, SCALE, Dead, FakeClock, no_home
from parts import garbage, request
from two_tiers_parts import Attempt, Gate, begin, state

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.request import SaveHandle
from holdfast.checkpoint.runs.promote_staged import promote_staged
from holdfast.checkpoint.runs.rollback import rollback
from holdfast.checkpoint.tier import LocalTier, Tier
from holdfast.core.errors import Fenced, HoldfastError, UsageError
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import WRITES, Fault, FaultyStore, Operation

pytestmark = pytest.mark.usefixtures("small_chunks", "quiet_deaths")

_DISK_FAULTS = (Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.FULL, Fault.DENIED, Fault.FLIPPED)
_STORE_FAULTS = (Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.FULL, Fault.TAKEN_BY_ITSELF)
_ACTIONS = (
    "stage", "stage", "stage", "settle", "gate", "crash", "crash soon", "elsewhere", "promote", "rollback", "store fault",
    "store down", "disk fault", "finish cleanly",
)  # fmt: skip


@dataclass
class Weather:
    """A plan for a store: a fault that waits for an operation that it suits, an outage, and the end of its process."""

    due: list[tuple[int, Fault]] = field(default_factory=list)
    is_down: bool = False
    dead: bool = False
    dies_in: int | None = None

    def __call__(self, operation: Operation) -> Fault | None:
        if self.dies_in is not None:
            self.dies_in -= 1
            self.dead |= self.dies_in < 0
        if self.dead:
            raise Dead
        if self.is_down:
            return Fault.UNAVAILABLE_BEFORE
        for index, (left, fault) in enumerate(self.due):
            if left > 0:
                self.due[index] = (left - 1, fault)
            elif _suits(fault, operation):
                del self.due[index]
                return fault
        return None


def _suits(fault: Fault, operation: Operation) -> bool:
    if fault is Fault.TAKEN_BY_ITSELF:
        return operation.method == "put_new"
    if fault is Fault.FULL:
        return operation.method == "put"
    if fault is Fault.FLIPPED:
        return operation.method in ("get", "read_into")
    return operation.method in WRITES or fault is not Fault.UNAVAILABLE_AFTER


@dataclass
class World:
    """`number`: the last state that was made. `floor`: the number of the newest commit that was reported and that nobody has gone
    back from; `reported`: what this machine's disk must give back while nobody else has committed, -1 for nothing."""

    folder: Path
    outlives: bool
    memory: MemoryStore = field(default_factory=MemoryStore)
    disk: MemoryStore = field(default_factory=MemoryStore)
    number: int = -1
    floor: int = -1
    reported: int = -1
    forbidden: set[int] = field(default_factory=set)
    attempt: Attempt | None = None
    handles: list[tuple[int, SaveHandle]] = field(default_factory=list)
    store_weather: Weather = field(default_factory=Weather)
    disk_weather: Weather = field(default_factory=Weather)
    gate: Gate | None = None

    @property
    def local(self) -> LocalTier:
        return LocalTier(self.folder, outlives=self.outlives)

    def wrap(self, inner: Store) -> Store:
        return FaultyStore(self.disk, self.disk_weather)

    # ---- this machine

    def running(self) -> Attempt:
        if self.attempt is None:
            self.store_weather, self.disk_weather = Weather(), Weather()
            self.gate = Gate(FaultyStore(self.memory, self.store_weather))
            attempt = self.attempt = begin(self.gate, self.local, wrap=self.wrap, max_unsaved=100)
            assert attempt.tier is not None
            self.found(attempt.restored, here=True)
            assert attempt.fallbacks == []
        return self.attempt

    def found(self, number: int, *, here: bool) -> None:
        assert number not in self.forbidden, "what was gone back from is alive again"
        assert number >= self.floor, "a commit that was reported is lost"
        if here:
            assert number >= self.reported, "what was reported to be on the disk is lost"
            # From here on the lineage is this one: what was staged and is older is history, what was newer never counted.
            self.reported = max(number, self.reported)

    def stage(self) -> None:
        attempt = self.running()
        self.number += 1
        handle = attempt.saver.save(request(state(self.number), self.number))
        self.handles.append((self.number, handle))
        assert attempt.saver._drain_snapshots(60)
        self.hear()

    def hear(self) -> None:
        """What has been reported by now."""
        attempt = self.attempt
        if attempt is None:
            return
        staged, committed = attempt.told.steps("save.staged"), attempt.told.steps("save.committed")
        self.reported = max([self.reported, *staged, *committed])
        self.floor = max([self.floor, *committed])
        for number, handle in self.handles:
            if handle.done():
                with suppress(HoldfastError, TimeoutError):
                    step = handle.wait(0).step
                    assert step >= number
                    assert step <= (self.reported if self.outlives else self.floor)

    def settle(self) -> None:
        if self.attempt is not None:
            self.open()
            _rest(self.attempt)
            self.hear()

    def open(self) -> None:
        if self.gate is not None:
            self.gate.open.set()

    def end(self, *, cleanly: bool) -> None:
        attempt = self.attempt
        if attempt is None:
            return
        if cleanly:
            self.settle()
        else:
            self.store_weather.dead = self.disk_weather.dead = True
        self.open()
        self.hear()
        _let_go(attempt)
        self.hear()
        self.attempt, self.handles = None, []

    # ---- others

    def elsewhere(self) -> None:
        """Another machine claims and commits; then what is on this disk is history."""
        other = begin(self.memory, None)
        self.found(other.restored, here=False)
        self.number += 1
        other.save(self.number)
        other.close()
        self.forbidden |= set(range(other.restored + 1, self.number))
        self.floor, self.reported = self.number, -1
        assert garbage(self.memory) == set()

    def promote(self) -> None:
        if read_truth(self.memory, RUN_ID).head is None:
            return
        local = self.local
        made = Tier.__init__

        def init(tier: Tier, options: LocalTier, run_id: str) -> None:
            made(tier, options, run_id)
            tier.store = FaultyStore(self.disk, Weather())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tier, "__init__", init)
            try:
                ref = promote_staged(self.memory, local, open_home=no_home, clock=FakeClock(), tokens=random_token)
            except UsageError:
                assert self.attempt is not None, "nobody holds the disk"
                return
            except HoldfastError:
                return
        if ref is not None:
            assert self.attempt is None
            self.found(ref.step, here=True)
            self.floor = max(self.floor, ref.step)

    def rollback(self) -> None:
        """By hand, to the older of two; every attempt is over then."""
        head = read_truth(self.memory, RUN_ID).head
        if head is None or len(head.checkpoints) < 2:
            return
        target = head.checkpoints[-2].step
        rollback(self.memory, target, open_home=no_home, clock=FakeClock(), tokens=random_token)
        self.forbidden |= set(range(target + 1, self.number + 1))
        self.floor, self.reported = target, -1


@pytest.mark.parametrize("outlives", [False, True])
@settings(
    max_examples=600 if SCALE > 1 else 40, deadline=None, derandomize=SCALE == 1,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
def test_any_history(outlives: bool, data: st.DataObject) -> None:
    actions = data.draw(st.lists(st.sampled_from(_ACTIONS), min_size=4, max_size=25))
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), outlives)
        try:
            for action in actions:
                _do(world, action, data)
            world.end(cleanly=False)
            world.elsewhere()
            last = world.running()
            assert last.restored == world.floor
            last.save(world.number + 1, finish=True)
            world.end(cleanly=True)
            assert garbage(world.memory) == set()
            assert list(world.disk.list()) == []
        finally:
            world.store_weather.dead = world.disk_weather.dead = True
            world.open()
            if world.attempt is not None:
                _let_go(world.attempt)


def _do(world: World, action: str, data: st.DataObject) -> None:
    few = st.integers(0, 12)
    match action:
        case "stage":
            world.stage()
        case "settle":
            world.settle()
        case "gate":
            world.running()
            assert world.gate is not None
            # Direct saves wait for the gate too, and this is one thread: so the disk must work meanwhile.
            if not world.disk_weather.due and not world.store_weather.is_down and _uses_disk(world):
                world.gate.open.clear()
        case "crash":
            world.end(cleanly=False)
        case "crash soon":
            world.open()
            world.running()
            weather = data.draw(st.sampled_from(["store", "disk"]))
            (world.store_weather if weather == "store" else world.disk_weather).dies_in = data.draw(few)
            world.stage()
            world.settle()
            world.end(cleanly=False)
        case "elsewhere":
            world.settle()
            world.elsewhere()
            if world.attempt is not None:
                world.handles = []
                _assert_fenced(world.attempt, world)
        case "promote":
            world.promote()
        case "rollback":
            world.end(cleanly=True)
            world.rollback()
        case "store fault":
            world.running()
            world.store_weather.due.append((data.draw(few), data.draw(st.sampled_from(_STORE_FAULTS))))
        case "store down":
            world.running()
            world.store_weather.is_down = not world.store_weather.is_down
        case "disk fault":
            world.open()
            world.running()
            world.disk_weather.due.append((data.draw(few), data.draw(st.sampled_from(_DISK_FAULTS))))
        case "finish cleanly":
            world.end(cleanly=True)


def _rest(attempt: Attempt) -> None:
    """Until nothing is under way any more, or who would do it is dead."""
    saver = attempt.saver
    assert saver._drain_snapshots(60)
    assert saver._tiers is not None
    promoter = saver._tiers._promoter
    while promoter._thread.is_alive() and not promoter.drain(0.02):
        pass


def _let_go(attempt: Attempt) -> None:
    """The lock goes with the process, and so do the threads that play it."""
    saver = attempt.saver
    with suppress(Dead):
        saver.close(60)
    saver._hashing.shutdown(wait=False)
    saver._sending.shutdown(wait=False)
    assert attempt.tier is not None
    attempt.tier.close()


def _uses_disk(world: World) -> bool:
    attempt = world.attempt
    assert attempt is not None
    assert attempt.saver._tiers is not None
    return not attempt.saver._tiers._is_off


def _assert_fenced(attempt: Attempt, world: World) -> None:
    """Its next save fails, and it is told."""
    world.store_weather.is_down, world.store_weather.due, world.disk_weather.due = False, [], []
    before = read_truth(world.memory, RUN_ID).head
    handle = attempt.saver.save(request(state(99), 99))
    _rest(attempt)
    if not world.outlives:
        with pytest.raises(Fenced):
            handle.wait(60)
    with pytest.raises(Fenced):
        attempt.warnings()
    assert read_truth(world.memory, RUN_ID).head == before
    world.store_weather.dead = world.disk_weather.dead = True
    _let_go(attempt)
    world.attempt, world.handles = None, []
