"""examples/huggingface, for real: killed and started again, it ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parents[2] / "examples" / "huggingface" / "train.py"
SMALL = [
    "--steps",
    "40",
    "--batch",
    "4",
    "--context",
    "32",
    "--width",
    "32",
    "--layers",
    "1",
    "--save-every",
    "3 steps",
]


def start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), "--url", "run", "--proof", "proof", *SMALL]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_killed_and_the_same(tmp_path: Path) -> None:
    with start(tmp_path / "undisturbed") as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    for _ in range(2):
        with start(tmp_path / "killed") as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "'loss'" in line:
                    break
            process.send_signal(signal.SIGKILL)
    with start(tmp_path / "killed") as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "attempt 3 resumes at step" in printed
    assert (tmp_path / "killed/proof").read_text() == (tmp_path / "undisturbed/proof").read_text()
