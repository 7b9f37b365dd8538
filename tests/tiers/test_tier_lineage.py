"""Which staged checkpoint continues the run, who may use the disk, and what users are told of their saves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from interleaved import RUN_ID, FakeClock, no_home
from parts import garbage
from two_tiers_parts import (
    Gate,
    Outage,
    assert_disk_holds_newest,
    begin,
    by_hand,
    disk_files,
    newest_in_store,
)

from holdfast.checkpoint.format import Head
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.request import SaveState
from holdfast.checkpoint.runs.promote_staged import find_staged, promote_staged
from holdfast.checkpoint.tier import LocalTier, Tier
from holdfast.core.errors import Fenced, SaveError, StoreUnavailable, TooManyUnsaved, UsageError
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation

pytestmark = pytest.mark.usefixtures("small_chunks", "no_flush")


def _left(store: Store, local: LocalTier, *, staged: tuple[int, ...] = (4,)) -> None:
    """Save 2 is committed, the others are on the disk only."""
    outage = Outage()
    attempt = begin(FaultyStore(store, outage), local, keep=3, max_unsaved=9)
    for number in (1, 2):
        attempt.save(number)
    outage.on = True
    for number in staged:
        attempt.stage(number)
        assert attempt.saver._tiers is not None
        attempt.saver._tiers.drain(60)
    attempt.close()


def _restored(store: Store, local: LocalTier) -> int:
    attempt = begin(store, local)
    assert attempt.fallbacks == []
    attempt.saver.drain(60)
    attempt.close()
    return attempt.restored


# ---- what continues the run


def _drop_newest(head: Head) -> Head:
    return msgspec.structs.replace(head, checkpoints=head.checkpoints[:-1])


def _drop_oldest(head: Head) -> Head:
    return msgspec.structs.replace(head, checkpoints=head.checkpoints[1:])


def _fresh(head: Head) -> Head:
    return msgspec.structs.replace(head, generation=head.generation + 1)


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("rollback", _drop_newest, 1),
        ("drop", _drop_newest, 1),
        ("drop", _drop_oldest, 2),
        ("rollback", lambda head: head, 2),
        ("import", lambda head: head, 2),
        ("fork", lambda head: head, 2),
        ("claim", _fresh, -1),
        ("claim", lambda head: head, 4),
    ],
)
def test_what_people_do_to_a_run_ends_what_was_staged(tmp_path: Path, kind: str, change: Any, expected: int) -> None:
    store, local = MemoryStore(), LocalTier(tmp_path)
    _left(store, local)
    by_hand(store, kind, change)
    assert _restored(store, local) == expected
    assert find_staged(store, local) is None, "it is committed, or history"


def test_many_claims_since(tmp_path: Path) -> None:
    """Attempts that come to nothing change nothing; where heads have been pruned nobody can tell, so it is not used."""
    store, local = MemoryStore(), LocalTier(tmp_path)
    _left(store, local)
    for _ in range(20):
        by_hand(store, "claim", lambda head: head)
    numbers = [entry.key for entry in store.list("heads/")]
    copied = dict(store._contents.objects)
    assert _restored(store, local) == 4
    pruned, elsewhere = MemoryStore(), LocalTier(tmp_path / "again")
    _left(MemoryStore(), elsewhere)
    pruned._contents.objects.update(copied)
    pruned.delete(numbers[-5])
    head = read_truth(pruned, RUN_ID).head
    assert head is not None
    assert Tier(local, RUN_ID).newest(pruned, head) is None


def test_cleared_away_by_another_attempt(tmp_path: Path) -> None:
    """It took what the dead one had begun to send for left-overs and condemned their names: they are never referred to again. The
    state is resumed from all the same, and the next save commits it under other names."""
    store, local = MemoryStore(), LocalTier(tmp_path)
    _left(store, local)
    names = [key for key in disk_files(local) if key.startswith("data/")]
    head = read_truth(store, RUN_ID).head
    assert head is not None
    kept = {key for key in names if any(entry.key == key for entry in store.list("data/"))}
    orphans = sorted(set(names) - kept)
    assert orphans
    by_hand(store, "sweep", lambda body: msgspec.structs.replace(body, condemned=orphans))
    assert find_staged(store, local) is None
    assert promote_staged(store, local, open_home=no_home, clock=FakeClock(), tokens=random_token) is None
    attempt = begin(store, local)
    assert attempt.restored == 4
    assert attempt.saver.drain(60)
    assert newest_in_store(store) == 2
    attempt.save(5)
    attempt.close()
    assert newest_in_store(store) == 5
    assert garbage(store) == set()
    assert_disk_holds_newest(attempt, local)


def test_the_older_of_two_when_the_newer_rots(tmp_path: Path) -> None:
    store, local = MemoryStore(), LocalTier(tmp_path)
    gate = Gate(store)
    attempt = begin(gate, local, keep=3)
    attempt.save(2)
    gate.open.clear()
    attempt.stage(4)
    before = disk_files(local)
    while not attempt.saver._tiers._promoter._working:  # type: ignore[union-attr]
        pass
    attempt.stage(5)
    (rotten,) = [key for key in disk_files(local) - before if key.startswith("data/")]
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(tmp_path / RUN_ID), str(copy)], check=True)
    there, early = LocalTier(tmp_path / "there"), MemoryStore()
    early._contents.objects.update(store._contents.objects)
    gate.open.set()
    attempt.close()
    (copy / "objects" / rotten).write_bytes(b"rotten")
    Path(there.folder).mkdir()
    copy.rename(Path(there.folder) / RUN_ID)
    following = begin(early, there)
    assert following.restored == 4
    assert [fallback.checkpoint.step for fallback in following.fallbacks] == [5]
    assert following.saver.drain(60)
    assert newest_in_store(early) == 4
    following.close()


@pytest.mark.parametrize("lands", [False, True])
def test_staged_after_a_save_of_unknown_outcome(tmp_path: Path, lands: bool) -> None:
    """A head's answer is lost for good, and the process ends; what was staged after it continues it whether it counts or not."""
    store, local, puts = MemoryStore(), LocalTier(tmp_path), []
    is_on = False

    def plan(operation: Operation) -> Fault | None:
        if is_on and operation.method == "put_new":
            puts.append(operation.key)
            return Fault.LATE if lands and len(puts) == 1 else Fault.UNAVAILABLE_BEFORE
        return None

    faulty = FaultyStore(store, plan)
    attempt = begin(faulty, local, keep=3, max_unsaved=9)
    attempt.save(1)
    is_on = True
    for number in (2, 4):
        attempt.stage(number)
        assert attempt.saver._tiers is not None
        attempt.saver._tiers.drain(60)
    if lands:
        faulty.land()
    attempt.close()
    assert newest_in_store(store) == (2 if lands else 1)
    assert _restored(store, local) == 4
    assert newest_in_store(store) == 4


def test_what_is_referred_to_is_still_there_when_it_is_promoted(tmp_path: Path) -> None:
    """Retention drops checkpoints while others are staged; those must not refer to what goes."""
    gate, local = Gate(MemoryStore()), LocalTier(tmp_path)
    attempt = begin(gate, local, keep=1)
    attempt.save(1)
    attempt.save(2)
    attempt.save(4)  # what it shares with save 1 went with save 2
    gate.open.clear()
    attempt.stage(6)
    handle = attempt.stage(8)  # what it shares with save 4 goes with save 6
    gate.open.set()
    assert handle.wait(60).step == 8
    assert attempt.warnings() == []
    attempt.close()
    assert attempt.told.steps("save.failed") == []
    assert garbage(gate) == set()


# ---- who may use the disk


def test_one_process_at_a_time(tmp_path: Path) -> None:
    local = LocalTier(tmp_path)
    tier = Tier(local, RUN_ID)
    assert tier.hold()
    code = (
        "import sys; from holdfast.checkpoint.tier import LocalTier, Tier; "
        "tier = Tier(LocalTier(sys.argv[1]), sys.argv[2]); print(tier.hold(), flush=True)"
    )

    def other(run_id: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), run_id], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert other(RUN_ID) == "False"
    assert other("another") == "True"
    assert Tier(local, RUN_ID).hold() is False, "not for a second Run of this process either"
    tier.close()
    again = Tier(local, RUN_ID)
    assert again.hold()
    again.close()
    assert not (tmp_path / RUN_ID).exists()
    assert other(RUN_ID) == "True"


def test_a_lock_that_its_owner_has_just_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the lock before it was removed must not take the removed one for the lock."""
    import fcntl

    first, second = Tier(LocalTier(tmp_path), RUN_ID), Tier(LocalTier(tmp_path), RUN_ID)
    real, left = fcntl.lockf, [1]

    def lockf(file: Any, how: int) -> None:
        if left.pop() if left else False:
            # Another process removes it between our open and our lock.
            (tmp_path / RUN_ID / "lock").unlink()
            (tmp_path / RUN_ID).rmdir()
        real(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert first.hold()
    first.check_in_place()
    assert second.hold() is False
    first.close()


def test_promoting_while_a_trainer_lives(tmp_path: Path) -> None:
    """The command leaves it alone: it neither claims the run nor touches the disk."""
    gate, local = Gate(MemoryStore()), LocalTier(tmp_path)
    attempt = begin(gate, local)
    attempt.save(1)
    gate.open.clear()
    attempt.stage(2)
    before = read_truth(gate, RUN_ID).head
    with pytest.raises(UsageError, match="is alive on this machine"):
        promote_staged(gate.inner, local, open_home=no_home, clock=FakeClock(), tokens=random_token)
    assert read_truth(gate, RUN_ID).head == before
    gate.open.set()
    attempt.close()
    assert newest_in_store(gate) == 2


def test_promoting_fences_nobody_for_nothing(tmp_path: Path) -> None:
    """Somebody commits in the very moment before the claim: then there is nothing to promote, and no claim."""
    store, local = MemoryStore(), LocalTier(tmp_path)
    _left(store, local)
    raced: list[str] = []

    class Racing(MemoryStore):
        def put_new(self, key: str, body: bytes) -> bool:
            if not raced:
                raced.append(key)
                other = begin(store, None)
                other.save(5)
                other.close()
            return super().put_new(key, body)

    racing = Racing()
    racing._contents = store._contents
    assert promote_staged(racing, local, open_home=no_home, clock=FakeClock(), tokens=random_token) is None
    head = read_truth(store, RUN_ID).head
    assert head is not None
    assert (head.kind, head.checkpoints[-1].step) == ("save", 5)


# ---- what users are told


def test_handles(tmp_path: Path) -> None:
    gate, local = Gate(MemoryStore()), LocalTier(tmp_path)
    attempt = begin(gate, local)
    attempt.save(1)
    gate.open.clear()
    first = attempt.stage(2)
    while not attempt.saver._tiers._promoter._working:  # type: ignore[union-attr]
        pass
    second, third = attempt.stage(4), attempt.stage(5)
    assert (first.state, second.state, third.state) == (SaveState.STAGED, SaveState.SUPERSEDED, SaveState.STAGED)
    assert not any(handle.done() for handle in (first, second, third))
    with pytest.raises(TimeoutError):
        second.wait(0)
    assert attempt.saver.drain(0) is False
    gate.open.set()
    assert [handle.wait(60).step for handle in (first, second, third)] == [2, 5, 5]
    assert newest_in_store(gate) == 5
    attempt.close()


def test_on_a_disk_that_outlives_the_machine(tmp_path: Path) -> None:
    """Staged is saved: wait() and drain() return, closing does not wait for a store that hangs, and the next attempt commits."""
    gate, local = Gate(MemoryStore()), LocalTier(tmp_path, outlives=True)
    attempt = begin(gate, local)
    gate.open.clear()
    told: list[int] = []
    attempt.saver._outcomes._committed = lambda ref: told.append(ref.step)
    for number in (1, 2):
        assert attempt.stage(number).wait(60).step == number
    assert attempt.saver.drain(0)
    assert told == [1, 2]
    gate.open.set()
    assert attempt.saver._tiers is not None
    assert attempt.saver._tiers.drain(60)
    assert told == [1, 2], "each is told once, and never an older one after a newer one"
    assert newest_in_store(gate) == 2
    finish = attempt.stage(4, finish=True)
    assert finish.wait(60).step == 4
    head = read_truth(gate, RUN_ID).head
    assert head is not None
    assert head.finished, "the end of a run is committed"
    attempt.close()


def test_too_many_unsaved(tmp_path: Path) -> None:
    outage, local = Outage(), LocalTier(tmp_path)
    store = FaultyStore(MemoryStore(), outage)
    attempt = begin(store, local, max_unsaved=1)
    attempt.save(1)
    outage.on = True
    for number in (2, 4):
        with pytest.raises(SaveError, match=f"the save of step {number} failed") as failed:
            attempt.stage(number).wait(60)
        assert isinstance(failed.value.__cause__, StoreUnavailable)
    with pytest.raises(TooManyUnsaved):
        attempt.warnings()
    outage.on = False
    attempt.save(5)
    assert attempt.warnings() == []
    attempt.close()


@pytest.mark.parametrize("outlives", [False, True])
def test_fenced(tmp_path: Path, outlives: bool) -> None:
    """Also when the disk says that all is well."""
    store, local = MemoryStore(), LocalTier(tmp_path, outlives=outlives)
    attempt = begin(store, local)
    attempt.save(1)
    by_hand(store, "claim", lambda head: head)
    for number in (2, 4):
        attempt.stage(number)
        assert attempt.saver._tiers is not None
        attempt.saver._tiers.drain(60)
    with pytest.raises(Fenced):
        attempt.warnings()
    attempt.close()
    # Where the disk counts, nobody has waited for the first one to reach the store.
    assert newest_in_store(store) in ((-1, 1) if outlives else (1,))
