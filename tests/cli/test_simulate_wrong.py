"""What goes wrong with `holdfast simulate` is one line with the way out, and what is interrupted leaves nothing behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from simulations import GIVE_UP_S, PRICED, QUICK, made, ok, probes

from holdfast.core.contract import EXIT_INTERRUPTED, EXIT_USAGE
from holdfast.core.errors import UsageError
from holdfast.simulate.traces.scenarios import SCENARIOS


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--policy", "uniform-progres"], r"no policy .*did you mean uniform-progress\?"),
        (["--policy", "zzz"], "there is no policy 'zzz'; there are greedy"),
        (["--scenario", "burst"], r"no scenario .*did you mean bursty\?"),
        (
            ["--deadline", "5h"],
            "6 h of work and one changeover of 6 min do not fit into a deadline of 5 h.*later deadline",
        ),
        (["--deadline", "8h,soon"], "--deadline: not a duration: 'soon'"),
        (["--deadline", "8h,"], "--deadline: not a duration"),
        (["--work", "0s"], "--work: '0s' is not a whole number of seconds, 1 or more"),
        (["--every", "0.5s"], "--every: .* whole number of seconds"),
        (["--days", "0.2"], "no window of 8 h fits into the 4 h 45 min of the trace: take a longer trace"),
        (["--history", "99%"], "a shorter history"),
        (["--history", "lots%"], "not a share"),
        (["--history", "100%"], "nothing to play on"),
        (["--history", "10 d"], "nothing to play on"),
        (["--horizon", "7h"], "horizon .* lies before the deadline"),
        (["--spot-price", "cheap"], "not a price: 'cheap'"),
        (["--gang", "17"], "no pool ever has 17 machines at once; the most is 16"),
        (["--marks", "available"], "--marks is about trace files"),
        (["--explain", "3"], "of which pool"),
        (["--explain", "nowhere:3"], "no pool 'nowhere'"),
        (["--explain", "bursty:999"], "have the numbers 1 to 18"),
        (["--explain", "bursty:x"], "have the numbers 1 to 18"),
        (["--explain", "bursty:1", "--deadline", "8h,9h"], "give one --deadline"),
        (["--explain", "bursty:1", "--csv", "x.csv"], "leave one of them away"),
        (["--every-tick"], "--every-tick is about --explain"),
        (["--trace", "a.csv", "--seed", "3"], "nothing to make"),
        (["--csv", "/dev/null/x.csv", "--windows", "1", "--policy", "spot", "--scenario", "steady"], "cannot write"),
    ],
)
def test_what_makes_no_sense_is_one_line_with_the_way_out(wrong: list[str], message: str) -> None:
    arguments = [*QUICK, *wrong]
    with pytest.raises(UsageError, match=message) as told:
        ok(*arguments)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            "date,a\n2023-01-01,1\n2023-01-02,x\n",
            ["--marks", "available"],
            r"pool\.csv, line 3: a date and a whole number",
        ),
        ("date,a\n2023-01-01,1\n2023-01-02,2\n", ["--marks", "available"], "probe 1 is 2"),
        ("date,a\n", ["--marks", "available"], "fewer than two probes"),
        ("0,add,n1\n5,add,n1\n", [], "line 2: add n1, which is there"),
        ("{}", ["--marks", "available"], "metadata.gap_seconds, data and prices are expected"),
        ("{", ["--marks", "available"], "is not JSON"),
        ("\ud800", ["--marks", "available"], "is not CSV"),
        (None, ["--marks", "available"], "cannot read .*No such file"),
        (
            "date,a\n2023-01-01,1\n2023-01-02,1\n",
            ["--marks", "available", "--gang", "2"],
            "says that one machine could be had",
        ),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_line(
    tmp_path: Path, text: str | None, arguments: list[str], message: str
) -> None:
    path = tmp_path / "pool.csv"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match=message):
        ok("--trace", path, *PRICED, *arguments)


def test_prices_must_come_from_somewhere_and_from_one_place(tmp_path: Path) -> None:
    path, prices = probes(tmp_path / "pool.csv", made().available()[0]), tmp_path / "prices.json"
    prices.write_text('{"other": [1, 2]}')
    for arguments, message in (
        ([], "give --on-demand-price"),
        (["--on-demand-price", "3"], "give --spot-price .* or --prices"),
        (["--on-demand-price", "3", "--prices", prices], "no prices for pool pool .*it has other"),
        (["--on-demand-price", "3", "--prices", tmp_path], "cannot read"),
        ([*PRICED, "--prices", prices], "not both"),
        ([*PRICED, "--trace", path], "two traces are of a pool 'pool'"),
    ):
        with pytest.raises(UsageError, match=message):
            ok("--trace", path, "--marks", "available", *arguments)


def test_the_help_names_everything_and_its_examples_work() -> None:
    text = ok("--help")
    for name in SCENARIOS:
        assert name in text
    examples = re.findall(r"holdfast simulate(.*)", text.split("Examples:")[1].split("JSON keys")[0])
    assert len(examples) == 6
    for example in examples:
        words = shlex.split(example.split("|")[0])
        if "--trace" not in words:
            ok(*words, "--work", "2h", "--deadline", "3h", "--days", "3", "--windows", "3")


# ---- processes


def test_it_starts_fast() -> None:
    """What it needs it imports when it is called."""
    heavy = ("numpy", "matplotlib", "rich", "holdfast.simulate")
    code = f"import sys, holdfast.cli.app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=GIVE_UP_S)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_ctrl_c_leaves_nothing_half_done_and_no_process(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "holdfast", "simulate", "--scenario", "steady", "--days", "300", "--every", "1h",
        "--policy", "greedy", "--jobs", "2", "--csv", str(tmp_path / "x.csv"), "--plot", str(tmp_path / "pictures"), "--json",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        # Both workers are there, so the optimum is under way: minutes of it.
        while len(workers := _workers(process.pid)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        printed, told = process.communicate(timeout=GIVE_UP_S)
    assert (process.returncode, printed) == (EXIT_INTERRUPTED, "")
    assert told == "holdfast: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def _workers(pid: int) -> list[int]:
    """Processes that compute, spawned by this one."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, children.read_text().split()):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
        except OSError:
            continue
    return found


def test_wrong_usage_has_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "simulate", "--policy", "gready"],
        check=False,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
    )
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert done.stderr.startswith("holdfast: there is no policy 'gready' (did you mean greedy?); there are ")
    assert done.stderr.count("\n") == 1
