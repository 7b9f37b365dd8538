"""What comes back, and what stays, when a mirrored command starts again: on the same machine, on another, after a kill."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from mirror_parts import SETTLE_S, Begin, tree, wipe, write, write_zip

from holdfast.agent.mirror.restore import clear_leftovers
from holdfast.core.errors import DifferentRun, Fenced, RestoreError, StoreUnavailable
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

MIB = 1 << 20


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
