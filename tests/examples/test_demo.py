"""The demo, for real and in small: it kills, restarts and proves; it tells a difference; and it leaves no process behind."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib import image
from rich.console import Console

from holdfast.core.contract import EXIT_INTERRUPTED

RUNS = ("reference", "killed")
FOLDER = Path(__file__).parents[2] / "examples" / "chargpt"
GIVE_UP_S = 300.0


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(FOLDER / "demo.py"), "--quick", "--seed", "3", "--out", str(out)]
    # From another folder, and with a path that a URL would have to quote.
    return subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "a folder"
    with start(out) as process:
        printed, _ = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0, printed
    return out, printed


def test_killed_and_the_same(finished: tuple[Path, str]) -> None:
    out, printed = finished
    kills = printed.count("ended: killed by SIGKILL")
    assert kills >= 1
    assert f"killed {kills} times" in printed or kills == 1
    assert printed.count("✓ equal") == 4
    assert f"attempt {kills + 1} ended: exit code 0" in printed
    proofs = [json.loads((out / f"{name}.json").read_text()) for name in RUNS]
    assert proofs[0] == proofs[1]
    assert {len(value) for value in proofs[0].values()} == {64}
    picture = image.imread(out / "loss.png")
    assert picture.shape[0] > 800
    assert picture.std() > 0.05


def test_a_difference_is_told(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    shutil.copytree(finished[0], out)
    proof = json.loads((out / "killed.json").read_text())
    (out / "killed.json").write_text(json.dumps(proof | {"order": "0" * 64}))
    monkeypatch.syspath_prepend(str(FOLDER))
    demo: ModuleType = importlib.import_module("demo")
    assert demo.prove(out, "killed", Console(width=100)) is False
    printed = capsys.readouterr().out
    assert printed.count("✗ DIFFERENT") == 1
    assert printed.count("✓ equal") == 3


@pytest.mark.parametrize(
    ("number", "exit_code", "trained"),
    [
        pytest.param(signal.SIGINT, EXIT_INTERRUPTED, True, marks=pytest.mark.long),
        (signal.SIGTERM, 128 + signal.SIGTERM, False),
    ],
    ids=["Ctrl-C while training", "SIGTERM while starting"],
)
def test_stopped(tmp_path: Path, number: signal.Signals, exit_code: int, trained: bool) -> None:
    out = tmp_path / "demo"
    with start(out) as process:
        wait_for(lambda: len(working_in(out)) >= 3, process)
        if trained:
            wait_for(
                lambda: all((log := out / f"{name}.log").exists() and "step 2 " in log.read_text() for name in RUNS),
                process,
            )
        process.send_signal(number)
        printed, _ = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == exit_code, printed
    assert "Traceback" not in printed
    # On a busy machine one may have come to its end before the other had begun.
    assert any("leaving at step" in log.read_text() for log in out.glob("*.log")) == trained
    wait_for(lambda: not working_in(out), process)


def working_in(folder: Path) -> list[int]:
    """The processes of a demo: the reference, the agent, and what the agent has started work in its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink() == folder:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < deadline_s, f"process {process.pid} does not get on"
        time.sleep(0.02)
