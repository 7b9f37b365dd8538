"""Every store that holdfast ships, through the suite that users' own stores must pass too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.core.errors import StoreUnsafe
from holdfast.core.ids import seeded_tokens
from holdfast.store import LocalStore, MemoryStore, Store, open_store, probe_conditional_writes
from holdfast.testing.faulty_store import FaultyStore, KillSwitch
from holdfast.testing.servers import ObjectServer, rclone_s3_server
from holdfast.testing.store_conformance import StoreConformance

_tokens = seeded_tokens(1)


@contextmanager
def _emptied(server: ObjectServer) -> Iterator[Store]:
    store = open_store(f"{server.make_bucket(f'bucket-{_tokens()}')}/runs/one", options=server.options)
    yield store
    store.close()


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
    def store(self, ministack: ObjectServer) -> Iterator[Store]:
        with _emptied(ministack) as store:
            yield store


class TestS3OfMoto(StoreConformance):
    """A second implementation of S3, which has nothing in common with the first."""

    @pytest.fixture
    def store(self, moto: ObjectServer) -> Iterator[Store]:
        with _emptied(moto) as store:
            yield store


class TestAzure(StoreConformance):
    """Its pages hold 5000 entries, which take a while to make."""

    listed_objects = 5100 if os.environ.get("HOLDFAST_TEST_SCALE") == "long" else 1100

    @pytest.fixture
    def store(self, azurite: ObjectServer) -> Iterator[Store]:
        with _emptied(azurite) as store:
            yield store


class TestGoogle(StoreConformance):
    """The emulator of Google Cloud Storage; `holdfast.testing.gcs_front` says what this proves and what it cannot."""

    @pytest.fixture
    def store(self, fake_gcs: ObjectServer) -> Iterator[Store]:
        with _emptied(fake_gcs) as store:
            yield store


@pytest.mark.parametrize("name", ["ministack", "moto", "azurite", "fake_gcs"])
def test_the_environment_alone_leads_to_each_cloud(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: ObjectServer = request.getfixturevalue(name)
    for variable in list(os.environ):
        if variable.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(variable)
    for variable, value in server.environment.items():
        monkeypatch.setenv(variable, value)
    url = server.make_bucket(f"bucket-{_tokens()}")
    store = open_store(f"{url}/runs/x/")
    assert store.url == f"{url}/runs/x"
    store.put("a", b"1")
    assert open_store(f"{url}/runs").get("x/a", max_bytes=1) == b"1"


def test_a_server_that_ignores_conditions_is_refused(tmp_path: Path) -> None:
    with rclone_s3_server(tmp_path) as running:
        store = open_store(f"{running.make_bucket('bucket')}/run", options=running.options)
        with pytest.raises(StoreUnsafe, match="ignores the condition"):
            probe_conditional_writes(store, _tokens())
        assert list(store.list()) == []
        store.close()
