"""The servers that tests and rehearsals rely on: to be had or named as missing, on this machine only, and gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from holdfast.core.errors import UsageError
from holdfast.testing.loopback import forward
from holdfast.testing.servers import ObjectServer, azurite_server, fake_gcs_server, ministack_server, moto_server


def test_what_is_not_installed_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="npm install --prefix"), azurite_server(tmp_path):
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    for server, package in (
        (ministack_server, "ministack"),
        (moto_server, r"moto\[server\]"),
        (fake_gcs_server, "fake-gcs"),
    ):
        with pytest.raises(UsageError, match=f"pip install '{package}"), server():
            pass


def test_a_server_listens_on_this_machine_only_and_is_gone_afterwards() -> None:
    with ministack_server() as running:
        port = urlsplit(running.endpoint).port
        # Listeners of other services come up after the one for HTTP.
        assert forward(running.endpoint, "GET", "/_ministack/ready", []).status == 200
        listening = _listening_addresses(running.pid)
        assert listening == {("127.0.0.1", port)}
    assert not os.path.exists(f"/proc/{running.pid}")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize("name", ["moto", "azurite", "fake_gcs"])
def test_no_shared_server_listens_to_other_machines(name: str, request: pytest.FixtureRequest) -> None:
    server: ObjectServer = request.getfixturevalue(name)
    addresses = {address for address, _ in _listening_addresses(server.pid)}
    assert addresses == {"127.0.0.1"}


def _listening_addresses(pid: int) -> set[tuple[str, int]]:
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    found: set[tuple[str, int]] = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[start : start + 8])[::-1] for start in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/bucket/key"),
        ("GET", "/bucket"),
        ("GET", "/bucket/key?versions"),
        ("PUT", "/bucket/key?X-Goog-Algorithm=1"),
    ],
)
def test_the_translation_of_google_refuses_what_it_does_not_know(
    fake_gcs: ObjectServer, method: str, target: str
) -> None:
    assert forward(fake_gcs.endpoint, method, target, []).status == 501
