"""The batch script under a real bash, without Slurm: signals reach the child, and its exit code is what is noted."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import waiting

from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.core.errors import UsageError
from holdfast.provider.base import DelegateJob
from holdfast.provider.slurm import bound_of
from holdfast.provider.slurm.script import batch_script
from holdfast.provider.slurm.words import is_definite, options_of, state_of

GIVE_UP_S = 60.0
CHILD = """
import signal, sys, time
heard = []
def hear(number, frame): heard.append(signal.Signals(number).name); print(heard, flush=True)
signal.signal(signal.SIGTERM, hear); signal.signal(signal.SIGUSR1, hear)
print(sys.argv[1:], "ready", flush=True)
while len(heard) < int(sys.argv[-2]): time.sleep(0.005)
time.sleep(0.05)
sys.exit(int(sys.argv[-1]))
"""


class Batch:
    """A script that runs as Slurm would run it."""

    def __init__(self, folder: Path, *command: str, restarts: int = 0, **more: Any) -> None:
        self.folder = folder
        (folder / "child.py").write_text(CHILD)
        requeue = folder / "scontrol"
        requeue.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
        requeue.chmod(requeue.stat().st_mode | stat.S_IXUSR)
        usual: dict[str, Any] = {
            "folder": folder, "command": command, "agent": (sys.executable, str(folder / "child.py")), "run_url": "/a run/x",
            "environment": {"GIVEN": "it's here"}, "workdir": str(folder), "nodes": 1, "max_requeues": None, "grace_s": 60,
        }  # fmt: skip
        (folder / "job.sh").write_text(batch_script(**(usual | more)))
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", str(folder / "job.sh")], env=environment, stdout=output, stderr=output
            )

    @property
    def said(self) -> str:
        return (self.folder / "output").read_text()

    def wait_for(self, text: str) -> None:
        waiting.eventually(lambda: text in self.said, lambda: self.said, give_up_s=GIVE_UP_S, every_s=0.01)

    def ended(self) -> tuple[int, str]:
        """Its exit code, and the one it has noted."""
        code = self.process.wait(GIVE_UP_S)
        (note,) = self.folder.glob("ended-7-*")
        return code, note.read_text().strip()


def test_signals_reach_the_child_and_its_code_is_noted(tmp_path: Path) -> None:
    """Signals that end bash's waiting are not taken for the child's end."""
    batch = Batch(tmp_path, "3", str(EXIT_PREEMPTED))
    batch.wait_for("ready")
    assert "['run', '--run', '/a run/x', '--', '3', '75'] ready" in batch.said
    for count in range(1, 4):
        batch.process.send_signal(signal.SIGUSR1)
        batch.wait_for(str(["SIGUSR1"] * count))
    assert batch.ended() == (EXIT_PREEMPTED, str(EXIT_PREEMPTED))
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "started-7-0").exists()


def test_what_was_cancelled_is_not_put_back(tmp_path: Path) -> None:
    """Whoever hears SIGTERM was preempted, and Slurm puts it back; or was cancelled, and nobody may."""
    batch = Batch(tmp_path, "2", str(EXIT_PREEMPTED))
    batch.wait_for("ready")
    for number, heard in ((signal.SIGUSR1, "['SIGUSR1']"), (signal.SIGTERM, "['SIGUSR1', 'SIGTERM']")):
        batch.process.send_signal(number)
        batch.wait_for(heard)
    assert batch.ended() == (EXIT_PREEMPTED, str(EXIT_PREEMPTED))
    assert not (tmp_path / "requeued").exists()


def test_what_was_cancelled_while_it_was_put_back_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "cancelled").touch()
    batch = Batch(tmp_path, "0", "0", restarts=1)
    assert batch.ended() == (1, "1")
    assert "ready" not in batch.said


@pytest.mark.parametrize("code", [0, 1, 137])
def test_what_has_ended_is_not_put_back(tmp_path: Path, code: int) -> None:
    assert Batch(tmp_path, "0", str(code)).ended() == (code, str(code))
    assert not (tmp_path / "requeued").exists()


def test_a_signal_before_the_child_is_there_waits_for_it(tmp_path: Path) -> None:
    """The script hangs in its very first command."""
    slow = tmp_path / "hostname"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/hangs\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.01; done\n")
    slow.chmod(0o755)
    (tmp_path / "child.sh").write_text("trap 'exit 75' TERM\nwhile :; do sleep 0.01; done\n")
    # The signal comes before the child has a handler, or after: it ends either way, and the script knows how.
    batch = Batch(tmp_path, "1", "75", agent=("bash", str(tmp_path / "child.sh")))
    waiting.eventually((tmp_path / "hangs").exists, lambda: batch.said, give_up_s=GIVE_UP_S, every_s=0.01)
    batch.process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    code, noted = batch.ended()
    assert code in (EXIT_PREEMPTED, 128 + signal.SIGTERM)
    assert noted == str(code)


def test_there_are_no_more_starts_than_are_allowed(tmp_path: Path) -> None:
    for restarts, runs, put_back in ((1, True, True), (2, True, False), (3, False, False)):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        batch = Batch(folder, "0", str(EXIT_PREEMPTED), restarts=restarts, max_requeues=2)
        code = EXIT_PREEMPTED if runs else 1
        assert batch.ended() == (code, str(code))
        assert ("ready" in batch.said) == runs
        assert (folder / "requeued").exists() == put_back


def job(**changes: Any) -> DelegateJob:
    usual: dict[str, Any] = {"token": "t-1", "name": "gpt", "run_url": "/r", "command": ("python", "train.py")}
    return DelegateJob(**(usual | changes))


def test_the_bound_is_the_time_limit_times_the_starts() -> None:
    bound = bound_of(job(time_limit_s=3601, max_requeues=3, nodes=2))
    assert (bound.node_s, bound.hard) == ((61 * 60 + 30) * 4 * 2, True)
    for unknown in (job(time_limit_s=60), job(max_requeues=1)):
        assert bound_of(unknown).node_s is None
        assert not bound_of(unknown).hard
        assert "soft" in bound_of(unknown).said


def test_what_sbatch_is_told() -> None:
    options = {"partition": "low", "grace_s": "60", "dependency": "afterok:5", "exclusive": ""}
    asked = options_of(
        job(name="my run", time_limit_s=61, accelerators=(("A100", 4),), cpus=2.5, memory_gib=1.5, options=options),
        "/o",
    )
    assert {
        "--requeue", "--open-mode=append", "--time=2", "--signal=B:USR1@60", "--gres=gpu:a100:4", "--cpus-per-task=3",
        "--mem=1536M", "--dependency=afterok:5,singleton", "--partition=low", "--exclusive", "--comment=holdfast:t-1",
    } < set(asked)  # fmt: skip
    assert "--no-requeue" in options_of(job(max_requeues=0), "/o")
    for wrong in (
        {"options": {"requeue": ""}},
        {"options": {"x y": ""}},
        {"options": {"grace_s": "soon"}},
        {"token": "a/b"},
        {"command": ()},
    ):
        with pytest.raises(UsageError):
            options_of(job(**wrong), "/o")


@pytest.mark.parametrize(
    ("said", "exit_code", "restarts", "state", "code"),
    [
        ("PENDING", "0:0", 0, "waiting", None),
        ("PENDING", "0:0", 2, "requeued", None),
        ("COMPLETING", "0:0", 0, "running", None),
        ("COMPLETED", "0:0", 1, "done", 0),
        ("FAILED", "75:0", 0, "failed", 75),
        ("NODE_FAIL", "0:9", 0, "failed", 137),
        ("CANCELLED by 0", "0:15", 0, "cancelled", 143),
        ("PREEMPTED", "0:0", 0, "failed", 0),
        ("REQUEUE_HOLD", "0:0", 1, "requeued", None),
    ],
)
def test_states(said: str, exit_code: str, restarts: int, state: str, code: int | None) -> None:
    status = state_of("1", said, exit_code, restarts)
    assert (status.state, status.exit_code, status.restarts) == (state, code, restarts)


def test_no_answer_is_not_taken_for_a_refusal() -> None:
    assert is_definite("sbatch: error: Batch job submission failed: Invalid partition name specified")
    for said in (
        "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch timed out after 60 s",
    ):  # fmt: skip
        assert not is_definite(said)


def test_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    bound = bound_of(found["job"])
    assert bound.node_s == 72 * 3600 + 6 * 30
    assert "--signal=B:USR1@60" in options_of(found["job"], "/o")
