"""What a machine says first, and what systemd hears, over real datagram sockets."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import GIVE_UP_S, python, started

from holdfast.agent.startup import Startup, describe_machine, describe_price, startup_lines
from holdfast.agent.systemd import ServiceManager
from holdfast.core.clock import SystemClock
from holdfast.core.contract import ENV_MARKET, ENV_PRICE


def test_the_block_leaves_out_what_is_not_known() -> None:
    nothing = Startup(
        start=1, url=None, attempt=None, checkpoint=None, machine="box, 2 CPUs", gpus=None, price=None, limit=None
    )
    assert startup_lines(nothing) == ["holdfast: start 1", "holdfast:   machine     box, 2 CPUs"]
    all_of_it = Startup(
        start=2,
        url="s3://b/r",
        attempt=5,
        checkpoint="the newest is of step 120",
        machine="box, 8 CPUs, memory 61 GiB",
        gpus="8 x NVIDIA H100 80GB HBM3 80 GiB",
        price="spot, $1.2 per hour",
        limit="all ends within 8 h",
    )
    assert startup_lines(all_of_it) == [
        "holdfast: attempt 5 of s3://b/r (start 2 of this agent)",
        "holdfast:   machine     box, 8 CPUs, memory 61 GiB",
        "holdfast:   GPU         8 x NVIDIA H100 80GB HBM3 80 GiB",
        "holdfast:   price       spot, $1.2 per hour; all ends within 8 h",
        "holdfast:   checkpoint  the newest is of step 120",
    ]
    assert describe_price({ENV_MARKET: "spot", ENV_PRICE: "1.2"}) == "spot, $1.2 per hour"
    assert describe_price({}) is None


def test_a_machine_is_as_large_as_its_cgroup_and_all_above_it_allow(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/pod/container\n")
    folder = tmp_path / "pod" / "container"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    (folder.parent / "memory.max").write_text(f"{1 << 28}\n")
    (folder / "cpu.max").write_text("50000 100000\n")
    (folder.parent / "cpu.max").write_text("max 100000\n")
    assert describe_machine(tmp_path, own).endswith(", 0.5 CPUs, memory 256 MiB")
    assert "CPU" in describe_machine(tmp_path, tmp_path / "nothing")


SCRIPT = """
import os
from pathlib import Path
from holdfast.checkpoint.heads import Lineage
from holdfast.core.clock import SystemClock
from holdfast.core.ids import random_token
from holdfast.store.open import open_store
Lineage(open_store(os.environ["HOLDFAST_RUN"]), "run", clock=SystemClock(), tokens=random_token).claim()
print(*(os.environ.get(n, "-") for n in ("HOLDFAST_PRICE_PER_HOUR", "HOLDFAST_MARKET")))
"""


def test_the_first_start_says_where_it_is_and_every_agent_counts_on(tmp_path: Path) -> None:
    for attempt in (1, 2):
        command = [sys.executable, "-m", "holdfast", "run", "--price", "1.2", "--market", "spot", "--", *python(SCRIPT)]
        environment = os.environ | {"HOLDFAST_RUN": str(tmp_path / "run")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=GIVE_UP_S)
        assert done.stdout == "1.2 spot\n"
        lines = done.stderr.splitlines()
        assert lines[0] == f"holdfast: attempt {attempt} of file://{tmp_path}/run (start 1 of this agent)"
        assert "holdfast:   price       spot, $1.2 per hour" in lines
        assert "holdfast:   checkpoint  none yet" in lines


# systemd


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    abstract = f"holdfast-test-{os.getpid()}-{id(request)}"
    name = str(tmp_path / "notify") if request.param == "path" else f"@{abstract}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(name if request.param == "path" else f"\0{abstract}")
        except OSError:
            pytest.skip("this system has no such sockets")
        sock.settimeout(GIVE_UP_S)
        yield sock, name


def received(sock: socket.socket) -> list[str]:
    messages = []
    sock.setblocking(False)
    while True:
        try:
            messages.append(sock.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_a_service_is_ready_when_its_command_runs_and_stops_with_the_time_it_needs(
    listener: tuple[socket.socket, str],
) -> None:
    sock, name = listener
    code = """
print(os.environ.get("NOTIFY_SOCKET"), os.environ.get("WATCHDOG_USEC"), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.kill(os.getppid(), signal.SIGTERM)
while True: signal.pause()
"""
    environment = os.environ | {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2"}
    with started("--grace", "30", "--", *python(code), env=environment) as agent:
        stdout, _ = agent.communicate(timeout=GIVE_UP_S)
    assert agent.returncode == 75
    assert stdout == b"None None\n", "the messages are the agent's to send, not the command's"
    messages = received(sock)
    assert messages[0] == "READY=1\nSTATUS=attempt 1 runs"
    assert "WATCHDOG=1" in messages
    # A last sign of life may come after it.
    last = [message for message in messages if message != "WATCHDOG=1"][-1]
    stopping = re.fullmatch(r"STOPPING=1\nEXTEND_TIMEOUT_USEC=(\d+)", last)
    assert stopping is not None
    assert 0 < int(stopping[1]) <= 50_000_000, "the grace period, what is left behind, and the last of the logs"


class Clock(SystemClock):
    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


def test_the_service_managers_watchdog_hears_twice_as_often_as_it_asks(listener: tuple[socket.socket, str]) -> None:
    sock, name = listener
    clock = Clock()
    service = ServiceManager(
        {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, clock
    )
    for now_s in (0, 4.9, 5, 9.9, 10):
        clock.now_s = now_s
        service.look()
    assert received(sock) == ["WATCHDOG=1", "WATCHDOG=1"]
    service.status("step 1")
    service.status("step 1")
    assert received(sock) == ["STATUS=step 1"]


@pytest.mark.parametrize("variables", [{}, {"NOTIFY_SOCKET": "/nowhere"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}])
def test_without_a_service_manager_nothing_happens(variables: dict[str, str]) -> None:
    service = ServiceManager(variables, SystemClock())
    service.ready("runs")
    service.look()
    service.stopping(3)
    assert service.every_s is None
