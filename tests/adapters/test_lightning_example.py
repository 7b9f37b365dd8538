"""examples/lightning, for real: killed and started again, it ends with the same weights; and a drill over it proves it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parents[2] / "examples" / "lightning" / "train.py"
SMALL = ["--steps", "60", "--batch", "4", "--context", "32", "--width", "32", "--layers", "1"]
ENVIRON = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        str(SCRIPT),
        "--url",
        "run",
        "--proof",
        "proof",
        "--save-every",
        "3 steps",
        *SMALL,
        *more,
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, *more: str) -> str:
    with start(folder, *more) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


@pytest.mark.parametrize("devices", ["1", "2"])
def test_killed_and_the_same(tmp_path: Path, devices: str) -> None:
    more = ("--devices", devices)
    finish(tmp_path / "undisturbed", *more)
    for _ in range(2):
        with start(tmp_path / "killed", *more) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "attempt" in line:
                    break
            heads = tmp_path / "killed" / "run" / "heads"
            before = len(list(heads.iterdir()))
            while len(list(heads.iterdir())) == before and process.poll() is None:
                pass
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()
    printed = finish(tmp_path / "killed", *more)
    assert "attempt 3 resumes at step" in printed
    assert (tmp_path / "killed/proof").read_text() == (tmp_path / "undisturbed/proof").read_text()


def test_drilled(tmp_path: Path) -> None:
    scenarios = ["--scenario", "kill", "--scenario", "sigterm-group", "--scenario", "eval", "--times", "2"]
    script = [sys.executable, str(SCRIPT), "--save-every", "10 steps", *SMALL]
    command = [sys.executable, "-m", "holdfast", "drill", *scenarios, "--", *script]
    drilled = subprocess.run(command, cwd=tmp_path, env=ENVIRON, capture_output=True, text=True, check=False)
    assert drilled.returncode == 0, drilled.stdout + drilled.stderr
