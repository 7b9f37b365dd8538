"""The cloud store over a network that misbehaves, in front of a server that does not: every fault has one right outcome.

What must hold: no wrong byte is returned, no write that did not happen is reported as made, no write that may have happened is
reported as "not made" (it is StoreUnavailable or "taken", and reading back tells), the number of requests is bounded, and
nothing secret is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from obstore.store import S3Store

from holdfast.core.clock import SystemClock
from holdfast.core.errors import HoldfastError, IntegrityError, PermissionDenied, StoreUnavailable
from holdfast.store import Store, open_store
from holdfast.store.remote import ObjectStore
from holdfast.testing.http_faults import FaultyProxy, HttpFault, every, faulty_proxy, in_turn
from holdfast.testing.servers import ObjectServer

_BODY = bytes(range(256)) * 1000
_RETRIES = 2
_STALLS = (HttpFault.STALLED, HttpFault.STALLED_AFTER)
_REFUSALS = (HttpFault.FORBIDDEN, HttpFault.EXPIRED)
_HARMLESS_TO_WRITES = (HttpFault.DELAYED, HttpFault.RESET_IN_ANSWER, HttpFault.TRUNCATED, HttpFault.SHORTENED)
"""The answer to a PUT has no body that could be spoilt."""


class _BriskClock(SystemClock):
    """Real time, in which every pause is short."""

    def sleep(self, seconds: float) -> None:
        super().sleep(min(seconds, 0.002))


def _read(store: Store) -> bytes:
    into = bytearray(len(_BODY) - 5)
    store.read_into("old", 5, memoryview(into))
    return bytes(into)


_CALLS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "put": ("PUT", lambda store: store.put("new", _BODY)),
    "put_new": ("PUT", lambda store: store.put_new("new", _BODY)),
    "get": ("GET", lambda store: store.get("old", max_bytes=len(_BODY))),
    "read_into": ("GET", _read),
    "list": ("GET", lambda store: [entry.key for entry in store.list()]),
    "delete": ("POST", lambda store: store.delete("old")),
}


class World:
    """One bucket, seen directly and through the proxy."""

    def __init__(self, server: ObjectServer, proxy: FaultyProxy, bucket: str) -> None:
        self.proxy = proxy
        self.secrets = (server.options["secret_access_key"], server.options["access_key_id"])
        self.options = {**server.options, "endpoint": proxy.endpoint}
        self.bucket = bucket
        self.direct = open_store(f"s3://{bucket}/run", options=server.options)

    def store(self, fault: HttpFault) -> ObjectStore:
        """A store with a short time limit where the fault is that nothing comes."""
        timeout_s, retries = (0.2, 1) if fault in _STALLS else (20.0, _RETRIES)

        def connect(_: float) -> S3Store:
            return S3Store(
                self.bucket,
                prefix="run",
                config=self.options,  # type: ignore[arg-type]
                client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s)},
                retry_config={
                    "max_retries": retries,
                    "retry_timeout": timedelta(seconds=20),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=1),
                        "max_backoff": timedelta(milliseconds=2),
                        "base": 2,
                    },
                },
            )

        return ObjectStore(f"s3://{self.bucket}/run", connect, secrets=self.secrets, clock=_BriskClock())

    def reset(self) -> None:
        self.direct.put("old", _BODY)
        self.direct.delete("new")
        self.proxy.forget()

    def holds(self, key: str) -> bool:
        return key in [entry.key for entry in self.direct.list()]


@pytest.fixture(scope="module")
def world(ministack: ObjectServer) -> Iterator[World]:
    with faulty_proxy(ministack.endpoint, every(HttpFault.GARBAGE), clock=_BriskClock()) as proxy:
        ministack.make_bucket("behind-the-proxy")
        yield World(ministack, proxy, "behind-the-proxy")


@pytest.mark.parametrize("fault", list(HttpFault))
@pytest.mark.parametrize("call", _CALLS)
def test_a_fault_that_lasts_has_a_bounded_and_honest_outcome(world: World, call: str, fault: HttpFault) -> None:
    method, make = _CALLS[call]
    store = world.store(fault)
    world.reset()
    world.proxy.plan = every(fault, method)
    outcome, said = _outcome(lambda: make(store))
    # The server's prose stays out; its code is kept.
    assert not [word for word in (*world.secrets, "injected") if word in said]
    # Three tries of the client; three of ours for what it does not repeat itself; never their product times more.
    assert 1 <= len(world.proxy.log) <= 3 * (1 + _RETRIES)
    assert outcome == _lasting_outcome(call, fault)
    if call in ("put", "put_new"):
        assert world.holds("new") == (fault in _APPLIED_WRITES)
    if call == "delete":
        assert world.holds("old") != (fault in _APPLIED_WRITES)


def _outcome(call: Callable[[], object]) -> tuple[object, str]:
    try:
        return call(), ""
    except HoldfastError as error:
        return type(error), str(error) + repr(error)


_APPLIED_WRITES = (
    *_HARMLESS_TO_WRITES,
    HttpFault.LOST_ANSWER,
    HttpFault.STALLED_AFTER,
    HttpFault.SLOW_DOWN_AFTER,
    HttpFault.INTERNAL_AFTER,
    HttpFault.CONFLICT_AFTER,
)


def _lasting_outcome(call: str, fault: HttpFault) -> object:
    worked = {
        "put": None,
        "put_new": True,
        "get": _BODY,
        "read_into": _BODY[5:],
        "list": ["old"],
        "delete": None,
    }[call]
    if fault is HttpFault.DELAYED or (call in ("put", "put_new") and fault in _HARMLESS_TO_WRITES):
        return worked
    if fault in _REFUSALS:
        return PermissionDenied
    if fault is HttpFault.SHORTENED and call == "get":
        # A consistent, too short answer cannot be told from a short object here; the hashes above tell.
        return _BODY[: len(_BODY) // 2]
    if fault is HttpFault.SHORTENED and call == "read_into":
        return IntegrityError
    return StoreUnavailable


# Neither a refusal nor a consistent lie passes by being repeated, and no service answers 409 to a plain read or write.
_SURVIVED = [
    (call, fault)
    for call in _CALLS
    for fault in HttpFault
    if call != "put_new"
    and fault not in (*_REFUSALS, HttpFault.SHORTENED)
    and (call in ("list", "delete") or fault not in (HttpFault.CONFLICT, HttpFault.CONFLICT_AFTER, HttpFault.GARBAGE))
]


@pytest.mark.parametrize(("call", "fault"), _SURVIVED)
def test_one_fault_is_survived_without_anybody_noticing(world: World, call: str, fault: HttpFault) -> None:
    method, make = _CALLS[call]
    store = world.store(fault)
    world.reset()
    world.proxy.plan = in_turn(method, fault)
    make(store)
    if call == "put":
        assert world.direct.get("new", max_bytes=len(_BODY)) == _BODY
    if call == "delete":
        assert not world.holds("old")
    assert len(world.proxy.log) <= 1 + _RETRIES


@pytest.mark.parametrize("fault", list(HttpFault))
def test_what_became_of_a_conditional_write_is_told_by_reading_back(world: World, fault: HttpFault) -> None:
    """True means mine. Everything else means: look. Whoever looks sees either all of this write, or nothing of it."""
    store = world.store(fault)
    world.reset()
    world.proxy.plan = in_turn("PUT", fault)
    try:
        made: bool | None = store.put_new("new", _BODY)
    except (StoreUnavailable, PermissionDenied):
        made = None
    stored = world.holds("new")
    assert stored or made is None
    if stored:
        assert world.direct.get("new", max_bytes=len(_BODY)) == _BODY
    # Another writer's object is never mistaken for this one's, nor replaced.
    world.direct.delete("new")
    world.direct.put("new", b"another writer's")
    world.proxy.forget()
    try:
        assert not store.put_new("new", _BODY)
    except (StoreUnavailable, PermissionDenied):
        pass
    assert world.direct.get("new", max_bytes=100) == b"another writer's"


def test_a_large_body_survives_resets_in_both_directions(world: World) -> None:
    body = _BODY * 40
    store = world.store(HttpFault.RESET_IN_REQUEST)
    world.reset()
    world.proxy.plan = in_turn("PUT", HttpFault.RESET_IN_REQUEST, HttpFault.LOST_ANSWER)
    store.put("new", [memoryview(body)[:100], memoryview(body)[100:]])
    assert world.direct.get("new", max_bytes=len(body)) == body
    world.proxy.forget()
    world.proxy.plan = in_turn("GET", HttpFault.RESET_IN_ANSWER, HttpFault.TRUNCATED)
    into = bytearray(len(body))
    store.read_into("new", 0, memoryview(into))
    assert into == body


@pytest.mark.parametrize("name", ["ministack", "moto", "azurite", "fake_gcs"])
def test_on_every_cloud_a_write_whose_answer_was_lost_is_never_reported_as_not_made(
    name: str, request: pytest.FixtureRequest
) -> None:
    server: ObjectServer = request.getfixturevalue(name)
    bucket = server.make_bucket(f"lost-answers-of-{name.replace('_', '-')}")
    with faulty_proxy(server.endpoint, in_turn("PUT", HttpFault.INTERNAL_AFTER)) as proxy:
        options = {option: value.replace(server.endpoint, proxy.endpoint) for option, value in server.options.items()}
        store = open_store(f"{bucket}/run", options=options)
        # Repeated by the client, which then meets its own object.
        assert not store.put_new("heads/1", b"mine")
        assert store.get("heads/1", max_bytes=10) == b"mine"
        proxy.forget()
        proxy.plan = in_turn("PUT", HttpFault.LOST_ANSWER)
        with pytest.raises(StoreUnavailable):
            store.put_new("heads/2", b"mine")
        assert store.get("heads/2", max_bytes=10) == b"mine"
        proxy.forget()
        proxy.plan = in_turn("PUT", HttpFault.CONFLICT)
        with pytest.raises(StoreUnavailable, match="ConditionalRequestConflict"):
            store.put_new("heads/3", b"mine")
        assert [entry.key for entry in store.list()] == ["heads/1", "heads/2"]
        store.close()
