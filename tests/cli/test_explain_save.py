"""`holdfast explain-save`: figures as people write them go in, the decision and its reasons come out."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from holdfast.cli.app import app
from holdfast.core.errors import UsageError

GIVEN = ["--seconds-left", "2 min", "--bytes", "12GiB", "--bandwidth", "400MiB/s"]


def explain(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["explain-save", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_decision_comes_with_its_figures() -> None:
    said = explain(*GIVEN, "--durable-step", "400", "--step-time", "0.5s")
    assert said.startswith("save now, train on and save again within 1 min ")
    assert "2 min left, less 2 s of margin and 2 s to leave: 1 min 56 s to use" in said
    assert "12 GiB to the store" in said
    assert "measured 400 MiB/s ± 20%" in said


def test_json_says_the_same() -> None:
    told = json.loads(explain(*GIVEN, "--durable-step", "400", "--step-time", "0.5s", "--json"))
    assert (told["action"], told["tier"], told["save_again"], told["fits"]) == ("save_now", "store", True, True)
    assert told["durable_step"] > 1000
    assert told["reasons"]
    alone = json.loads(explain("--seconds-left", "unknown", "--bytes", "0", "--step-time", "unknown", "--json"))
    assert (alone["action"], alone["probability"]) == ("save_now", None)


def test_everything_can_be_given() -> None:
    told = json.loads(
        explain(
            "--seconds-left", "30", "--bytes", "2GiB", "--boundary-in", "unknown", "--snapshot-bytes", "64MiB",
            "--snapshot-step", "990", "--in-flight-bytes", "1MiB", "--in-flight-step", "980", "--local-bandwidth", "1GiB/s",
            "--margin", "1s", "--leave-time", "1s", "--copy-time", "100ms", "--commit-latency", "0.5s", "--confidence", "0.9",
            "--bandwidth-spread", "0.3", "--step-time-spread", "10%", "--insured", "--json",
        )
    )  # fmt: skip
    assert (told["action"], told["durable_step"]) == ("commit_newest_snapshot", 990)


@pytest.mark.parametrize(
    ("wrong", "message"), [(["--bandwidth", "400"], "not a rate"), (["--confidence", "high"], "not a share")]
)
def test_what_makes_no_sense_is_a_usage_error(wrong: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explain(*GIVEN, *wrong)


def test_the_examples_of_the_help_work() -> None:
    help_text = explain("--help")
    examples = re.findall(r"holdfast explain-save (.*)", help_text.split("Examples:")[1])
    assert len(examples) == 3
    for example in examples:
        assert explain(*shlex.split(example))
