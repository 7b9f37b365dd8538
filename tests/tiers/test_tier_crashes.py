"""A process that ends before and after every operation of the store and of the disk: claiming, staging, promoting, restoring from
the disk, adopting, tidying, and promoting what another one has left."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from interleaved import RUN_ID, FakeClock, no_home
from parts import garbage
from two_tiers_parts import Attempt, Gate, assert_disk_holds_newest, begin, newest_in_store

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.runs.promote_staged import promote_staged
from holdfast.checkpoint.tier import LocalTier, Tier
from holdfast.core.errors import StoreUnavailable
from holdfast.core.events import Event
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.testing.faulty_store import METHODS, WRITES, Fault, FaultyStore, KillSwitch, Operation

# The children that are forked use nothing that threads of this process may hold.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("small_chunks", "no_flush"),
]

_KILLED = 9
_BROKEN = 1
_FOLLOWING = 19
_LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


def _counted(after: bool) -> frozenset[str]:
    """Before a read there is what was there after the write before it, and after a write what is there before the next one; but
    whoever has put a head, and does not know it yet, is worth a try each time."""
    return METHODS if _LONG else frozenset({"put_new"}) if after else WRITES


@dataclass
class Site:
    """A store and a machine with a disk. `staged` and `committed`: the newest that was reported; `most`: that was begun."""

    folder: Path
    staged: int = -1
    committed: int = -1
    most: int = -1

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "store")

    @property
    def local(self) -> LocalTier:
        return LocalTier(self.folder / "disk")

    def copy(self, to: Path) -> Site:
        shutil.copytree(self.folder, to)
        return Site(to, self.staged, self.committed, self.most)

    def heard(self, what: str, number: int) -> None:
        if what == "staged":
            self.staged = max(self.staged, number)
        elif what == "committed":
            self.committed = max(self.committed, number)
        elif what == "begun":
            self.most = max(self.most, number)


@dataclass
class Story:
    """What a process does with a store and a disk, each behind a switch that may end it. It tells what it has come to."""

    site: Site
    store: Store
    wrap: Callable[[Store], Store]
    tell: Callable[[str, int], None]
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(self.store)

    def also(self, event: Event) -> None:
        if event.name in ("save.staged", "save.committed"):
            self.tell(event.name.removeprefix("save."), event.fields["step"])

    def begin(self) -> Attempt:
        return begin(self.gate, self.site.local, wrap=self.wrap, also=self.also)

    def train(self) -> None:
        """Two plain saves, then three of which one is on its way and one is replaced, then the last one marks the end."""
        attempt = self.begin()
        for number in (1, 2):
            self.tell("begun", number)
            attempt.save(number)
        self.gate.open.clear()
        for number in (4, 5, 6):
            self.tell("begun", number)
            attempt.stage(number)
        self.gate.open.set()
        assert attempt.saver.drain(60)
        self.tell("begun", 7)
        attempt.save(7)
        attempt.close()

    def go_on(self) -> None:
        """Resume from what an earlier attempt has staged, and save twice."""
        attempt = self.begin()
        assert attempt.staged is not None
        self.gate.open.clear()
        self.tell("begun", 8)
        attempt.stage(8)
        self.gate.open.set()
        assert attempt.saver.drain(60)
        self.tell("begun", 9)
        attempt.save(9)
        attempt.close()

    def promote(self) -> None:
        """`holdfast checkpoints promote`."""
        made, Tier.__init__ = Tier.__init__, _wrapping(Tier.__init__, self.wrap)  # type: ignore[method-assign]
        try:
            ref = promote_staged(self.store, self.site.local, open_home=no_home, clock=FakeClock(), tokens=random_token)
        finally:
            Tier.__init__ = made  # type: ignore[method-assign]
        assert ref is not None
        self.tell("committed", ref.step)


def _wrapping(init: Callable[..., None], wrap: Callable[[Store], Store]) -> Callable[..., None]:
    def make(tier: Tier, options: LocalTier, run_id: str) -> None:
        init(tier, options, run_id)
        tier.store = wrap(tier.store)

    return make


def _in_child(site: Site, act: str, where: str, at_number: int | None, after: bool) -> tuple[int, dict[str, int]]:
    """Act in a forked process: its exit status; how many operations there were, by place and method, if it came to its end."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = _BROKEN
        try:

            def tell(what: str, number: int) -> None:
                os.write(write_end, f"{what} {number}\n".encode())

            def die() -> None:
                os._exit(_KILLED)

            def switch(place: str, inner: Store) -> KillSwitch:
                at = at_number if place == where else None
                return KillSwitch(inner, die, at_number=at, after=after, methods=_counted(after))

            store, disks = switch("store", site.store), []

            def wrap(inner: Store) -> Store:
                disks.append(switch("disk", inner))
                return disks[-1]

            getattr(Story(site, store, wrap, tell), act)()
            tell("store", store.counted)
            tell("disk", sum(disk.counted for disk in disks))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    counted: dict[str, int] = {}
    with os.fdopen(read_end) as pipe:
        for line in pipe:
            what, number = line.split()
            site.heard(what, int(number))
            counted[what] = int(number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), counted


def _attack(template: Site, act: str, scratch: Path) -> None:
    for after in (False, True):
        whole = template.copy(scratch / f"whole-{after}")
        status, counted = _in_child(whole, act, "", None, after)
        assert status == 0
        _check(whole, scratch / "check")
        assert after or counted["store"] > 4
        for where in ("store", "disk"):
            # Every second place is one in each phase; the few after a head is put are all tried.
            for number in range(0, counted[where], 1 if _LONG or after else 2):
                site = template.copy(scratch / "site")
                status, _ = _in_child(site, act, where, number, after)
                # Two threads send objects, so that the last operations may be fewer this time.
                assert status == _KILLED or number > counted[where] - 3
                _check(site, scratch / "check")
                shutil.rmtree(site.folder)


def _check(site: Site, scratch: Path) -> None:
    """What is found on this machine and on another; each goes on and clears away; who was overtaken lets go of what is staged."""
    elsewhere, here = site.copy(scratch / "elsewhere"), site.copy(scratch / "here")
    other = begin(elsewhere.store, None)
    assert site.committed <= other.restored <= site.most
    assert other.fallbacks == []
    _go_on(other)
    late = begin(elsewhere.store, elsewhere.local)
    assert (late.restored, late.fallbacks) == (_FOLLOWING, []), "what another machine has committed is the truth"
    late.close()
    same = begin(here.store, here.local)
    assert max(site.committed, site.staged) <= same.restored <= site.most
    assert same.fallbacks == []
    assert same.saver.drain(60)
    assert newest_in_store(here.store) == same.restored, "what was resumed from is committed"
    _go_on(same)
    assert_disk_holds_newest(same, here.local)
    done = begin(here.store, here.local)
    assert done.restored == _FOLLOWING
    done.save(_FOLLOWING + 1, finish=True)
    done.close()
    assert not any(Path(here.local.folder).iterdir()), "a finished run leaves nothing on the disk"
    shutil.rmtree(scratch)


def _go_on(attempt: Attempt) -> None:
    attempt.save(_FOLLOWING)
    attempt.close()
    assert attempt.warnings() == []
    assert newest_in_store(attempt.store) == _FOLLOWING
    assert garbage(attempt.store) == set()


@pytest.fixture
def left_staged(tmp_path: Path) -> Site:
    """Save 2 is committed; save 4 lies on the disk, all of it was uploaded, and the process ended before a head named it."""
    site = Site(tmp_path / "template", staged=4, committed=2, most=4)
    attempt = begin(site.store, site.local)
    for number in (1, 2):
        attempt.save(number)
    attempt.close()
    heads = len(list(site.store.list("heads/")))

    def no_more_heads(operation: Operation) -> Fault | None:
        return Fault.UNAVAILABLE_BEFORE if operation.method == "put_new" and heads_before_stop[0] else None

    heads_before_stop = [False]
    store = FaultyStore(site.store, no_more_heads)
    attempt = begin(store, site.local)
    heads_before_stop[0] = True
    handle = attempt.stage(4)
    with pytest.raises(Exception, match="the save of step 4 failed") as failed:
        handle.wait(60)
    assert isinstance(failed.value.__cause__, StoreUnavailable)
    attempt.close()
    assert len(list(site.store.list("heads/"))) == heads + 1
    head = read_truth(site.store, RUN_ID).head
    assert head is not None
    assert head.checkpoints[-1].step == 2
    return site


def test_killed_while_training(tmp_path: Path) -> None:
    _attack(_empty(tmp_path), "train", tmp_path)


def _empty(tmp_path: Path) -> Site:
    site = Site(tmp_path / "template")
    (site.folder / "disk").mkdir(parents=True)
    return site


def test_killed_while_going_on_from_the_disk(tmp_path: Path, left_staged: Site) -> None:
    _attack(left_staged, "go_on", tmp_path)


def test_killed_while_promoting_for_another(tmp_path: Path, left_staged: Site) -> None:
    _attack(left_staged, "promote", tmp_path)
