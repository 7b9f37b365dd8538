"""All that a command has led to is found and ended: in sessions of its own, after its parent's death, while it multiplies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import eventually

from holdfast.drill.attempt import Life
from holdfast.drill.family import MARK, has_launched_ranks, kill_all, members, signal_all

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to find processes in")

CHAIN = """
import os, time
for _ in range(2):
    if os.fork():
        break
    os.setsid()
print(os.getpid(), flush=True)
time.sleep(3600)
"""
"""Three processes, each the child of the one before it, each in a session of its own."""
SWARM = """
import os, time
print(os.getpid(), flush=True)
for _ in range(300):
    if not os.fork():
        os.setsid()
        print(os.getpid(), flush=True)
        break
time.sleep(3600)
"""


@contextmanager
def family(script: str, mark: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", script], env={**os.environ, MARK: mark, **environ}, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            kill_all(process.pid, mark)


def pids(process: subprocess.Popen[str], count: int) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline()) for _ in range(count)]


def state(pid: int) -> str:
    """`Z` also for one that is gone altogether."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def all_are(chosen: list[int], states: str) -> bool:
    return all(state(pid) in states for pid in chosen)


def test_sessions_of_their_own(tmp_path: Path) -> None:
    with family(CHAIN, str(tmp_path)) as process:
        chain = pids(process, 3)
        assert members(process.pid)[0] == process.pid
        assert sorted(members(process.pid)) == sorted(chain)
        signal_all(process.pid, signal.SIGSTOP)
        eventually(lambda: all_are(chain, "T"))
        signal_all(process.pid, signal.SIGCONT)
        eventually(lambda: all_are(chain, "SR"))
        kill_all(process.pid)
        assert process.wait() == -signal.SIGKILL
        eventually(lambda: all_are(chain, "Z"))


def test_what_is_left_behind(tmp_path: Path) -> None:
    """Its root is gone, the rest has another parent. Nobody else's process is taken for one of it."""
    with family(CHAIN, str(tmp_path / "1")) as process, family(CHAIN, str(tmp_path / "11")) as other:
        chain, others = pids(process, 3), pids(other, 3)
        process.kill()
        process.wait()
        assert members(process.pid) == []
        assert members(process.pid, str(tmp_path / "1")) == sorted(set(chain) - {process.pid})
        kill_all(process.pid, str(tmp_path / "1"))
        eventually(lambda: all_are(chain, "Z"))
        assert all_are(others, "SR")


def test_what_multiplies_meanwhile(tmp_path: Path) -> None:
    with family(SWARM, str(tmp_path)) as process:
        first = pids(process, 3)
        kill_all(process.pid)
        assert process.wait() == -signal.SIGKILL
        eventually(lambda: members(process.pid, str(tmp_path)) == [])
        # Whoever still ran would keep the pipe open.
        assert process.stdout is not None
        assert all_are([*first, *map(int, process.stdout.read().split())], "Z")


RANKS = "import os\nif not os.fork():\n    os.execle('/bin/sleep', 'sleep', '3600', {'RANK': '%d'})\nos.wait()"


@pytest.mark.parametrize(
    ("rank", "own", "launched"),
    [(0, None, True), (1, None, False), (0, "0", False)],
    ids=["torchrun", "itself", "bare"],
)
def test_who_is_a_launcher(tmp_path: Path, rank: int, own: str | None, launched: bool) -> None:
    """Who trains as rank 0 and starts the others, as Lightning does, is none; neither is who was started as rank 0."""
    with family(RANKS % rank, str(tmp_path), **({"RANK": own} if own else {})) as process:
        eventually(lambda: any(state(pid) == "S" and pid != process.pid for pid in members(process.pid)))
        if launched:
            eventually(lambda: has_launched_ranks(process.pid))
        assert has_launched_ranks(process.pid) == launched


@pytest.mark.parametrize(
    ("launched", "code", "recorded", "left"),
    [
        (True, 1, {2: 75}, 75),
        (True, 1, {2: 76}, 76),
        (True, 1, {1: 75}, 1),
        (True, 0, {2: 75}, 0),
        (True, -9, {2: 75}, -9),
        (True, None, {2: 75}, None),
        (False, 1, {2: 75}, 1),
    ],
)
def test_whose_exit_code_counts(launched: bool, code: int | None, recorded: dict[int, int], left: int | None) -> None:
    """A launcher's 1 stands for what its last attempt has recorded, if it has; every other end is its own."""
    life = Life(1, 0.0, None, claimed=True, attempt=2, launched=launched, exit_code=code)
    assert life.left_with(recorded) == left
