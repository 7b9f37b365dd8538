"""Files beside the working folder: copied whole from real stores, gone on with, and never twice."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from agents import GIVE_UP_S
from mounting import MIB, ODD, Counting, Here, bytes_of, source_folder, tree

from holdfast.agent.machine import copying, mounts
from holdfast.agent.machine.unprepared import Unprepared
from holdfast.core.errors import NotFound, StoreUnavailable, UsageError
from holdfast.core.job_record import archive_key
from holdfast.core.mounts import Mount
from holdfast.store.foreign import open_foreign


def test_everything_of_a_bucket_whatever_it_is_called(here: Here, bucket: Any) -> None:
    bucket_name, put = bucket
    files = {name: b"" if name == "empty" else bytes_of(name) for name in ODD}
    files["large.bin"] = bytes_of("large", 2 * copying.RANGE_BYTES + 5)
    for name, body in files.items():
        put(f"a set/{name}", body)
    # Consoles make objects for folders; a neighbour's name begins like ours.
    for name in ("a set/", "a set/deep/", "a set/nothing/", "a settle/x"):
        put(name, b"")
    here.bring(Mount(target="data/set", url=f"s3://{bucket_name}/a set"))
    assert tree(here.work) == {f"data/set/{name}": body for name, body in files.items()}
    assert (here.work / "data/set/nothing").is_dir()
    assert stat.S_IMODE((here.work / "data/set/plain").stat().st_mode) & 0o022 == 0
    # One object is one file, and a bucket a folder.
    here.bring(Mount(target="one", url=f"s3://{bucket_name}/a set/large.bin"))
    assert (here.work / "one").read_bytes() == files["large.bin"]
    here.bring(Mount(target="all", url=f"s3://{bucket_name}"))
    assert (here.work / "all/a set/plain").read_bytes() == b"plain"
    for url in (f"s3://{bucket_name}/none", "s3://no-such-bucket/x"):
        with pytest.raises(Unprepared) as failed:
            here.bring(Mount(target="never", url=url))
        assert failed.value.exit_code == 1


def test_what_cannot_be_a_file_is_refused_and_not_left_out(here: Here, bucket: Any) -> None:
    bucket_name, put = bucket
    put("both/a", b"x")
    put("both/a/b", b"y")
    with pytest.raises(Unprepared, match="a file or a folder, and not both") as failed:
        here.bring(Mount(target="x", url=f"s3://{bucket_name}/both"))
    assert failed.value.exit_code == 2
    put("hole//b", b"y")
    with pytest.raises(Unprepared, match="no file's"):
        here.bring(Mount(target="x", url=f"s3://{bucket_name}/hole"))
    assert tree(here.work) == {}


def test_an_unchanged_second_start_copies_nothing_and_a_changed_one_all(here: Here, tmp_path: Path) -> None:
    files = source_folder(tmp_path / "source")
    data, one = Mount(target="in/data", url=f"file://{tmp_path}/source"), here.packed("conf.d", a=b"1")
    here.bring(data, one)
    assert sorted(set(here.sources[0].reads)) == sorted(files)
    inode = (here.work / "in/data/plain").stat().st_ino
    here.again()
    assert not (here.work / "in").exists()
    here.bring(data, one)
    assert tree(here.work) == {f"in/data/{name}": body for name, body in files.items()} | {"conf.d/a": b"1"}
    assert here.sources[0].reads == []
    assert (here.work / "in/data/plain").stat().st_ino == inode
    assert "unchanged" in here.said[-1]
    # What the job has changed or removed is made anew, and only that.
    (here.work / "in/data/plain").write_bytes(b"PLAIN")
    (here.work / "in/data/.hidden").unlink()
    here.again()
    here.bring(data, one)
    assert sorted(here.sources[0].reads) == [".hidden", "plain"]
    assert tree(here.work / "in/data") == files
    # Another version at the source, of the same size.
    (tmp_path / "source/plain").write_bytes(b"other")
    here.again()
    here.bring(data, one)
    assert tree(here.work / "in/data") == files | {"plain": b"other"}


def test_a_source_that_fails_half_way_is_gone_on_with(here: Here, tmp_path: Path) -> None:
    files = source_folder(tmp_path / "source")
    data = Mount(target="data", url=f"file://{tmp_path}/source")
    down = Counting(open_foreign(data.url), lambda number: StoreUnavailable("down") if number > 4 else None)
    with pytest.raises(Unprepared, match="down") as failed:
        here.bring(data, source=down)
    assert failed.value.exit_code == 1
    there = tree(here.work / "data")
    whole = {name for name in there if not name.startswith(copying.COMING)}
    assert {name: there[name] for name in whole} == {name: files[name] for name in whole}
    assert 0 < len(whole) < len(files)
    here.again()
    here.bring(data)
    assert tree(here.work / "data") == files
    assert set(here.sources[0].reads) == set(files) - whole, "what was whole is not read again"
    # Now and then, every range of every file: nobody notices.
    flaky = Counting(open_foreign(data.url), lambda number: StoreUnavailable("throttled") if number % 2 else None)
    here.bring(Mount(target="again", url=data.url), source=flaky)
    assert tree(here.work / "again") == files


def test_what_an_earlier_try_has_left_is_in_no_file(here: Here, tmp_path: Path) -> None:
    """Its parts may be of other, larger files."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(bytes_of("large", 3 * copying.RANGE_BYTES))
    data = Mount(target="data", url=f"file://{tmp_path}/source")
    down = Counting(open_foreign(data.url), lambda number: StoreUnavailable("down") if number > 2 else None)
    with pytest.raises(Unprepared, match="down"):
        here.bring(data, source=down)
    (tmp_path / "source/file").write_bytes(b"small")
    here.bring(data)
    assert tree(here.work / "data") == {"file": b"small"}


def test_a_file_that_changes_while_it_is_copied_is_no_mixture(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes_of("old", 3 * copying.RANGE_BYTES))
    source = open_foreign(f"file://{tmp_path}/file")

    def change(number: int) -> None:
        if number == 2:
            (tmp_path / "new").write_bytes(bytes_of("new", 3 * copying.RANGE_BYTES))
            (tmp_path / "new").replace(tmp_path / "file")

    with pytest.raises(Unprepared, match="changed at its source"):
        here.bring(Mount(target="x", url=f"file://{tmp_path}/file"), source=Counting(source, change))
    assert not (here.work / "x").exists()


def test_leaving_in_the_middle_leaves_nothing_half_named(here: Here, tmp_path: Path) -> None:
    files = source_folder(tmp_path / "source")
    data = Mount(target="data", url=f"file://{tmp_path}/source")
    slow, reading = threading.Event(), threading.Event()

    def wait(number: int) -> None:
        if number == 3:
            reading.set()
            slow.wait(GIVE_UP_S)

    class Leave(Exception):
        pass

    def tick() -> None:
        if reading.is_set():
            slow.set()
            raise Leave

    with pytest.raises(Leave):
        here.bring(data, source=Counting(open_foreign(data.url), wait), tick=tick)
    there = tree(here.work / "data")
    assert all(body == files[name] for name, body in there.items() if not name.startswith(copying.COMING))
    here.again()
    here.bring(data)
    assert tree(here.work / "data") == files


def test_a_disk_that_is_too_small_is_found_out_before_a_byte_is_copied(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All mounts of a disk together; half of it is not enough for both."""
    source_folder(tmp_path / "source")
    several = [Mount(target=name, url=f"file://{tmp_path}/source") for name in ("a", "b")]
    need = sum(each.size_bytes + 4096 for each in open_foreign(several[0].url).files())
    real = os.statvfs

    def small(path: Any) -> os.statvfs_result:
        found = list(real(path))
        found[0] = found[1] = 4096
        found[2], found[4] = 10**6, need * 3 // 2 // 4096 + 10**6 // 50
        return os.statvfs_result(found)

    monkeypatch.setattr(mounts.os, "statvfs", small)
    with pytest.raises(Unprepared, match="disk_size") as failed:
        here.bring(*several)
    assert failed.value.exit_code == 2
    assert [source.reads for source in here.sources] == [[], []]
    here.bring(several[0])


def test_a_disk_that_fills_meanwhile_is_said(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_folder(tmp_path / "source")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying.os, "pwrite", full)
    with pytest.raises(Unprepared, match="disk is full"):
        here.bring(Mount(target="a", url=f"file://{tmp_path}/source"))


def test_links_of_a_folder_are_followed_and_loops_found(here: Here, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1").write_bytes(b"weights")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/model.bin").symlink_to(tmp_path / "blobs/1")
    (tmp_path / "source/all").symlink_to(tmp_path / "blobs")
    mount = Mount(target="a", url=f"file://{tmp_path}/source")
    here.bring(mount)
    assert tree(here.work / "a") == {"model.bin": b"weights", "all/1": b"weights"}
    assert not any(path.is_symlink() for path in (here.work / "a").rglob("*"))
    (tmp_path / "blobs/loop").symlink_to(tmp_path / "source")
    with pytest.raises(UsageError, match="a folder that it lies in"):
        open_foreign(mount.url).files()
    (tmp_path / "blobs/loop").unlink()
    os.mkfifo(tmp_path / "blobs/pipe")
    with pytest.raises(UsageError, match="no plain file"):
        open_foreign(mount.url).files()
    (tmp_path / "blobs/pipe").unlink()
    (tmp_path / "blobs/dangling").symlink_to("nowhere")
    with pytest.raises(NotFound):
        open_foreign(mount.url).files()


def test_an_archive_that_is_not_the_named_one_is_not_unpacked(here: Here) -> None:
    mount = here.packed("conf", **{"a": b"1", "b/c": b"2"})
    good = here.store.get(archive_key(mount.digest), max_bytes=MIB)
    here.store.put(archive_key(mount.digest), good[:600] + b"X" + good[601:])
    with pytest.raises(Unprepared, match="named by"):
        here.bring(mount)
    here.store.put(archive_key(mount.digest), good)
    here.bring(mount)
    assert tree(here.work / "conf") == {"a": b"1", "b/c": b"2"}


@pytest.mark.long
def test_memory_is_bounded(tmp_path: Path) -> None:
    """1.5 GiB in one file and 20,000 small ones, in a process of 400 MiB."""
    source = tmp_path / "source"
    source.mkdir()
    with (source / "large").open("wb") as file:
        file.truncate(1536 * MIB)
    for number in range(20_000):
        (source / f"{number:05}").write_bytes(b"x")
    program = f"""
import resource, sys
from pathlib import Path
from holdfast.agent.machine.mounts import bring
from holdfast.core.mounts import Mount
from holdfast.store.memory import MemoryStore
folder = Path({str(tmp_path / "machine")!r})
(folder / "work").mkdir(parents=True)
bring([Mount(target="data", url="file://{source}")], MemoryStore(), folder, {{}}, lambda: None, say=lambda line: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400 * 1024
    assert (tmp_path / "machine/work/data/large").stat().st_size == 1536 * MIB
