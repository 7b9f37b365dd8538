"""Every store that holdfast ships, through the suite that users' own stores must pass too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.core.errors import StoreUnsafe
from holdfast.core.ids import seeded_tokens
from holdfast.store import LocalStore, MemoryStore, Store, open_store, probe_conditional_writes
from holdfast.testing.faulty_store import FaultyStore, KillSwitch
from holdfast.testing.servers import ObjectServer, ministack_server, rclone_s3_server
from holdfast.testing.store_conformance import StoreConformance

_tokens = seeded_tokens(1)


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with ministack_server() as running:
        yield running


class TestLocalStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = LocalStore(tmp_path / "not" / "yet" / "there")
        yield store
        store.close()


class TestLocalStoreWithoutUnnamedFiles(StoreConformance):
    """What network and overlay file systems get: named files in `.tmp`, which must be empty after everything."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = LocalStore(tmp_path)
        store._unnamed_files = False
        yield store
        store.close()
        assert list((tmp_path / ".tmp").glob("*")) == []


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestWrappers(StoreConformance):
    """The fault injectors, with nothing injected, change nothing."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = KillSwitch(FaultyStore(LocalStore(tmp_path)), action=lambda: None)
        yield store
        store.close()


class TestS3(StoreConformance):
    """S3's protocol over HTTP, against a server that honours conditions."""

    @pytest.fixture
    def store(self, server: ObjectServer) -> Iterator[Store]:
        url = server.make_bucket(f"bucket-{_tokens()}")
        store = open_store(f"{url}/runs/one", options=server.options)
        yield store
        store.close()


def test_a_server_that_ignores_conditions_is_refused(tmp_path: Path) -> None:
    with rclone_s3_server(tmp_path) as running:
        store = open_store(f"{running.make_bucket('bucket')}/run", options=running.options)
        with pytest.raises(StoreUnsafe, match="ignores the condition"):
            probe_conditional_writes(store, _tokens())
        assert list(store.list()) == []
