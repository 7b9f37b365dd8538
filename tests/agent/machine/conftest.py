"""Lets these tests import the modules that stand beside them; a machine's folder and a bucket for the tests of `file_mounts`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.core.ids import random_token

if TYPE_CHECKING:
    from mounting import Here

    from holdfast.testing.servers import ObjectServer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectServer]:
    from holdfast.testing.servers import ministack_server

    with ministack_server() as running:
        yield running


@pytest.fixture
def bucket(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The name of a new bucket that this process reaches, and how to put something into it."""
    from mounting import filling

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"data-{random_token()[:12]}"
    with filling(server, name) as put:
        yield name, put


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Copies are tried again at once."""
    from mounting import Here

    from holdfast.agent.machine import copying

    monkeypatch.setattr(copying, "_PAUSES_S", (0.0, 0.0, 0.0))
    return Here(tmp_path)
