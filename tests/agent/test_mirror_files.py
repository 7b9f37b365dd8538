"""The mirror's small parts: formats that say whether a file is whole, names that lead nowhere else, and hostile states."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mirror_parts import Machine, write

from holdfast.agent.mirror.folder import Names, is_inside, open_for_writing
from holdfast.agent.mirror.sources import Source
from holdfast.agent.mirror.state import FileNote, FolderState, take
from holdfast.agent.mirror.whole import says_whole
from holdfast.core.errors import RestoreError
from holdfast.store.memory import MemoryStore


def _zip(compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        file.writestr("a/data.pkl", os.urandom(300))
        file.writestr("a/data/0", bytes(2000))
        file.comment = comment
    return data.getvalue()


def _torch() -> bytes:
    import torch

    data = io.BytesIO()
    torch.save({"weights": torch.arange(100), "step": 3}, data)
    return data.getvalue()


def _npz() -> bytes:
    data = io.BytesIO()
    np.savez(data, a=np.arange(50), b=np.zeros(3))
    return data.getvalue()


def _safetensors() -> bytes:
    from safetensors.numpy import save

    return bytes(save({"a": np.arange(20, dtype=np.float32), "b": np.zeros((2, 3))}, metadata={"format": "np"}))


MAKERS: dict[str, Callable[[], bytes]] = {
    "stored.zip": _zip,
    "deflated.zip": lambda: _zip(zipfile.ZIP_DEFLATED),
    "with-comment.zip": lambda: _zip(comment=b"PK\x05\x06 is also how an end begins" * 20),
    "model.pt": _torch,
    "arrays.npz": _npz,
    "model.safetensors": _safetensors,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_cut_at_any_byte_is_not_whole(name: str, tmp_path: Path) -> None:
    data = MAKERS[name]()
    path = tmp_path / name
    path.write_bytes(data)
    assert says_whole(path) is True
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert says_whole(path) is not True, length
        if length >= 4:
            assert says_whole(path) is False, length
    path.write_bytes(data + b"x")
    assert says_whole(path) is False


def test_other_formats_do_not_say(tmp_path: Path) -> None:
    for content in (b"", b"P", b"\x80\x04pickle.", b"{}"):
        (tmp_path / "state").write_bytes(content)
        assert says_whole(tmp_path / "state") is None


@given(
    st.lists(st.sampled_from(["..", ".", "a", "b", ""]), max_size=6),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
)
def test_a_link_is_inside_exactly_when_its_path_never_leaves(target: list[str], link: list[str]) -> None:
    text = "/".join(target)
    depth, inside = len(link) - 1, bool(text) and not text.startswith("/")
    for part in text.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        inside = inside and depth >= 0
    assert is_inside("/".join(link), text) is inside


def test_units_are_the_topmost_folders_that_are_checkpoints() -> None:
    names = Names()
    assert names.unit_of("run/checkpoint-10/deep/epoch_3/model.bin") == "run/checkpoint-10"
    assert names.unit_of("last.ckpt") == "last.ckpt"
    assert names.unit_of("last.ckpt/shard-0") == "last.ckpt"
    assert names.unit_of("notes/a.txt") == "notes/a.txt"
    assert names.unit_of("tmp-checkpoint-10/model.bin") is None
    assert names.unit_of(".holdfast-kept-1/a") is None
    assert names.is_appended("logs/train.log")
    assert not names.is_appended("checkpoint-1/train.log"), "what belongs to a checkpoint is taken with it"
    assert Names(("sub/*.pt",)).unit_of("other/a.pt") is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are seen in /proc")
def test_files_open_for_writing_are_seen_and_those_open_for_reading_are_not(tmp_path: Path) -> None:
    for name in ("written", "appended", "read"):
        (tmp_path / name).touch()
    with (tmp_path / "written").open("r+b"), (tmp_path / "appended").open("ab"), (tmp_path / "read").open("rb"):
        assert open_for_writing(tmp_path) == {"written", "appended"}


class _Nothing:
    def read(self, start: int, length: int) -> memoryview:
        return memoryview(bytes(length))

    def hashes(self, start: int, length: int) -> bytes:
        return b""


_FILE = FileNote(0o644, 0, 4)
HOSTILE: dict[str, dict[str, Any]] = {
    "above": {"files": {"../planted": _FILE}},
    "around": {"files": {"a/../../planted": _FILE}},
    "absolute": {"files": {"/planted": _FILE}},
    "dot": {"files": {"./a": _FILE}},
    "empty part": {"files": {"a//b": _FILE}},
    "zero byte": {"files": {"a\0b": _FILE}},
    "its own name": {"files": {".holdfast-restore-x": _FILE}},
    "a link that leads out": {"files": {"a": _FILE}, "links": {"b": "../planted"}},
    "an absolute link": {"files": {"a": _FILE}, "links": {"b": "/etc"}},
    "through a link": {"files": {"a/b": _FILE}, "links": {"a": "c"}},
    "through a file": {"files": {"a": _FILE, "a/b": _FILE}},
    "a link and a file": {"files": {"a": _FILE}, "links": {"a": "c"}},
    "a setuid file": {"files": {"a": FileNote(0o4755, 0, 4)}},
    "a folder above": {"files": {"a": _FILE}, "folders": {"..": 0o700}},
    "an endless time": {"files": {"a": FileNote(0o644, 2**70, 4)}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_state_is_refused_and_touches_nothing(kind: str, tmp_path: Path) -> None:
    store = MemoryStore()
    writer = Machine(tmp_path / "writer" / "out", _made(store, tmp_path / "writer"))
    state = FolderState(**HOSTILE[kind])
    sources: dict[str, Source] = {path: _Nothing() for path in state.files}
    writer.passes._committer.commit(take(state, sources, number=1, metadata={"step": 1}))
    writer.close()
    victim = tmp_path / "victim"
    victim.mkdir()
    with pytest.raises(RestoreError):
        Machine(victim / "deep" / "out", store)
    assert [path for path in victim.rglob("*") if path.is_file() or path.is_symlink()] == []
    assert not Path("/planted").exists()


def _made(store: MemoryStore, folder: Path) -> MemoryStore:
    folder.mkdir(parents=True)
    return store


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    (tmp_path / "one").mkdir()
    machine = Machine(tmp_path / "one" / "out", store)
    machine.settle(lambda: write(tmp_path / "one" / "out" / "a", b"stored"))
    machine.close()

    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    here = tmp_path / "two" / "out"
    write(here / "a", b"older")
    os.utime(here / "a", ns=(0, 0))
    with pytest.raises(RestoreError, match="No space left"):
        Machine(here, store)
    assert (here / "a").read_bytes() == b"older"
    assert sorted(path.name for path in here.parent.iterdir()) == ["out"]
