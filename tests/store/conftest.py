"""The object-store servers, each started when the first test asks for it and then shared by all tests of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from holdfast.core.errors import UsageError
from holdfast.testing.servers import ObjectServer, azurite_server, fake_gcs_server, ministack_server, moto_server


@contextmanager
def _required_or_skipped(make: Callable[[], AbstractContextManager[ObjectServer]]) -> Iterator[ObjectServer]:
    """A server that is not installed skips its tests, unless HOLDFAST_REQUIRE_SERVERS=1 says that this is a failure."""
    server = make()
    try:
        running = server.__enter__()
    except UsageError as missing:
        if os.environ.get("HOLDFAST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(missing))
    try:
        yield running
    finally:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def ministack() -> Iterator[ObjectServer]:
    with _required_or_skipped(ministack_server) as running:
        yield running


@pytest.fixture(scope="session")
def moto() -> Iterator[ObjectServer]:
    with _required_or_skipped(moto_server) as running:
        yield running


@pytest.fixture(scope="session")
def azurite() -> Iterator[ObjectServer]:
    with _required_or_skipped(azurite_server) as running:
        yield running


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[ObjectServer]:
    with _required_or_skipped(fake_gcs_server) as running:
        yield running
