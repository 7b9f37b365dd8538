"""What the mirror takes and leaves: files at rest, units, deletions, ends of commands; the bytes sent; every operation killed.

The clock is the test's, the folder is real, and the store is in memory or on disk.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mirror_parts import SETTLE_S, Machine, tree, write, write_zip

from holdfast.agent.mirror.restore import clear_leftovers
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.record import read_record
from holdfast.checkpoint.runs.verify import verify
from holdfast.core.errors import DifferentRun, Fenced, HoldfastError, RestoreError, SaveError, StoreUnavailable
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, KillSwitch, Operation, at

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

MIB = 1 << 20
Begin = Callable[..., Machine]


@pytest.fixture
def begin() -> Iterator[Begin]:
    machines: list[Machine] = []

    def start(*arguments: object, **keywords: object) -> Machine:
        machines.append(Machine(*arguments, **keywords))  # type: ignore[arg-type]
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()


def wipe(folder: Path) -> None:
    """Another machine: neither the folder nor what lay beside it."""
    for left in folder.parent.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "machine").mkdir()
    return tmp_path / "machine" / "out"


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


def test_after_a_kill_what_was_not_seen_complete_is_replaced_by_what_was(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    machine.settle(lambda: write(out / "state.pkl", b"whole"))
    machine.settle(lambda: write(out / "checkpoint-1" / "model.bin", b"one"))
    write(out / "state.pkl", b"to")
    write(out / "checkpoint-2" / "model.bin", b"half of tw")
    write(out / "train.log", b"a line\nhalf a")
    shutil.rmtree(out / "checkpoint-1")
    suspects = machine.end(clean=False)
    assert suspects.torn == {"state.pkl", "checkpoint-2"}
    assert suspects.missing == {"checkpoint-1"}
    machine.mend(suspects)
    assert (out / "state.pkl").read_bytes() == b"whole"
    assert (out / "checkpoint-1" / "model.bin").read_bytes() == b"one"
    assert not (out / "checkpoint-2").exists()
    assert (out.parent / ".holdfast-torn-out" / "checkpoint-2" / "model.bin").read_bytes() == b"half of tw"
    assert (out / "train.log").read_bytes() == b"a line\nhalf a", "a log is good at every length"
    assert not machine.settle()
    mirrored = tree(out)
    wipe(out)
    begin(out, store)
    assert tree(out) == mirrored


def test_a_file_by_itself_that_its_format_calls_whole_survives_a_kill(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())
    write(out / "config.json", b"{}")
    for number in range(3):
        machine.settle(partial(write_zip, out / "ckpt.pt", bytes([number])))
    write_zip(out / "ckpt.pt", b"written and closed just before the kill")
    whole = (out / "ckpt.pt").read_bytes()
    assert not machine.end(clean=False).torn
    assert machine.passes.held.files["ckpt.pt"].size_bytes == len(whole)
    (out / "ckpt.pt").write_bytes(whole[:-1])
    assert machine.end(clean=False).torn == {"ckpt.pt"}
    assert machine.end(clean=True).torn == {"ckpt.pt"}, "torn is torn, whatever the exit code"


def test_files_that_change_together_are_not_taken_apart_by_a_kill(begin: Begin, out: Path) -> None:
    machine = begin(out, MemoryStore())

    def both(number: int) -> None:
        write_zip(out / "model.pt", bytes([number]) * 9)
        write_zip(out / "optimizer.pt", bytes([number]) * 9)

    for number in range(3):
        machine.settle(partial(both, number))
    model_before = (out / "model.pt").read_bytes()
    write_zip(out / "model.pt", b"newer than its optimizer")
    suspects = machine.end(clean=False)
    assert suspects.torn == {"model.pt"}
    machine.mend(suspects)
    assert (out / "model.pt").read_bytes() == model_before


# A start on a machine that has the folder already.


def test_the_same_machine_keeps_what_is_complete_and_newer_and_replaces_what_is_torn(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    write(out / "a.pkl", b"stored")
    write(out / "b.pkl", b"stored")
    assert machine.settle()
    unavailable = FaultyStore(store, lambda operation: Fault.UNAVAILABLE_BEFORE)
    machine.passes._committer._store = unavailable
    write(out / "a.pkl", b"newer, complete, not stored")
    machine.passes.look()
    machine.clock.sleep(SETTLE_S)
    with pytest.raises(StoreUnavailable):
        machine.passes.look()
    write(out / "b.pkl", b"ha")
    # The agent is killed here, with its command; the machine stays.
    again = begin(out, store)
    assert again.restored is None
    assert (out / "a.pkl").read_bytes() == b"newer, complete, not stored"
    assert (out / "b.pkl").read_bytes() == b"stored"
    assert again.settle()


def test_a_folder_that_somebody_else_has_gone_beyond_gives_way_and_is_kept(
    begin: Begin, out: Path, tmp_path: Path
) -> None:
    store = MemoryStore()
    here = begin(out, store)
    here.settle(lambda: write(out / "a.pkl", b"here"))
    elsewhere = tmp_path / "other" / "out"
    there = begin(elsewhere, store)
    there.settle(lambda: write(elsewhere / "a.pkl", b"there"))
    write(out / "a.pkl", b"the stale machine works on")
    with pytest.raises(Fenced):
        here.settle()
    again = begin(out, store)
    assert again.restored is not None
    assert (out / "a.pkl").read_bytes() == b"there"
    assert (out.parent / "out.holdfast-kept-1" / "a.pkl").read_bytes() == b"the stale machine works on"


def test_a_folder_that_nothing_is_known_of_stays_only_if_it_is_newer(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    begin(out, store).settle(lambda: write(out / "a.pkl", b"stored"))
    stored_ns = (out / "a.pkl").stat().st_mtime_ns
    for age_s, stays in ((-5, True), (5, False)):
        wipe(out)
        write(out / "a.pkl", b"found here")
        os.utime(out / "a.pkl", ns=(0, stored_ns - age_s * 10**9))
        machine = begin(out, store)
        assert (machine.restored is None) is stays
        assert (out / "a.pkl").read_bytes() == (b"found here" if stays else b"stored")
        assert any("stays as it is" in line or "kept as" in line for line in machine.lines)


def test_fresh_restores_nothing_and_leaves_the_folder(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    begin(out, store).settle(lambda: write(out / "a.pkl", b"old"))
    wipe(out)
    machine = begin(out, store, fresh=True)
    assert machine.restored is None
    assert not out.exists()
    assert machine.settle(lambda: write(out / "b.pkl", b"new"))
    wipe(out)
    begin(out, store)
    assert set(tree(out)) == {"b.pkl"}


def test_a_training_that_uses_holdfast_is_not_overwritten(begin: Begin, out: Path) -> None:
    import msgspec

    store = MemoryStore()
    machine = begin(out, store)
    machine.settle(lambda: write(out / "a.pkl", b"x"))
    machine.lineage.advance("save", lambda head: msgspec.structs.replace(head, identity="a trainer's"))
    with pytest.raises(DifferentRun, match="--mirror"):
        begin(out, store)


# Damage, faults and kills.


def test_a_damaged_state_falls_back_to_an_older_one_and_nothing_torn_is_left_behind(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    machine.settle(lambda: write(out / "a.pkl", b"1" * 100))
    machine.settle(lambda: write(out / "a.pkl", b"2" * 100))
    newest = max(
        (entry.key for entry in store.list("data/")), key=lambda key: store.get(key, max_bytes=MIB).startswith(b"2")
    )
    store.delete(newest)
    store.put(newest, b"3" * 100)
    wipe(out)
    again = begin(out, store)
    assert again.restored is not None
    assert again.fell_back
    assert (out / "a.pkl").read_bytes() == b"1" * 100
    assert sorted(path.name for path in out.parent.iterdir()) == [".holdfast-mirror-out.json", "out"]
    for entry in list(store.list("data/")):
        store.delete(entry.key)
    wipe(out)
    with pytest.raises(RestoreError):
        begin(out, store)
    assert not out.exists()


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
    def work(home: Path, number: int | None, after: bool) -> int:
        """In a child: two states of two files, killed at the given operation. Returns the operations counted, -1 when killed."""
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                switch = KillSwitch(LocalStore(home / "store"), lambda: os._exit(9), at_number=number, after=after)
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

    operations = work(tmp_path / "whole", None, False)
    assert operations > 20
    for number in range(operations):
        for after in (False, True):
            home = tmp_path / f"{number}-{after}"
            # An operation that raises (there is no run yet) has no moment after it.
            assert work(home, number, after) == -1 or (after and number == 0)
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


def test_leftovers_of_an_interrupted_restore_are_cleared(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    begin(out, store).settle(lambda: write(out / "a.pkl", b"x"))
    wipe(out)
    write(out.parent / ".holdfast-restore-out-abc" / "half", b"x")
    write(out.parent / ".holdfast-restore-outer-abc" / "another run's", b"x")
    begin(out, store)
    assert sorted(path.name for path in out.parent.iterdir()) == [
        ".holdfast-mirror-out.json", ".holdfast-restore-outer-abc", "out",
    ]  # fmt: skip
    clear_leftovers(out)


def test_states_verify_like_every_checkpoint(begin: Begin, out: Path) -> None:
    store = MemoryStore()
    machine = begin(out, store)
    for number in range(5):
        machine.settle(partial(write, out / f"checkpoint-{number}" / "m", bytes([number]) * 1000))
    report = verify(store, open_home=lambda url: store)
    assert report.good
    assert [verdict.step for verdict in report.checkpoints] == [3, 4, 5]
