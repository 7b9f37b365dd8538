"""What a standby fetches ahead: a real training is restored from it, whatever happens to it, and nothing waits for it."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents import GIVE_UP_S, eventually, read_until
from mirror_parts import Machine as Mirrored

import holdfast
from holdfast.agent.machine import ahead as module
from holdfast.agent.machine.ahead import Ahead
from holdfast.checkpoint import pack
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.near import near_disk
from holdfast.checkpoint.retain import read_root
from holdfast.core.clock import Clock, SystemClock
from holdfast.core.contract import ENV_STAGED, Phase, Progress
from holdfast.store.base import Body, Entry, Store
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, seeded

ARRAYS, LENGTH, PIECE_BYTES = 5, 9_000, 30_000


class Far:
    """A store behind a network, as far as anybody can tell. `reads`: keys of data that were asked for."""

    is_near = False

    def __init__(self, inner: Store, before: Callable[[str], None] = lambda key: None) -> None:
        self._inner, self.before, self.reads = inner, before, list[str]()
        self.url = inner.url

    def put(self, key: str, body: Body) -> None:
        self._inner.put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        return self._inner.put_new(key, body)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._inner.get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.reads.append(key)
        self.before(key)
        self._inner.read_into(key, offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def close(self) -> None:
        """It is used on."""


class Weights:
    """Each step changes one of them, so that a checkpoint's objects come from many saves."""

    def __init__(self) -> None:
        self.arrays = {f"a{number}": np.zeros(LENGTH) for number in range(ARRAYS)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.arrays)

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            self.arrays[name][:] = value

    def step(self, number: int) -> None:
        self.arrays[f"a{number % ARRAYS}"][:] += np.random.default_rng(number).random(LENGTH)


class Killed(Exception):
    """The machine is gone, after everything that was under way is durable."""


def train(store: Store, until: int, *, keep: int = 2) -> Weights:
    """One attempt, from wherever the store and this machine's disk have it, killed after so many steps."""
    weights = Weights()
    try:
        with holdfast.Run(
            "./run", save_every="1 step", keep=keep, progress=False, notice=None, open_store=lambda url, options=None: store
        ) as run:  # fmt: skip
            run.track(weights=weights)
            for _ in run.batches(range(1000)):
                if run.step == until:
                    raise Killed
                weights.step(run.step)
    except Killed:
        return weights
    raise AssertionError("it was not killed")


def restored(store: Store) -> tuple[int, Weights]:
    """What the next attempt begins with."""
    weights = Weights()
    with holdfast.Run(
        "./run", progress=False, notice=None, open_store=lambda url, options=None: store
    ) as run:  # fmt: skip
        run.track(weights=weights)
        run.restore()
        return run.step, weights


def expected(steps: int) -> Weights:
    weights = Weights()
    for number in range(steps):
        weights.step(number)
    return weights


def same(one: Weights, other: Weights) -> bool:
    return all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def needed(store: Store) -> set[str]:
    head = read_truth(store).head
    assert head is not None
    return set(read_root(store, head.checkpoints[-1]).objects)


def on_disk(folder: Path) -> set[str]:
    return {entry.key for entry in LocalStore(folder).list()}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several objects for each save, and several pieces for each object."""
    monkeypatch.setattr(pack, "OBJECT_BYTES", 100_000)
    monkeypatch.setattr(module, "_PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(module, "_CLOSE_S", 20.0)


@pytest.fixture
def source() -> Store:
    store = MemoryStore()
    train(store, 7)
    assert len(needed(store)) >= 3
    return store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENV_STAGED, str(tmp_path / "machine" / "staged"))
    return tmp_path / "machine" / "staged"


class Standby:
    """`with`: it waits at the gate."""

    def __init__(self, store: Store, folder: Path, clock: Clock | None = None, **options: Any) -> None:
        self.said = list[str]()
        self.ahead = Ahead(store, folder, clock=clock or SystemClock(), say=self.said.append, look_s=0.01, **options)

    def is_whole(self) -> bool:
        return any("restored ahead: step" in line for line in self.said)


def staged(store: Store, folder: Path) -> Standby:
    """All that there is, and the gate is open."""
    standby = Standby(store, folder)
    with standby.ahead.beside_waiting():
        eventually(standby.is_whole)
    return standby


def test_what_was_fetched_ahead_is_not_fetched_again(source: Store, folder: Path) -> None:
    far = Far(source)
    standby = staged(far, folder)
    assert standby.ahead.environment == {ENV_STAGED: str(folder)}
    assert on_disk(folder) == needed(source) == set(far.reads)
    far.reads.clear()
    far.before = lambda key: pytest.fail("an object that lies on the disk was fetched")
    step, weights = restored(far)
    assert (step, same(weights, expected(7))) == (7, True)
    assert not far.reads
    # The command is told of by its progress; until it has a checkpoint of its own, a restart reads here again.
    standby.ahead.look(Progress(2, 7, 7, -1, Phase.TRAINING))
    assert on_disk(folder) == needed(source)
    standby.ahead.look(Progress(2, 9, 7, 8, Phase.TRAINING))
    eventually(lambda: not folder.exists())
    standby.ahead.close()


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "deleted", "linked", "a folder"])
def test_what_is_not_as_it_should_be_comes_from_the_store(
    source: Store, folder: Path, harm: str, tmp_path: Path
) -> None:
    far = Far(source)
    standby = staged(far, folder)
    far.reads.clear()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        body = path.read_bytes()
        if harm == "flipped":
            path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        elif harm == "cut":
            path.write_bytes(body[: len(body) // 2])
        elif harm == "emptied":
            path.write_bytes(b"")
        else:
            path.unlink()
            if harm == "linked":
                (tmp_path / path.name).write_bytes(body)
                path.symlink_to(tmp_path / path.name)
            elif harm == "a folder":
                path.mkdir()
    step, weights = restored(far)
    assert (step, same(weights, expected(7))) == (7, True)
    assert set(far.reads) == needed(source)
    standby.ahead.close()
    assert not folder.exists()


def test_it_follows_the_head_and_keeps_only_what_the_newest_needs(source: Store, folder: Path) -> None:
    """The machine before trains on; what it sweeps away may be under way here."""
    far = Far(source)
    standby = Standby(far, folder)
    with standby.ahead.beside_waiting():
        for until in (9, 12, 16, 25):
            standby.said.clear()
            train(source, until, keep=1)
            eventually(standby.is_whole)
            eventually(lambda: on_disk(folder) == needed(source))
        # Between the last look and the opening comes its last save.
        standby.said.clear()
        train(source, 26, keep=1)
    eventually(standby.is_whole)
    assert on_disk(folder) == needed(source)
    for key in needed(source):
        assert far.reads.count(key) == -(-(folder / key).stat().st_size // PIECE_BYTES), "each was fetched once"
    far.reads.clear()
    step, weights = restored(far)
    assert (step, same(weights, expected(26))) == (26, True)
    assert not far.reads
    standby.ahead.close()


class Announced(Far):
    """Says when a head is about to be put, and waits for a word."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.comes, self.may = threading.Event(), threading.Event()

    def put_new(self, key: str, body: bytes) -> bool:
        if key.startswith("heads/") and b'"kind":"save"' in body:
            self.comes.set()
            assert self.may.wait(GIVE_UP_S)
        return super().put_new(key, body)


def test_a_save_that_is_being_made_is_fetched_before_a_head_names_it(source: Store, folder: Path) -> None:
    """And what one that failed has left is not, nor is it kept when it goes."""
    source.put("data/1/left-by-a-save-that-failed", b"x" * 1000)
    far, old = Far(source), Announced(source)
    standby = Standby(far, folder)
    with standby.ahead.beside_waiting():
        eventually(standby.is_whole)
        before = needed(source)
        trainer = threading.Thread(target=train, args=(old, 8), kwargs={"keep": 1})
        trainer.start()
        assert old.comes.wait(GIVE_UP_S)
        eventually(lambda: len(on_disk(folder)) > len(before))
        far.put("data/2/coming-and-gone", b"x" * 1000)
        eventually(lambda: "data/2/coming-and-gone" in on_disk(folder))
        far.delete("data/2/coming-and-gone")
        eventually(lambda: "data/2/coming-and-gone" not in on_disk(folder))
        assert needed(source) == before, "no head has named it"
        coming = on_disk(folder) - before
        far.reads.clear()
        standby.said.clear()
        old.may.set()
        trainer.join()
    eventually(standby.is_whole)
    assert on_disk(folder) == needed(source)
    assert coming <= needed(source)
    assert not set(far.reads) & coming
    assert "data/1/left-by-a-save-that-failed" not in far.reads
    standby.ahead.close()


class HurriedClock(SystemClock):
    """A minute passes with every look: pauses are over at once."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic_s(self) -> float:
        self._now_s += 60.0
        return self._now_s


@pytest.mark.parametrize("seed", range(6))
def test_through_a_store_that_misbehaves_nothing_wrong_is_ever_restored(source: Store, folder: Path, seed: int) -> None:
    faults = (
        Fault.UNAVAILABLE_BEFORE, Fault.TRUNCATED, Fault.FLIPPED, Fault.BROKEN_OFF, Fault.DENIED, Fault.STALE,
    )  # fmt: skip
    faulty = Far(FaultyStore(source, seeded(seed, 0.3, faults)))
    standby = Standby(faulty, folder, HurriedClock())
    with standby.ahead.beside_waiting():
        eventually(lambda: len(on_disk(folder)) >= 2)
        train(source, 8 + seed, keep=1)
    standby.ahead.look(Progress(2, -1, -1, -1, Phase.RESTORING))
    step, weights = restored(Far(source))
    assert (step, same(weights, expected(8 + seed))) == (8 + seed, True)
    standby.ahead.close()
    assert not folder.exists()
    assert any("cannot be fetched ahead now" in line for line in standby.said)
    assert len(standby.said) < 50, "a store that fails is not told of at every try"


def test_at_most_half_of_the_free_disk_is_used(source: Store, folder: Path) -> None:
    sizes = {entry.key: entry.size_bytes for entry in source.list("data/") if entry.key in needed(source)}
    total = sum(sizes.values())

    def free(path: Path) -> int:
        return int(1.5 * total) - sum(found.stat().st_size for found in path.rglob("*") if found.is_file())

    far = Far(source)
    standby = Standby(far, folder, free_bytes=free)
    with standby.ahead.beside_waiting():
        eventually(lambda: any("half of the free disk" in line for line in standby.said))
        eventually(lambda: not standby.ahead._stager._flying)
    kept = on_disk(folder)
    assert kept
    assert sum(sizes[key] for key in kept) <= 0.75 * total
    far.reads.clear()
    step, weights = restored(far)
    assert (step, same(weights, expected(7))) == (7, True)
    assert set(far.reads) == needed(source) - kept
    standby.ahead.close()


def test_a_disk_that_takes_nothing_is_said_once_and_nothing_is_fetched_for_it_again(
    source: Store, folder: Path
) -> None:
    far = Far(source)
    standby = Standby(far, folder, HurriedClock())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with standby.ahead.beside_waiting():
            eventually(lambda: any("are not restored ahead" in line for line in standby.said) or len(far.reads) > 999)
            train_more = [far.reads.count(key) for key in set(far.reads)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert max(train_more) <= 4, "one try: a few pieces"
    step, weights = restored(far)
    assert (step, same(weights, expected(7))) == (7, True)
    standby.ahead.close()


def test_the_gate_opens_in_the_middle_of_a_request_and_nobody_waits_for_it(source: Store, folder: Path) -> None:
    hangs, released = threading.Event(), threading.Event()

    def hang(key: str) -> None:
        hangs.set()
        assert released.wait(GIVE_UP_S)

    far = Far(source, hang)
    standby = Standby(far, folder)
    with standby.ahead.beside_waiting():
        assert hangs.wait(GIVE_UP_S)
    # Left while the request still hangs. The command begins, and claims.
    standby.ahead.look(None)
    standby.ahead.look(Progress(2, -1, -1, -1, Phase.RESTORING))
    far.before = lambda key: None
    step, weights = restored(far)
    assert (step, same(weights, expected(7))) == (7, True)
    released.set()
    standby.ahead.close()
    assert not folder.exists()
    counts = [far.reads.count(key) for key in needed(source)]
    assert max(counts) <= 5, "after the claim nothing more is asked for"


def test_the_end_does_not_wait_for_a_request_that_hangs(
    source: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLOSE_S", 0.05)
    hangs, released = threading.Event(), threading.Event()

    def hang(key: str) -> None:
        hangs.set()
        assert released.wait(GIVE_UP_S)

    standby = Standby(Far(source, hang), folder)
    with standby.ahead.beside_waiting():
        assert hangs.wait(GIVE_UP_S)
    standby.ahead.close()
    assert not released.is_set()
    released.set()
    eventually(lambda: not folder.exists())


def test_an_older_checkpoint_that_is_damaged_keeps_nobody_from_fetching_the_newest(source: Store, folder: Path) -> None:
    head = read_truth(source).head
    assert head is not None
    source.delete(f"{head.checkpoints[0].name}/root.json")
    standby = staged(Far(source), folder)
    assert on_disk(folder) == needed(source)
    assert len(standby.said) == 1
    standby.ahead.close()


def test_a_standby_that_is_sent_home_fetches_nothing_more(source: Store, folder: Path) -> None:
    far = Far(source)
    standby = Standby(far, folder)

    def wait_and_leave() -> None:
        with standby.ahead.beside_waiting():
            eventually(standby.is_whole)
            raise Killed

    with pytest.raises(Killed):
        wait_and_leave()
    eventually(lambda: not folder.exists())
    far.reads.clear()
    train(source, 9)
    standby.ahead.close()
    assert not far.reads


def test_nothing_to_fetch_is_no_trouble(folder: Path) -> None:
    """A run without a checkpoint, a store that is this machine's own disk, a machine that never waits."""
    for store in (Far(MemoryStore()), MemoryStore()):
        standby = Standby(store, folder)  # type: ignore[arg-type]
        with standby.ahead.beside_waiting():
            pass
        standby.ahead.look(None)
        standby.ahead.close()
        assert not standby.said
        assert not folder.exists()
    assert Standby(Far(MemoryStore()), folder).ahead.environment == {}


KILLED = """
import sys, threading
sys.path[:0] = {path!r}
import test_ahead as tests
from holdfast.agent.machine import ahead as module
from holdfast.store.local import LocalStore
module._PIECE_BYTES = 30_000
reads = 0
def before(key):
    global reads
    reads += 1
    if reads == {last}:
        print("now", flush=True)
        threading.Event().wait()
standby = tests.Standby(tests.Far(LocalStore({source!r}), before), tests.Path({folder!r}))
with standby.ahead.beside_waiting():
    threading.Event().wait()
"""


@pytest.mark.parametrize("last", [2, 5, 8])
def test_killed_half_way_every_file_is_whole_and_the_next_fetches_only_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    source = LocalStore(tmp_path / "source")
    train(source, 7)
    here = str(Path(__file__).parent)
    path = [here, str(Path(here).parent), str(Path(here).parents[1] / "support")]
    text = KILLED.format(path=path, last=last, source=str(tmp_path / "source"), folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b"now\n")
        process.kill()
    whole = on_disk(folder)
    for key in whole:
        assert (folder / key).read_bytes() == (tmp_path / "source" / key).read_bytes()
    # What a damaged disk has in another size is fetched anew.
    torn = random.Random(last).choice(sorted(whole)) if whole else ""
    if torn:
        with open(folder / torn, "ab") as file:
            file.write(b"x")
    far = Far(source)
    standby = staged(far, folder)
    assert set(far.reads) == needed(source) - (whole - {torn})
    far.reads.clear()
    step, weights = restored(far)
    assert (step, same(weights, expected(7)), far.reads) == (7, True, [])
    standby.ahead.close()


def test_a_mirrored_folder_is_restored_from_there_as_well(folder: Path, tmp_path: Path) -> None:
    source = MemoryStore()
    (tmp_path / "one").mkdir()
    first = Mirrored(tmp_path / "one", source)
    first.settle(lambda: [(tmp_path / "one" / f"file{number}").write_bytes(os.urandom(50_000)) for number in range(4)])
    first.end(clean=True)
    far = Far(source)
    standby = staged(far, folder)
    far.reads.clear()
    second = Mirrored(tmp_path / "two", far, near=[near_disk(LocalStore(folder))])
    assert second.restored is not None
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert not far.reads
    standby.ahead.close()
