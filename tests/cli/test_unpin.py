"""`holdfast checkpoints unpin` as people and scripts call it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint_runs"))
from run_builder import Trainer, tree_at

from holdfast.cli.checkpoints import checkpoints_app
from holdfast.core.errors import RunConflict, UsageError
from holdfast.store.local import LocalStore
from holdfast.store.open import open_store


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with a fork and a trial."""
    with Trainer(LocalStore(tmp_path / "base"), open_store, seed=1) as trainer:
        trainer.save(10)
    invoke("fork", str(tmp_path / "base"), str(tmp_path / "fork"))
    with Trainer(LocalStore(tmp_path / "trial"), open_store, seed=2, base=f"file://{tmp_path}/base") as trainer:
        trainer.save(11, tree_at(11, lineage=5))
    return tmp_path / "base"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(checkpoints_app, list(arguments))


def ok(*arguments: str) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_it_lists_who_refers_to_a_run_and_since_when(base: Path) -> None:
    lines = ok("unpin", str(base)).stdout.splitlines()
    assert lines[0].split() == ["TARGET", "STEP", "SAVED", "STATE", "PIN"]
    assert [line.split()[0] for line in lines[1:]] == sorted(
        (f"file://{base.parent}/{name}" for name in ("fork", "trial")), key=lambda url: url in lines[2]
    )
    assert all("in use" in line and " ago" in line for line in lines[1:])
    listed = json.loads(ok("unpin", str(base), "--json").stdout)
    assert listed.keys() == {"url", "removed", "pins"}
    assert not listed["removed"]
    assert listed["pins"][0].keys() == {"pin", "target", "checkpoint", "step", "age_s", "state", "detail"}
    assert {pin["step"] for pin in listed["pins"]} == {10}
    assert "no other run" in ok("unpin", str(base.parent / "trial")).stdout


def test_it_removes_only_what_nobody_refers_to(base: Path) -> None:
    trial = str(base.parent / "trial")
    refused = invoke("unpin", str(base), trial, "--yes")
    assert isinstance(refused.exception, RunConflict)
    assert "still refers" in str(refused.exception)
    shutil.rmtree(trial)
    asked = invoke("unpin", str(base), trial)
    assert isinstance(asked.exception, UsageError)
    assert "--yes" in str(asked.exception)
    assert "not mounted" in asked.stderr
    assert "Nothing was changed" in ok("unpin", str(base), trial, "--dry-run").stdout
    assert len(list((base / "pins").iterdir())) == 2
    done = json.loads(ok("unpin", str(base), trial, "--yes", "--json").stdout)
    assert (done["removed"], [pin["state"] for pin in done["pins"]]) == (True, ["no target"])
    assert len(list((base / "pins").iterdir())) == 1


def test_force_is_for_one_target_and_takes_what_is_in_use(base: Path) -> None:
    assert isinstance(invoke("unpin", str(base), "--force").exception, UsageError)
    assert isinstance(invoke("unpin", str(base), str(base.parent / "nobody"), "-y").exception, UsageError)
    fork = str(base.parent / "fork")
    said = ok("unpin", str(base), fork, "--force", "-y")
    assert "in use" in said.stderr
    assert "Removed" in said.stdout
    assert [pin["target"] for pin in json.loads(ok("unpin", str(base), "--json").stdout)["pins"]] == [
        f"file://{base.parent}/trial"
    ]


def test_its_help_says_what_a_person_needs() -> None:
    text = ok("unpin", "--help").stdout
    for words in ("Examples:", "JSON keys:", "no target", "Deleted by hand"):
        assert words in text
