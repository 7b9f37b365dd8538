"""Nodes that are apart: a network namespace each, joined by a bridge in one more, where the object store's server runs.

Nothing of it touches the machine's own network. A node whose link is down reaches neither the others nor the store.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.clock import SystemClock

__all__ = ["Network", "network", "why_not"]

_SERVER = "10.77.0.1"
_PORT = 9000
_ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://{_SERVER}:{_PORT}",
    "AWS_ACCESS_KEY_ID": "rehearsalaccesskey00",
    "AWS_SECRET_ACCESS_KEY": "rehearsalsecretkey00",
    "AWS_REGION": "us-east-1",
    "GLOO_SOCKET_IFNAME": "out",
}
_MAKE_BUCKET = "import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1], method='PUT')).close()"


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if shutil.which("ip") is None:
        return "`ip` is not installed (scripts/install-iproute2.sh)"
    name = f"hf{secrets.token_hex(3)}"
    if _ip("netns", "add", name, check=False):
        return "making a network namespace is not allowed here"
    try:
        return "a link between namespaces cannot be made here" if _link(name, "x", "y", check=False) else ""
    finally:
        _ip("netns", "del", name)


@dataclass(frozen=True, slots=True)
class Network:
    """`addresses` of the nodes by name; `environment` under which a node reaches the store at `url`."""

    prefix: str
    addresses: dict[str, str]
    url: str
    environment: dict[str, str]

    def within(self, name: str) -> tuple[str, ...]:
        """What a command of that node begins with."""
        return ("ip", "netns", "exec", f"{self.prefix}{name}")

    def cut_off(self, name: str) -> None:
        _ip("-n", f"{self.prefix}hub", "link", "set", f"to-{name}", "down")

    def join(self, name: str) -> None:
        _ip("-n", f"{self.prefix}hub", "link", "set", f"to-{name}", "up")


@contextmanager
def network(names: str, log: Path) -> Iterator[Network]:
    """One node for each letter, and the store. What the server says goes to `log`."""
    prefix = f"hf{secrets.token_hex(3)}"
    hub = f"{prefix}hub"
    made: list[str] = []
    server: subprocess.Popen[bytes] | None = None
    try:
        for space in [hub, *(f"{prefix}{name}" for name in names)]:
            _ip("netns", "add", space)
            made.append(space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{_SERVER}/24", "dev", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 11)}
        for name, address in addresses.items():
            space = f"{prefix}{name}"
            _link(hub, f"to-{name}", "out", space)
            _ip("-n", hub, "link", "set", f"to-{name}", "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "out")
            _ip("-n", space, "link", "set", "out", "up")
        server = _serve(hub, log)
        yield Network(prefix, addresses, "s3://runs/elastic", _ENVIRONMENT)
    finally:
        if server is not None:
            server.send_signal(signal.SIGKILL)
            server.wait()
        for space in made:
            _ip("netns", "del", space)


def _serve(hub: str, log: Path) -> subprocess.Popen[bytes]:
    only_there = {"BIND_HOST": _SERVER, "GATEWAY_PORT": str(_PORT), "IOT_MTLS_ENABLED": "0", "SFTP_ENABLED": "0"}
    with log.open("ab") as output:
        server = subprocess.Popen(
            ["ip", "netns", "exec", hub, sys.executable, "-m", "ministack"], stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, env={**os.environ, **only_there, "PERSIST_STATE": "0"},
        )  # fmt: skip
    bucket = [sys.executable, "-c", _MAKE_BUCKET, f"http://{_SERVER}:{_PORT}/runs"]
    clock = SystemClock()
    give_up_s = clock.monotonic_s() + 60.0
    while subprocess.run(["ip", "netns", "exec", hub, *bucket], capture_output=True, check=False).returncode:
        assert server.poll() is None, log.read_text()
        assert clock.monotonic_s() < give_up_s, log.read_text()
        clock.sleep(0.1)
    return server


def _link(space: str, name: str, other: str, other_space: str = "", *, check: bool = True) -> int:
    there = ("netns", other_space) if other_space else ()
    return _ip("-n", space, "link", "add", name, "type", "veth", "peer", "name", other, *there, check=check)


def _ip(*arguments: str, check: bool = True) -> int:
    ended = subprocess.run(["ip", *arguments], capture_output=True, check=False)
    if check and ended.returncode:
        with suppress(UnicodeDecodeError):
            raise RuntimeError(f"ip {' '.join(arguments)}: {ended.stderr.decode()}")
    return ended.returncode
