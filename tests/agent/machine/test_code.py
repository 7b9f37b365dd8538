"""Code and secrets on their way onto a machine: hostile archives, other bytes, other commits, open files."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.agent.machine.code import fetch_code, unpack
from holdfast.agent.machine.secrets import hide, resolve
from holdfast.core.errors import FormatError, HoldfastError, IntegrityError, UsageError
from holdfast.core.job_record import GitCode, JobRecord, PackedCode, archive_key
from holdfast.core.sealed import digest, seal, unseal
from holdfast.store.memory import MemoryStore

Member = tuple[str, bytes, str]
"""Name, kind, and what it holds or leads to."""


def archive_of(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, text in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o6777
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = text
            elif kind == tarfile.REGTYPE:
                member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


FILE, FOLDER, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE


def test_what_is_packed_comes_out_and_no_mode_that_nobody_asked_for(tmp_path: Path) -> None:
    members = [
        (".", FOLDER, ""),
        ("a/b", FOLDER, ""),
        ("a/b/run.sh", FILE, "x"),
        ("link", LINK, "a/b"),
        ("c/d", FILE, "y"),
    ]
    unpack(archive_of(members), tmp_path)
    assert (tmp_path / "link" / "run.sh").read_text() == "x"
    assert (tmp_path / "c" / "d").read_text() == "y"
    assert (tmp_path / "a" / "b" / "run.sh").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    "members",
    [
        [("../out", FILE, "x")],
        [("/out", FILE, "x")],
        [("a/../../out", FILE, "x")],
        [("a", LINK, ".."), ("a/out", FILE, "x")],
        [("a", LINK, "/")],
        [("a", LINK, "../../out")],
        [("b", LINK, "."), ("a", LINK, "b/..")],
        [("a", FILE, "x"), ("a", FILE, "y")],
        [("a", FILE, "x"), ("a", FOLDER, "")],
        [("a", FILE, "x"), ("a/b", FILE, "y")],
        [("a", tarfile.LNKTYPE, "/etc/passwd")],
        [("a", tarfile.CHRTYPE, "")],
        [("a", tarfile.FIFOTYPE, "")],
        [("a", tarfile.GNUTYPE_SPARSE, "x")],
    ],
)
def test_what_leads_out_or_is_no_plain_file_is_refused(members: list[Member], tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    with pytest.raises(FormatError):
        unpack(archive_of(members), inside)
    assert not list(tmp_path.rglob("out"))


names = st.lists(st.sampled_from(["a", "b", "..", ".", "out", ""]), min_size=1, max_size=4).map("/".join).filter(bool)
members = st.lists(st.tuples(names, st.sampled_from([FILE, FOLDER, LINK, tarfile.LNKTYPE]), names), max_size=6)


@given(members, st.integers(0, 4000) | st.none())
def test_whatever_stands_in_an_archive_nothing_is_written_outside(
    tmp_path_factory: pytest.TempPathFactory, members: list[Member], cut: int | None
) -> None:
    root = tmp_path_factory.mktemp("archive")
    inside = root / "x" / "inside"
    inside.mkdir(parents=True)
    try:
        unpack(archive_of(members)[:cut], inside)
    except FormatError:
        pass
    else:
        for link in (path for path in inside.rglob("*") if path.is_symlink()):
            assert Path(os.path.realpath(link)).is_relative_to(inside)
    assert [path.name for path in root.iterdir()] == ["x"]
    assert [path.name for path in (root / "x").iterdir()] == ["inside"]


def test_other_bytes_than_the_named_ones_never_become_the_working_folder(tmp_path: Path) -> None:
    store, good = MemoryStore(), archive_of([("a", FILE, "x")])
    code = PackedCode(digest=digest(good), size_bytes=len(good))
    store.put(archive_key(code.digest), archive_of([("a", FILE, "z")]))
    with pytest.raises(IntegrityError):
        fetch_code(code, store, tmp_path / "work", os.environ)
    assert not (tmp_path / "work").exists()
    store.put(archive_key(code.digest), good)
    for _ in range(2):
        fetch_code(code, store, tmp_path / "work", os.environ)
        assert (tmp_path / "work" / "a").read_text() == "x"


def test_a_commit_is_fetched_by_its_hash(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    commits = []
    subprocess.run([*git, "init", "-q"], cwd=origin, check=True)
    for text in ("one", "two"):
        (origin / "file").write_text(text)
        subprocess.run([*git, "add", "file"], cwd=origin, check=True)
        subprocess.run([*git, "commit", "-q", "-m", text], cwd=origin, check=True)
        said = subprocess.run([*git, "rev-parse", "HEAD"], cwd=origin, check=True, capture_output=True, text=True)
        commits.append(said.stdout.strip())
    for commit, text in zip(commits, ("one", "two"), strict=True):
        fetch_code(GitCode(url=f"file://{origin}", commit=commit), MemoryStore(), tmp_path / "work", os.environ)
        assert (tmp_path / "work" / "file").read_text() == text
    with pytest.raises(HoldfastError, match="git"):
        fetch_code(GitCode(url=f"file://{origin}", commit="0" * 40), MemoryStore(), tmp_path / "work", os.environ)


@pytest.mark.parametrize(
    "fields",
    [
        {"secrets": {"A": "the-secret-itself"}},
        {"secrets": {"A": "aws-secret:-x"}},
        {"secrets": {"A": "file:relative"}},
        {"envs": {"A B": "x"}},
        {"envs": {"A": "x"}, "secrets": {"A": "file:/x"}},
        {"run": " "},
        {"grace_s": -1},
        {"code": {"type": "git", "url": "https://user:secret@host/x", "commit": "0" * 40}},
        {"code": {"type": "git", "url": "ext::sh -c x", "commit": "0" * 40}},
        {"code": {"type": "git", "url": "--upload-pack=x", "commit": "0" * 40}},
        {"code": {"type": "git", "url": "https://host/x", "commit": "main"}},
        {"code": {"type": "packed", "digest": "../x", "size_bytes": 1}},
    ],
)
def test_records_that_make_no_sense_are_not_read(fields: dict[str, object]) -> None:
    known = {"format": 1, "nonce": "n", "name": "j", "run": "true"} | fields
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(known, JobRecord)
    assert "the-secret-itself" not in str(caught.value)


def test_a_record_comes_back_as_it_was() -> None:
    job = JobRecord(
        format=1, nonce="n", name="j", run="true", secrets={"A": "gcp-secret:projects/p/secrets/s/versions/3"},
        code=GitCode(url="git@host:x/y.git", commit="a" * 40),
    )  # fmt: skip
    assert unseal(seal(job), JobRecord, what="job") == job


def test_a_secret_in_a_file_must_be_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("value\n")
    for mode in (0o644, 0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(UsageError, match="closed to all others"):
            resolve("A", f"file:{path}", {})
    path.chmod(0o600)
    assert resolve("A", f"file:{path}", {}) == "value"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError):
        resolve("A", f"file:{tmp_path / 'link'}", {})


@pytest.mark.parametrize(
    ("reference", "tool", "asked"),
    [
        ("aws-secret:team/token", "aws", "secretsmanager get-secret-value --secret-id team/token"),
        ("aws-parameter:/team/token", "aws", "ssm get-parameter --with-decryption --name /team/token"),
        ("gcp-secret:token", "gcloud", "secrets versions access latest --secret token"),
        (
            "gcp-secret:projects/p/secrets/token/versions/3",
            "gcloud",
            "secrets versions access 3 --secret token --project p",
        ),
    ],
)
def test_the_providers_own_tool_is_asked(tmp_path: Path, reference: str, tool: str, asked: str) -> None:
    program = tmp_path / tool
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho the-value\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert resolve("A", reference, environment) == "the-value"
    assert (tmp_path / "asked").read_text().startswith(asked)
    program.write_text("#!/bin/sh\necho the-value; echo no such secret >&2; exit 1\n")
    with pytest.raises(HoldfastError, match="no such secret") as caught:
        resolve("A", reference, environment)
    assert "the-value" not in str(caught.value)


def test_values_are_hidden_also_where_they_overlap_or_have_several_lines() -> None:
    values = {"A": "abc", "B": "abcdef", "C": "first line\nsecond line"}
    assert hide("abcdef abc, second line", values) == "*** ***, ***"
