"""Killing writers of the local store: between any two system calls, and at random moments. An object is whole or absent."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.store import LocalStore

# The children that tests fork call nothing but the local store, so that threads left over from other tests do not matter.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

_LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
_WATCHED = ("open", "mkdir", "link", "rename", "unlink", "rmdir", "writev", "fsync", "close")


def _fork(work: Callable[[], None]) -> int:
    """Run `work` in a forked child and return its wait status; an error in it exits with 70."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(70)
    return os.waitpid(child, 0)[1]


def _die_at(number: int) -> None:
    """Replace the watched calls so that this process is killed just before the one with this number."""
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*arguments, **more)

        return call

    for name in _WATCHED:
        setattr(os, name, dying(getattr(os, name)))


_OLD, _NEW = b"old " * 5000, b"new " * 9000


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("operation", ["put", "replace", "put_new", "delete"])
def test_a_kill_between_any_two_system_calls_leaves_all_or_nothing(tmp_path: Path, operation: str, named: bool) -> None:
    outcomes = set()
    for number in range(200):
        root = tmp_path / str(number)
        store = LocalStore(root)
        if named:
            store._unnamed_files = False
        if operation in ("replace", "delete"):
            store.put("data/1/x", _OLD)

        def work(store: LocalStore = store, number: int = number) -> None:
            _die_at(number)
            if operation == "put_new":
                store.put_new("data/1/x", _NEW)
            elif operation == "delete":
                store.delete("data/1/x")
            else:
                store.put("data/1/x", [_NEW[:1000], _NEW[1000:]])

        status = _fork(work)
        assert status in (0, signal.SIGKILL)
        files = [path for path in root.rglob("*") if path.is_file()]
        litter = [path for path in files if path.relative_to(root).parts[0] == ".tmp"]
        assert not litter or named or operation == "replace"
        assert all(path == root / "data" / "1" / "x" for path in files if path not in litter)
        found = store.get("data/1/x", max_bytes=10**6) if set(files) - set(litter) else None
        outcomes.add(found)
        # The next writer is not hindered by what the dead one left.
        if found is None:
            assert store.put_new("data/1/x", _NEW)
        store.close()
        if status == 0:
            break
    else:
        pytest.fail("the operation never came to its end")
    expected = {"put": {None, _NEW}, "replace": {_OLD, _NEW}, "put_new": {None, _NEW}, "delete": {_OLD, None}}
    assert outcomes == expected[operation]
    assert number > 5


def test_random_kills_of_a_busy_writer_leave_whole_objects_only(tmp_path: Path) -> None:
    """The writer reports each object through a pipe; it is killed somewhere in the middle of what follows."""
    root = tmp_path / "root"
    rng = random.Random(20)
    bodies = [bytes([index]) * (1 + rng.randrange(3 * 2**20)) for index in range(8)]
    for turn in range(50 if _LONG else 20):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            store = LocalStore(root)
            for number in range(10**6):
                store.put(f"data/{turn}/{number}", bodies[number % 8])
                os.write(write_end, b".")
        os.close(write_end)
        reported = 0
        for _ in range(rng.randrange(4)):
            reported += len(os.read(read_end, 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read_end, "rb") as rest:
            reported += len(rest.read())
        store = LocalStore(root)
        found = {entry.key: entry.size_bytes for entry in store.list(f"data/{turn}/")}
        # What put had returned for is there; at most one more object is, and every one of them is whole.
        assert reported <= len(found) <= reported + 1
        for number in range(len(found)):
            body = bodies[number % 8]
            assert store.get(f"data/{turn}/{number}", max_bytes=len(body)) == body
            store.delete(f"data/{turn}/{number}")
        store.close()
        assert [path for path in root.rglob("*") if path.is_file()] == []
