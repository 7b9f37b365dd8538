"""A process killed before and after the store operations of claiming, saving, retaining and sweeping."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interleaved import make_state, same_state
from parts import begin, garbage, restore, resume

from holdfast.core.ids import random_token
from holdfast.store.local import LocalStore
from holdfast.testing.faulty_store import METHODS, WRITES, KillSwitch

# The children that are forked use nothing that threads of this process may hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

_SAVES = 4
_LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
_KILLED = 9
_BROKEN = 1


def _counted(after: bool) -> frozenset[str]:
    """Before a read there is what was there after the write before it, and after a write what is there before the next one; but
    whoever has put a head, and does not know it yet, is worth a try each time."""
    return METHODS if _LONG else frozenset({"put_new"}) if after else WRITES


def _state(number: int) -> dict[str, Any]:
    return {**make_state("A", number), "large": np.full(3000, number // 3, dtype=np.int64)}


def _train(store: KillSwitch, tell: Callable[[int], None]) -> None:
    attempt = begin(store, tokens=random_token)
    resume(attempt)
    for number in range(_SAVES):
        attempt.save(_state(number), number)
        tell(number)
    attempt.saver.close(60)


def _in_child(folder: Path, at_number: int | None, after: bool) -> tuple[int, int, int]:
    """Train in a forked process: its exit status, the newest save that it was told is committed (-1: none), its operations."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = _BROKEN
        try:
            switch = KillSwitch(
                LocalStore(folder), lambda: os._exit(_KILLED), at_number=at_number, after=after, methods=_counted(after)
            )
            _train(switch, lambda number: _tell(write_end, number))
            _tell(write_end, switch.counted)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = [int.from_bytes(pipe_bytes, "little") for pipe_bytes in iter(lambda: pipe.read(4), b"")]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return status, _SAVES - 1, told[-1]
    return status, told[-1] if told else -1, 0


def _tell(pipe: int, number: int) -> None:
    os.write(pipe, number.to_bytes(4, "little"))


def test_killed_at_every_operation(tmp_path: Path) -> None:
    for after in (False, True):
        status, newest, operations = _in_child(tmp_path / f"whole-{after}", None, after)
        assert (status, newest) == (0, _SAVES - 1)
        assert operations > (_SAVES if after else 3 * _SAVES)
        for number in range(operations):
            folder = tmp_path / f"{number}-{after}"
            status, newest, _ = _in_child(folder, number, after)
            assert status == _KILLED
            _check(LocalStore(folder), newest)


def _check(store: LocalStore, newest: int) -> None:
    """Exactly the old state or the new one; and what was left behind goes with the next attempt's first save."""
    found = restore(store)
    known = [None, *(_state(number) for number in range(_SAVES))]
    allowed = known[newest + 1 : newest + 3]
    assert any(
        found is state or (found is not None and state is not None and same_state(found, state)) for state in allowed
    )
    following = begin(store)
    again = resume(following)
    assert (again is None) == (found is None)
    assert found is None or same_state(again, found)
    assert following.fallbacks == []
    following.save(_state(9), 9)
    following.saver.close(60)
    assert same_state(restore(store), _state(9))
    assert garbage(store) == set()
    store.close()
