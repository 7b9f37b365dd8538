"""What goes out comes back bit for bit, and other tools read what goes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
from exchanging import common_state, export, import_, newest, trained
from make_fixture import tree
from same_bits import plain
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from holdfast.checkpoint.exchange.note import FORMATS, Format
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import open_checkpoint
from holdfast.core.errors import UnsupportedState, UsageError
from holdfast.store.open import open_store
from holdfast.train.restoring import load_checkpoint
from holdfast.train.tracked import Tracker

LARGE = torch.arange(70 << 20, dtype=torch.int64).view(torch.uint8)[: (70 << 20) + 5]


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_value_comes_back_with_the_same_bits(tmp_path: Path, format: Format) -> None:
    state = tree(2) if format == "torch" else common_state(2)
    # More than one window of the stream, and a chunk that is not a whole number of blocks.
    state["tracked"]["large"] = LARGE
    store = trained(tmp_path / "run", common_state(1), state)
    told: list[tuple[int, int]] = []
    done = export(store, tmp_path / "out", format, progress=lambda now, total: told.append((now, total)))
    assert (done.checkpoint.step, done.names) == (2, tuple(state["tracked"]))
    assert told[0][0] == 0
    assert told[-1] == (done.array_bytes, done.array_bytes)
    made, copy = import_(tmp_path / "out", step=7)
    assert (made.format, made.checkpoint.step, made.left_out) == (format, 7, ())
    back = newest(copy)
    assert plain(back["tracked"]) == plain(state["tracked"])
    assert back["holdfast"] == {"step": 7}
    model = back["tracked"]["model"]
    assert model["emb.weight"] is model["head.weight"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("format", FORMATS)
def test_one_object_goes_out_bare_and_comes_back_under_another_name(tmp_path: Path, format: Format) -> None:
    state = tree(3)
    store = trained(tmp_path / "run", state)
    done = export(store, tmp_path / "out", format, only=["model"], bare=True)
    assert done.names == ("model",)
    _, copy = import_(tmp_path / "out", name="net")
    assert plain(newest(copy)["tracked"]) == plain({"net": state["tracked"]["model"]})
    with pytest.raises(UsageError, match="bare"):
        export(store, tmp_path / "other", format, bare=True)
    with pytest.raises(UsageError, match="does not hold nothing_such"):
        export(store, tmp_path / "other", format, only=["nothing_such"])


def test_an_object_can_be_taken_out_of_an_export(tmp_path: Path) -> None:
    store = trained(tmp_path / "run", common_state(1))
    for format in FORMATS:
        export(store, tmp_path / format, format, only=["model", "optimizer"])
        made, copy = import_(tmp_path / format, name="optimizer")
        assert (made.names, made.left_out) == (("optimizer",), ("model",))
        assert plain(newest(copy)["tracked"]) == plain({"optimizer": tree(1)["tracked"]["optimizer"]})
        with pytest.raises(UsageError, match="model, optimizer"):
            import_(tmp_path / format, name="elsewhere")


def test_safetensors_readers_take_it(tmp_path: Path) -> None:
    state = common_state(5)
    store = trained(tmp_path / "run", state)
    out = tmp_path / "out.safetensors"
    done = export(store, out, "safetensors")
    assert done.aliases == {"model.head.weight": "model.emb.weight"}
    loaded = safetensors.torch.load_file(out)
    tracked = state["tracked"]
    assert torch.equal(loaded["model.emb.weight"], tracked["model"]["emb.weight"])
    assert torch.equal(loaded["optimizer.state.0.exp_avg"], tracked["optimizer"]["state"][0]["exp_avg"])
    for name, tensor in tracked["dtypes"].items():
        got = loaded[f"dtypes.{name}"]
        assert (got.dtype, bytes(got.view(torch.uint8).numpy())) == (
            tensor.dtype,
            bytes(tensor.view(torch.uint8).numpy()),
        )
    with safetensors.safe_open(out, "numpy") as file:
        metadata = file.metadata()
        assert np.array_equal(file.get_tensor("numpy.matrix"), tracked["numpy"]["matrix"])
    assert (metadata["format"], metadata["model.head.weight"]) == ("pt", "model.emb.weight")
    note = json.loads(metadata["holdfast.json"])
    assert (note["step"], note["state"]["values"]["int"]) == (1, -7)


def test_formats_say_what_they_cannot_hold(tmp_path: Path) -> None:
    store = trained(tmp_path / "run", tree(1))
    with pytest.raises(UnsupportedState, match=r"dtypes\.complex128.*c128"):
        export(store, tmp_path / "out", "safetensors")
    with pytest.raises(UnsupportedState, match=r"as dcp: .*shapes\.same_key\.1"):
        export(store, tmp_path / "out", "dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class _Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head.weight = self.emb.weight


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return bool(plain(dict(one.state_dict())) == plain(dict(other.state_dict())))


def _stepped(seed: int) -> tuple[_Tied, torch.optim.Adam]:
    model = _Tied(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.head(model.norm(model.emb(torch.arange(5)))).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def model_run(tmp_path: Path) -> Any:
    model, optimizer = _stepped(0)
    tracker = Tracker()
    tracker.add({"model": model, "optimizer": optimizer})
    own = {"step": 1, "parameters": tracker.parameters()}
    return trained(tmp_path / "run", {"tracked": tracker.state(), "holdfast": own}), model, optimizer


def test_torch_itself_takes_it(tmp_path: Path, model_run: Any) -> None:
    store, model, optimizer = model_run
    export(store, tmp_path / "whole.pt", "torch")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)
    other, other_optimizer = _stepped(1)
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    assert _same(other, model)
    assert plain(other_optimizer.state_dict()) == plain(optimizer.state_dict())
    assert loaded["model"]["emb.weight"].data_ptr() == loaded["model"]["head.weight"].data_ptr()
    export(store, tmp_path / "bare.pt", "torch", only=["model"], bare=True)
    other = _Tied(2)
    other.load_state_dict(torch.load(tmp_path / "bare.pt", weights_only=True))
    assert _same(other, model)
    export(store, tmp_path / "bare.safetensors", "safetensors", only=["model"], bare=True)
    other = _Tied(3)
    safetensors.torch.load_model(other, tmp_path / "bare.safetensors")
    assert _same(other, model)


def test_dcp_itself_takes_it(tmp_path: Path, model_run: Any) -> None:
    store, model, optimizer = model_run
    export(store, tmp_path / "folder", "dcp")
    other, other_optimizer = _stepped(1)
    state = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is one process only
        dcp_loader.load(state, checkpoint_id=tmp_path / "folder", no_dist=True)
        dcp_to_torch_save(tmp_path / "folder", tmp_path / "converted.pt")
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    assert _same(other, model)
    assert plain(other_optimizer.state_dict()) == plain(optimizer.state_dict())
    converted = torch.load(tmp_path / "converted.pt", weights_only=True)
    assert torch.equal(converted["model"]["emb.weight"], model.emb.weight)


@pytest.mark.parametrize("format", FORMATS)
def test_tracked_objects_restore_from_an_import(tmp_path: Path, model_run: Any, format: Format) -> None:
    """Also the rule that optimizer state must not reach another parameter survives the way through a file."""
    store, model, optimizer = model_run
    export(store, tmp_path / "out", format)
    _, copy = import_(tmp_path / "out", step=4)
    head = read_truth(copy).head
    assert head is not None
    other, other_optimizer = _stepped(1)
    tracker = Tracker()
    tracker.add({"model": other, "optimizer": other_optimizer})
    with ThreadPoolExecutor(1) as pool:
        loaded = load_checkpoint(open_checkpoint(copy, head.checkpoints[0], open_store), tracker, pool, strict=True)
    assert loaded.own == {"step": 4, "parameters": tracker.parameters()}
    assert _same(other, model)
    assert plain(other_optimizer.state_dict()) == plain(optimizer.state_dict())


def test_safetensors_goes_both_ways_without_torch(tmp_path: Path) -> None:
    state = common_state(1)
    trained(tmp_path / "run", state)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from holdfast.cli.app import main\n"
        "main()"
    )  # fmt: skip

    def holdfast(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "checkpoints", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=tmp_path, check=False)

    for arguments in (["export", "run", "out.safetensors"], ["import", "copy", "out.safetensors"]):
        done = holdfast(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
    assert plain(newest(open_store(str(tmp_path / "copy")))["tracked"]) == plain(state["tracked"])
    refused = holdfast("export", "run", "out.pt", "--format", "torch")
    assert refused.returncode == 2
    assert "pip install 'holdfast[torch]'" in refused.stderr
