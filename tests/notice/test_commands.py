"""`holdfast notices` as users call it, and the true metadata address in a network namespace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE_S = 300
CLOUDS = ["aws", "gcp", "azure"]
VARIABLES = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST", "HOLDFAST_AZURE_METADATA_ENDPOINT")


def clean_environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | more


@contextmanager
def running(*command: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment or clean_environment()
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            assert process.stdout is not None
            process.stdout.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def holdfast(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "holdfast", *arguments]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_rehearsal_in_two_shells(cloud: str) -> None:
    with running(*holdfast("notices", "fake", "--cloud", cloud, "--after", "0 s", "--lead", "45 s")) as server:
        export, _, assignment = line_of(server).partition(" ")
        name, _, value = assignment.partition("=")
        assert (export, name) == ("export", VARIABLES[CLOUDS.index(cloud)])
        with running(*holdfast("notices", "watch", "--json"), environment=clean_environment(**{name: value})) as watch:
            heard = json.loads(line_of(watch))
    assert heard["kind"] == "preemption"
    assert heard["source"].startswith(cloud)
    assert heard["assumed"] == (cloud == "gcp")
    assert watch.returncode == server.returncode == 0


def test_people_read_a_sentence_and_for_ends_it(tmp_path: Path) -> None:
    going = tmp_path / "going"
    going.write_text("10 min")
    with running(*holdfast("notices", "watch", "--notice", f"file:{going}")) as watch:
        line = line_of(watch)
    assert f"termination from file:{going}: " in line
    assert " left, until " in line
    brief = holdfast("notices", "watch", "--notice", "none", "--for", "10 ms")
    assert subprocess.run(brief, capture_output=True, timeout=PATIENCE_S, check=True).stdout == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("watch", "--notice", "amazon"), "file:PATH"),
        (("fake", "--cloud", "aws", "--what", "explode"), "what can: preempt, slide"),
        (("fake", "--cloud", "aws", "--timeline", "/no/such/file"), "cannot read the timeline"),
        (("fake", "--cloud", "gcp", "--after", "soon"), '"10 min"'),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        holdfast("notices", *arguments), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("holdfast: ")
    assert message in line


def test_neither_the_library_nor_the_command_loads_an_http_client_to_start() -> None:
    code = "import sys, holdfast, holdfast.cli.app; print(sorted({'httpx', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "[]\n"


ADDRESS = "169.254.169.254"


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network of its own in which the metadata address exists."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 (`ip netns`) is not installed")
    name = f"holdfast-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        for command in (("link", "set", "lo", "up"), ("addr", "add", f"{ADDRESS}/32", "dev", "lo")):
            done = subprocess.run(["ip", "-n", name, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be set up here: {done.stderr.strip()}")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


SERVE = """
import sys, threading
from holdfast.testing.metadata import metadata_server
with metadata_server(sys.argv[1], address=("169.254.169.254", 80)) as server:
    server.do("preempt", lead="100 s")
    print("ready", flush=True)
    threading.Event().wait()
"""
DETECT = """
import asyncio, pathlib, sys
from holdfast.notice.detect import detect
print(*asyncio.run(detect({}, dmi=pathlib.Path(sys.argv[1]), total_s=60, probe_s=30)))
"""


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_true_address_is_found_and_heard(cloud: str, namespace: str, tmp_path: Path) -> None:
    inside = ("ip", "netns", "exec", namespace)
    with running(*inside, sys.executable, "-c", textwrap.dedent(SERVE), cloud) as server:
        assert line_of(server) == "ready"
        detect = [*inside, sys.executable, "-c", DETECT, str(tmp_path)]
        found = subprocess.run(
            detect, capture_output=True, text=True, timeout=PATIENCE_S, check=True, env=clean_environment()
        )
        assert found.stdout.split() == [cloud]
        with running(*inside, *holdfast("notices", "watch", "--notice", cloud, "--json")) as watch:
            heard = json.loads(line_of(watch))
    assert heard["kind"] == "preemption"
    assert heard["source"].startswith(cloud)
    assert 0 < heard["left_s"] <= 100
