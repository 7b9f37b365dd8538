"""Outputs that are whole or absent, runs that are begun or not, and the commands that people type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchanging import common_state, export, import_, newest, trained
from make_fixture import Attempt, StoppedClock, tree
from same_bits import plain
from typer.testing import CliRunner, Result

from holdfast.checkpoint.exchange.adopt import import_checkpoint
from holdfast.checkpoint.exchange.export import export_checkpoint
from holdfast.checkpoint.exchange.note import FORMATS, Format
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.runs import rollback
from holdfast.checkpoint.runs.verify import verify
from holdfast.cli.checkpoints import checkpoints_app
from holdfast.core.errors import Fenced, IntegrityError, RunConflict, StoreUnavailable, UsageError
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.store.open import open_store
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return trained(tmp_path / "run", common_state(1), common_state(2))


def _bytes_of(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_replaced_unless_asked_for(tmp_path: Path, run: Store, format: Format) -> None:
    out = tmp_path / "outputs" / "out"
    with pytest.raises(UsageError, match="no such folder"):
        export(run, out, format)
    out.parent.mkdir()
    export(run, out, format, which=1)
    before = _bytes_of(out)
    with pytest.raises(UsageError, match="--force"):
        export(run, out, format)
    assert _bytes_of(out) == before
    export(run, out, format, force=True)
    assert plain(newest(import_(out)[1])["tracked"]) == plain(common_state(2)["tracked"])
    assert os.listdir(out.parent) == ["out"]
    # A folder that is something else is never taken away.
    (out.parent / "precious").mkdir()
    (out.parent / "precious" / "thesis").write_text("…")
    with pytest.raises(UsageError, match="folder"):
        export(run, out.parent / "precious", format, force=True)
    assert (out.parent / "precious" / "thesis").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, run: Store, format: Format) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()

    def refuse(operation: Operation) -> Fault | None:
        return Fault.UNAVAILABLE_BEFORE if operation.method == "read_into" else None

    with pytest.raises(StoreUnavailable):
        export(FaultyStore(run, refuse), outputs / "out", format)
    assert os.listdir(outputs) == []
    key = max((entry for entry in run.list("data/")), key=lambda entry: entry.size_bytes).key
    file = Path(run.url.removeprefix("file://")) / key
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError):
        export(run, outputs / "out", format)
    assert os.listdir(outputs) == []
    file.unlink()
    with pytest.raises(Exception, match=key):
        export(run, outputs / "out", format)
    assert os.listdir(outputs) == []


def test_a_checkpoint_that_retention_drops_meanwhile_is_no_damage(tmp_path: Path) -> None:
    moving = trained(tmp_path / "moving", *({"tracked": {"x": np.full(100, step)}, "holdfast": {}} for step in (1, 2)))
    dropped = False

    def drop(operation: Operation) -> Fault | None:
        nonlocal dropped
        if operation.method == "read_into" and not dropped:
            dropped = True
            rollback.drop(moving, 1, open_home=open_store, clock=StoppedClock(), tokens=seeded_tokens(8))
        return None

    with pytest.raises(RunConflict, match="was dropped while it was exported"):
        export(FaultyStore(moving, drop), tmp_path / "out", "safetensors", which=1)


def test_an_import_needs_an_empty_place(tmp_path: Path, run: Store) -> None:
    export(run, tmp_path / "file", "safetensors")
    with pytest.raises(RunConflict, match="already"):
        import_(tmp_path / "file", into=run)
    target = LocalStore(tmp_path / "target")
    with Attempt(target, open_store, seeded_tokens(4)):
        pass  # claimed, and nothing was saved
    done, _ = import_(tmp_path / "file", into=target, step=3)
    assert (done.checkpoint.generation, done.checkpoint.attempt) == (2, 2)
    assert verify(target, open_home=open_store).good
    # A training that goes on from it refers to its bytes.
    with Attempt(target, open_store, seeded_tokens(5)) as attempt:
        attempt.save(4, {"tracked": newest(target)["tracked"], "holdfast": {"step": 4}})
    assert plain(newest(target)["tracked"]) == plain(newest(run)["tracked"])
    head = read_truth(target).head
    assert head is not None
    assert [ref.step for ref in head.checkpoints] == [3, 4]
    assert len(list(target.list("data/"))) == 1
    assert verify(target, open_home=open_store).good


def test_an_import_that_fails_can_be_repeated(tmp_path: Path, run: Store) -> None:
    export(run, tmp_path / "file", "safetensors")
    store, failing = MemoryStore(), True

    def refuse(operation: Operation) -> Fault | None:
        return Fault.UNAVAILABLE_BEFORE if failing and operation.key.startswith("data/") else None

    faulty = FaultyStore(store, refuse)
    with pytest.raises(StoreUnavailable):
        import_(tmp_path / "file", into=faulty)
    failing = False
    import_(tmp_path / "file", into=faulty)
    assert plain(newest(store)["tracked"]) == plain(newest(run)["tracked"])


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, run: Store) -> None:
    source = tmp_path / "file"
    export(run, source, "safetensors")
    store = MemoryStore()

    def touch(now: int, total: int) -> None:
        if now == total:
            os.utime(source, ns=(1, 1))

    with pytest.raises(IntegrityError, match="changed while"):
        import_checkpoint(store, source, clock=StoppedClock(), tokens=seeded_tokens(1), progress=touch)
    head = read_truth(store).head
    assert head is not None
    assert head.checkpoints == []


def test_two_imports_at_once_make_one_run(tmp_path: Path, run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one claims between this one's claim and its head: one of them wins, the other is fenced."""
    export(run, tmp_path / "file", "safetensors")
    store, advance = MemoryStore(), Lineage.advance
    calls: list[str] = []

    def interleaved(lineage: Lineage, kind: str, change: Any) -> Any:
        calls.append(kind)
        if len(calls) == 1:
            import_checkpoint(store, tmp_path / "file", clock=StoppedClock(), tokens=seeded_tokens(6))
        return advance(lineage, kind, change)

    monkeypatch.setattr(Lineage, "advance", interleaved)
    with pytest.raises(Fenced):
        import_(tmp_path / "file", into=store)
    assert calls == ["import", "import"]
    assert plain(newest(store)["tracked"]) == plain(newest(run)["tracked"])


# ---- the commands


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(checkpoints_app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("format", FORMATS)
def test_commands_export_and_import(tmp_path: Path, run: Store, format: Format) -> None:
    source, out = run.url.removeprefix("file://"), tmp_path / "out"
    arguments = ("export", source, out, "--format", format, "--step", 1, "--only", "model", "--only", "optimizer")
    done = _invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{out}: step 1 of {run.url} as {format}: model, optimizer, 4 arrays")
    again = _invoke(*arguments)
    assert isinstance(again.exception, UsageError)
    listed = json.loads(_invoke(*arguments, "--force", "--json").stdout)
    assert listed.keys() == {
        "url", "checkpoint", "path", "format", "names", "arrays", "array_bytes", "file_bytes", "aliases",
    }  # fmt: skip
    made = _invoke("import", tmp_path / "copy", out, "--step", 12)
    assert made.exit_code == 0, made.output
    assert "begins at step 12 with model, optimizer" in made.stdout
    copy = open_store(str(tmp_path / "copy"))
    tracked = tree(1)["tracked"]
    assert plain(newest(copy)["tracked"]) == plain({name: tracked[name] for name in ("model", "optimizer")})
    listed = json.loads(_invoke("import", tmp_path / "other", out, "--name", "model", "--json").stdout)
    assert listed.keys() == {
        "url", "run_id", "checkpoint", "source", "format", "names", "arrays", "array_bytes", "sent_bytes", "left_out",
    }  # fmt: skip
    assert (listed["names"], listed["left_out"]) == (["model"], ["optimizer"])


def test_unknown_formats_are_refused(tmp_path: Path, run: Store) -> None:
    assert _invoke("export", run.url, tmp_path / "out", "--format", "onnx").exit_code == 2
    wrong: Any = "onnx"
    with pytest.raises(UsageError, match="safetensors, torch, dcp"):
        export_checkpoint(run, tmp_path / "out", wrong, open_home=open_store, tokens=seeded_tokens(1))
    with pytest.raises(UsageError, match="auto, safetensors"):
        import_(tmp_path, wrong)
    with pytest.raises(UsageError, match="tracked"):
        import_(tmp_path, name="no name")
