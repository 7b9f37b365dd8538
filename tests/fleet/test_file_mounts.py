"""`file_mounts` of a job file: packed or named, the same for the same content, and refused in words that help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from holdfast.agent.machine.mounts import bring
from holdfast.core.errors import UsageError
from holdfast.core.jobfile import JobFile, parse_job
from holdfast.fleet import code
from holdfast.fleet.mounts import check_mounts, mounts_of
from holdfast.store.memory import MemoryStore


def job_of(*lines: str) -> JobFile:
    return parse_job("\n".join(["run: 'true'", "envs: {BUCKET: data-7, EMPTY: }", "file_mounts:", *lines]))


def mounts(tmp_path: Path, *lines: str, provider: str = "aws", store: MemoryStore | None = None) -> dict[str, str]:
    job = job_of(*lines)
    check_mounts(job, provider)
    return {each.target: each.source for each in mounts_of(job, provider, store or MemoryStore(), tmp_path)}


def test_skypilots_forms(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/a").write_text("1")
    found = mounts(
        tmp_path,
        "  /data/: s3://${BUCKET}/set//",
        "  ~/config: ./config",
        "  cache: {source: gs://b/x, mode: COPY}",
        "  weights: az://models/llama 3",
        "  shared: file:///mnt/shared",
    )
    assert found.pop("~/config").startswith("blake3:")
    assert found == {
        "/data": "s3://data-7/set", "cache": "gs://b/x", "weights": "az://models/llama 3", "shared": "file:///mnt/shared",
    }  # fmt: skip


def test_local_files_are_packed_by_content_and_come_out_again(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "machine"
    (here / "conf/sub").mkdir(parents=True)
    (here / "conf/sub/a.yaml").write_text("a: 1")
    (here / "conf/run.sh").write_text("#!/bin/sh")
    (here / "conf/run.sh").chmod(0o755)
    (here / "conf/link").symlink_to("sub/a.yaml")
    (here / "conf/big.bin").write_text("x")
    (here / "conf/.holdfastignore").write_text("*.bin\n")
    (here / "one.json").write_text("{}")
    (there / "work").mkdir(parents=True)
    store = MemoryStore()
    job = job_of("  conf: conf", "  etc/one: ./one.json")
    wanted = mounts_of(job, "local", store, here)
    count = len(list(store.list("code/")))
    assert mounts_of(job, "local", store, here) == wanted
    assert len(list(store.list("code/"))) == count == 2
    bring(wanted, store, there, {}, lambda: None, say=print)
    found = {
        path.relative_to(there / "work").as_posix(): path for path in (there / "work").rglob("*") if path.is_file()
    }
    assert set(found) == {"conf/sub/a.yaml", "conf/run.sh", "conf/link", "conf/.holdfastignore", "etc/one"}
    assert found["etc/one"].read_text() == "{}"
    assert os.readlink(found["conf/link"]) == "sub/a.yaml"
    assert os.access(found["conf/run.sh"], os.X_OK)
    (here / "one.json").write_text("{ }")
    assert mounts_of(job, "local", store, here) != wanted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  data: {source: s3://b/x, mode: MOUNT}", "mode: COPY"),
        ("  data: {source: s3://b/x, mode: mount_cached}", "mode: COPY"),
        ("  data: {source: s3://b/x}", "without `mode:`, SkyPilot mounts"),
        ("  data: {source: s3://b/x, mode: LINK}", "no mode 'LINK'"),
        ("  data: {name: my-bucket, mode: COPY}", "holdfast makes none"),
        ("  data: {sorce: s3://b/x, mode: COPY}", "did you mean 'source'"),
        ("  data: {source: [a, b], mode: COPY}", "it is a path, a URL"),
        ("  data: ", "it is a path, a URL"),
        ("  data: r2://b/x", "copied from s3://, gs://, az://, file:///"),
        ("  data: https://host/x", "fetch it in `setup:`"),
        ("  data: s3://b/x?versionId=3", "a bucket and a prefix and nothing else"),
        ("  data: s3://${BUKET}/x", "BUKET is not among `envs:`"),
        ("  data: s3://${EMPTY}/x", "EMPTY is not among `envs:`"),
        ("  data: ./none", "neither a file nor a folder here"),
        ("  ../data: s3://b/x", "no `..`"),
        ("  ~: s3://b/x", "below a home"),
        ("  /: s3://b/x", "a place of their own"),
        ("  '.': s3://b/x", "the working folder is `workdir:`"),
        ("  data: s3://b/x\n  data/more: s3://b/y", "lies in, data"),
    ],
)
def test_what_is_refused_says_what_to_do(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        mounts(tmp_path, line)
    assert said in str(refused.value)


@pytest.mark.parametrize("target", ["/data", "~/data"])
def test_the_rehearsal_cloud_takes_relative_targets_only(tmp_path: Path, target: str) -> None:
    with pytest.raises(UsageError, match="use a relative target, like data"):
        mounts(tmp_path, f"  {target}: s3://b/x", provider="local")
    assert mounts(tmp_path, f"  {target}: s3://b/x", provider="gcp") == {target: "s3://b/x"}


def test_what_is_too_large_to_be_packed_is_said_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MOST_BYTES", 10)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / name).write_bytes(b"x" * 8)
    (tmp_path / "file").write_bytes(b"x" * 11)
    for source in ("data", "file"):
        with pytest.raises(UsageError, match=rf"'{source}' holds more than .*own URL"):
            mounts(tmp_path, f"  x: {source}")


def test_the_command_refuses_them_before_anything_is_asked_of_a_cloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from holdfast.cli.app import app

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a cloud was opened")

    monkeypatch.setattr("holdfast.provider.registry.instances_named", never)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"run: x\nresources: {{infra: local}}\nfile_mounts: {{/data: s3://b/x}}\ncheckpoint: {{url: {tmp_path}/run}}"
    )
    done = CliRunner().invoke(app, ["launch", str(path), "--dry-run"])
    assert isinstance(done.exception, UsageError)
    assert "use a relative target" in str(done.exception)
