"""What is chosen when not everything fits, when notices are withdrawn, moved or only advice, and when somebody talks nonsense."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from forking import Zygote
from grounds import Ground, eventually

from holdfast.agent.control import ControlSocket
from holdfast.checkpoint.handover import left_behind
from holdfast.core.contract import CONTROL_SOCKET, EXIT_PREEMPTED, NoticeWord, SlotsWord, encode_word


def test_a_save_that_cannot_fit_is_not_started(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path / "a", save_at=(1, 2, 3))
    (ground.control / "put").write_text("0.8")
    with ground.attended():
        ground.start(pace_s=0.05)
        ground.until(lambda: ground.durable_step() == 3)
        ground.until(lambda: ground.step() >= 5)
        ground.tell(0.8)
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    last = ground.decisions()[-1]
    assert last["action"] == "nothing", ground.log.read_text()
    assert any("does not fit" in reason for reason in last["reasons"])
    assert [ref.step for ref in ground.checkpoints()][-1] == 3
    assert ground.heard == []
    ground.assert_exact(reference)


def test_only_the_save_in_flight_fits(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path / "a", save_at=(1, 2, 30))
    (ground.control / "put").write_text("2.5")
    with ground.attended():
        ground.start(pace_s=0.02)
        ground.until(lambda: ground.durable_step() == 2)
        # Its snapshot is described when its writing begins.
        ground.until(lambda: 30 in [left.share.step for left in left_behind(ground.control)])
        ground.tell(4.2)
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    # A loop that looks again when that save is done finds nothing more to do.
    assert {decision["action"] for decision in ground.decisions()} <= {"finish the save in flight", "nothing"}
    assert [ref.step for ref in ground.checkpoints()][-1] == 30
    ground.assert_exact(reference)


def test_withdrawn_moved_and_told_again(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """Withdrawn: training goes on. A second notice with an earlier deadline counts, the first one's removal changes nothing."""
    ground = Ground(zygote, tmp_path / "a")
    with ground.attended():
        ground.start(pace_s=0.1)
        ground.until(lambda: ground.step() >= 4)
        ground.tell(4.0, id="off")
        ground.until(lambda: ground.step() >= 6)
        ground.tell(None, kind="withdrawn", id="off", stands=False)
        time.sleep(4.0)
        assert not ground.ended(), ground.log.read_text()
        ground.tell(500.0, id="far")
        ground.tell(2.0, id="near")
        ground.tell(None, kind="withdrawn", id="far", stands=False)
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
        eventually(lambda: ground.heard == ["near"])
    ground.assert_nothing_lost()
    ground.assert_exact(reference)


def test_advice_saves_once(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """Rebalance advice: saved at once, then trained on; a preemption after it is taken as seriously as without."""
    ground = Ground(zygote, tmp_path / "a")
    with ground.attended():
        ground.start(pace_s=0.05)
        ground.until(lambda: ground.step() >= 3)
        ground.tell(None, kind="rebalance", id="advice")
        ground.until(lambda: ground.durable_step() >= 3)
        saved = ground.step()
        ground.until(lambda: ground.step() >= saved + 15)
        assert len(ground.checkpoints()) == 1
        ground.tell(3.0)
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    ground.assert_nothing_lost()
    ground.assert_exact(reference)


def test_after_the_end(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path / "a", place="finished")
    with ground.attended():
        ground.start()
        ground.until_place()
        ground.tell(0.5)
        time.sleep(0.7)
        ground.go_on()
        assert ground.wait() == 0, ground.log.read_text()


def test_garbage_from_the_agent(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """Nothing that comes over the socket ends the training or deafens it; an agent that dies does not either."""
    ground = Ground(zygote, tmp_path / "a")
    with ground.attended() as agent:
        ground.start(pace_s=0.05)
        ground.until(lambda: ground.step() >= 2)
        (trainer,) = agent._trainers
        trainer.sendall(b'\x00\xff{"type":"notice"}\n[]\n{"type":"notice","kind":5}\n' + b"x" * (3 << 20) + b"\n")
        trainer.sendall(
            b'{"type":"notice","kind":"rebalance","deadline_unix_s":1e999,"source":"","id":"","heard_unix_s":0}\n'
        )
        ground.tell(3.0, kind="unheard of", id="new")
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
        eventually(lambda: ground.heard == ["new"])
    ground.assert_nothing_lost()
    with ground.attended():
        ground.start(pace_s=0.01)
        ground.until(lambda: ground.step() > 3)
    ground.until(ground.ended)
    assert ground.wait() == 0, ground.log.read_text()


def test_garbage_from_a_trainer(tmp_path: Path) -> None:
    """The agent holds no memory for it, keeps no descriptor, and goes on hearing others."""
    heard: list[str] = []
    folder = tmp_path / ("deep" * 40)  # longer than a socket's address may be
    folder.mkdir()
    before = set(os.listdir("/proc/self/fd"))
    agent = ControlSocket(folder, heard.append)
    opened = os.open(folder, os.O_RDONLY)

    def connected() -> socket.socket:
        one = socket.socket(socket.AF_UNIX)
        one.connect(f"/proc/self/fd/{opened}/{CONTROL_SOCKET}")
        return one

    with connected() as endless, suppress(OSError):
        while True:  # until the agent lets go of it
            endless.sendall(b"x" * (1 << 20))
    with connected() as liar:
        memory, pipe = os.memfd_create("m"), os.pipe()
        os.ftruncate(memory, 8192)
        for sizes in ([-1, 0], [1 << 62, 4096], [4096, 4096, 4096], []):
            socket.send_fds(liar, [encode_word(SlotsWord(sizes_bytes=sizes))], [memory, pipe[0]])
        socket.send_fds(liar, [b"nonsense\n" + encode_word(SlotsWord(sizes_bytes=[8192]))], [memory])
        liar.sendall(b'{"type":"ready","notice_id":"heard"}\n{"type":"ready"}\n')
        eventually(lambda: heard == ["heard"])
        for descriptor in (memory, *pipe):
            os.close(descriptor)
    agent.slots()
    agent.forget_slots()
    silent = connected()
    eventually(lambda: agent.connected)
    word = NoticeWord(kind="preemption", deadline_unix_s=None, source="s" * 60_000, id="", heard_unix_s=0.0)
    for number in range(20):  # more than a socket holds: who does not read is let go
        agent.tell(
            NoticeWord(**{**{f: getattr(word, f) for f in word.__struct_fields__}, "id": str(number)}), stands=True
        )
    eventually(lambda: not agent.connected)
    silent.close()
    agent.close()
    os.close(opened)
    eventually(lambda: set(os.listdir("/proc/self/fd")) <= before)
