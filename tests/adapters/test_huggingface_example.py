"""examples/huggingface, for real: killed, told to go, drilled; on one process, and on two under torchrun and accelerate."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent
SCRIPT = str(Path(__file__).parents[2] / "examples" / "huggingface" / "train.py")
SMALL = ["--steps=60", "--batch=4", "--context=32", "--width=32", "--layers=1", "--save-every=3 steps"]
ALONE = [sys.executable]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
ACCELERATE = [
    *(
        str(BIN / "accelerate"),
        "launch",
        "--multi_gpu",
        "--num_machines=1",
        "--num_processes=2",
        "--mixed_precision=no",
    ),
    *("--dynamo_backend=no", "--max_restarts=3"),
]


@contextmanager
def started(launcher: list[str], folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir(exist_ok=True)
    command = [*launcher, SCRIPT, "--url", "run", "--proof", "proof", *SMALL, *options]
    environ = {
        **os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    with subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        yield process


def until_logged(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "'loss'" in line:
            return
    pytest.fail("".join(said))


def finish(launcher: list[str], folder: Path, *options: str) -> str:
    with started(launcher, folder, *options) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The ranks, in order."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid
            ):
                environ = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text().split("\0"))
                found[int(environ["RANK"])] = int(folder.name)
        except (OSError, KeyError):
            pass  # gone meanwhile, or something else
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("options", [(), ("--lora",)], ids=["whole", "lora"])
def test_killed_and_the_same(tmp_path: Path, options: tuple[str, ...]) -> None:
    finish(ALONE, tmp_path / "undisturbed", *options)
    for _ in range(2):
        with started(ALONE, tmp_path / "killed", *options) as process:
            until_logged(process)
            process.send_signal(signal.SIGKILL)
    assert "attempt 3 resumes at step" in finish(ALONE, tmp_path / "killed", *options)
    assert (tmp_path / "killed/proof").read_text() == (tmp_path / "undisturbed/proof").read_text()


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_ranks_that_their_launcher_starts_again(tmp_path: Path, launcher: list[str]) -> None:
    """One is killed, then the other, then one is told to go; then the launcher is, and starts anew."""
    assert "on 2 ranks" in finish(launcher, tmp_path / "undisturbed")
    with started(launcher, tmp_path / "killed") as process:
        for rank, number in ((0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)):
            until_logged(process)
            os.kill(workers_of(process)[rank], number)
        until_logged(process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
    assert process.returncode != 0
    left = re.search(r"leaving at step (\d+) with exit code 75", printed)
    assert left is not None, printed
    assert f"attempt 5 resumes at step {left[1]} " in finish(launcher, tmp_path / "killed")
    assert (tmp_path / "killed/proof").read_text() == (tmp_path / "undisturbed/proof").read_text()


@pytest.mark.parametrize("options", [(), ("--lora",)], ids=["whole", "lora"])
def test_drilled(tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [*ALONE, SCRIPT, *SMALL, *options]
    scenarios = ["kill", "notice-30", "sigterm-group", "eval", "torn", "two"]
    picked = [word for scenario in scenarios for word in ("--scenario", scenario)]
    drilled = subprocess.run(
        [str(BIN / "holdfast"), "drill", "--times", "2", "--seed", "1", *picked, "--", *command],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert drilled.returncode == 0, drilled.stdout + drilled.stderr
