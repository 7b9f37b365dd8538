"""What the mirror takes and leaves: files at rest, units, deletions, ends of commands; the bytes sent; every operation killed.

The clock is the test's, the folder is real, and the store is in memory or on disk.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mirror_parts import SETTLE_S, Begin, Machine, tree, wipe, write

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.record import read_record
from holdfast.checkpoint.runs.verify import verify
from holdfast.core.errors import HoldfastError, SaveError
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import METHODS, WRITES, Fault, FaultyStore, KillSwitch, Operation, at

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

MIB = 1 << 20
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


def test_a_folder_comes_back_on_another_machine_with_names_modes_times_and_links(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    assert machine.restored is None
    write(out / "a" / "b" / "weights.bin", os.urandom(3 * MIB + 17))
    write(out / "empty", b"")
    write(out / "name with ünïcode \\ and ~x", b"odd")
    (out / os.fsdecode(b"bad-\xff-name")).write_bytes(b"not UTF-8")
    write(out / "run.sh", b"#!/bin/sh\n")
    (out / "run.sh").chmod(0o750)
    os.utime(out / "empty", ns=(1, 12345678901234567))
    os.symlink("a/b/weights.bin", out / "last")
    (out / "a").chmod(0o700)
    assert machine.settle()
    before = tree(out)
    wipe(out)
    again = begin(out, store)
    assert again.restored is not None
    assert tree(out) == before
    assert (out / "a").stat().st_mode & 0o777 == 0o700
    assert not again.settle(), "what was restored is not new"
    assert sorted(path.name for path in out.parent.iterdir()) == [".holdfast-mirror-out.json", "out"]


def test_only_changed_bytes_are_sent_and_unchanged_files_are_not_even_read(
    begin: Begin, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = begin(out, MemoryStore())
    sizes = {"checkpoint-1/model.bin": 5 * MIB, "checkpoint-1/optimizer.bin": 2 * MIB, "config.json": 300}
    for name, size in sizes.items():
        write(out / name, os.urandom(size))
    assert machine.settle()
    write(out / "checkpoint-2" / "model.bin", os.urandom(3 * MIB))
    read: list[str] = []
    opened = os.open

    def open_and_tell(path: Any, *rest: Any, **more: Any) -> int:
        read.append(str(path))
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", open_and_tell)
    assert machine.settle()
    monkeypatch.undo()
    write(out / "checkpoint-3" / "copy.bin", (out / "checkpoint-2" / "model.bin").read_bytes())
    assert machine.settle()
    assert machine.sent_bytes() == [sum(sizes.values()), 3 * MIB, 0]
    assert {Path(path).parent.name for path in read if path.startswith(str(out))} == {"checkpoint-2"}


def test_a_file_much_larger_than_a_chunk_is_sent_in_the_part_that_changed(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    data = bytearray(os.urandom(40 * MIB))
    assert machine.settle(lambda: write(out / "large.bin", data))
    data[17 * MIB] ^= 1
    assert machine.settle(lambda: write(out / "large.bin", data))
    assert machine.sent_bytes() == [40 * MIB, 16 * MIB]
    wipe(out)
    assert begin(out, store).restored is not None
    assert (out / "large.bin").read_bytes() == data


def test_a_file_that_is_being_written_stays_in_the_mirror_as_it_was(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    assert machine.settle(lambda: write(out / "state.pkl", b"first"))
    with (out / "state.pkl").open("wb") as file:
        file.write(b"sec")
        file.flush()
        write(out / "other.pkl", b"complete")
        for _ in range(20):
            machine.clock.sleep(SETTLE_S)
            machine.passes.look()
        wiped = out.parent.parent / "elsewhere" / "out"
        assert begin(wiped, _copy(store)).restored is not None
        assert (wiped / "state.pkl").read_bytes() == b"first", "open for writing, however long it rests"
        assert (wiped / "other.pkl").read_bytes() == b"complete", "and others do not wait for ever"
        file.write(b"ond")
    assert machine.settle()
    wipe(out)
    begin(out, store)
    assert (out / "state.pkl").read_bytes() == b"second"


def _copy(store: MemoryStore) -> MemoryStore:
    copied = MemoryStore()
    for entry in store.list(""):
        copied.put(entry.key, store.get(entry.key, max_bytes=1 << 30))
    return copied


def test_complete_files_wait_for_others_that_are_being_written_but_not_for_ever(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    write(out / "model.pkl", b"model")
    waited = 0
    for _ in range(40):
        write(out / "optimizer.pkl", os.urandom(8))
        if machine.passes.look():
            break
        machine.clock.sleep(1)
        waited += 1
    assert 20 < waited < 40
    assert list(machine.passes.held.files) == ["model.pkl"]
    assert machine.settle()
    assert list(machine.passes.held.files) == ["model.pkl", "optimizer.pkl"]


def test_a_checkpoint_folder_is_taken_when_all_of_it_has_settled(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    for name in ("model.bin", "optimizer.bin", "trainer_state.json"):
        write(out / "checkpoint-10" / name, name.encode())
        assert not machine.passes.look()
        machine.clock.sleep(SETTLE_S * 0.9)
        assert not machine.passes.look()
    assert machine.settle()
    assert len(machine.passes.held.files) == 3


def test_temporary_names_and_what_leads_outside_are_left_out(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    write(out / "tmp-checkpoint-10" / "model.bin", b"x")
    write(out / "ckpt.pt.tmp", b"x")
    write(out / "kept", b"x")
    os.symlink("/etc/passwd", out / "absolute")
    os.symlink("../../secret", out / "above")
    os.symlink("sub/../../x", out / "around")
    os.mkfifo(out / "pipe")
    assert machine.settle()
    assert list(machine.passes.held.files) == ["kept"]
    assert not machine.passes.held.links
    assert sum("left out" in line for line in machine.lines) == 4
    os.rename(out / "tmp-checkpoint-10", out / "checkpoint-10")
    assert machine.settle()
    assert "checkpoint-10/model.bin" in machine.passes.held.files


def test_patterns_choose_what_is_mirrored(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore(), include=("*.pt", "runs/*/best/"))
    for name in ("a.pt", "deep/er/b.pt", "c.bin", "runs/one/best/x.bin", "runs/one/last/x.bin", "checkpoint-3/d.pt"):
        write(out / name, b"x")
    machine.settle()
    assert list(machine.passes.held.files) == ["a.pt", "checkpoint-3/d.pt", "deep/er/b.pt", "runs/one/best/x.bin"]
    assert machine.passes.names.unit_of("runs/one/best/x.bin") == "runs/one/best"
    assert machine.passes.names.unit_of("checkpoint-3/d.pt") == "checkpoint-3"


def test_a_deletion_counts_when_it_lasts_and_an_emptied_folder_keeps_its_mirror(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    for number in (1, 2):
        machine.settle(partial(write, out / f"checkpoint-{number}" / "model.bin", bytes([number])))
    shutil.rmtree(out / "checkpoint-1")
    machine.settle()
    assert "checkpoint-1/model.bin" in machine.passes.held.files
    machine.clock.sleep(10 * SETTLE_S)
    machine.settle()
    machine.clock.sleep(15 * SETTLE_S)
    machine.settle()
    assert list(machine.passes.held.files) == ["checkpoint-2/model.bin"]
    shutil.rmtree(out)
    for _ in range(5):
        machine.clock.sleep(20 * SETTLE_S)
        machine.settle()
    machine.end(clean=True)
    assert list(machine.passes.held.files) == ["checkpoint-2/model.bin"]


def test_logs_are_kept_while_they_grow_but_do_not_make_a_state_each_time(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    out.mkdir()
    with (out / "train.log").open("a") as log:
        for number in range(60):
            log.write(f"step {number}\n")
            log.flush()
            machine.settle()
        assert 2 <= len(machine.sent_bytes()) <= 5, "one a minute or so"
        assert machine.passes.data_commits == 0
        machine.settle(lambda: write(out / "model.bin", b"x"))
        assert machine.passes.data_commits == 1


# The end of a command.


def test_a_clean_end_makes_everything_complete(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    machine.settle(lambda: write(out / "a.pkl", b"1"))
    machine.passes.look()
    write(out / "a.pkl", b"2")
    write(out / "final.pkl", b"3")
    suspects = machine.end(clean=True)
    assert not suspects.torn
    assert set(machine.passes.held.files) == {"a.pkl", "final.pkl"}
    assert machine.passes.held.files["a.pkl"].size_bytes == 1


def test_a_file_that_changes_while_it_is_sent_is_taken_later_and_leaves_no_garbage(begin: Begin, out: Path) -> None:
    inner = MemoryStore()
    rewrites: list[bytes] = []

    def plan(operation: Operation) -> None:
        if rewrites and operation.key.startswith("data/"):
            write(out / "large.pkl", rewrites.pop())

    machine = begin(out, FaultyStore(inner, plan))
    size = 6 * MIB
    machine.settle(lambda: write(out / "large.pkl", os.urandom(size)))
    third, fourth = os.urandom(size), os.urandom(size)
    rewrites.append(third)
    write(out / "large.pkl", os.urandom(size))
    machine.passes.look()
    machine.clock.sleep(SETTLE_S)
    with pytest.raises(SaveError, match="changed"):
        machine.passes.look()
    # From now on it is copied before it is sent, so that a script that writes faster than the store takes is mirrored all the same.
    rewrites.append(fourth)
    assert machine.settle()
    elsewhere = out.parent.parent / "elsewhere" / "out"
    begin(elsewhere, _copy(inner))
    assert (elsewhere / "large.pkl").read_bytes() == third
    assert machine.settle()
    wipe(out)
    begin(out, inner)
    assert (out / "large.pkl").read_bytes() == fourth
    assert len(list(inner.list("data/"))) == 3, "what the given-up pass had sent is swept"


def test_a_large_file_that_is_replaced_or_deleted_while_it_is_sent_is_sent_as_it_was(begin: Begin, out: Path) -> None:
    inner = MemoryStore()
    first, second = os.urandom(6 * MIB), os.urandom(6 * MIB)
    write(out / "new.tmp", second)
    happens: list[Callable[[], object]] = [lambda: (out / "new.tmp").rename(out / "large.pkl")]

    def plan(operation: Operation) -> None:
        if happens and operation.key.startswith("data/"):
            happens.pop()()

    machine = begin(out, FaultyStore(inner, plan))
    assert machine.settle(lambda: write(out / "large.pkl", first))
    elsewhere = out.parent.parent / "elsewhere" / "out"
    begin(elsewhere, _copy(inner))
    assert (elsewhere / "large.pkl").read_bytes() == first
    assert machine.settle(), "and then what has replaced it"
    assert machine.sent_bytes() == [6 * MIB, 6 * MIB]


def test_every_single_fault_of_the_store_leaves_the_last_state_or_the_next(begin: Begin, out: Path) -> None:
    counting = FaultyStore(MemoryStore())
    _two_states(begin(out, counting), out)
    for number in range(len(counting.log)):
        for fault in (Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.DENIED):
            wipe(out)
            inner = MemoryStore()
            faulty = FaultyStore(inner, at({number: fault}))
            done = 0
            try:
                machine = begin(out, faulty)
                done = _two_states(machine, out)
            except HoldfastError:
                done = -1
            wipe(out)
            begin(out, inner)
            found = (out / "a.pkl").read_bytes() if out.exists() else b""
            assert found in ((b"2" * 50,) if done == 2 else (b"", b"1" * 50, b"2" * 50)), (number, fault)


def _two_states(machine: Machine, out: Path) -> int:
    machine.settle(lambda: write(out / "a.pkl", b"1" * 50))
    machine.settle(lambda: write(out / "a.pkl", b"2" * 50))
    return 2


def test_killed_at_every_operation_of_a_pass_the_folder_comes_back_whole(begin: Begin, tmp_path: Path) -> None:
    def counted(after: bool) -> frozenset[str]:
        """Before a read there is what was there after the write before it, and after a write what is there before the next one;
        but whoever has put a head, and does not know it yet, is worth a try each time."""
        return METHODS if LONG else frozenset({"put_new"}) if after else WRITES

    def work(home: Path, number: int | None, after: bool) -> int:
        """In a child: two states of two files, killed at the given operation. Returns the operations counted, -1 when killed."""
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                switch = KillSwitch(
                    LocalStore(home / "store"),
                    lambda: os._exit(9),
                    at_number=number,
                    after=after,
                    methods=counted(after),
                )
                machine = Machine(home / "out", switch, keep=1)
                for state in range(2):
                    machine.settle(partial(_write_state, home / "out", state))
                os.write(write_end, switch.counted.to_bytes(4, "little"))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            told = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if told else 9)
        return int.from_bytes(told, "little") if told else -1

    for after in (False, True):
        operations = work(tmp_path / f"whole-{after}", None, after)
        assert operations > (2 if after else 6)
        for number in range(operations):
            home = tmp_path / f"{number}-{after}"
            # An operation that raises (there is no run yet) has no moment after it.
            assert work(home, number, after) == -1 or (LONG and after and number == 0)
            store = LocalStore(home / "store")
            fresh = begin(home / "fresh" / "out", store, keep=1)
            _check_state(home / "fresh" / "out", fresh)
            same = begin(home / "out", store, keep=1)
            _check_state(home / "out", same)
            assert same.settle(partial(_write_state, home / "out", 7))
            record = read_record(store)
            head = read_truth(store, record.run_id).head
            assert head is not None
            (ref,) = head.checkpoints
            assert ref.total_bytes == 2 * 60
            assert verify(store, open_home=lambda url: LocalStore(Path(url))).good
            assert len(list(store.list("data/"))) == 1, "what the killed pass had sent is swept"


def _write_state(out: Path, state: int) -> None:
    for name in ("checkpoint-1/model.bin", "checkpoint-1/optimizer.bin"):
        write(out / name, bytes([state]) * 60)


def _check_state(out: Path, machine: Machine) -> None:
    files = {name: value[0] for name, value in tree(out).items() if isinstance(value, tuple)}
    assert len(files) in (0, 2)
    assert len(set(files.values())) <= 1, "two files of one checkpoint, of one age"


def test_states_verify_like_every_checkpoint(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    for number in range(5):
        machine.settle(partial(write, out / f"checkpoint-{number}" / "m", bytes([number]) * 1000))
    report = verify(store, open_home=lambda url: store)
    assert report.good
    assert [verdict.step for verdict in report.checkpoints] == [3, 4, 5]
