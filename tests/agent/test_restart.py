"""The agent around real processes: restarts, signals, leftovers, and what it says about them.

Children are small scripts that report over the progress page as a trainer does. Nothing sleeps: a child that must be alive
while the test acts says "ready" on its output and then waits for a signal.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.agent.evidence import oom_kills
from holdfast.agent.restart import RunOptions, run_command
from holdfast.core.clock import SystemClock
from holdfast.core.errors import UsageError
from holdfast.core.events import CollectingSink
from holdfast.policy.restart import RestartLimits

AT_ONCE = RestartLimits(first_delay_s=0, max_delay_s=0)
TRAINER = """
import os, signal, sys
from pathlib import Path
from holdfast.core.contract import ProgressPage
attempt = int(os.environ["HOLDFAST_ATTEMPT"])
page = ProgressPage(Path(os.environ["HOLDFAST_CONTROL"]))
"""


class Run:
    """One call of the agent in this process, and what came of it."""

    def __init__(self, code: str, options: RunOptions | None = None, environment: dict[str, str] | None = None) -> None:
        self.sink = CollectingSink()
        self.lines: list[str] = []
        self.exit_code = run_command(
            [sys.executable, "-c", code],
            options or RunOptions(limits=AT_ONCE),
            clock=SystemClock(),
            sink=self.sink,
            say=self.lines.append,
            rng=random.Random(1),
            environment=os.environ | (environment or {}),
        )

    @property
    def endings(self) -> list[object]:
        return [event.fields["ending"] for event in self.sink.named("attempt.ended")]


def test_a_run_that_is_preempted_crashes_and_is_killed_comes_to_its_end_and_says_what_it_lost() -> None:
    run = Run(
        TRAINER
        + """
page.claimed(attempt)
page.restored(10 * (attempt - 1)) if attempt > 1 else None
page.committed(10 * attempt)
page.stepped(10 * attempt + 3)
if attempt == 1: sys.exit(75)
if attempt == 2: raise SystemExit("out of luck")
if attempt == 3: os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert run.exit_code == 0
    assert run.endings[:2] == ["preempted", "error"]
    assert run.endings[3:] == ["done"]
    assert [event.fields["lost_steps"] for event in run.sink.named("attempt.ended")] == [3, 3, 3, 3]
    assert len(run.lines) == 4
    assert "exit code 75" in run.lines[0]
    assert "at step 13, last committed step 10, 3 steps lost" in run.lines[0]
    assert run.lines[0].endswith("starting attempt 2 now")
    assert "killed by SIGKILL" in run.lines[2]
    assert run.lines[3].endswith("the command is done; leaving with exit code 0")


def test_two_attempts_without_a_new_checkpoint_stop_even_if_each_commits_the_same_steps_again() -> None:
    run = Run(TRAINER + "page.claimed(attempt); page.committed(10); page.stepped(19); sys.exit(75)")
    assert run.exit_code == 77
    assert len(run.endings) == 3, "the first made progress, two came no further"
    assert "2 attempts in a row committed no new checkpoint" in run.lines[-1]


def test_a_restore_from_an_older_checkpoint_counts_from_there() -> None:
    run = Run(
        TRAINER
        + """
restored, committed = {1: (-1, 30), 2: (10, 20), 3: (20, 25), 4: (25, 25)}[attempt]
page.claimed(attempt)
page.restored(restored)
page.committed(committed)
sys.exit(0 if attempt == 4 else 75)
"""
    )
    assert [event.fields["progress_made"] for event in run.sink.named("attempt.ended")] == [True, True, True, False]
    assert run.exit_code == 0


@pytest.mark.parametrize("nonsense", ["", "page._memory[:48] = b'hfprog01' + bytes([255] * 39) + b'~'"])
def test_a_command_without_known_progress_ends_by_its_budget_with_its_own_exit_code(nonsense: str) -> None:
    run = Run(TRAINER + nonsense + "\nsys.exit(41)")
    assert run.exit_code == 41
    assert len(run.endings) == 4
    assert "it reported no progress" in run.lines[0]


@pytest.mark.parametrize("exit_code", [2, 76, 130, 0])
def test_endings_that_another_start_would_not_change_are_final(exit_code: int) -> None:
    run = Run(f"raise SystemExit({exit_code})")
    assert (run.exit_code, len(run.endings)) == (exit_code, 1)


def test_the_command_is_told_what_it_needs_and_fresh_only_until_a_start_has_claimed(tmp_path: Path) -> None:
    code = TRAINER + (
        "import json\n"
        "names = ['HOLDFAST_RUN', 'HOLDFAST_ATTEMPT', 'HOLDFAST_FRESH']\n"
        "with open(os.environ['SEEN'], 'a') as seen: print(json.dumps([os.environ.get(n) for n in names]), file=seen)\n"
        "if attempt == 2: page.claimed(1); page.committed(5)\n"
        "sys.exit(75 if attempt < 4 else 0)"
    )
    options = RunOptions(url="s3://bucket/runs/gpt", fresh=True, limits=AT_ONCE)
    seen = tmp_path / "seen"
    assert Run(code, options, {"SEEN": str(seen)}).exit_code == 0
    told = [json.loads(line) for line in seen.read_text().splitlines()]
    assert told == [["s3://bucket/runs/gpt", str(n), fresh] for n, fresh in [(1, "1"), (2, "1"), (3, None), (4, None)]]


LEFTOVERS = {
    "one that saves": "signal.signal(15, lambda *_: (open(sys.argv[1], 'a').write('told to stop'), sys.exit()))",
    "one that refuses": "signal.signal(15, signal.SIG_IGN)",
}


@pytest.mark.parametrize(
    ("kind", "grace_s", "said"), [("one that saves", 3600, "told to stop"), ("one that refuses", 0, "")]
)
def test_what_a_dead_command_leaves_behind_is_stopped_or_killed(
    kind: str, grace_s: float, said: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    leftover = f"import signal, sys; {LEFTOVERS[kind]}; print('ready', flush=True); signal.pause()"
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {leftover!r}, {str(log)!r}], stdout=subprocess.PIPE)
child.stdout.readline()
os._exit(0)
"""
    run = Run(code, RunOptions(leftover_grace_s=grace_s))
    assert run.exit_code == 0
    assert log.read_text() == said
    assert not members_of(int(run.sink.named("attempt.started")[0].fields["pid"]))


def members_of(group: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX" and int(fields[2]) == group:
                    members.append(int(entry.name))
    return members


# Signals: the agent as a process of its own.

DRIVER = """
import random, sys
from holdfast.agent.restart import RunOptions, run_command
from holdfast.core.clock import SystemClock
from holdfast.core.events import NullSink
from holdfast.policy.restart import RestartLimits
grace_s, delay_s, code = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
say = lambda line: print(line, file=sys.stderr, flush=True)
options = RunOptions(grace_s=grace_s, limits=RestartLimits(first_delay_s=delay_s, max_delay_s=delay_s))
sys.exit(run_command([sys.executable, "-c", code], options, clock=SystemClock(), sink=NullSink(), say=say,
                     rng=random.Random(1)))
"""
READY = "print('ready', os.getpid(), flush=True)\n"
PAUSE = "while True: signal.pause()\n"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    agents: list[subprocess.Popen[str]] = []

    def start_agent(code: str, grace_s: float = 3600, delay_s: float = 0, **popen: object) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", DRIVER, str(grace_s), str(delay_s), "import os, signal, sys\n" + code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | popen
        agents.append(subprocess.Popen(argv, **pipes))  # type: ignore[call-overload]
        return agents[-1]

    yield start_agent
    for agent in agents:
        with agent:  # closes the pipes and reaps
            agent.kill()


def read_line(agent: subprocess.Popen[str]) -> str:
    """Byte by byte past Python's buffer, so that `communicate` gets all that follows. The time limit only ends a broken test."""
    assert agent.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([agent.stdout], [], [], 60)[0], f"the child said nothing more than {line!r}"
        line += os.read(agent.stdout.fileno(), 1) or pytest.fail(f"the output ended after {line!r}")
    return line.decode()


def ready_pid(agent: subprocess.Popen[str]) -> int:
    word, pid = read_line(agent).split()
    assert word == "ready"
    return int(pid)


def finished(agent: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = agent.communicate(timeout=60)
    return agent.returncode, stdout, stderr


WORKER = """
import signal, sys
signal.signal(15, lambda *_: print('told', flush=True))
print('ready', flush=True)
for line in sys.stdin: print('alive', flush=True)
"""
TRAINER_WITH_A_WORKER = (
    f"""
import os, signal, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
worker.stdout.readline()
def save(*_):
    # Many exchanges, so that a signal on its way to the worker would have arrived.
    for _ in range(300):
        worker.stdin.write(b"still there?\\n")
        answer = worker.stdout.readline()
        if answer != b"alive\\n": break
    print("saved; the worker said", answer, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
"""
    + READY
    + PAUSE
)
"""Its worker is in the same process group, and would say so if it were told to stop while the trainer still saves."""


def test_sigterm_is_passed_to_the_main_process_alone_and_its_exit_code_is_kept(start: Start) -> None:
    agent = start(TRAINER_WITH_A_WORKER)
    ready_pid(agent)
    agent.send_signal(signal.SIGTERM)
    exit_code, stdout, stderr = finished(agent)
    assert exit_code == 75
    assert stdout == "saved; the worker said b'alive\\n'\n"
    assert "the agent was told to stop; leaving with exit code 75" in stderr


def test_a_command_that_ignores_sigterm_is_killed_with_its_group_after_the_grace_period(start: Start) -> None:
    agent = start("signal.signal(15, signal.SIG_IGN)\nif os.fork(): " + READY + PAUSE, grace_s=0)
    group = ready_pid(agent)
    agent.send_signal(signal.SIGTERM)
    assert finished(agent)[0] == 137
    assert not members_of(group)


def test_a_trainer_whose_shell_died_of_sigterm_can_still_save_with_its_workers_alive(start: Start) -> None:
    """The main process is a stand-in for a shell without `exec`: it dies of SIGTERM at once, its child needs to be told."""
    agent = start(f"import subprocess; subprocess.run([sys.executable, '-c', {TRAINER_WITH_A_WORKER!r}])")
    ready_pid(agent)
    agent.send_signal(signal.SIGTERM)
    exit_code, stdout, _ = finished(agent)
    assert (exit_code, stdout) == (143, "saved; the worker said b'alive\\n'\n")


def test_a_second_ctrl_c_kills_at_once(start: Start) -> None:
    agent = start("signal.signal(2, lambda *_: print('noted', flush=True))\n" + READY + PAUSE)
    pid = ready_pid(agent)
    agent.send_signal(signal.SIGINT)
    assert read_line(agent) == "noted\n"
    agent.send_signal(signal.SIGINT)
    assert finished(agent)[0] == 130
    assert not members_of(pid)


def test_signals_between_launcher_and_command_pass_through_the_agent(start: Start) -> None:
    agent = start("signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\n" + READY + PAUSE)
    ready_pid(agent)
    agent.send_signal(signal.SIGUSR1)
    assert finished(agent)[0] == 0


def test_a_closed_terminal_means_sigterm_and_a_wait_between_attempts_ends_at_once(start: Start) -> None:
    agent = start("signal.signal(15, lambda *_: sys.exit(75))\n" + READY + PAUSE)
    ready_pid(agent)
    agent.send_signal(signal.SIGHUP)
    assert finished(agent)[0] == 75

    waiting = start("sys.exit(1)", delay_s=3600)
    assert waiting.stderr is not None
    assert "starting attempt 2" in waiting.stderr.readline()
    waiting.send_signal(signal.SIGTERM)
    assert finished(waiting)[0] == 143


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a command of its parent's death on Linux only")
def test_a_killed_agent_does_not_leave_its_command_running(start: Start) -> None:
    agent = start("signal.signal(15, lambda *_: (print('told', flush=True), sys.exit()))\n" + READY + PAUSE)
    pid = ready_pid(agent)
    agent.kill()
    try:
        # The command holds the other end of this pipe: the end of the output is the end of the command.
        assert agent.communicate(timeout=60)[0] == "told\n"
    except subprocess.TimeoutExpired:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the command outlived its agent")


def test_ctrl_c_at_a_terminal_reaches_the_command_once_and_it_can_read_from_the_terminal(start: Start) -> None:
    controller, terminal = os.openpty()
    modes = termios.tcgetattr(terminal)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, modes)

    def own_the_terminal() -> None:
        import fcntl

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    agent = start(
        "count = []\nsignal.signal(2, lambda *_: (count.append(1), print('noted', flush=True)))\n"
        "def leave(*_): print('interrupted', len(count), flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGUSR1, leave)\n"
        "print('read', input(), flush=True)\n" + READY + PAUSE,
        stdin=terminal,
        start_new_session=True,
        preexec_fn=own_the_terminal,
    )
    os.close(terminal)
    os.write(controller, b"a line\n")
    assert read_line(agent) == "read a line\n"
    ready_pid(agent)
    os.write(controller, b"\x03")
    assert read_line(agent) == "noted\n"
    # Passed on after whatever else the agent makes of the Ctrl-C: the command counts when all of it has arrived.
    agent.send_signal(signal.SIGUSR1)
    exit_code, stdout, _ = finished(agent)
    os.close(controller)
    assert (exit_code, stdout) == (130, "interrupted 1\n")


def test_what_cannot_be_started_is_a_usage_error_and_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    options = {"clock": SystemClock(), "sink": CollectingSink(), "say": print, "rng": random.Random(1)}
    for command, message in (["no-such-command"], "no-such-command"), ([str(tmp_path)], "cannot start"), ([], "--"):
        with pytest.raises(UsageError, match=message):
            run_command(command, RunOptions(), **options)  # type: ignore[arg-type]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before

    refused: list[str] = []

    def elsewhere() -> None:
        try:
            run_command(["true"], RunOptions(), **options)  # type: ignore[arg-type]
        except UsageError as error:
            refused.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert refused == ["a command can be supervised from the main thread only"]


def test_the_kernels_counter_of_memory_kills_is_read_where_it_exists(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/old\n0::/jobs/7\n")
    assert oom_kills(tmp_path, own) is None
    (tmp_path / "jobs/7").mkdir(parents=True)
    (tmp_path / "jobs/7/memory.events").write_text("low 0\nhigh 5\nmax 3\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(tmp_path, own) == 2
    (tmp_path / "jobs/7/memory.events").write_text("torn oom_kill")
    assert oom_kills(tmp_path, own) is None
