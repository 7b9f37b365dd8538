"""examples/accelerate, for real: killed and started again, by itself and by a launcher, and drilled: the same weights."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parents[2] / "examples" / "accelerate" / "train.py"
SMALL = [
    "--epochs", "1", "--batch", "8", "--context", "512", "--width", "16", "--save-every", "3 steps",
]  # fmt: skip


def launch(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, str(SCRIPT)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return [
        *accelerate, "--cpu", "--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", port, str(SCRIPT),
    ]  # fmt: skip


def start(folder: Path, ranks: int) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [*launch(ranks), "--url", "run", "--proof", "proof", *SMALL]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HOLDFAST_NOTICE": "none"}
    return subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_the_same(tmp_path: Path, ranks: int) -> None:
    with start(tmp_path / "undisturbed", ranks) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    for _ in range(2):
        with start(tmp_path / "killed", ranks) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step "):
                    break
            os.killpg(process.pid, signal.SIGKILL)
    with start(tmp_path / "killed", ranks) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "attempt 3 resumes at step" in printed
    assert (tmp_path / "killed/proof").read_text() == (tmp_path / "undisturbed/proof").read_text()


def test_drilled(tmp_path: Path) -> None:
    scenarios = [word for name in ("kill", "sigterm", "torn", "two") for word in ("--scenario", name)]
    drill = [sys.executable, "-m", "holdfast", "drill", *scenarios, "--times", "2"]
    command = [*drill, "--", sys.executable, str(SCRIPT), *SMALL]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
