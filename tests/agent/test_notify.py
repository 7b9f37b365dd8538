"""`holdfast notify` around real agents and real trainings: who is told, what is waited for, and what the exit code promises."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from agents import GIVE_UP_S, eventually, python, read_until, started
from typer.testing import CliRunner

from holdfast.agent import registry
from holdfast.agent.callers import Callers
from holdfast.agent.notify import Fate, Outcome, exit_code, notify_agents
from holdfast.agent.registry import Registered, Registration, find_agents
from holdfast.checkpoint.heads import read_truth
from holdfast.cli.app import app
from holdfast.core.clock import SystemClock
from holdfast.core.contract import (
    ENV_AGENTS,
    EXIT_PREEMPTED,
    NOTIFY_SOCKET,
    KeptWord,
    NoticeWord,
    ReadyWord,
    decode_words,
    encode_word,
)
from holdfast.core.errors import UsageError
from holdfast.store.local import LocalStore

TRAINING = """
import sys, time
import torch
import holdfast
torch.manual_seed(1)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
loader = torch.utils.data.DataLoader(torch.rand(4000, 8), batch_size=4)
with holdfast.Run(save_every="1 h") as run:
    run.track(model=model, optimizer=optimizer)
    for batch in run.batches(loader, epochs=100):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if run.step == 2:
            print("trains", flush=True)
        time.sleep(0.02)
"""
WAITS = "print('ready', flush=True); signal.pause()"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
REPORTS = """
from pathlib import Path
from holdfast.core.contract import ProgressPage
page = ProgressPage(Path(os.environ["HOLDFAST_CONTROL"]))
page.claimed(1), page.committed(10), page.stepped(13)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where these agents register: nobody else's are told."""
    monkeypatch.setenv(ENV_AGENTS, str(tmp_path / "agents"))
    return tmp_path / "agents"


@contextmanager
def notifying(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "holdfast", "notify", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        timer = threading.Timer(GIVE_UP_S, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def notify(*arguments: str) -> tuple[int, str]:
    """Exit code and all that was said."""
    with notifying(*arguments) as process:
        out, err = process.communicate()
        return process.returncode, (out + err).decode()


def until_said(agent: subprocess.Popen[bytes], words: bytes) -> None:
    assert agent.stdout is not None
    read_until(agent.stdout.fileno(), words)


def durable_step(run: Path) -> int:
    head = read_truth(LocalStore(run)).head
    return max((ref.step for ref in head.checkpoints), default=0) if head is not None else 0


def test_everything_is_durable_when_it_returns_and_only_those_are_told_who_are_meant(
    place: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        started("--run", str(first), "--no-logs", "--", *python(TRAINING)) as one,
        started("--run", str(second), "--", *python(WAITS)) as other,
    ):
        until_said(one, b"trains\n")
        until_said(other, b"ready\n")
        with notifying("--deadline", "3 s", "--run", str(first), "--source", "here") as waiting:
            assert waiting.stdout is not None
            read_until(waiting.stdout.fileno(), b"agent %d of file://%b has heard it\n" % (one.pid, bytes(first)))
            # The other one hears of it from its own caller, later.
            code, told = notify("--deadline", "3 s", "--pid", str(other.pid), "--json")
            said = waiting.communicate()[0].decode()
            assert waiting.returncode == 0, said
        saved = durable_step(first)
        assert said.endswith(f"agent {one.pid} of file://{first} has kept everything: step {saved} is durable\n")
        assert str(other.pid) not in said
        words = one.communicate()[1].decode()
        assert one.returncode == EXIT_PREEMPTED, words
        assert "holdfast: notice from notify:here: preemption" in words
        assert f"at step {saved}, last committed step {saved}, 0 steps lost" in words
        assert code == 0, told
        fate = {
            "pid": other.pid,
            "uid": os.geteuid(),
            "run": f"file://{second}",
            "outcome": "kept",
            "step": None,
            "lost": [],
        }
        assert json.loads(told)["agents"] == [fate]
        assert json.loads(told)["exit_code"] == 0
        words = other.communicate()[1].decode()
        assert other.returncode == EXIT_PREEMPTED, words
        assert "notify:here" not in words
    assert list(place.iterdir()) == []


def test_nobody_is_there(place: Path) -> None:
    code, said = notify("--deadline", "25s")
    assert (code, "nothing has to be kept" in said) == (0, True)
    with started("--", *python(WAITS)) as agent:
        until_said(agent, b"ready\n")
        code, said = notify("--deadline", "25s", "--pid", "1")
        assert (code, f"there are others: agent {agent.pid}\n" in said) == (0, True)


def test_a_killed_agent_is_none_whoever_has_its_number_and_a_stopped_one_is_missed(place: Path) -> None:
    with started("--", *python(WAITS)) as agent:
        until_said(agent, b"ready\n")
        (entry,) = place.iterdir()
        agent.kill()
        agent.wait()
        # Its number belongs to a living process now.
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"pid": os.getpid()}))
        (place / "other").write_text("not an agent's")
        code, said = notify("--deadline", "25s")
        assert (code, "nothing has to be kept" in said) == (0, True), said
        assert not entry.exists()
        assert (place / "other").exists()
    with started("--", *python(WAITS)) as stopped, started("--", *python(WAITS)) as well:
        for each in (stopped, well):
            until_said(each, b"ready\n")
        stopped.send_signal(signal.SIGSTOP)
        code, said = notify("--deadline", "5 s")
        assert code == 69
        assert f"agent {stopped.pid} could NOT be told (it does not answer)\n" in said
        assert f"agent {well.pid} has kept everything\n" in said
        stopped.kill()


def test_withdrawn_and_not_waited_for(place: Path) -> None:
    with started("--", *python(WAITS)) as agent:
        until_said(agent, b"ready\n")
        heard = f"agent {agent.pid} has heard it\n"
        with notifying("--deadline", "200 s") as waiting:
            assert waiting.stdout is not None
            read_until(waiting.stdout.fileno(), heard.encode())
            assert notify("--deadline", "100 s", "--no-wait", "--source", "another") == (0, heard)
            # Another source's word is another word.
            assert notify("--withdraw", "--source", "another") == (0, heard)
            assert waiting.poll() is None
            assert notify("--withdraw") == (0, heard)
            assert waiting.communicate()[0] == f"agent {agent.pid} goes on: the notice has been withdrawn\n".encode()
            assert waiting.returncode == 0
        assert notify("--kind", "rebalance") == (0, heard)
        assert agent.poll() is None
        agent.kill()


def test_lost_steps_and_a_deadline_that_comes_first_are_no_success(place: Path) -> None:
    with started("--", *python(REPORTS)) as loses, started("--", *python(DEAF)) as late:
        until_said(loses, b"ready\n")
        until_said(late, b"ready\n")
        with notifying("--deadline", "2 s") as waiting:
            assert waiting.stdout is not None
            read_until(waiting.stdout.fileno(), b"agent %d has heard it\n" % late.pid)
            late.send_signal(signal.SIGSTOP)
            said = waiting.communicate()[0].decode()
            assert waiting.returncode == 1
        assert (
            f"agent {loses.pid} has ended, and NOT everything is kept: step 10 is durable (3 steps of the command)"
            in said
        )
        assert said.endswith("the deadline has passed, and not everything is kept\n")
        late.kill()


def test_an_agent_that_dies_before_it_has_kept_everything(place: Path) -> None:
    with started("--", *python(DEAF)) as agent:
        until_said(agent, b"ready\n")
        with notifying("--deadline", "100 s") as waiting:
            assert waiting.stdout is not None
            read_until(waiting.stdout.fileno(), b"has heard it\n")
            agent.kill()
            said = waiting.communicate()[0].decode()
            assert (waiting.returncode, "the agent died" in said) == (1, True), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say when the machine goes"),
        (["--deadline", "soon"], "neither a time"),
        (["--deadline", "5 s", "--withdraw"], "give one of them"),
        (["--deadline", "5 s", "--kind", "rebalance"], "leave one of them out"),
        (["--deadline", "5 s", "--run", "s3:/bucket"], "not a run's URL"),
    ],
)
def test_a_mistake_tells_nobody(place: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["notify", *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert result.output == ""


def test_a_folder_that_others_may_write_is_ignored_and_the_agent_says_so(place: Path) -> None:
    place.mkdir(mode=0o700)
    place.chmod(0o777)
    with started("--", *python(WAITS)) as agent:
        until_said(agent, b"ready\n")
        assert list(place.iterdir()) == []
        (place / f"{'0' * 24}.json").write_text("{}")
        code, said = notify("--deadline", "25s")
        assert (code, "nothing has to be kept" in said) == (0, True)
        agent.terminate()
        words = agent.communicate()[1].decode()
    assert (
        f"`holdfast notify` cannot find this agent: {place}: it does not belong to user {os.geteuid()} alone" in words
    )


class Agent:
    """Registered, and listening, in this process."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.heard: list[NoticeWord] = []
        self.callers = Callers(folder, self.heard.append)
        self.registration = Registration(folder, run=None, environ=environ)
        assert self.registration.trouble is None

    def end(self, kept: KeptWord) -> None:
        self.registration.close()
        self.callers.close(kept)


def word(left_s: float) -> NoticeWord:
    now_s = SystemClock().unix_s()
    return NoticeWord(
        kind="preemption", deadline_unix_s=now_s + left_s, source="notify", id="notify", heard_unix_s=now_s
    )


def tell(agents: list[Registered], left_s: float, environ: dict[str, str], **more: Any) -> list[Fate]:
    settings: dict[str, Any] = {"wait": True, "changed": lambda fate: None} | more
    return notify_agents(
        agents, word(left_s), clock=SystemClock(), still_there=lambda agent: agent in find_agents(environ), **settings
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play other users")
def test_root_finds_all_users_agents_and_is_not_led_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TMP", tmp_path)
    mine = Agent(tmp_path / "control", {})
    (own,) = find_agents({})
    assert (own.uid, own.pid, own.folder) == (0, os.getpid(), tmp_path / "control")
    # User 4711 registers what is not theirs: root's own socket, once by its folder and once behind a link.
    theirs = tmp_path / "holdfast-agents-4711"
    trap = tmp_path / "trap"
    trap.mkdir(mode=0o700)
    (trap / NOTIFY_SOCKET).symlink_to(tmp_path / "control" / NOTIFY_SOCKET)
    (tmp_path / "link").symlink_to(trap)
    with ExitStack() as entries:
        for folder in (tmp_path / "control", trap, tmp_path / "link"):
            entry = Registration(folder, run=None, environ={ENV_AGENTS: str(theirs)})
            assert entry.trouble is None
            entries.callback(entry.close)
        os.mkfifo(theirs / f"{'0' * 24}.json")
        (theirs / f"{'1' * 24}.json").symlink_to("/etc/hostname")
        (theirs / f"{'2' * 24}.json").mkdir()
        for path in (theirs, trap):
            os.chown(path, 4711, 4711)
        # Somebody's folder with another's name, and one that is a link.
        (tmp_path / "holdfast-agents-4712").mkdir(mode=0o700)
        (tmp_path / "holdfast-agents-4713").symlink_to(theirs)
        found = find_agents({})
        assert sorted(agent.uid for agent in found) == [0, 4711, 4711, 4711]
        fates = tell([agent for agent in found if agent.uid == 4711], 60.0, {})
        assert {fate.outcome for fate in fates} == {Outcome.UNREACHABLE}
        assert exit_code(fates, waited=True) == 69
        assert mine.heard == []
        mine.end(KeptWord(step=None, lost=[]))
        assert {fate.outcome for fate in tell([own], 60.0, {})} == {Outcome.ENDED}


def test_no_living_agent_is_taken_for_a_dead_one_while_others_look(place: Path, tmp_path: Path) -> None:
    """Between the making of an entry and its lock it looks like one that was left behind."""
    environ = dict(os.environ)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            find_agents(environ)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    made = [Registration(tmp_path / str(number), run=None, environ=environ) for number in range(100)]
    stop.set()
    for looker in lookers:
        looker.join()
    assert [each.trouble for each in made] == [None] * 100
    assert {agent.folder.name for agent in find_agents(environ)} == {str(number) for number in range(100)}
    for each in made:
        each.close()
    assert find_agents(environ) == []


def test_whoever_calls_late_or_talks_nonsense(place: Path, tmp_path: Path) -> None:
    environ = dict(os.environ)
    agent = Agent(tmp_path / ("deep" * 40), environ)  # longer than a socket's address may be
    folder = os.open(tmp_path / ("deep" * 40), os.O_RDONLY)
    (found,) = find_agents(environ)
    address = f"/proc/self/fd/{folder}/{NOTIFY_SOCKET}"
    with closing(socket.socket(socket.AF_UNIX)) as endless, suppress(BrokenPipeError, ConnectionResetError):
        endless.connect(address)
        while True:
            endless.sendall(b"x" * (1 << 20))
    silent = [socket.socket(socket.AF_UNIX) for _ in range(80)]
    for each in silent:
        each.connect(address)
    # One too many is turned away at once, and that is no success.
    (fate,) = tell([found], 60.0, environ)
    assert (fate.outcome, fate.lost) == (Outcome.UNREACHABLE, ("it has hung up",))
    for each in silent:
        each.close()
    eventually(lambda: not agent.callers._callers)
    with closing(socket.socket(socket.AF_UNIX)) as rude:
        rude.connect(address)
        rude.sendall(b'\x00\xff nonsense\n{"type":"ready","notice_id":"x"}\n' + encode_word(word(1e300)))
        words, _ = decode_words(rude.recv(65536))
        assert [type(each) for each in words] == [NoticeWord]
    agent.callers.ready(ReadyWord(notice_id="n", step=7))
    steps: list[tuple[Outcome | None, int | None]] = []

    def changed(fate: Fate) -> None:
        steps.append((fate.outcome, fate.step))
        if fate.outcome is Outcome.READY:
            threading.Thread(target=agent.end, args=(KeptWord(step=8, lost=[]),)).start()

    (fate,) = tell([found], 60.0, environ, changed=changed)
    assert steps == [(Outcome.HEARD, None), (Outcome.READY, 7), (Outcome.KEPT, 8)]
    assert exit_code([fate], waited=True) == 0
    os.close(folder)
