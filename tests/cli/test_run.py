"""`holdfast run` as users call it: a process of its own, its words, its exit codes, its report, and a light start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def holdfast(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_keeps_its_options_its_output_and_its_exit_code() -> None:
    code = "import sys; print(sys.argv[1:]); sys.exit(41)"
    command = [sys.executable, "-c", code, "--url", "mine", "--", "-x"]
    for dashes in (["--"], []):
        done = holdfast("run", "--max-errors", "0", *dashes, *command)
        assert done.returncode == 41
        assert done.stdout == "['--url', 'mine', '--', '-x']\n"
        first, *block, line = done.stderr.splitlines()
        assert first == "holdfast: start 1"
        assert block[0].startswith("holdfast:   machine ")
        assert line.startswith("holdfast: attempt 1 ended: exit code 41 after ")
        assert line.endswith("leaving with exit code 41")


def test_options_reach_the_command_and_the_limits_and_the_report_tells_it_all(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    code = (
        "import os, sys; print(*(os.environ.get('HOLDFAST_' + n) for n in ('RUN', 'ATTEMPT', 'FRESH')), flush=True);"
        "os.kill(os.getpid(), 15)"
    )
    run = str(tmp_path / "gpt")
    options = ["--url", run, "--fresh", "--max-preemptions", "0", "--grace", "1 min", "--report", str(report)]
    done = holdfast("run", *options, "--", sys.executable, "-c", code)
    assert done.returncode == 143
    assert done.stdout == f"{run} 1 1\n"
    told = [json.loads(line) for line in report.read_text().splitlines()]
    events = [event for event in told if not event["name"].startswith("notice.")]
    assert [event["name"] for event in events] == ["attempt.started", "attempt.ended", "agent.stopped"]
    assert events[1]["fields"]["ending"] == "preempted"
    assert events[1]["fields"]["exit_code"] == -15
    assert events[2]["fields"]["exit_code"] == 143


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grace", "5 lightyears", "--", "true"], '"10 min"'),
        (["--max-cost", "5", "--", "true"], "max_cost needs the machine's price"),
        (["--hang-limit", "sleeping=3 h", "--", "true"], "phases are starting, restoring"),
        (["--report", "/no/such/folder/report", "--", "true"], "cannot write the report"),
        (["--", "no-such-command-anywhere"], "cannot start 'no-such-command-anywhere'"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = holdfast("run", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("holdfast: ")
    assert message in line


def test_help_and_version_start_without_what_they_do_not_need() -> None:
    assert "holdfast run -- python train.py" in holdfast("run", "--help").stdout
    assert holdfast("run").returncode == 2
    assert holdfast("--version").stdout.startswith("holdfast ")
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "holdfast", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert loaded.returncode == 0
    names = {line.rpartition("|")[2].strip() for line in loaded.stderr.splitlines()}
    assert "holdfast.cli.run" in names
    assert not {"torch", "numpy", "obstore", "blake3", "asyncio", "rich", "holdfast.agent.restart"} & names
