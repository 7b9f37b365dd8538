"""What the local store promises beyond the common suite: hostile folders, full and failing disks, flushing order."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import holdfast.store
from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    StoreFull,
    StoreUnavailable,
    StoreUnsafe,
)
from holdfast.core.ids import seeded_tokens
from holdfast.store import Entry, LocalStore, posix


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> Iterator[LocalStore]:
    root.mkdir()
    store = LocalStore(root, tokens=seeded_tokens(3))
    yield store
    store.close()


def _named_only(store: LocalStore) -> LocalStore:
    store._unnamed_files = False
    return store


# A hostile folder


def _make_link_to_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "secret")


def _make_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "made-by-a-write")


def _make_fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _make_folder(path: Path, outside: Path) -> None:
    path.mkdir()


def _make_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize("make", [_make_link_to_file, _make_dangling_link, _make_fifo, _make_folder, _make_socket])
def test_what_stands_in_an_objects_place_is_not_read(
    store: LocalStore, root: Path, tmp_path: Path, make: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "heads").mkdir()
    monkeypatch.chdir(root / "heads")  # A socket's path must be short.
    make(Path("1.json"), outside)
    with pytest.raises(IntegrityError):
        store.get("heads/1.json", max_bytes=100)
    with pytest.raises(IntegrityError):
        store.read_into("heads/1.json", 0, memoryview(bytearray(1)))
    assert not store.put_new("heads/1.json", b"mine")
    assert list(store.list()) == []
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_links_in_place_of_folders_lead_nowhere(store: LocalStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "below" / "x").write_bytes(b"secret")
    (root / "data").symlink_to(outside)
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "below")
    attempts: tuple[Callable[[str], object], ...] = (
        lambda below: store.get(f"{below}/x", max_bytes=10),
        lambda below: store.put(f"{below}/new", b"1"),
        lambda below: store.put_new(f"{below}/new", b"1"),
        lambda below: store.delete(f"{below}/x"),
        lambda below: list(store.list(f"{below}/")),
    )
    for below in ("data/below", "pipe/below"):
        for attempt in attempts:
            with pytest.raises(IntegrityError):
                attempt(below)
    assert list(store.list()) == []
    assert [path.name for path in (outside / "below").iterdir()] == ["x"]


def test_a_temporary_folder_that_is_a_link_is_refused(store: LocalStore, root: Path, tmp_path: Path) -> None:
    (root / ".tmp").symlink_to(tmp_path)
    with pytest.raises(IntegrityError):
        _named_only(store).put("data/x", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    root.symlink_to(tmp_path / "real")
    store = LocalStore(root)
    store.put("data/x", b"1")
    assert (tmp_path / "real" / "data" / "x").read_bytes() == b"1"
    store.close()


def test_foreign_files_are_not_listed(store: LocalStore, root: Path) -> None:
    store.put("data/x", b"12")
    for name in (".hidden", "with space", ".nfs0001", "ü"):
        (root / "data" / name).write_bytes(b"1")
    (root / ".tmp").mkdir()
    (root / ".tmp" / "leftover").write_bytes(b"1")
    assert list(store.list()) == [Entry("data/x", 2)]


# Full disks, failing disks, poor file systems


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EFBIG, StoreFull),
        (errno.EACCES, PermissionDenied),
        (errno.EPERM, PermissionDenied),
        (errno.EROFS, PermissionDenied),
        (errno.ENOENT, NotFound),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
        (errno.EMFILE, StoreUnavailable),
    ],
)
def test_errors_of_the_system_become_ours(number: int, expected: type[HoldfastError]) -> None:
    with pytest.raises(expected) as caught, posix.translated("reading", "a/b", "/root"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is expected
    assert "a/b" in str(caught.value)


_ON_A_FULL_DISK = """
import sys
from holdfast.core.errors import StoreFull
from holdfast.store import LocalStore
for unnamed in (True, False):
    store = LocalStore(sys.argv[1])
    store._unnamed_files = unnamed
    store.put("data/small", b"1" * 1000)
    for write in (store.put, store.put_new):
        try:
            write("data/big", b"2" * 2**20)
        except StoreFull as error:
            assert "free some space" in str(error)
        else:
            raise SystemExit("the disk was not full")
    assert [tuple(entry) for entry in store.list()] == [("data/small", 1000)]
    assert store.put_new(f"data/other-{unnamed}", b"3")
    store.delete(f"data/other-{unnamed}")
    store.close()
print("survived")
"""


def test_a_full_disk_is_store_full_and_leaves_nothing_half(tmp_path: Path) -> None:
    """A file system of 256 KiB in a private mount namespace; where that is not allowed, a limit on file size instead."""
    environment = {**os.environ, "PYTHONPATH": str(Path(holdfast.store.__file__).parents[2])}
    python = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)]
    mounted = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f"mount -t tmpfs -o size=256k none '{tmp_path}' && echo mounted && exec \"$@\"",
    ]
    result = subprocess.run([*mounted, "sh", *python], env=environment, capture_output=True, text=True, check=False)
    if "mounted" not in result.stdout:
        limited = ["sh", "-c", 'ulimit -f 512 && exec "$@"', "sh", *python]
        result = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
    assert "survived" in result.stdout, result.stderr


def test_a_limit_on_file_size_is_store_full(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(holdfast.store.__file__).parents[2])}
    limited = ["sh", "-c", 'ulimit -f 512 && exec "$@"', "sh", sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)]
    result = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
    assert "survived" in result.stdout, result.stderr


@pytest.mark.parametrize("named", [False, True])
def test_no_failed_flush_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """A write flushes the names above the root, the root's, the folder's, the file, and the file's name. Each may fail."""
    flush, calls, failing = os.fsync, 0, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, "Input/output error")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for failing in range(100):
        calls, root = 0, tmp_path / f"{failing}" / "root"
        store = LocalStore(root)
        if named:
            _named_only(store)
        try:
            assert store.put_new("data/x", b"1")
            break
        except StoreUnavailable:
            # Not visible either: a name that can be read would be taken for one that is durable.
            assert calls == failing + 1
            assert not (root / "data" / "x").exists()
            assert store.put_new("data/x", b"1")
        finally:
            store.close()
    assert failing == calls >= 6


def test_short_writes_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, parts: write(descriptor, [b"".join(parts)[:997]]))
    parts = [bytes([index % 251]) * (index % 400) for index in range(300)]
    store.put("data/x", parts)
    assert store.get("data/x", max_bytes=10**6) == b"".join(parts)


@pytest.mark.parametrize("missing", ["unnamed files", "/proc", "hard links"])
def test_poor_file_systems(store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real_open, real_link = os.open, os.link

    def poor_open(path: str, flags: int, *rest: Any, **more: Any) -> int:
        if missing != "/proc" and flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *rest, **more)

    def poor_link(source: str, target: str, **more: Any) -> None:
        if source.startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        if missing == "hard links":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real_link(source, target, **more)

    monkeypatch.setattr(os, "open", poor_open)
    monkeypatch.setattr(os, "link", poor_link)
    store.put("data/x", b"1")
    store.put("data/x", b"2")
    assert store.get("data/x", max_bytes=1) == b"2"
    if missing == "hard links":
        with pytest.raises(StoreUnsafe, match="hard links"):
            store.put_new("heads/1", b"1")
    else:
        assert store.put_new("heads/1", b"1")
        assert not store.put_new("heads/1", b"2")
        assert store.get("heads/1", max_bytes=1) == b"1"
    assert list((root / ".tmp").iterdir()) == []


def test_old_leftovers_of_killed_writers_are_removed(store: LocalStore, root: Path) -> None:
    (root / ".tmp").mkdir()
    for name, age_s in (("old", 25 * 3600), ("young", 3600)):
        (root / ".tmp" / name).write_bytes(b"half")
        written_s = (root / ".tmp" / name).stat().st_mtime - age_s
        os.utime(root / ".tmp" / name, (written_s, written_s))
    _named_only(store).put("data/x", b"1")
    assert [path.name for path in (root / ".tmp").iterdir()] == ["young"]


def test_emptied_folders_go_and_the_root_stays(store: LocalStore, root: Path) -> None:
    store.put("a/b/c/d", b"1")
    store.put("a/x", b"1")
    store.delete("a/b/c/d")
    assert [path.name for path in (root / "a").iterdir()] == ["x"]
    store.delete("a/x")
    assert root.is_dir()
    assert list(root.iterdir()) == []


# Flushing order


class _Recorder:
    """Every watched call of `os`, with inode numbers in place of descriptors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object]] = []
        for name in ("mkdir", "link", "rename", "fsync"):
            monkeypatch.setattr(os, name, self._recording(name, getattr(os, name)))

    def _recording(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            result = real(*arguments, **more)
            if name == "fsync":
                self.calls.append((name, os.fstat(arguments[0]).st_ino))
            else:
                self.calls.append((name, str(arguments[-1] if name in ("link", "rename") else arguments[0])))
            return result

        return call


def _inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.mark.parametrize("named", [False, True])
def test_bytes_before_name_and_parents_before_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    root = tmp_path / "new" / "root"
    store = LocalStore(root)
    if named:
        _named_only(store)
    recorder = _Recorder(monkeypatch)
    store.put("data/1/x", b"bytes")
    calls = [call for call in recorder.calls if call != ("mkdir", ".tmp")]
    folders = [tmp_path, tmp_path / "new", root, root / "data", root / "data" / "1"]
    file = _inode(folders[-1] / "x")
    naming = ("rename", "x") if named else ("link", "x")
    named_at = calls.index(naming)
    # The file's bytes are flushed before it gets its name; the name is flushed after that, before put returns.
    assert ("fsync", file) in calls[:named_at]
    assert ("fsync", _inode(folders[-1])) in calls[named_at:]
    # Each folder's name is flushed, in its parent, after it was made and before the object is named.
    for parent, folder in pairwise(folders):
        made_at = next(
            i for i, (name, what) in enumerate(calls) if name == "mkdir" and Path(str(what)).name == folder.name
        )
        assert ("fsync", _inode(parent)) in calls[made_at:named_at]
    # Once known to be durable, parents are not flushed again.
    recorder.calls.clear()
    store.put("data/1/y", b"bytes")
    assert [call for call in recorder.calls if call[0] == "fsync"] == [
        ("fsync", _inode(folders[-1] / "y")),
        ("fsync", _inode(folders[-1])),
    ]
    store.close()


def test_a_folder_made_by_another_process_is_flushed_too(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = _Recorder(monkeypatch)
    (root / "data").mkdir()
    store.put("data/x", b"1")
    assert ("fsync", _inode(root)) in recorder.calls
    # The same path, but no longer the same folder: what was known about its name no longer holds.
    store.delete("data/x")
    (root / "data").mkdir()
    recorder.calls.clear()
    store.put("data/x", b"1")
    assert ("fsync", _inode(root)) in recorder.calls
