"""Files of other tools, and files that are torn, altered or hostile: taken, or refused with one of our errors and no trace."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
import torch.distributed.checkpoint.state_dict_saver as dcp_saver
from exchanging import common_state, export, import_, newest, trained
from same_bits import plain
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.checkpoint.exchange.note import FORMATS, NOTE_KEY, Format
from holdfast.core.errors import FormatError, HoldfastError, IntegrityError, UsageError
from holdfast.store.memory import MemoryStore

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2, dtype=torch.bfloat16)}


# ---- files of other tools


def test_published_safetensors_become_one_object(tmp_path: Path) -> None:
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    safetensors.torch.save_model(tied, str(tmp_path / "tied.safetensors"))
    made, store = import_(tmp_path / "tied.safetensors")
    assert (made.names, made.arrays) == (("model",), 1)
    assert plain(dict(sorted(newest(store)["tracked"]["model"].items()))) == plain(dict(tied.state_dict()))
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name, value in WEIGHTS.items():
        safetensors.torch.save_file({name: value}, folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in WEIGHTS}}
    with pytest.raises(UsageError, match="2 safetensors files"):
        import_(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, store = import_(folder, name="net")
    assert newest(store)["tracked"].keys() == {"net"}
    assert plain(sorted(newest(store)["tracked"]["net"].items())) == plain(sorted(WEIGHTS.items()))
    index["weight_map"]["fc.bias"] = "../fc.bias.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="not in the folder"):
        import_(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_of_every_shape(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "file.pt"

    def tracked(content: Any, **options: Any) -> tuple[Any, tuple[str, ...]]:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        made, store = import_(path, **options)
        return newest(store)["tracked"], made.left_out

    expected = plain(WEIGHTS)
    flat, _ = tracked(WEIGHTS)
    assert plain(flat["model"]) == expected
    assert plain(tracked(WEIGHTS, name="net")[0]["net"]) == expected
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    several = {"model": WEIGHTS, "optimizer": optimizer, "epoch": 3}
    got, left_out = tracked(several)
    assert (plain(got), left_out) == (plain({"model": WEIGHTS, "optimizer": optimizer}), ("epoch",))
    got, left_out = tracked(several, name="model")
    assert (plain(got), left_out) == (plain({"model": WEIGHTS}), ("optimizer", "epoch"))
    got, left_out = tracked({"state_dict": WEIGHTS, "epoch": 1}, key="state_dict", name="model")
    assert (plain(got), left_out) == (plain({"model": WEIGHTS}), ("epoch",))
    with pytest.raises(UsageError, match="state_dict"):
        tracked({"state_dict": WEIGHTS}, key="elsewhere")
    with pytest.raises(FormatError, match="state dict is expected"):
        tracked([1, 2])


def _save_dcp(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is one process only
        dcp_saver.save(state, checkpoint_id=folder, no_dist=True)


def test_dcp_folders_of_torch(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    _save_dcp({"model": WEIGHTS, "optimizer": optimizer, "list": [torch.ones(1), {"a": 1}]}, tmp_path / "nested")
    made, store = import_(tmp_path / "nested")
    assert plain(newest(store)["tracked"]["model"]) == plain(WEIGHTS)
    assert newest(store)["tracked"]["optimizer"]["param_groups"] == optimizer["param_groups"]
    assert list(newest(store)["tracked"]["optimizer"]["state"]) == [0]
    assert made.left_out == ("list",)
    _save_dcp(dict(WEIGHTS), tmp_path / "flat")
    assert plain(newest(import_(tmp_path / "flat")[1])["tracked"]) == plain({"model": WEIGHTS})


def _sharded(folder: Path, pieces: dict[tuple[int, int], torch.Tensor], shape: tuple[int, int], path: str = "") -> None:
    """A tensor `w` as ranks would have written it, a file for each piece."""
    folder.mkdir()
    storage, chunks = {}, []
    for number, (offsets, piece) in enumerate(pieces.items()):
        name = path or f"__{number}_0.distcp"
        data = io.BytesIO()
        torch.save(piece, data)
        (folder / name).write_bytes(b"before" + data.getvalue())
        storage[MetadataIndex("w", offsets, number)] = _StorageInfo(name, 6, len(data.getvalue()))
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
    properties = TensorProperties(dtype=torch.float32)
    tensors: dict[str, Any] = {"w": TensorStorageMetadata(properties, torch.Size(shape), chunks)}
    metadata = Metadata(tensors, planner_data={"w": ("w",)}, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_sharded_tensors_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(35.0).reshape(5, 7)
    pieces = {(0, 0): whole[:2, :4], (2, 0): whole[2:, :4], (0, 4): whole[:2, 4:], (2, 4): whole[2:, 4:]}
    pieces = {offsets: piece.clone() for offsets, piece in pieces.items()}
    _sharded(tmp_path / "good", pieces, (5, 7))
    assert plain(newest(import_(tmp_path / "good")[1])["tracked"]) == plain({"model": {"w": whole}})
    target = {"w": torch.zeros(5, 7)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_loader.load(target, checkpoint_id=tmp_path / "good", no_dist=True)
    assert torch.equal(target["w"], whole)  # so torch takes this folder for one of its own
    overlap = {(0, 0): whole[:3].clone(), (1, 0): whole[:2].clone()}
    hole = {(0, 0): whole[:2].clone()}
    outside = {(0, 0): whole[:2].clone(), (4, 0): whole[:3].clone()}
    for number, wrong in enumerate((overlap, hole, outside)):
        _sharded(tmp_path / str(number), wrong, (5, 7))
        with pytest.raises(FormatError, match="do not make up the whole"):
            import_(tmp_path / str(number))


# ---- hostile ones


class _Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._marker),)


def _hostile_files(folder: Path, marker: Path) -> list[Path]:
    attack = _Runs(marker)
    torch.save({"model": attack}, folder / "zip.pt")
    torch.save({"model": attack}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "bare.pt").write_bytes(pickle.dumps(attack))
    index, value, tensor = folder / "index", folder / "value", folder / "tensor"
    _save_dcp({"model": WEIGHTS}, index)
    (index / ".metadata").write_bytes(pickle.dumps(attack))
    _save_dcp({"model": WEIGHTS, "value": {"x": attack}}, value)
    _sharded(tensor, {(0, 0): torch.ones(1, 1)}, (1, 1))
    data = io.BytesIO()
    torch.save(attack, data)
    (tensor / "__0_0.distcp").write_bytes(b"before" + data.getvalue() + b" " * 2000)
    return [folder / "zip.pt", folder / "legacy.pt", folder / "bare.pt", index, value, tensor]


def test_pickles_that_would_run_something_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for path in _hostile_files(tmp_path, marker):
        with pytest.raises(FormatError) as caught:
            import_(path)
        assert "\n" not in str(caught.value)
        assert not marker.exists(), path


def test_an_index_that_abuses_what_is_allowed_is_refused(tmp_path: Path) -> None:
    """Opcodes that set state on the allowed names themselves, or call them with strange things."""
    names = ["torch.distributed.checkpoint.metadata Metadata", "torch Size", "torch float32", "pathlib PosixPath"]
    for number, name in enumerate([*names, "torch load", "torch.hub load", "builtins eval", "os system"]):
        module, attribute = name.split()
        get = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"
        for ending in (
            b"}X\x01\x00\x00\x00aK\x01sb.",
            b"}}X\x08\x00\x00\x00__init__K\x01s\x86b.",
            b"K\x01\x85R.",
            b".",
        ):
            folder = tmp_path / f"{number}"
            folder.mkdir(exist_ok=True)
            (folder / ".metadata").write_bytes(b"\x80\x04" + get + ending)
            with pytest.raises(FormatError):
                import_(folder)
    _sharded(tmp_path / "after", {(0, 0): torch.ones(2, 2)}, (2, 2))
    import_(tmp_path / "after")  # and none of them has left anything behind


@pytest.mark.parametrize("place", ["../outside", "/etc/hostname", "a/../../outside"])
def test_an_index_cannot_reach_outside_of_its_folder(tmp_path: Path, place: str) -> None:
    _sharded(tmp_path / "folder", {(0, 0): torch.ones(2, 2)}, (2, 2))
    shutil.copy(tmp_path / "folder" / "__0_0.distcp", tmp_path / "outside")
    path = tmp_path / "folder" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"\x8c\x0c__0_0.distcp", b"\x8c" + bytes([len(place)]) + place.encode()))
    # The frame's length is no longer right, so it is left out.
    data = path.read_bytes()
    path.write_bytes(data[:2] + data[11:])
    with pytest.raises(FormatError, match="outside of the folder"):
        import_(tmp_path / "folder")


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.update(format=2),
        lambda note: note.update(state={"not a name": {}}),
        lambda note: note["state"]["model"].update(x={"$": "array", "name": "gone", "of": "torch"}),
        lambda note: note["state"]["model"].update(x={"$": "array", "name": "model.emb.weight", "of": "os"}),
        lambda note: note["state"]["model"].update(x={"$": "dict", "v": [[[], 1]]}),
        lambda note: note["state"]["model"].update(x={"$": "set", "v": [{"$": "array", "name": "x", "of": "torch"}]}),
        lambda note: note["state"]["model"].update(x={"$": "unknown"}),
        lambda note: note.update(parameters={"optimizer": [[1, 2]]}),
        lambda note: note.pop("state"),
    ],
)
def test_notes_are_not_trusted(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    export(trained(tmp_path / "run", common_state(1)), tmp_path / "out", "torch")
    state = torch.load(tmp_path / "out", weights_only=True)
    note = json.loads(state[NOTE_KEY])
    change(note)
    torch.save({**state, NOTE_KEY: json.dumps(note)}, tmp_path / "out")
    with pytest.raises(HoldfastError, match=r"note|newer"):
        import_(tmp_path / "out")


# ---- torn and altered ones


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


@pytest.mark.parametrize("format", FORMATS)
def test_torn_and_altered_files_give_our_errors_only(tmp_path: Path, format: Format) -> None:
    """Cut off anywhere: always refused. One byte changed: refused, or it is where nothing could tell (bytes of a tensor without
    a checksum). Nothing but our errors comes out, in one line, and nothing is written."""
    good = tmp_path / "good"
    export(trained(tmp_path / "run", common_state(1)), good, format, only=["model", "optimizer", "numpy"])
    chance = random.Random(format)
    broken = tmp_path / "broken"
    for number in range(160):
        if good.is_dir():
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(good, broken)
        else:
            shutil.copy(good, broken)
        path = chance.choice(_files(broken))
        data = bytearray(path.read_bytes())
        position = chance.randrange(len(data)) if number % 4 else chance.randrange(min(len(data), 200))
        cut = number % 2 == 0
        if cut:
            del data[position:]
        else:
            data[position] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        store = MemoryStore()
        refused: HoldfastError | None = None
        try:
            import_(broken, format, into=store)
        except HoldfastError as error:
            refused = error
        assert refused or not cut, (path, position)
        assert refused is None or ("\n" not in str(refused) and not list(store.list())), (path, position)


def test_altered_tensors_in_a_torch_file_are_noticed(tmp_path: Path) -> None:
    """torch itself does not look at the checksums that it writes."""
    path = tmp_path / "file.pt"
    torch.save({"w": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.find(b"\x00\x00\x80\x3f" * 8) + 100] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(IntegrityError, match="checksum"):
        import_(path)
    # Written without checksums, none of them matches: that is no damage.
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(1000)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    import_(path)


def test_what_is_no_checkpoint_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    for name, kind in (("text", UsageError), ("empty", UsageError), ("zip", FormatError), ("absent", UsageError)):
        with pytest.raises(kind, match=name):
            import_(tmp_path / name)
    with pytest.raises(UsageError, match="neither"):
        import_(tmp_path)
    for format in FORMATS:
        with pytest.raises((FormatError, UsageError)):
            import_(tmp_path / "text", format)
