"""The examples of the adapters, for real: killed, told to go, started again by their launchers, drilled; the same weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import ENVIRON, command_of, started, workers_of
from waiting import eventually

from holdfast.checkpoint.heads import read_truth
from holdfast.store.local import LocalStore

EXAMPLES = Path(__file__).parents[2] / "examples"
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
GIVE_UP_S = 120.0
SMALL = ["--steps=60", "--batch=4", "--context=32", "--width=32", "--layers=1", "--save-every=3 steps"]
KINDS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "huggingface": (("transformers",), ["huggingface", *SMALL]),
    "huggingface-lora": (("transformers", "peft"), ["huggingface", *SMALL, "--lora"]),
    "lightning": (("lightning",), ["lightning", *SMALL]),
    "lightning-ranks": (("lightning",), ["lightning", *SMALL, "--devices=2"]),
    "accelerate": (
        ("accelerate",),
        ["accelerate", "--epochs=1", "--batch=8", "--context=512", "--width=16", "--save-every=3 steps"],
    ),
}
"""What must be installed; which example, and how large."""


def script_of(kind: str, *more: str) -> list[str]:
    needs, (example, *options) = KINDS[kind]
    for package in needs:
        pytest.importorskip(package)
    return [str(EXAMPLES / example / "train.py"), *options, *more]


def to_be_killed(kind: str) -> list[str]:
    """Long enough for whoever watches it from outside to strike in its middle."""
    longer = "--epochs=6" if kind == "accelerate" else "--steps=300"
    return script_of(kind, "--url=run", "--proof=proof", longer)


def durable_step(folder: Path) -> int:
    head = read_truth(LocalStore(folder / "run")).head
    return max((ref.step for ref in head.checkpoints), default=0) if head is not None else 0


def until_saved(process: subprocess.Popen[str], folder: Path, after: int) -> int:
    eventually(lambda: durable_step(folder) > after or process.poll() is not None, give_up_s=GIVE_UP_S)
    assert process.poll() is None, process.communicate()[0]
    return durable_step(folder)


def finish(command: list[str], folder: Path) -> str:
    with started(command, folder) as process:
        printed, _ = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0, printed
    return printed


def proof(folder: Path) -> str:
    return (folder / "proof").read_text()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "launcher"), [*((kind, "alone") for kind in KINDS), ("accelerate", "accelerate")])
def test_killed_and_the_same(tmp_path: Path, kind: str, launcher: str) -> None:
    script, killed = to_be_killed(kind), tmp_path / "killed"
    undisturbed = finish(command_of(launcher, script), tmp_path / "undisturbed")
    assert ("on 2 ranks" in undisturbed) == (launcher != "alone" or kind == "lightning-ranks")
    step = 0
    for _ in range(2):
        with started(command_of(launcher, script), killed) as process:
            step = until_saved(process, killed, after=step)
    assert "attempt 3 resumes at step" in finish(command_of(launcher, script), killed)
    assert proof(killed) == proof(tmp_path / "undisturbed")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_ranks_that_their_launcher_starts_again(tmp_path: Path, launcher: str) -> None:
    """One is killed, then the other, then one is told to go; then the launcher is, and starts anew."""
    script, killed = to_be_killed("huggingface"), tmp_path / "killed"
    finish(command_of(launcher, script), tmp_path / "undisturbed")
    step = 0
    with started(command_of(launcher, script, restarts=3), killed) as process:
        for rank, number in ((0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)):
            step = until_saved(process, killed, after=step)
            os.kill(workers_of(process)[rank], number)
        until_saved(process, killed, after=step)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 1, "torchrun's own, whatever its ranks have left with"
    left = re.findall(r"leaving at step (\d+) with exit code 75", printed)
    assert left, printed
    assert f"resumes at step {left[-1]} " in finish(command_of(launcher, script), killed)
    assert proof(killed) == proof(tmp_path / "undisturbed")


SCENARIOS = ["kill", "notice-30", "sigterm", "sigterm-group", "eval", "torn", "two"] if LONG else ["kill"]


def drilled(folder: Path, command: list[str], scenarios: list[str], times: int) -> str:
    chosen = [word for name in scenarios for word in ("--scenario", name)]
    drill = [sys.executable, "-m", "holdfast", "drill", *chosen, "--times", str(times), "--seed", "1", "--", *command]
    done = subprocess.run(drill, cwd=folder, env={**os.environ, **ENVIRON}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ALONE = ["accelerate", *(pytest.param(name, marks=pytest.mark.long) for name in list(KINDS)[:3])]


@pytest.mark.parametrize("kind", ALONE)
def test_drilled(tmp_path: Path, kind: str) -> None:
    said = drilled(tmp_path, command_of("alone", script_of(kind)), SCENARIOS, times=2 if LONG else 1)
    assert said.count("the same bits") >= 1 + len(SCENARIOS) - 1, "an evaluation may be over too soon to be met"


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "launcher"),
    [
        ("huggingface", "torchrun"),
        ("accelerate", "torchrun"),
        ("accelerate", "accelerate"),
        ("lightning-ranks", "alone"),
    ],
)
def test_drilled_on_two_ranks(tmp_path: Path, kind: str, launcher: str) -> None:
    """torchrun and `accelerate launch` have exit codes of their own: what their ranks record counts."""
    scenarios = SCENARIOS if launcher == "alone" else ["kill", "sigterm", "sigterm-group", "two"]
    drilled(tmp_path, command_of(launcher, script_of(kind)), scenarios, 1)
