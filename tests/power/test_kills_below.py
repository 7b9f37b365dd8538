"""A process that ends before any one of the system calls that change the disk, and in the middle of each write."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from seam import HALF, Seam
from story import SAVES, Trainer, check, local_store, tell_story

# The children that are forked use nothing that threads of this process may hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
_KILLED = 9
_BROKEN = 1


def _in_child(root: Path, named: bool, plan: Callable[[int, str], str | None]) -> tuple[int, list[int]]:
    """Tell the story in a forked process: its exit status, and what it reported through a pipe."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = _BROKEN
        try:
            seam = Seam(plan=plan)
            seam.install()
            tell_story(lambda: local_store(root, named=named), lambda number: _tell(write_end, number))
            _tell(write_end, len(seam.calls))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = [int.from_bytes(number, "little") for number in iter(lambda: pipe.read(4), b"")]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def _tell(pipe: int, number: int) -> None:
    os.write(pipe, number.to_bytes(4, "little"))


def _dying(at: int, half: bool) -> Callable[[int, str], str | None]:
    """End the process before change `at`; with `half`, in the middle of it if it is a write, and else right after it."""

    def plan(number: int, call: str) -> str | None:
        if half and number == at:
            return HALF if call == "writev" else None
        if number == at + half:
            os._exit(_KILLED)
        return None

    return plan


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.long)])
def test_killed_at_every_change_of_the_disk(tmp_path: Path, named: bool) -> None:
    calls: list[str] = []

    def watch(number: int, call: str) -> None:
        calls.append(call)

    status, told = _in_child(tmp_path / "whole", named, lambda number, call: None)
    assert (status, told[:-1]) == (0, list(range(SAVES)))
    with Seam(plan=watch).installed():
        tell_story(lambda: local_store(tmp_path / "watched", named=named), lambda number: None)
    assert len(calls) == told[-1] > 100
    assert {"mkdir", "create", "writev", "fsync", "link", "unlink", "rmdir"} <= set(calls)
    outcomes = set()
    # The saves make the same calls one after the other, so that every third of all is each of them in one save or another.
    for at in range(0, len(calls), 1 if LONG else 3):
        call = calls[at]
        for half in (False, True) if call == "writev" else (False,):
            root = tmp_path / f"{at}-{half}"
            status, told = _in_child(root, named, _dying(at, half))
            assert status == _KILLED
            newest = told[-1] if told else -1
            outcomes.add(check(root, newest, named=named) - newest)
    assert outcomes == {0, 1}


def test_restoring_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    """So that no kill or power cut during a restore can matter; only the claim before it writes."""
    tell_story(lambda: local_store(tmp_path / "run", named=False), lambda number: None)
    with Seam().installed() as seam:
        store = local_store(tmp_path / "run", named=False)
        trainer = Trainer(store, 5)
        claimed = len(seam.calls)
        assert claimed > 0
        assert trainer._restore(trainer.lineage.head) is not None
        assert len(seam.calls) == claimed
        store.close()
