"""`holdfast checkpoints …` as people and scripts call it: tables, JSON, questions on a terminal, exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint_runs"))
from run_builder import Trainer, head_of, newest_tree, tree_at, trees_equal

from holdfast.cli.checkpoints import checkpoints_app
from holdfast.core.errors import RunConflict, UsageError
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.store.open import open_store
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = LocalStore(tmp_path / "gpt")
    with Trainer(store, open_store) as trainer:
        for step in (10, 20, 30):
            trainer.save(step, batch_size=8, note="[bold]not markup[/bold]")
    store.close()
    return store


def _path(store: Store) -> str:
    return store.url.removeprefix("file://")


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(checkpoints_app, list(arguments))


def _ok(*arguments: str) -> Result:
    result = _invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def _json(*arguments: str) -> Any:
    return json.loads(_ok(*arguments, "--json").stdout)


def _steps(store: Store) -> list[int]:
    return [ref.step for ref in head_of(store).checkpoints]


def test_ls_shows_what_is_there(run: Store) -> None:
    listed = _json("ls", _path(run))
    assert listed.keys() == {
        "url", "run_id", "name", "created_unix_s", "head", "attempt", "generation", "finished", "removed", "stored_bytes",
        "unreached_bytes", "altered", "forks", "checkpoints",
    }  # fmt: skip
    assert [line["step"] for line in listed["checkpoints"]] == [10, 20, 30]
    assert listed["checkpoints"][0].keys() == {
        "name", "step", "epoch", "generation", "attempt", "unix_s", "age_s", "total_bytes", "own_bytes", "home",
    }  # fmt: skip
    lines = _ok("ls", _path(run)).stdout.splitlines()
    assert "not finished" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["STEP", "10", "20", "30"]
    assert "21.9 KiB" in lines[2]
    assert lines[4].endswith("newest")


def test_show_prints_metadata_arrays_and_changes(run: Store) -> None:
    shown = _json("show", _path(run), "--step", "20")
    assert shown.keys() == {
        "url", "newest", "checkpoint", "metadata", "arrays", "objects", "total_bytes", "new_bytes", "shared_bytes",
        "borrowed_bytes", "previous", "changes",
    }  # fmt: skip
    assert shown["metadata"] == {"step": 20, "batch_size": 8, "note": "[bold]not markup[/bold]"}
    text = _ok("show", _path(run)).stdout
    assert "[bold]not markup[/bold]" in text
    assert "step: 20 → 30" in text
    assert "0 x 3" in text
    assert "the newest" in text


def test_verify_finds_damage_and_says_so_with_its_exit_code(run: Store) -> None:
    assert _json("verify", _path(run))["good"]
    assert "everything is whole" in _ok("verify", _path(run)).stdout
    key = next(key for key, _ in run.list("data/"))
    file = Path(_path(run)) / key
    file.write_bytes(file.read_bytes()[:-1])
    result = _invoke("verify", _path(run), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    problems = [problem for verdict in report["checkpoints"] for problem in verdict["problems"]]
    assert {problem["key"] for problem in problems} == {key}
    result = _invoke("verify", _path(run))
    assert (result.exit_code, "NOT SOUND" in result.stdout, key in result.stdout) == (1, True, True)


def test_verify_says_nothing_about_the_bytes_when_the_store_refuses(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(operation: Operation) -> Fault | None:
        return Fault.DENIED if operation.method == "read_into" else None

    monkeypatch.setattr("holdfast.store.open.open_store", lambda url: FaultyStore(run, refuse))
    result = _invoke("verify", _path(run), "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("holdfast: ")


def test_rollback_asks_and_dry_run_does_not(run: Store) -> None:
    dry = _ok("rollback", _path(run), "--to", "10", "--dry-run")
    assert "step 20, 30 would be removed" in dry.stdout
    assert _steps(run) == [10, 20, 30]
    refused = _invoke("rollback", _path(run), "--to", "10")
    assert isinstance(refused.exception, UsageError)
    assert "--yes" in str(refused.exception)
    assert _steps(run) == [10, 20, 30]
    done = _json("rollback", _path(run), "--to", "10", "--yes")
    assert ([ref["step"] for ref in done["dropped"]], done["target"]["step"]) == ([20, 30], 10)
    assert _steps(run) == [10]


@pytest.mark.parametrize("copy", [False, True])
def test_fork_begins_another_run(run: Store, tmp_path: Path, copy: bool) -> None:
    target = str(tmp_path / "forked")
    forked = _json("fork", _path(run), target, "--at", "20", *(["--copy"] if copy else []))
    assert (forked["mode"], forked["homes"]) == (("copy", []) if copy else ("reference", [run.url]))
    store = LocalStore(target)
    assert trees_equal(newest_tree(store, open_store), tree_at(20))
    assert (f"{store.url} refers to step 20" in _ok("ls", _path(run)).stdout) == (not copy)
    again = _invoke("fork", _path(run), target)
    assert isinstance(again.exception, RunConflict)
    assert _ok("verify", target).exit_code == 0
    if not copy:
        refused = _invoke("rm", _path(run), "--yes")
        assert isinstance(refused.exception, RunConflict)
        assert "Forks refer to it" in refused.stderr
    _ok("rm", target, "--yes")
    assert "removed" in _ok("ls", target).stdout
    _ok("rm", _path(run), "--yes")


def test_rm_takes_one_checkpoint_or_all(run: Store) -> None:
    assert _ok("rm", _path(run), "--step", "10", "--dry-run").stdout == "Nothing was changed.\n"
    _ok("rm", _path(run), "--step", "10", "-y")
    assert _steps(run) == [20, 30]
    plan = _json("rm", _path(run), "--dry-run")
    done = _json("rm", _path(run), "-y")
    assert plan.keys() == done.keys() == {"url", "objects", "removed_bytes", "kept_objects", "forks", "head"}
    assert (plan["head"], plan["objects"]) == (0, done["objects"])
    assert isinstance(_invoke("rm", _path(run), "--step", "20", "--force", "-y").exception, UsageError)


_SCRIPT = "from holdfast.cli.app import main; main()"


def _holdfast(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, "checkpoints", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_from_a_shell_errors_are_one_line_and_exit_codes_are_kept(run: Store, tmp_path: Path) -> None:
    missing = _holdfast("ls", str(tmp_path / "nothing"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("holdfast: ")
    assert missing.stderr.count("\n") == 1
    assert not (tmp_path / "nothing").exists()
    piped = _holdfast("rm", _path(run))
    assert (piped.returncode, _steps(run)) == (2, [10, 20, 30])
    listed = _holdfast("ls", _path(run), "--json")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert json.loads(listed.stdout)["url"] == run.url
    helped = _holdfast("rollback", "--help")
    assert (helped.returncode, "Examples:" in helped.stdout, "JSON keys:" in helped.stdout) == (0, True, True)


@pytest.mark.parametrize(("answer", "code", "steps"), [("n\n", 1, [10, 20, 30]), ("y\n", 0, [10])])
def test_on_a_terminal_it_asks_first(run: Store, answer: str, code: int, steps: list[int]) -> None:
    terminal, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, "checkpoints", "rollback", _path(run), "--to", "10"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while b"[y/N]" not in shown:
            shown += os.read(terminal, 4096)
        os.write(terminal, answer.encode())
        try:
            while data := os.read(terminal, 4096):
                shown += data
        except OSError:
            pass  # A terminal whose other side is closed answers EIO.
        assert child.wait(60) == code
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
    assert b"A trainer that is running on it stops" in shown
    assert _steps(run) == steps
