"""The drill on a sound script, which passes every scenario, and on scripts with known faults, each of which it must name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import eventually

from holdfast.core.contract import EXIT_INTERRUPTED
from holdfast.drill.scenarios import SCENARIOS

HERE = Path(__file__).parent
CHARGPT = HERE.parents[1] / "examples" / "chargpt" / "train.py"
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
GIVE_UP_S = 3600.0 if LONG else 600.0
STEP_MS = "20"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`holdfast drill` with a folder for temporary files of its own, so that one sees what it leaves there."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast", "drill", *arguments], cwd=folder, env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def play(folder: Path, scenarios: tuple[str, ...], *command: str, times: int = 1) -> tuple[dict[str, Any], int]:
    chosen = [word for name in scenarios for word in ("--scenario", name)]
    with start(folder, *chosen, "--times", str(times), "--seed", "1", "--json", "--", *command) as process:
        printed, said = process.communicate(timeout=GIVE_UP_S)
    assert printed, said
    assert list((folder / "tmp").iterdir()) == [], "the scratch folder was not removed"
    report: dict[str, Any] = json.loads(printed)
    assert report["passed"] == (process.returncode == 0)
    return report, process.returncode


def verdict_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(verdict for verdict in report["verdicts"] if verdict["scenario"] == name)


SHORT = ("torn", "two")


@pytest.mark.parametrize("scenarios", [tuple(SCENARIOS) if LONG else SHORT], ids=["all" if LONG else "short"])
def test_a_sound_script_passes(tmp_path: Path, scenarios: tuple[str, ...]) -> None:
    step_ms = "200" if LONG else STEP_MS
    report, code = play(tmp_path, scenarios, sys.executable, str(HERE / "good.py"), step_ms, times=3 if LONG else 1)
    assert code == 0, report
    assert report["deterministic"]
    assert report["tolerance"] == 0
    for name in scenarios:
        verdict = verdict_of(report, name)
        assert verdict["faults"] == []
        if verdict["status"] == "passed":
            assert verdict["same_state"] is True
            assert verdict["interruptions"] >= 1
        else:
            assert verdict["notes"], "a skipped scenario says why"
    assert 76 in verdict_of(report, "two")["exit_codes"]
    assert verdict_of(report, "two")["exit_codes"].count(0) == 1
    assert verdict_of(report, "torn")["lost_steps"] > 0


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")


@pytest.mark.long
def test_under_a_launcher_with_exit_codes_of_its_own(tmp_path: Path) -> None:
    """What counts is what its rank has recorded, and every signal reaches that rank, which has a session of its own."""
    scenarios = ("kill", "notice-30", "sigterm", "sigterm-group", "torn", "store", "two")
    report, code = play(tmp_path, scenarios, *TORCHRUN, str(HERE / "good.py"), "100")
    assert code == 0, [verdict["faults"] for verdict in report["verdicts"]]
    for name in scenarios:
        verdict = verdict_of(report, name)
        assert verdict["status"] == ("skipped" if name == "store" else "passed"), verdict
    for name, told in (("sigterm", 75), ("sigterm-group", 75), ("two", 76)):
        verdict = verdict_of(report, name)
        assert sorted(verdict["exit_codes"]) == [0, 1]
        assert f"its ranks recorded that they left with {told}" in " ".join(verdict["notes"])


@pytest.mark.long
def test_a_fault_under_a_launcher(tmp_path: Path) -> None:
    report, code = play(tmp_path, ("sigterm",), *TORCHRUN, str(HERE / "faulty.py"), "exit 0", "100")
    assert code == 1
    assert verdict_of(report, "reference")["status"] == "passed", report
    said = " ".join(verdict_of(report, "sigterm")["faults"])
    assert "exit code 1 instead of 0 or 75" in said
    assert "stands at step" in said


@pytest.mark.long
def test_the_demo_passes(tmp_path: Path) -> None:
    sizes = ["--epochs", "2", "--batches", "30", "--width", "32", "--layers", "1", "--context", "32", "--workers", "1"]
    scenarios = () if LONG else ("kill",)
    demo = (sys.executable, str(CHARGPT), *sizes, "--save-every", "5 steps")
    report, code = play(tmp_path, scenarios, *demo, times=2 if LONG else 1)
    assert code == 0, report
    assert all(verdict["same_state"] for verdict in report["verdicts"] if verdict["status"] == "passed")
    assert verdict_of(report, "kill")["exit_codes"][0] == -signal.SIGKILL


FAULTS = [
    pytest.param("counter", "sigterm", ("is another one", "optimizer.param_groups.0.lr", "run.track"), id="counter"),
    pytest.param(
        "exit 0", "sigterm", ("left with exit code 0", "not finished", "takes it for done"), id="exit 0", marks=pytest.mark.long
    ),
    pytest.param(
        "torch.save", "kill", ("latest.pt", "had resumed at step", "model.weight"), id="torch.save", marks=pytest.mark.long
    ),
    pytest.param("average", "kill", ("not in the checkpoint", "had resumed at step"), id="average", marks=pytest.mark.long),
    pytest.param("own generator", "kill", ("a generator of its own",), id="own generator", marks=pytest.mark.long),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "scenario", "named"), FAULTS)
def test_what_breaks_when_interrupted(tmp_path: Path, fault: str, scenario: str, named: tuple[str, ...]) -> None:
    report, code = play(tmp_path, (scenario,), sys.executable, str(HERE / "faulty.py"), fault, STEP_MS)
    assert code == 1
    assert verdict_of(report, "reference")["status"] == "passed", report
    verdict = verdict_of(report, scenario)
    assert verdict["status"] == "failed"
    said = " ".join(verdict["faults"])
    assert all(word in said for word in named), said


UNFIT = [
    pytest.param("own url", ("a URL of its own", "HOLDFAST_RUN", "Let the launcher choose"), id="own url"),
    pytest.param("no holdfast", ("never opens a holdfast.Run",), id="no holdfast"),
    pytest.param("nonsense", ("without any interruption", "exit code 1", "ValueError"), id="fails by itself"),
]


@pytest.mark.parametrize(("fault", "named"), UNFIT)
def test_what_cannot_be_drilled(tmp_path: Path, fault: str, named: tuple[str, ...]) -> None:
    report, code = play(tmp_path, (), sys.executable, str(HERE / "faulty.py"), fault, "1")
    assert code == 1
    assert [verdict["scenario"] for verdict in report["verdicts"]] == ["reference"]
    said = " ".join(report["verdicts"][0]["faults"])
    assert all(word in said for word in named), said


RANDOM = [
    pytest.param("unseeded", ("not deterministic", "torch.manual_seed"), id="torch"),
    pytest.param(
        "unseeded python", ("not deterministic", "python's global generator"), id="python", marks=pytest.mark.long
    ),
    pytest.param("unseeded own generator", ("a generator of the script's own",), id="own", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("fault", "named"), RANDOM)
def test_a_script_that_is_not_deterministic(tmp_path: Path, fault: str, named: tuple[str, ...]) -> None:
    # It never evaluates, so that nothing is played there but what it is compared with.
    scenario = "sigterm" if LONG else "eval"
    report, code = play(tmp_path, (scenario,), sys.executable, str(HERE / "faulty.py"), fault, STEP_MS)
    assert code == 1
    assert not report["deterministic"]
    assert report["tolerance"] is None
    said = " ".join(verdict_of(report, "reference")["faults"])
    assert all(word in said for word in named), said
    assert "loss of step 0" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--scenario", "earthquake", "--", "true"), "there is no scenario 'earthquake'"),
        (("--tolerance", "2", "--", "true"), "tolerance"),
        (("--keep", ".", "--", "true"), "exists"),
        (("--", "no-such-program"), "cannot start"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    with start(tmp_path, *arguments) as process:
        _, error = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 2
    assert said in error
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(tmp_path: Path, number: signal.Signals) -> None:
    """No process and no folder stays, and none in a session of its own, as a launcher's ranks are."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, time\nfrom pathlib import Path\nif os.fork():\n    os.wait()\nos.setsid()\n"
        f"Path({str(tmp_path / 'started')!r}).write_text(str(os.getpid()))\ntime.sleep(3600)\n"
    )
    with start(tmp_path, "--", sys.executable, "train.py") as process:
        give_up_s = time.monotonic() + GIVE_UP_S
        started = tmp_path / "started"
        while not (started.exists() and started.read_text()):
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == (EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number), said
    assert "Traceback" not in said
    assert list((tmp_path / "tmp").iterdir()) == []
    stat = Path(f"/proc/{started.read_text()}/stat")
    eventually(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_as_a_fixture(tmp_path: Path) -> None:
    """In somebody else's tests: a fault fails the test and is named in it."""
    (tmp_path / "test_training.py").write_text(
        "import sys\n\n\ndef test_my_training(drill):\n"
        f"    drill([sys.executable, {str(HERE / 'faulty.py')!r}, 'own url', '1'], scenarios=['kill'], times=1).check()\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "holdfast.drill.fixture",
        "-p",
        "no:cacheprovider",
        "test_training.py",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=GIVE_UP_S, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "AssertionError: the drill found faults" in ended.stdout
    assert "a URL of its own" in ended.stdout
