"""Where files may be put: nowhere outside, not over others', and on a rehearsal machine in its working folder only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from agents import GIVE_UP_S
from controlling import words_of
from hypothesis import given
from hypothesis import strategies as st
from mounting import Here, source_folder, tree
from real import Place, environment_of, machine

from holdfast.agent.machine.unprepared import Unprepared
from holdfast.core.job_record import JobRecord
from holdfast.core.mounts import Mount, check_apart, read_target
from holdfast.store.foreign import ForeignFile


@pytest.mark.parametrize("target", ["/out/data", "~/data", "~/.ssh/config", "/tmp"])
def test_a_machine_of_the_rehearsal_cloud_writes_nothing_outside(here: Here, tmp_path: Path, target: str) -> None:
    """Whoever wrote the record."""
    source_folder(tmp_path / "source")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for mount in (Mount(target=target, url=f"file://{tmp_path}/source"), here.packed(target, a=b"1")):
        with pytest.raises(Unprepared, match="use a relative target") as failed:
            here.bring(mount)
        assert failed.value.exit_code == 2
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    # Elsewhere they are what they say.
    if target.startswith("~"):
        here.bring(here.packed(target, is_file=True, a=b"1"), kind="")
        assert (here.home / target[2:]).read_bytes() == b"1"


@pytest.mark.parametrize(
    "where", ["the target", "its parent", "to nowhere yet", "below it", "after a first start", "a parent, later"]
)
def test_no_link_leads_out(here: Here, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    (outside / "data").mkdir(parents=True)
    (outside / "data/kept").write_text("theirs")
    source_folder(tmp_path / "source")
    mount = Mount(target="a/data", url=f"file://{tmp_path}/source")
    if where == "the target":
        (here.work / "a").mkdir()
        (here.work / "a/data").symlink_to(outside)
    elif where == "its parent":
        (here.work / "a").symlink_to(outside)
    elif where == "to nowhere yet":
        (tmp_path / "empty").mkdir()
        (here.work / "a").symlink_to(tmp_path / "empty")
    else:
        here.bring(mount)
        (here.work / "a/data/deep/er").rename(here.work / "gone")
        (here.work / "a/data/deep").rmdir()
        (here.work / "a/data/deep").symlink_to(outside)
        if where == "after a first start":
            here.again()
        if where == "a parent, later":
            (here.work / "a").rename(here.work / "b")
            (here.work / "a").symlink_to(outside)
            here.again()
    if where == "a parent, later":
        here.bring(mount)
    else:
        with pytest.raises(Unprepared) as refused:
            here.bring(mount)
        assert refused.value.exit_code == 2
    assert tree(outside) == {"data/kept": b"theirs"}
    assert not (tmp_path / "empty").exists() or not list((tmp_path / "empty").iterdir())


names = st.lists(st.sampled_from(["a", "b", "..", ".", "~", "out", "", "-"]), min_size=1, max_size=4).map("/".join)


@given(names, names)
def test_whatever_a_record_says_nothing_is_written_outside(
    tmp_path_factory: pytest.TempPathFactory, target: str, name: str
) -> None:
    root = tmp_path_factory.mktemp("mounts")
    here = Here(root)

    class Hostile:
        is_near = True

        def files(self) -> list[ForeignFile]:
            return [ForeignFile(name, 1, "v"), ForeignFile("z", 1, "v")]

        def read_into(self, name: str, offset: int, buffer: memoryview) -> str:
            buffer[:] = b"x"
            return "v"

        def close(self) -> None: ...

    try:
        here.bring(Mount(target=target, url="file:///source"), source=Hostile())
    except (Unprepared, ValueError):
        pass
    assert sorted(path.name for path in root.iterdir()) == ["home", "machine"]
    assert list(here.home.iterdir()) == []
    assert {path.name for path in here.folder.iterdir()} <= {"work", "mounts"}


def test_what_is_there_and_is_not_ours_stays(here: Here, tmp_path: Path) -> None:
    source_folder(tmp_path / "source")
    (here.work / "data").mkdir()
    mount = Mount(target="data", url=f"file://{tmp_path}/source")
    here.bring(mount)  # an empty folder is free: disks are mounted on such
    for place, wanted in (
        ("code", Mount(target="code", url=mount.url)),
        ("file", here.packed("file", is_file=True, a=b"1")),
    ):
        (here.work / place).mkdir()
        (here.work / place / "theirs").write_text("x")
        with pytest.raises(Unprepared, match="there already and is not empty"):
            here.bring(wanted)
        assert tree(here.work / place) == {"theirs": b"x"}
    own = Mount(target=f"{here.folder}/work/x", url=mount.url)
    with pytest.raises(Unprepared, match="holdfast's own folder"):
        here.bring(own, kind="")
    with pytest.raises(Unprepared, match="lies in"):
        here.bring(Mount(target="~/x", url=mount.url), Mount(target=f"{here.home}/x/y", url=mount.url), kind="")


def test_targets_have_one_spelling() -> None:
    spelled = {"data/": "data", "./a//b": "a/b", "/data/./x/": "/data/x", "~/a/": "~/a", "//data": "/data"}
    assert {text: read_target(text) for text in spelled} == spelled
    for wrong in ("", ".", "/", "~", "~/", "~bob/x", "../x", "a/../b", "a\nb", "/..", "a\0"):
        with pytest.raises(ValueError, match=r"place|target|own"):
            read_target(wrong)
    check_apart(["a", "ab", "a-b", "/a", "~/a"])
    for several in (["a", "a"], ["a/b/c", "a"], ["/x", "y", "/x/y"]):
        with pytest.raises(ValueError, match="lies in"):
            check_apart(several)


@pytest.mark.parametrize(
    "fields",
    [
        {"target": "../x", "url": "s3://b/x"},
        {"target": "x/", "url": "s3://b/x"},
        {"target": "x"},
        {"target": "x", "url": "s3://b/x", "digest": "0" * 64},
        {"target": "x", "url": "https://host/x"},
        {"target": "x", "url": "memory://x"},
        {"target": "x", "digest": "../../x"},
    ],
)
def test_mounts_that_make_no_sense_are_not_read(fields: dict[str, object]) -> None:
    known = {"format": 1, "nonce": "n", "name": "j", "run": "true", "mounts": [fields]}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(known, JobRecord)


@given(st.text("a/.~", max_size=8))
def test_a_read_target_is_read_as_itself(text: str) -> None:
    try:
        found = read_target(text)
    except ValueError:
        return
    assert read_target(found) == found
    assert ".." not in found.split("/")


def test_a_machine_brings_them_before_the_set_up_and_leaves_where_it_cannot(tmp_path: Path, bucket: Any) -> None:
    bucket_name, put = bucket
    put("set/part-1", b"one")
    good, bad = Place(tmp_path / "good"), Place(tmp_path / "bad")
    data = Mount(target="data", url=f"s3://{bucket_name}/set")
    good.ready("cat data/part-1 copied", setup="cp data/part-1 copied", mounts=(data,))
    bad.ready("true", mounts=(Mount(target="~/data", url=data.url),))
    with machine(good, environment_of(good)) as one, machine(bad, environment_of(bad)) as other:
        out, err = one.communicate(timeout=GIVE_UP_S)
        other.communicate(timeout=GIVE_UP_S)
    assert out == b"oneone", err.decode()
    assert b"holdfast: file_mounts: data: 1 of 1 files" in err
    released = words_of(bad.store, 1)[-1]
    assert (released.kind, released.exit_code) == ("released", 2)
    assert "use a relative target" in released.reasons[0]
    assert bad.ended.read_text() == "ended\n"
