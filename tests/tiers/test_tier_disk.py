"""What may be wrong with the disk: it fails at any operation, is full, is read-only, vanishes, or gives back other bytes. The run
goes on, its saves reach the store, the user is told once, and nobody ever computes with wrong values."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from interleaved import RUN_ID, FakeClock, no_home
from parts import garbage, request
from seam import Plan, Seam
from two_tiers_parts import Attempt, Gate, begin, disk_files, folder_of, newest_in_store, state

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.runs.promote_staged import promote_staged
from holdfast.checkpoint.tier import LocalTier, Tier
from holdfast.core.errors import IntegrityError, SaveError
from holdfast.core.ids import random_token
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation

pytestmark = pytest.mark.usefixtures("small_chunks", "no_flush")

_SAVES = (1, 2, 4, 5)
_LAST = 4
_LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


def _train(store: Store, local: LocalTier, wrap: Callable[[Store], Store] = lambda disk: disk) -> Attempt:
    attempt = begin(store, local, wrap=wrap)
    for number in _SAVES:
        attempt.save(number)
    return attempt


# ---- operations that fail


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.FULL, Fault.DENIED])
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
def test_every_operation_of_the_disk_fails(tmp_path: Path, fault: Fault, lasts: bool) -> None:
    """Also the listing that looks for what an earlier attempt has left."""
    methods = ("put",) if fault is Fault.FULL else ("put", "get", "read_into", "list", "delete")
    count, number = 1, 0
    while number < count:
        suffers = _Suffers(fault, number, lasts, methods)
        told = _go_on_whatever(MemoryStore(), LocalTier(tmp_path / str(number)), suffers.wrap)
        assert len(told) <= 1, told
        assert all("disk" in line or "injected" in line for line in told)
        count, number = max(count, suffers.seen), number + 1
    assert count > (4 if fault is Fault.FULL else 10)


@dataclass
class _Suffers:
    """A plan: the operation with this number among these methods, and with `lasts` all that follow."""

    fault: Fault
    at: int
    lasts: bool
    methods: tuple[str, ...]
    seen: int = 0

    def __call__(self, operation: Operation) -> Fault | None:
        if operation.method not in self.methods:
            return None
        self.seen += 1
        return self.fault if self.seen - 1 == self.at or (self.lasts and self.seen > self.at) else None

    def wrap(self, disk: Store) -> Store:
        return FaultyStore(MemoryStore(), self)

    def around(self, disk: Store) -> Store:
        return FaultyStore(disk, self)


def _go_on_whatever(store: Store, local: LocalTier, wrap: Callable[[Store], Store]) -> list[str]:
    """All saves are made; at most one of them fails, when the disk gives back what it was given no more. Then the rest are made."""
    attempt = begin(store, local, wrap=wrap)
    failed = 0
    number = 0
    while number < _LAST or newest_in_store(store) != number:
        number += 1
        try:
            attempt.save(number)
        except SaveError:
            failed += 1
            assert attempt.saver.drain(60)
            assert attempt.told.steps("save.failed") == [number]
        else:
            assert newest_in_store(store) == number
    assert failed <= 1
    assert failed == 0 or attempt.told.steps("save.staged")[-1] <= attempt.told.steps("save.failed")[0], (
        "a disk that has cost a save is used again"
    )
    attempt.close()
    assert garbage(store) == set()
    return [line for line in attempt.warnings() if "the save of step" not in line]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_every_system_call_that_changes_the_disk_fails(tmp_path: Path, error: int) -> None:
    healthy = Seam()
    with healthy.installed():
        _go_on_whatever(MemoryStore(), LocalTier(tmp_path / "healthy"), lambda disk: disk)
    assert len(healthy.calls) > 50
    for at in range(0, len(healthy.calls), 1 if _LONG or error == errno.EIO else 5):
        with Seam(plan=_fails_from(at, error)).installed():
            store = MemoryStore()
            told = _go_on_whatever(store, LocalTier(tmp_path / str(at)), lambda disk: disk)
        assert len(told) <= 1, told
        assert not told or os.strerror(error) in told[0] or "No space" in told[0]
        shutil.rmtree(tmp_path / str(at))


def _fails_from(at: int, error: int) -> Plan:
    def plan(number: int, call: str) -> str | None:
        if number >= at:
            raise OSError(error, os.strerror(error))
        return None

    return plan


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    """With a cap and without; it does not come into being again, on whatever lies below the mount point."""
    for cap in (None, "1 MB"):
        local, store = LocalTier(tmp_path / "nvme", cap=cap), MemoryStore()
        attempt = begin(store, local)
        attempt.save(1)
        shutil.rmtree(local.folder)
        for number in (2, 4):
            attempt.save(number)
        assert newest_in_store(store) == 4
        (told,) = attempt.warnings()
        assert "removed or unmounted" in told
        attempt.close()
        assert not Path(local.folder).exists()


def test_vanishing_while_it_is_promoted(tmp_path: Path) -> None:
    """The save that lay there only fails, the next one is made, and wait() says so."""
    local, gate = LocalTier(tmp_path / "nvme"), Gate(MemoryStore())
    attempt = begin(gate, local)
    attempt.save(1)
    gate.open.clear()
    attempt.stage(2)
    newer = attempt.stage(4)
    shutil.rmtree(local.folder)
    gate.open.set()
    with pytest.raises(Exception, match="the save of step 4 failed"):
        newer.wait(60)
    attempt.save(5)
    assert newest_in_store(gate) == 5
    attempt.close()
    assert garbage(gate) == set()


@pytest.mark.parametrize("cap_bytes", [1, 3000])
def test_a_cap_that_is_too_small(tmp_path: Path, cap_bytes: int) -> None:
    """Even for one checkpoint, or for two at once. The cap holds at every moment; the user is told once, with figures."""
    local, gate = LocalTier(tmp_path, cap=cap_bytes), Gate(MemoryStore())
    sizes: list[int] = []

    class Measured(Gate):
        def put(self, key: str, body: object) -> None:
            super().put(key, body)  # type: ignore[arg-type]
            sizes.append(sum(entry.size_bytes for entry in self.inner.list()))

    attempt = begin(gate, local, wrap=Measured)
    for number in (*_SAVES, 7, 8):
        attempt.save(number)
    assert newest_in_store(gate) == 8
    assert max(sizes, default=0) <= cap_bytes
    said = attempt.warnings()
    assert len(said) == (1 if cap_bytes == 1 else 0)
    assert all("cap" in line and "go to the store directly" in line for line in said)
    attempt.close()
    assert garbage(gate) == set()


def test_no_room_beside_what_waits(tmp_path: Path) -> None:
    """What is on its way is never given up for something newer that does not fit; that one goes directly, in its turn."""
    gate = Gate(MemoryStore())
    local = LocalTier(tmp_path, cap=3400)
    attempt = begin(gate, local)
    attempt.save(1)
    gate.open.clear()
    attempt.stage(2)
    direct = attempt.saver.save(request(state(4), 4))
    while attempt.saver._waiting is not None:
        pass
    assert "staged/" in "".join(disk_files(local))
    gate.open.set()
    assert direct.wait(60).step == 4
    assert attempt.told.steps("save.staged") == [1, 2]
    # What had not begun to be sent is replaced.
    assert attempt.told.steps("save.committed") in ([1, 2, 4], [1, 4])
    attempt.close()


def test_disks_that_cannot_be_used_at_all(tmp_path: Path) -> None:
    """hold() says so, whatever it is; the session then goes on without."""
    plain = tmp_path / "a file"
    plain.write_text("")
    with pytest.raises(OSError, match="a file"):
        Tier(LocalTier(plain), RUN_ID).hold()


# ---- bytes that are not what was written


@dataclass
class Left:
    """A store with save 2 committed, and a disk with a copy of it and with save 4, staged, some of whose objects lie only there."""

    store: MemoryStore
    local: LocalTier
    disk: dict[str, bytes]
    staged: set[str]


@pytest.fixture
def left(tmp_path: Path) -> Left:
    store, local = MemoryStore(), LocalTier(tmp_path / "disk")
    attempt = begin(store, local)
    for number in (1, 2):
        attempt.save(number)
    outage = [False]
    attempt.close()
    faulty = FaultyStore(store, lambda operation: Fault.UNAVAILABLE_BEFORE if outage[0] else None)
    attempt = begin(faulty, local)
    attempt.save(2)
    before = disk_files(local)
    outage[0] = True
    attempt.stage(4)
    attempt.close()
    files = disk_files(local)
    assert before & files, "a copy of what is committed stays"
    objects = folder_of(local) / "objects"
    return Left(store, local, {key: (objects / key).read_bytes() for key in files}, files - before)


def _altered(body: bytes, other: bytes) -> dict[str, bytes | None]:
    more: dict[str, bytes | None] = {
        "one byte short": body[:-1],
        "longer": body + b"x",
        "zeros": bytes(len(body)),
        "flipped last": body[:-1] + bytes([body[-1] ^ 128]),
    }
    return (more if _LONG else {}) | {
        "flipped first": bytes([body[0] ^ 1]) + body[1:],
        "flipped middle": body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 16]) + body[len(body) // 2 + 1 :],
        "truncated": body[: len(body) // 2],
        "emptied": b"",
        "deleted": None,
        "swapped": other,
    }


def test_every_object_on_the_disk_altered(left: Left, tmp_path: Path) -> None:
    """Restored is exactly save 4, or save 2 with a warning; and what is altered is never promoted, by the next attempt or by the
    command."""
    heads = dict(left.store._contents.objects)
    outcomes = set()
    for key, body in left.disk.items():
        others = [other for name, other in left.disk.items() if name != key and name.split("/")[0] == key.split("/")[0]]
        for what, altered in _altered(body, others[0] if others else b"x").items():
            for promote_first in (False, True):
                objects = folder_of(left.local) / "objects"
                shutil.rmtree(folder_of(left.local))
                for name, data in left.disk.items():
                    (objects / name).parent.mkdir(parents=True, exist_ok=True)
                    (objects / name).write_bytes(data)
                if altered is None:
                    (objects / key).unlink()
                else:
                    (objects / key).write_bytes(altered)
                store = MemoryStore()
                store._contents.objects.update(heads)
                outcomes.add(_check_altered(store, left, f"{key}: {what}", key, promote_first))
    assert outcomes == {2, 4}


def _check_altered(store: MemoryStore, left: Left, case: str, key: str, promote_first: bool) -> int:
    if promote_first:
        try:
            promote_staged(store, left.local, open_home=no_home, clock=FakeClock(), tokens=random_token)
        except IntegrityError:
            pass
        assert newest_in_store(store) in (2, 4), case
    attempt = begin(store, left.local)
    assert attempt.restored in (2, 4), case
    if key not in left.staged:
        assert attempt.restored == 4, f"{case}: the store has what the disk lacks"
    if attempt.staged is None and attempt.restored == 2:
        assert len(attempt.fallbacks) <= 1
        assert key in left.staged, case
    assert attempt.saver.drain(60)
    assert newest_in_store(store) == attempt.restored, case
    attempt.save(7)
    attempt.close()
    assert newest_in_store(store) == 7
    assert garbage(store) == set(), case
    assert attempt.warnings() == [], case
    return attempt.restored


def test_a_reader_that_is_fooled_by_the_disk_is_not(left: Left) -> None:
    """Bits that turn while they are read: once, and the store has them; always, and they are taken from the store."""
    for at in range(40):
        suffers = _Suffers(Fault.FLIPPED, at, False, ("get", "read_into"))
        store = MemoryStore()
        store._contents.objects.update(left.store._contents.objects)
        attempt = begin(store, left.local, wrap=suffers.around)
        assert attempt.restored in (2, 4)
        assert attempt.saver.drain(60)
        attempt.close()
        newest = newest_in_store(store)
        assert newest in (2, 4)
        if suffers.seen <= at:
            break
        # What closing tidies away is put back for the next round.
        objects = folder_of(left.local) / "objects"
        for name, data in left.disk.items():
            (objects / name).parent.mkdir(parents=True, exist_ok=True)
            (objects / name).write_bytes(data)
    else:
        raise AssertionError("there are more reads than are tried")


def test_records_that_are_not_ours(left: Left, tmp_path: Path) -> None:
    """Of another run, under another name, or in a folder that a run's id would lead to."""
    for run_id in ("../other", "a/b", "", ".", ".."):
        with pytest.raises(IntegrityError, match="no folder is named after it"):
            Tier(LocalTier(tmp_path), run_id)
    head = read_truth(left.store, RUN_ID).head
    assert head is not None
    (record,) = [key for key in left.disk if key.startswith("staged/") and key in left.staged]
    objects = folder_of(left.local) / "objects"
    (objects / record).rename(objects / "staged" / "00000009-1-other.json")
    assert not any(staged.ref.step == 4 for staged in Tier(left.local, RUN_ID).candidates(left.store, head))
    shutil.copytree(folder_of(left.local), Path(left.local.folder) / "stranger")
    assert Tier(left.local, "stranger").newest(left.store, head) is None
