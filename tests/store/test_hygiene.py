"""What a bucket's own rules do to checkpoints is seen where it can be seen, and never costs a run its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event

import pytest

from holdfast.core.clock import SystemClock
from holdfast.core.errors import StoreUnavailable
from holdfast.core.ids import seeded_tokens
from holdfast.store import LocalStore, MemoryStore, Store, open_store
from holdfast.store.azure_key import signed_headers
from holdfast.store.hygiene import describe_retention
from holdfast.testing.faulty_store import FaultyStore
from holdfast.testing.http_faults import HttpFault, every, faulty_proxy
from holdfast.testing.loopback import Answer, forward, listening, reply
from holdfast.testing.servers import ObjectServer

_tokens = seeded_tokens(7)

_VERSIONING = "<VersioningConfiguration><Status>{}</Status></VersioningConfiguration>"
_BOUND_S = 60.0
"""Longer than in use: a slow machine must not make an empty answer look like a right one."""


def _bucket(server: ObjectServer, *rules: tuple[str, str, str]) -> Store:
    """A store in a bucket of its own, to which the requests (method, query, body) have been made."""
    name = f"bucket-{_tokens()}"
    url = server.make_bucket(name)
    for method, query, body in rules:
        assert forward(server.endpoint, method, f"/{name}?{query}", [], body.encode()).status == 200
    return open_store(f"{url}/runs/one", options=server.options)


def _described(store: Store) -> tuple[str, ...]:
    described = describe_retention(store, _tokens(), bound_s=_BOUND_S)
    assert list(store.list()) == []
    return described


@pytest.mark.parametrize("name", ["ministack", "moto"])
def test_s3_versioning_is_seen(name: str, request: pytest.FixtureRequest) -> None:
    server: ObjectServer = request.getfixturevalue(name)
    assert _described(_bucket(server)) == ()
    store = _bucket(server, ("PUT", "versioning", _VERSIONING.format("Enabled")))
    (sentence,) = _described(store)
    assert sentence.startswith(f"{store.url}: the bucket keeps old versions")
    suspended = [("PUT", "versioning", _VERSIONING.format(status)) for status in ("Enabled", "Suspended")]
    assert _described(_bucket(server, *suspended)) == ()


def test_a_bucket_that_locks_every_object_is_named_as_such(moto: ObjectServer) -> None:
    """S3 takes no object without a checksum header there, which the client sends only when told to."""
    name = f"bucket-{_tokens()}"
    locked = [("x-amz-bucket-object-lock-enabled", "true")]
    assert forward(moto.endpoint, "PUT", f"/{name}", locked).status == 200
    rule = (
        "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>"
        "<Mode>GOVERNANCE</Mode><Days>3</Days></DefaultRetention></Rule></ObjectLockConfiguration>"
    )
    assert forward(moto.endpoint, "PUT", f"/{name}?object-lock", [], rule.encode()).status == 200
    store = open_store(f"s3://{name}/run", options=moto.options)
    assert _described(store) == ()
    for write in (store.put, store.put_new):
        with pytest.raises(StoreUnavailable, match="locks every new object"):
            write("a", b"1")


def test_s3_expiry_and_lock_of_our_objects_are_seen() -> None:
    """S3 says with every object which rule will remove it, and until when it is locked; the emulators do not."""

    def handle(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        until = ("x-amz-object-lock-retain-until-date", "2026-12-01T00:00:00.000Z")
        reply(request, Answer(200, (("ETag", '"1"'), ("x-amz-expiration", _expiry("scratch")), until)))

    with listening(handle) as endpoint:
        expiry, lock = describe_retention(_s3(endpoint), _tokens(), bound_s=_BOUND_S)
    assert "the lifecycle rule 'scratch' of the bucket deletes this run's objects, the first on Fri, 25 Dec" in expiry
    assert "object lock keeps what is written now until 2026-12-01" in lock


@pytest.mark.parametrize("days", [0, 7])
def test_azure_soft_delete_is_seen(azurite: ObjectServer, days: int) -> None:
    retention = "<Enabled>false</Enabled>" if days == 0 else f"<Enabled>true</Enabled><Days>{days}</Days>"
    _set_azure_service(azurite, f"<DeleteRetentionPolicy>{retention}</DeleteRetentionPolicy>")
    try:
        described = _described(_bucket(azurite))
        assert len(described) == (1 if days else 0)
        assert not days or "soft delete) and billed for 7 days" in described[0]
    finally:
        _set_azure_service(azurite, "<DeleteRetentionPolicy><Enabled>false</Enabled></DeleteRetentionPolicy>")


def _set_azure_service(server: ObjectServer, properties: str) -> None:
    account, key = server.options["account_name"], server.options["account_key"]
    target = f"/{account}/?restype=service&comp=properties"
    body = f"<?xml version='1.0'?><StorageServiceProperties>{properties}</StorageServiceProperties>".encode()
    unix_s = SystemClock().unix_s()
    headers = signed_headers(account, key, "PUT", server.endpoint + target, unix_s=unix_s, body_bytes=len(body))
    assert forward(server.endpoint, "PUT", target, headers.items(), body).status == 202


def test_azure_without_the_accounts_key_tells_by_how_a_deletion_is_answered() -> None:
    """A deletion says whether it was for good, to whoever may delete; azurite says so too, but knows no soft delete."""

    def handle(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if "comp=properties" in request.path:
            reply(request, Answer(403))
        elif request.command == "DELETE":
            assert "sp=d" in request.path
            reply(request, Answer(202, (("x-ms-delete-type-permanent", "false"),)))
        else:
            reply(request, Answer(201, (("ETag", '"1"'), ("x-ms-version-id", "2026-11-21T08:00:00.0000000Z"))))

    with listening(handle) as endpoint:
        options = {"account_name": "account", "account_key": "aGlkZGVu", "endpoint": f"{endpoint}/account"}
        store = open_store("az://container/run", options=options)
        versions, soft_delete = describe_retention(store, _tokens(), bound_s=_BOUND_S)
    assert "keeps old versions" in versions
    assert "as many days as the storage account says" in soft_delete


def test_google_versioning_is_seen(fake_gcs: ObjectServer) -> None:
    assert _described(_bucket(fake_gcs)) == ()
    name = f"bucket-{_tokens()}"
    made = json.dumps({"name": name, "versioning": {"enabled": True}}).encode()
    assert forward(fake_gcs.endpoint, "POST", "/storage/v1/b", [], made).status == 200
    (sentence,) = _described(open_store(f"gs://{name}/run", options=fake_gcs.options))
    assert "keeps old versions" in sentence


def test_google_rules_are_read_from_the_bucket_with_the_machines_own_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The emulator keeps no soft delete, retention or lifecycle; the fields are those of the JSON API's bucket."""
    rules = [
        {"action": {"type": "Delete"}, "condition": {"age": 30, "isLive": False}},
        {"action": {"type": "Delete"}, "condition": {"numNewerVersions": 2}},
        {"action": {"type": "SetStorageClass"}, "condition": {"age": 5}},
        {"action": {"type": "Delete"}, "condition": {"age": 9, "matchesPrefix": ["other/"]}},
        {"action": {"type": "Delete"}, "condition": {"age": 14, "matchesPrefix": ["runs/"]}},
    ]
    bucket = {
        "softDeletePolicy": {"retentionDurationSeconds": "604800"},
        "retentionPolicy": {"retentionPeriod": "86400"},
        "lifecycle": {"rule": rules},
    }

    def handle(request: BaseHTTPRequestHandler) -> None:
        if request.path.startswith("/computeMetadata/"):
            assert request.headers["Metadata-Flavor"] == "Google"
            reply(request, Answer(200, (), b'{"access_token": "ya29.hidden", "expires_in": 3599}'))
        elif request.path.startswith("/storage/v1/b/bucket?fields="):
            assert request.headers["Authorization"] == "Bearer ya29.hidden"
            reply(request, Answer(200, (), json.dumps(bucket).encode()))
        else:
            reply(request, Answer(404))

    with listening(handle) as endpoint:
        monkeypatch.setenv("GCE_METADATA_HOST", endpoint.removeprefix("http://"))
        store = open_store("gs://bucket/runs/one", options={"base_url": endpoint})
        soft_delete, locked, expiry = describe_retention(store, _tokens(), bound_s=_BOUND_S)
    assert "(soft delete) and billed for 7 days" in soft_delete
    assert "retention policy keeps every object for 1 days" in locked
    assert 'under the condition {"age": 14' in expiry
    assert "hidden" not in soft_delete + locked + expiry


def test_stores_without_a_bucket_have_nothing_to_tell(tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path), MemoryStore(), FaultyStore(MemoryStore())):
        assert describe_retention(store, _tokens()) == ()
        assert list(store.list()) == []


@pytest.mark.parametrize("fault", [HttpFault.FORBIDDEN, HttpFault.GARBAGE, HttpFault.CONFLICT])
@pytest.mark.parametrize("name", ["ministack", "azurite", "fake_gcs"])
def test_what_cannot_be_seen_is_passed_over(name: str, fault: HttpFault, request: pytest.FixtureRequest) -> None:
    server: ObjectServer = request.getfixturevalue(name)
    url = server.make_bucket(f"bucket-{_tokens()}")
    with faulty_proxy(server.endpoint, every(fault)) as proxy:
        options = {option: value.replace(server.endpoint, proxy.endpoint) for option, value in server.options.items()}
        assert describe_retention(open_store(f"{url}/run", options=options), _tokens(), bound_s=_BOUND_S) == ()


def test_a_service_that_never_answers_is_not_waited_for() -> None:
    asked, finish = Event(), Event()

    def handle(request: BaseHTTPRequestHandler) -> None:
        asked.set()
        finish.wait()

    with listening(handle) as endpoint:
        try:
            assert describe_retention(_s3(endpoint), _tokens(), bound_s=0.1) == ()
            assert asked.wait(_BOUND_S)
        finally:
            finish.set()


def test_redirects_are_not_followed() -> None:
    """A redirect would take a token along."""
    paths: list[str] = []

    def handle(request: BaseHTTPRequestHandler) -> None:
        paths.append(request.path)
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.command == "GET":
            reply(request, Answer(307, (("Location", "/elsewhere"), ("x-amz-expiration", _expiry("scratch")))))
        else:
            reply(request, Answer(200, (("ETag", '"1"'), ("x-amz-version-id", "v1"))))

    with listening(handle) as endpoint:
        (sentence,) = describe_retention(_s3(endpoint), _tokens(), bound_s=_BOUND_S)
    assert "keeps old versions" in sentence
    assert "/elsewhere" not in paths


def _expiry(rule: str) -> str:
    return f'expiry-date="Fri, 25 Dec 2026 00:00:00 GMT", rule-id="{rule}"'


def _s3(endpoint: str) -> Store:
    options: Mapping[str, str] = {
        "endpoint": endpoint,
        "access_key_id": "AKIAEXAMPLEEXAMPLE00",
        "secret_access_key": "verySecretKeyThatNobodyMaySee",
        "region": "us-east-1",
    }
    return open_store("s3://bucket/run", options=options)
