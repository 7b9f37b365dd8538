"""Many runs under one controller: killed at its requests, its index kept, deleted, rolled back or damaged; two at once; and what
hurts one run hurts no other."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_of_worlds import FleetOfWorlds, damaged
from fleet_stories import NAMES, SCRIPTS, scenario
from fleet_world import FusedStore, World, standing_pools
from imagined import Fuse

from holdfast.core.clock import SystemClock
from holdfast.core.errors import ProviderError, StoreUnavailable
from holdfast.core.launches import CANCEL_KEY, Cancel, answer_key
from holdfast.core.sealed import seal
from holdfast.fleet.crew import run_fleet
from holdfast.fleet.home import Home
from holdfast.fleet.index import Index
from holdfast.fleet.lookout import Lookout
from holdfast.fleet.pace import FleetPace, Pace
from holdfast.fleet.records import WORDS
from holdfast.fleet.view import Listed
from holdfast.provider.base import Machine, Wanted
from holdfast.store.base import Body, Entry
from holdfast.store.memory import MemoryStore

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
WARM_S = 250
"""Machines work by then, and their grants of 900 s are not renewed for some minutes."""
WAYS = ("kept", "deleted", "rolled back", "damaged")


class Indexes:
    """One index file for the controllers of a play; what happens to it between two of them."""

    def __init__(self, path: Path, way: str) -> None:
        self.path, self._way, self._made = path, way, 0
        self.said: list[str] = []

    def __call__(self) -> Index:
        files = [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]
        early = self.path.with_suffix(".early")
        if self._made == 0:
            for each in files:
                each.unlink(missing_ok=True)
            early.unlink(missing_ok=True)
        elif self._way == "deleted":
            for each in files:
                each.unlink(missing_ok=True)
        elif self._way == "rolled back" and early.exists():
            for each in files:
                each.unlink(missing_ok=True)
            shutil.copy(early, self.path)
        elif self._way == "damaged" and self.path.exists():
            damaged(self.path)
        self._made += 1
        return Index(self.path, say=self.said.append)

    def remember(self) -> None:
        """An earlier copy, as a backup would have it."""
        early = self.path.with_suffix(".early")
        if not early.exists() and self.path.exists():
            shutil.copy(self.path, early)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_its_requests(name: str, tmp_path: Path) -> None:
    fuse, fleet = Fuse(), FleetOfWorlds([scenario(name)])
    script = SCRIPTS.get(name, lambda world: None)
    overs = fleet.play(script, fuse=fuse, index=lambda: Index(tmp_path / "counted.sqlite"))
    assert overs["run"].outcome == "done"
    fleet.check_end()
    count = fuse.count
    points = range(count) if LONG else sorted({*range(3, 35, 4), *range(35, count, max(1, count // 6))})
    for number, at in enumerate(points):
        for after in (False, True) if LONG else (number % 2 == 0,):
            way = WAYS[(number // 2 + NAMES.index(name)) % len(WAYS)]
            indexes = Indexes(tmp_path / "index.sqlite", way)
            fleet = FleetOfWorlds([scenario(name)])

            def play(world: World, indexes: Indexes = indexes) -> None:
                indexes.remember()
                script(world)

            overs = fleet.play(play, fuse=Fuse(at, after=after), index=indexes)
            assert overs["run"].outcome == "done", (name, at, after, way, overs, fleet.story())
            fleet.check_end()


def test_two_controllers_with_an_index_each(tmp_path: Path) -> None:
    """Two laptops on three runs, at work all the time; one index is thrown away now and then."""
    for seed in range(6 if LONG else 2):
        worlds = [World(pools=standing_pools(3), seed=seed, run_id=f"run-{i}", work_s=900 + 300 * i) for i in range(3)]
        fleet = FleetOfWorlds(worlds)
        paths = [tmp_path / f"{seed}-{i}.sqlite" for i in range(2)]
        both = [fleet.controller(index=Index(path)) for path in paths]
        for turn in range(2000):
            for world in worlds:
                SCRIPTS["handed over"](world)
            for each in both if turn % 2 else reversed(both):
                each.turn()
                fleet.check()
            if turn % 20 == 19:
                both[0].leave()
                paths[0].unlink()
                both[0] = fleet.controller(index=Index(paths[0]))
            if not list(fleet.home.list("runs/")):
                break
            fleet.advance(10)
        fleet.check_end()
        assert {over.outcome for over in fleet.overs().values()} == {"done"}
        for world in worlds:
            tokens = [machine.token for machine in world.cloud.machines_]
            assert len(tokens) == len(set(tokens))
        for each in both:
            each.leave()


def test_without_an_inbox_it_is_slower_and_never_wrong() -> None:
    """Machines that may not write there, and one whose news are lost now and then."""
    took: dict[bool, float] = {}
    for rings in (True, False):
        fleet = FleetOfWorlds([World(run_id=f"run-{i}") for i in range(2)], rings=rings)
        began_s = fleet.clock.unix_s()
        overs = fleet.play(SCRIPTS["handed over"])
        assert {over.outcome for over in overs.values()} == {"done"}
        fleet.check_end()
        assert all(len(world.cloud.machines_) == 3 for world in fleet.worlds)
        took[rings] = fleet.clock.unix_s() - began_s
    assert took[True] <= took[False]


class Counting(MemoryStore):
    """Counts requests by kind, to the home and to the runs."""

    def __init__(self, inner: MemoryStore, counts: Counter[str], where: str) -> None:
        super().__init__()
        self._contents, self._counts, self._where = inner._contents, counts, where

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self._counts[f"get {self._where}"] += 1
        return super().get(key, max_bytes=max_bytes)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self._counts[f"list {self._where}"] += 1
        return super().list(prefix)

    def put(self, key: str, body: Body) -> None:
        self._counts[f"put {self._where}"] += 1
        super().put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        self._counts[f"put {self._where}"] += 1
        return super().put_new(key, body)

    def delete(self, key: str) -> None:
        self._counts[f"delete {self._where}"] += 1
        super().delete(key)


def steady_minute(runs: int) -> Counter[str]:
    """What is asked of the stores in a minute in which nothing happens, with the usual pace."""
    fleet = FleetOfWorlds([World(run_id=f"run-{i}", work_s=4 * 3600) for i in range(runs)], pace=FleetPace())
    controller, counts = fleet.controller(), Counter[str]()
    for _ in range(WARM_S):
        controller.turn()
        fleet.advance(1)
    assert all(world.working() is not None for world in fleet.worlds), fleet.story()
    # From here on machines say nothing, and no grant comes to be renewed.
    controller._home = Home(Counting(fleet.home, counts, "home"), clock=fleet.clock, tokens=lambda: "t")
    for care in controller._cares.values():
        assert care.adopted is not None
        records = care.adopted.controller._records
        records._store = Counting(records._store, counts, "runs")  # type: ignore[arg-type]
    for second in range(60):
        assert all(world.working() is not None for world in fleet.worlds)
        controller.turn()
        fleet.clock.advance(1)
        assert controller.counts["failures"] == 0, second
    return counts


def test_a_steady_minute_costs_so_many_requests() -> None:
    """Exactly: 60 lists of the inbox, 4 of the runs, 2 pulses; and for each run 4 turns of three lists and one machine's pulse.
    Lists of machines and prices cost the store nothing."""
    for runs in (20, 40):
        counts = steady_minute(runs)
        assert counts["list home"] == 60 + 4
        assert counts["put home"] == 2
        assert counts["get home"] == 0
        assert counts["list runs"] == 4 * 3 * runs
        assert counts["get runs"] == 4 * runs
        assert counts["put runs"] == 0


def test_a_run_that_always_fails_holds_up_no_other() -> None:
    """By a flaw, by a store that is away, by a record that was altered: it is said, tried again less and less often, and well
    again as soon as it can be."""
    worlds = [World(run_id=name, work_s=900) for name in ("good", "flawed", "away")]
    fleet = FleetOfWorlds(worlds)
    controller = fleet.controller()
    flawed, away = fleet.by_id["flawed"], fleet.by_id["away"]
    request, inner = flawed.cloud.request, away.store
    tries: Counter[str] = Counter()

    def broken(order: Any) -> Any:
        tries["flawed"] += 1
        raise AssertionError("a flaw")

    flawed.cloud.request = broken  # type: ignore[method-assign]

    original = FusedStore.list

    def list_of(self: FusedStore, prefix: str = "") -> Iterator[Entry]:
        if self._contents is inner._contents:
            tries["away"] += 1
            raise StoreUnavailable("the bucket is away")
        return original(self, prefix)

    FusedStore.list = list_of  # type: ignore[method-assign]
    try:
        for _ in range(200):
            controller.turn()
            fleet.check()
            fleet.advance(10)
        assert "good" in controller.over
        assert sorted(controller.run_ids()) == ["away", "flawed"]
        # 2,000 s: seven tries while the back-off grows, and one a minute then.
        assert 20 < tries["flawed"] < 45
        assert 20 < tries["away"] < 45
        assert controller.counts["flaws"] == tries["flawed"]
        assert len([line for line in fleet.said if "a flaw" in line]) == 1
        assert len([line for line in fleet.said if "the bucket is away" in line]) == 1
    finally:
        FusedStore.list = original  # type: ignore[method-assign]
    flawed.cloud.request = request  # type: ignore[method-assign]
    for _ in range(400):
        controller.turn()
        fleet.advance(10)
        if not controller.run_ids():
            break
    fleet.check_end()
    assert {over.outcome for over in fleet.overs().values()} == {"done"}


def test_one_list_of_machines_for_all_runs() -> None:
    """A lookout that several runs share asks once; a list that fails is said once; a list never looks younger than it is."""
    world = World(cloud_options={"list_delay_s": 0})
    lookout = Lookout(world.cloud, "fleet", clock=world.clock, pace=Pace(), say=(said := []).append)
    asked: Counter[str] = Counter()
    machines, offers, bill = world.cloud.machines, world.cloud.offers, world.cloud.bill

    def slowly(fleet: str, run_id: str | None = None) -> Any:
        asked["machines"] += 1
        found = machines(fleet, run_id)
        world.clock.advance(7)
        return found

    def failing(*_: object) -> Any:
        asked["machines"] += 1
        raise ProviderError("503")

    def priced(wanted: Wanted) -> Any:
        asked["offers"] += 1
        return offers(wanted)

    def billed(machine: Machine) -> Any:
        asked["bill"] += 1
        return bill(machine)

    world.cloud.machines, world.cloud.offers, world.cloud.bill = slowly, priced, billed  # type: ignore[method-assign]
    lookout.want(Wanted())
    lookout.want(Wanted(cpus=4))
    assert lookout.listed("run") is None
    asked_s = world.cloud.now_s
    assert lookout.look_for_machines()
    assert not lookout.look_for_machines()
    assert lookout.look_for_offers()
    assert not lookout.look_for_offers()
    assert lookout.listed("run") == lookout.listed("another") == Listed(asked_s, ())
    assert asked == {"machines": 1, "offers": 2}
    world.cloud.machines = failing  # type: ignore[method-assign]
    for _ in range(20):
        world.clock.advance(5)
        assert not lookout.look_for_machines()
    assert lookout.listed("run") == Listed(asked_s, ()), "no list is no empty list"
    assert len(said) == 1
    world.cloud.machines = machines  # type: ignore[method-assign]
    world.clock.advance(15)
    assert lookout.look_for_machines()
    assert len(said) == 2
    controller = world.controller()
    for _ in range(3):
        controller.step()
        world.cloud.advance(10)
    (machine,) = world.cloud.machines("fleet")
    asked.clear()
    assert lookout.meter(machine) is not None
    for _ in range(59):
        assert lookout.meter(machine) is None
        world.clock.advance(1)
    world.clock.advance(1)
    assert lookout.meter(machine) is not None
    assert asked["bill"] == 2


def test_nothing_is_done_on_what_was_known_before() -> None:
    """News are lost, and a list shows that the machine is gone: what it said before it went decides, not the list alone."""
    fleet = FleetOfWorlds([World(work_s=600)], rings=False, pace=FleetPace(reads_per_s=0.001))
    (world,) = fleet.worlds
    controller = fleet.controller()
    fleet_turns = 0
    while not controller.over:
        controller.turn()
        fleet.advance(1)
        fleet_turns += 1
        assert fleet_turns < 3000, fleet.story()
    assert len(world.cloud.machines_) == 1
    assert controller.over["run"].outcome == "done"
    fleet.check_end()


def test_a_sleep_that_the_monotonic_clock_does_not_know() -> None:
    """A laptop's lid: the time of day jumps by an hour. Meanwhile another controller has renewed the grant, and nobody is ended."""
    world = World(work_s=2 * 3600)
    sleeper = world.controller()
    for _ in range(60):
        sleeper.step()
        world.cloud.advance(10)
    other = world.controller()

    class Asleep:
        """Of the one who sleeps: it has missed what the other one saw."""

        def __init__(self) -> None:
            self.at_s = sleeper._read_at_s[0]

        def monotonic_s(self) -> float:
            return self.at_s

        def unix_s(self) -> float:
            return world.clock.unix_s()

        def sleep(self, seconds: float) -> None:
            raise AssertionError("it does not wait")

    for _ in range(360):
        other.step()
        world.cloud.advance(10)
    sleeper._clock = sleeper._lookout._clock = Asleep()
    sleeper.step()
    world.check()
    machine = world.working()
    assert machine is not None
    assert machine.ending_at_s is None


def test_the_threads_finish_what_they_have_begun() -> None:
    """A create call that hangs holds up its own run and no other; who is told to leave waits for it."""
    worlds = [World(run_id=name) for name in ("hangs", "goes-on", "goes-on-too")]
    fleet = FleetOfWorlds(
        worlds, pace=FleetPace(run=Pace(list_s=0.2, offers_s=0.2), hear_s=0.05, roll_s=0.1, beat_s=0.2)
    )
    fleet.clock = SystemClock()  # type: ignore[assignment]
    for world in worlds:
        world.clock = fleet.clock  # type: ignore[assignment]
        world.cloud.clock = fleet.clock  # type: ignore[assignment]
    controller = fleet.controller()
    hanging, go, leaving = threading.Event(), threading.Event(), threading.Event()
    create = worlds[0].cloud.create

    def hang(request: Any) -> Any:
        hanging.set()
        assert go.wait(60)
        return create(request)

    worlds[0].cloud.create = hang  # type: ignore[method-assign]
    done = threading.Event()

    def run() -> None:
        run_fleet(controller, leaving.is_set, pace=fleet.pace, say=fleet.said.append, workers=2)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert hanging.wait(60)
    give_up_s = time.monotonic() + 60
    while not all(world.cloud.machines_ for world in worlds[1:]):
        assert time.monotonic() < give_up_s, fleet.said
        time.sleep(0.01)
    leaving.set()
    assert not done.wait(0.3)
    go.set()
    thread.join(60)
    assert done.is_set()
    assert worlds[0].store.get(answer_key(1), max_bytes=1 << 20), "its answer was written before it left"
    controller.leave()
    assert not list(fleet.home.list("controllers/"))


def test_news_come_and_go() -> None:
    """A new run is taken on, and a cancelled one ended, as soon as word comes; old news are removed, and what is none of ours."""
    fleet = FleetOfWorlds([World(run_id="first")], pace=FleetPace(keep_news_s=60))
    controller = fleet.controller()
    home = Home(fleet.home, clock=fleet.clock, tokens=lambda: "t")
    fleet.home.put("inbox/whatever", b"")
    fleet.home.put("inbox/nobody.00000001.000000", b"")
    controller.turn()
    late = World(run_id="second")
    late.clock = late.cloud.clock = fleet.clock
    fleet.worlds = [*fleet.worlds, late]
    fleet.by_id["second"] = late
    fleet.advance(2)
    assert controller.run_ids() == ["first"]
    controller._adopt = fleet.controller()._adopt
    fleet.enrol(late)
    home.ring("second", "enrolled")
    fleet.advance(1)
    controller.turn()
    assert controller.run_ids() == ["first", "second"], "long before the roll is called again"
    fleet.advance(1)
    controller.turn()
    assert late.cloud.machines_
    late.store.put_new(CANCEL_KEY, seal(Cancel(format=1, nonce="n", now=True, reason="enough", at_unix_s=0.0)))
    home.ring("second", "cancelled")
    fleet.advance(1)
    controller.turn()
    assert late.cloud.machines_[0].ending_at_s is not None
    for _ in range(100):
        fleet.advance(1)
        controller.turn()
    assert fleet.overs_of("second").outcome == "cancelled"
    assert not [key for key in home.news() if not key.startswith("inbox/first")]


def test_how_it_ended_is_written_before_its_entry_is_removed() -> None:
    """Whoever looks in between sees a run twice, and never one that was there and is nowhere."""
    fleet = FleetOfWorlds([World(work_s=300)])
    done: list[str] = []

    class Noting(MemoryStore):
        def put_new(self, key: str, body: bytes) -> bool:
            done.append(f"put {key}")
            return super().put_new(key, body)

        def delete(self, key: str) -> None:
            done.append(f"delete {key}")
            super().delete(key)

    noting = Noting()
    noting._contents = fleet.home._contents
    controller = fleet.controller()
    controller._home = Home(noting, clock=fleet.clock, tokens=lambda: "t")
    while controller.run_ids() or not controller.over:
        controller.turn()
        fleet.advance(10)
    assert [each for each in done if "inbox" not in each] == ["put over/run", "delete runs/run"]


def test_word_of_a_word_costs_three_requests() -> None:
    """A list of what machines say, the word, and the pulse beside it. Where nothing new is said, pulses are not read."""
    fleet = FleetOfWorlds([World(work_s=4 * 3600)], pace=FleetPace(reads_per_s=0.001))
    (world,) = fleet.worlds
    controller = fleet.controller()
    for _ in range(WARM_S):
        controller.turn()
        fleet.advance(1)
    machine = world.working()
    assert machine is not None
    counts: Counter[str] = Counter()
    (care,) = controller._cares.values()
    assert care.adopted is not None
    records = care.adopted.controller._records
    records._store = Counting(records._store, counts, "run")  # type: ignore[arg-type]
    machine.say("withdrawn")
    controller.turn()
    assert counts == {"list run": 1, "get run": 2}
    assert list(records.read(WORDS)) == []
    assert counts == {"list run": 2, "get run": 2}
