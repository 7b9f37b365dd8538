"""A machine does not outlive its purpose: agents, watchdogs and commands are killed at every point, and the end is run once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agents import GIVE_UP_S, eventually, lives, python, read_until, started
from hypothesis import given
from hypothesis import strategies as st

from holdfast.agent import watchdog_process
from holdfast.agent.watchdog import Lifetime
from holdfast.core.errors import UsageError

PAUSE = """
print("ready", os.getpid(), flush=True)
while True: signal.pause()
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PAUSE
SAVING = 'signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], "a").write("saved"), sys.exit(75)))\n' + PAUSE


def pid_of(agent: subprocess.Popen[bytes]) -> int:
    assert agent.stdout is not None
    return int(read_until(agent.stdout.fileno(), b"\n").split()[1])


def parent_of(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def watchdog_of(agent_pid: int) -> int:
    """By its own arguments: it has neither the agent's session nor its parent."""

    def found() -> int:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and lives(int(entry.name)):
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                is_watchdog = len(words) > 4 and words[3].endswith(b"watchdog_process.py")
                if is_watchdog and json.loads(words[4])["agent"] == agent_pid and parent_of(entry) != agent_pid:
                    return int(entry.name)
        return 0

    eventually(found)
    return found()


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    return tmp_path / "ended"


def on_exit(ended: Path) -> list[str]:
    return ["--on-exit", f"echo ended >> {ended}"]


@pytest.mark.parametrize(
    ("code", "exit_code"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)]
)
def test_the_end_is_run_once_however_the_command_ends_and_before_the_agent_leaves(
    code: str, exit_code: int, ended: Path
) -> None:
    options = ["--max-errors", "0", "--max-preemptions", "0", *on_exit(ended), "--"]
    with started(*options, *python(code)) as agent:
        assert agent.wait() == exit_code
        assert ended.read_text() == "ended\n"


def test_the_end_is_run_when_the_command_cannot_even_be_started(ended: Path) -> None:
    with started(*on_exit(ended), "--", "no-such-command") as agent:
        assert agent.wait() == 2
        assert ended.read_text() == "ended\n"


def test_a_failing_end_is_said(ended: Path) -> None:
    with started("--on-exit", "exit 3", "--", "true") as agent:
        stderr = agent.communicate(timeout=GIVE_UP_S)[1]
    assert agent.returncode == 0
    assert b"the command to run at the end has failed with exit code 3: exit 3" in stderr


def test_an_agent_that_is_killed_leaves_a_saved_command_and_an_ended_machine(ended: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with started(*on_exit(ended), "--", *python(SAVING), str(saved)) as agent:
        pid = pid_of(agent)
        agent.kill()
        agent.communicate(timeout=GIVE_UP_S)
        assert saved.read_text() == "saved"
        assert ended.read_text() == "ended\n"
        assert not lives(pid)


def test_a_command_that_does_not_stop_is_killed_when_its_agent_is_gone(ended: Path) -> None:
    with started("--grace", "0", *on_exit(ended), "--", *python(STUBBORN)) as agent:
        pid = pid_of(agent)
        agent.kill()
        agent.communicate(timeout=GIVE_UP_S)
        assert not lives(pid)
        assert ended.read_text() == "ended\n"


def test_what_a_dead_shell_leaves_behind_is_told_and_then_killed_with_its_agent_gone(
    tmp_path: Path, ended: Path
) -> None:
    """The shell dies of the kernel's SIGTERM; its child has to be told by the watchdog."""
    saved = tmp_path / "saved"
    inner = f"{sys.executable} -c 'import os, signal, sys\n{SAVING}' {saved}; true"
    with started(*on_exit(ended), "--", "sh", "-c", inner.replace('"', '\\"').replace('\\"', '"')) as agent:
        pid = pid_of(agent)
        agent.kill()
        agent.communicate(timeout=GIVE_UP_S)
        assert saved.read_text() == "saved"
        assert not lives(pid)


def test_a_watchdog_that_dies_is_replaced_and_knows_what_the_first_one_knew(ended: Path) -> None:
    with started("--grace", "0", *on_exit(ended), "--", *python(STUBBORN)) as agent:
        pid = pid_of(agent)
        first = watchdog_of(agent.pid)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not lives(first))
        second = watchdog_of(agent.pid)
        assert second != first
        agent.kill()
        agent.communicate(timeout=GIVE_UP_S)
        assert not lives(pid)
        assert ended.read_text() == "ended\n"


def test_time_is_over_the_command_saves_and_the_code_says_that_it_is_not_to_be_started_again(
    ended: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    options = ["--max-cost", "0.001", "--price", "3.6", "--grace", "1 min", *on_exit(ended), "--"]
    with started(*options, *python(SAVING), str(saved)) as agent:
        stderr = agent.communicate(timeout=GIVE_UP_S)[1].decode()
    assert agent.returncode == 78
    assert saved.read_text() == "saved"
    assert ended.read_text() == "ended\n"
    assert "the machine's time of 1 s is over: that is $0.001 at $3.6 per hour" in stderr


def test_a_hard_limit_holds_against_a_command_that_does_not_stop_and_a_stopped_agent(ended: Path) -> None:
    with started("--max-hours", "0.0005", *on_exit(ended), "--", *python(STUBBORN)) as agent:
        pid = pid_of(agent)
        agent.communicate(timeout=GIVE_UP_S)
        assert agent.returncode == 78, "its grace period is longer than its time"
        assert not lives(pid)
    with started("--max-hours", "0.0005", *on_exit(ended), "--", *python(STUBBORN)) as agent:
        pid = pid_of(agent)
        os.kill(agent.pid, signal.SIGSTOP)
        eventually(lambda: not lives(pid) or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        os.kill(agent.pid, signal.SIGCONT)
        agent.communicate(timeout=GIVE_UP_S)
    assert ended.read_text() == "ended\n" * 2


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 30))])
def test_killed_at_any_moment_the_end_is_run_exactly_once(seed: int, ended: Path) -> None:
    """Agent, watchdog or command, at a random moment of a short life, its start and its end included."""
    rng = random.Random(seed)
    code = "import time; time.sleep(0.05)"
    for number in range(3):
        ended.unlink(missing_ok=True)
        with started("--max-preemptions", "1", *on_exit(ended), "--", *python(code)) as agent:
            # Before the watchdog stands nobody can promise anything.
            watchdog = watchdog_of(agent.pid)
            time.sleep(rng.random() * 0.25)
            victim = agent.pid if (seed + number) % 2 else watchdog
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                pass
            agent.communicate(timeout=GIVE_UP_S)
        assert ended.read_text() == "ended\n"


RACE = """
import os, sys
from holdfast.agent.watchdog_process import run_once
token, source = os.pipe()
os.write(source, b"1")
os.close(source)
point, command = sys.argv[1], sys.argv[2]
if os.fork() == 0:
    def die(*arguments): os.kill(os.getpid(), 9)
    if point == "before fork": os.fork = die
    if point == "after fork":
        fork = os.fork
        def fork_and_die():
            child = fork()
            return child if child == 0 else die()
        os.fork = fork_and_die
    if point == "before wait": os.waitpid = die
    run_once(token, command)
    os._exit(0)
if point != "both": os.wait()
print(run_once(token, command), flush=True)
if point == "both": os.wait()
"""


@pytest.mark.parametrize("point", ["before fork", "after fork", "before wait", "after all", "both"])
def test_the_token_is_taken_once_whoever_is_killed_wherever(point: str, ended: Path) -> None:
    subprocess.run([sys.executable, "-c", RACE, point, f"echo ended >> {ended}"], check=True, timeout=60)
    eventually(ended.exists)
    assert ended.read_text() == "ended\n"


def test_the_watchdog_needs_nothing_but_the_standard_library() -> None:
    path = watchdog_process.__file__
    code = f"import runpy, sys; runpy.run_path({path!r}); print([m for m in sys.modules if m.startswith('holdfast')])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@given(st.floats(0.01, 100) | st.none(), st.floats(0.01, 1000) | st.none(), st.floats(0, 50), st.floats(0, 1000))
def test_a_limit_is_the_tighter_one_and_leaves_time_to_save(
    max_hours: float | None, max_cost: float | None, price: float, grace_s: float
) -> None:
    lifetime = Lifetime(max_hours=max_hours, max_cost=max_cost, price_per_hour=price)
    hours = [limit for limit in (max_hours, max_cost / price if max_cost and price else None) if limit is not None]
    if not hours:
        assert lifetime.limit_s == lifetime.stop_after_s(grace_s) == float("inf")
        return
    assert lifetime.limit_s == pytest.approx(3600 * min(hours))
    stop_s = lifetime.stop_after_s(grace_s)
    assert lifetime.limit_s / 2 <= stop_s <= lifetime.limit_s
    assert stop_s + grace_s <= lifetime.limit_s * (1 + 1e-9) or stop_s == lifetime.limit_s / 2
    assert "over" in lifetime.reason()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_hours": 0.0},
        {"max_cost": 1.0},
        {"max_cost": -1.0, "price_per_hour": 1.0},
        {"price_per_hour": float("nan")},
    ],
)
def test_limits_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Lifetime(**fields)  # type: ignore[arg-type]
