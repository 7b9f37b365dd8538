"""The bootstrap script, in a real sh: whatever happens half-way, the machine ends, once; and with a real wheel it becomes one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.bootstrap import (
    ENV_LOCAL_END,
    ENV_MACHINE_BOOT,
    ENV_MACHINE_KIND,
    MOST_USER_DATA_BYTES,
    Piece,
    bootstrap_script,
)
from holdfast.core.errors import UsageError
from holdfast.store.open import open_store
from holdfast.testing.servers import ministack_server

GIVE_UP_S = 120.0
SHA = "0" * 64
PYTHON = """#!/bin/sh
# Stands for the image's python: makes an environment whose python says what it was told.
if [ "$1" = -c ]; then
  exec {real} "$@"
elif [ "$2" = venv ]; then
  mkdir -p venv/bin && cp "$0" venv/bin/python
elif [ "$2" = pip ]; then
  echo "$@" >> pip-calls; {pip}
else
  echo "$@" > machine-call; {machine}
fi
"""


def a_wheel(folder: Path) -> Piece:
    path = folder / "holdfast-0-py3-none-any.whl"
    path.write_bytes(b"wheel")
    return Piece(source=str(path), name=path.name, sha256=hashlib.sha256(b"wheel").hexdigest())


def fake_python(folder: Path, pip: str = "exit 0", machine: str = "exit 0") -> str:
    path = folder / "python"
    path.write_text(PYTHON.replace("{pip}", pip).replace("{machine}", machine).replace("{real}", sys.executable))
    path.chmod(0o755)
    return str(path)


def run(tmp_path: Path, *, pieces: list[Piece] | None = None, limit_s: int = 60, **more: str) -> tuple[int, str]:
    """Exit code, and what the end command has written."""
    end, ended = f"echo ended >> {tmp_path}/ended", tmp_path / "ended"
    environment = more.pop("environment", None)
    script = bootstrap_script(
        run_url="s3://bucket/it's a run", launch=3, pieces=pieces or [a_wheel(tmp_path)], end_command=end, boot_limit_s=limit_s,
        folder=str(tmp_path / "machine"), **more,
    )  # fmt: skip
    assert not any(word in script for word in ("AWS_SECRET", "PASSWORD"))
    done = subprocess.run(
        ["sh", "-c", script], timeout=GIVE_UP_S, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"]} | (json.loads(environment) if environment else {}),
    )  # fmt: skip
    return done.returncode, ended.read_text() if ended.exists() else ""


def test_what_goes_well_ends_in_the_machines_own_command(tmp_path: Path) -> None:
    assert run(tmp_path, python=fake_python(tmp_path)) == (0, "ended\n")
    folder = tmp_path / "machine"
    call = (folder / "machine-call").read_text()
    assert call.startswith("-m holdfast machine --run s3://bucket/it's a run --launch 3 --end-command echo ended")
    assert "--no-index" in (folder / "pip-calls").read_text()


@pytest.mark.parametrize(
    ("pip", "machine", "code"), [("exit 4", "exit 0", 4), ("exit 0", "exit 75", 75), ("exit 0", "kill -9 $$", 137)]
)
def test_what_fails_ends_the_machine_with_its_code(tmp_path: Path, pip: str, machine: str, code: int) -> None:
    assert run(tmp_path, python=fake_python(tmp_path, pip, machine)) == (code, "ended\n")


def test_an_end_that_the_machine_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    assert run(tmp_path, python=fake_python(tmp_path, machine="mkdir ended; exit 0")) == (0, "")


def test_a_watchdog_that_still_waits_for_a_last_save_is_waited_for(tmp_path: Path) -> None:
    later = f"(sleep 1; echo saved >> {tmp_path}/ended) >/dev/null 2>&1 & echo $! > guarded; kill -9 $$"
    assert run(tmp_path, python=fake_python(tmp_path, machine=later)) == (137, "saved\nended\n")


def test_a_boot_that_hangs_is_ended_by_the_timer(tmp_path: Path) -> None:
    began_s = time.monotonic()
    code, ended = run(tmp_path, python=fake_python(tmp_path, pip="sleep 3"), limit_s=1)
    assert (code, ended) == (143, "ended\n")
    assert time.monotonic() - began_s < GIVE_UP_S
    assert "not ready after 1 s" in (tmp_path / "machine" / "timer.log").read_text()


@pytest.mark.long
def test_a_file_that_is_not_the_one_that_was_meant_is_not_installed(tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path)
    other = Piece(source=wheel.source, name=wheel.name, sha256=SHA)
    assert run(tmp_path, pieces=[other], python=fake_python(tmp_path)) == (1, "ended\n")
    assert not (tmp_path / "machine" / "pip-calls").exists()


def test_from_a_bucket_on_an_image_without_the_aws_command(tmp_path: Path) -> None:
    """Then boto3, which images for training have, fetches by the machine's own role."""
    piece = a_wheel(tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("mkdir", "rm", "cp", "sh", "sleep", "sha256sum", "cat", "kill", "env", "chmod"):
        (tmp_path / "tools" / name).symlink_to(shutil.which(name) or name)
    with ministack_server() as server:
        bucket = server.make_bucket("code")
        with closing(open_store(f"{bucket}/run", options=server.options)) as store:
            assert store.put_new("code/wheel.whl", Path(piece.source).read_bytes())
        source = replace(piece, source=f"{bucket}/run/code/wheel.whl")
        environment = {**server.environment, "PATH": str(tmp_path / "tools")}
        assert run(
            tmp_path, pieces=[source], python=fake_python(tmp_path), environment=json.dumps(environment)
        ) == (0, "ended\n")  # fmt: skip
    assert (tmp_path / "machine" / "pieces" / piece.name).read_bytes() == b"wheel"


@pytest.mark.parametrize("own", [True, False])
def test_in_the_rehearsal_cloud_only_its_own_end_is_run(tmp_path: Path, own: bool) -> None:
    end = f"echo ended >> {tmp_path}/ended" if own else "another"
    environment = json.dumps({ENV_MACHINE_KIND: "local", ENV_LOCAL_END: end})
    assert run(tmp_path, python=fake_python(tmp_path), environment=environment) == (0, "ended\n" if own else "")


@given(
    st.text(min_size=1, max_size=60).filter(lambda text: "\0" not in text),
    st.text(max_size=40).filter(lambda text: "\0" not in text),
)
def test_what_is_quoted_stays_one_word(url: str, value: str) -> None:
    script = bootstrap_script(
        run_url=url, launch=1, pieces=[Piece(source="/w/x.whl", name="x.whl", sha256=SHA)], end_command="true", boot_limit_s=9,
        environment={"REGION": value},
    )  # fmt: skip
    last = script.splitlines(keepends=True)
    assert len(script.encode()) <= MOST_USER_DATA_BYTES
    done = subprocess.run(["sh", "-n"], input=script.encode(errors="surrogateescape"), check=False, timeout=GIVE_UP_S)
    assert done.returncode == 0, last


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "ftp://x/y"}, {"source": "https://user:secret@host/x.whl"}, {"name": "../x.whl"}, {"name": "x y"},
        {"sha256": "abc"}, {"source": "s3://bucket/$(x)' y"},
    ],
)  # fmt: skip
def test_pieces_that_cannot_be_are_refused(wrong: Mapping[str, str]) -> None:
    with pytest.raises(UsageError):
        Piece(**{"source": "s3://bucket/x.whl", "name": "x.whl", "sha256": SHA} | dict(wrong))


def test_a_script_that_does_not_fit_is_refused() -> None:
    pieces = [
        Piece(source=f"s3://bucket/{'long/' * 30}{number}.whl", name=f"{number}.whl", sha256=SHA)
        for number in range(60)
    ]
    with pytest.raises(UsageError, match="bytes, more than"):
        bootstrap_script(run_url="s3://b/r", launch=1, pieces=pieces, end_command="true", boot_limit_s=9)


@pytest.mark.long
def test_from_a_bare_python_to_a_run_that_is_done(tmp_path: Path) -> None:
    """The wheel of this very tree, in an environment of its own; what it needs comes from this one's."""
    from holdfast.core.job_record import JOB_KEY, JobRecord
    from holdfast.core.launches import GrantRecord, Intent, grant_key, intent_key
    from holdfast.core.sealed import seal
    from holdfast.store.local import LocalStore

    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    shutil.copytree(root / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("holdfast-*.whl")
    # Everything of this environment but holdfast itself, which is to come from the wheel.
    needs = tmp_path / "needs"
    needs.mkdir()
    import msgspec

    for path in Path(msgspec.__file__).parents[1].iterdir():
        if not path.name.lower().startswith(("holdfast", "_holdfast", "__editable__")) and path.suffix != ".pth":
            (needs / path.name).symlink_to(path)
    store = LocalStore(tmp_path / "run")
    job = JobRecord(
        format=1, nonce="j", name="job", notice="none",
        run="python -c 'import holdfast, os; print(holdfast.__file__, os.environ[\"HOLDFAST_RUN\"])' | tee out",
    )  # fmt: skip
    intent = Intent(
        format=1, launch=1, nonce="i", run_id="r", fleet="f", token="t", allowed=(), request={}, reasons=()
    )  # fmt: skip
    grant = GrantRecord(
        format=1, launch=1, part=0, nonce="g", lifetime_s=3600, machine_microusd_h=1, extras_microusd_h=0, once_microusd=0,
        nodes=1, uses=(), outside_s=1, grace_s=60, minimum_s=1, least_s=1, wants_s=None,
    )  # fmt: skip
    for key, record in ((JOB_KEY, job), (intent_key(1), intent), (grant_key(1, 0), grant)):
        assert store.put_new(key, seal(record))
    end = f"echo ended >> {tmp_path}/ended"
    environment = {
        "PYTHONPATH": str(needs), ENV_MACHINE_KIND: "local", ENV_LOCAL_END: end, ENV_MACHINE_BOOT: repr(time.monotonic()),
    }  # fmt: skip
    script = bootstrap_script(
        run_url=str(tmp_path / "run"), launch=1, end_command=end, boot_limit_s=600, folder=str(tmp_path / "machine"),
        pieces=[Piece(source=f"file://{wheel}", name=wheel.name, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())],
        python=sys.executable, environment=environment,
    )  # fmt: skip
    assert len(script.encode()) < 8192
    done = subprocess.run(["sh", "-c", script], timeout=400, check=False, env={"PATH": os.environ["PATH"]})
    log = (tmp_path / "machine" / "bootstrap.log").read_text()
    assert done.returncode == 0, log
    assert (tmp_path / "ended").read_text() == "ended\n"
    said = (tmp_path / "machine" / "work" / "out").read_text()
    assert said.startswith(str(tmp_path / "machine" / "venv")), said
