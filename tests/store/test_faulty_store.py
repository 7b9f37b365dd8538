"""The fault injectors themselves: a test that relies on them must be able to trust that the faults are real and repeatable."""

from __future__ import annotations

import os
import signal

import pytest

from holdfast.core.errors import (
    IntegrityError,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
    StoreUnsafe,
    UsageError,
)
from holdfast.store import MemoryStore, probe_conditional_writes
from holdfast.testing.faulty_store import Fault, FaultyStore, KillSwitch, always, at, seeded, since


class _Clock:
    def __init__(self) -> None:
        self.slept_s = 0.0

    def monotonic_s(self) -> float:
        return self.slept_s

    def unix_s(self) -> float:
        return self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


@pytest.mark.parametrize(
    ("fault", "error", "applied"),
    [
        (Fault.UNAVAILABLE_BEFORE, StoreUnavailable, False),
        (Fault.UNAVAILABLE_AFTER, StoreUnavailable, True),
        (Fault.DENIED, PermissionDenied, False),
        (Fault.FULL, StoreFull, False),
    ],
)
def test_failing_writes(fault: Fault, error: type[Exception], applied: bool) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, at({0: fault}))
    with pytest.raises(error):
        store.put("a", b"1")
    assert bool(list(inner.list())) == applied
    store.put("a", b"1")
    assert [(entry.fault, entry.outcome) for entry in store.log] == [(fault, error.__name__), (None, "ok")]


def test_a_late_write_lands_when_told_and_finds_the_name_as_it_is_then() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, at({0: Fault.LATE, 2: Fault.LATE, 3: Fault.LATE}))
    body = bytearray(b"late")
    with pytest.raises(StoreUnavailable):
        store.put_new("heads/1", bytes(body))
    assert store.put_new("heads/1", b"early")
    with pytest.raises(StoreUnavailable):
        store.put("data", memoryview(body))
    body[:] = b"____"
    with pytest.raises(StoreUnavailable):
        store.delete("heads/1")
    assert [operation.number for operation in store.pending] == [0, 2, 3]
    store.land()
    assert inner.get("heads/1", max_bytes=10) == b"early"
    store.land(1)
    assert [entry.key for entry in inner.list()] == []
    store.land()
    assert inner.get("data", max_bytes=10) == b"late"
    assert not store.pending


def test_a_retry_that_meets_its_own_first_try() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, at({0: Fault.TAKEN_BY_ITSELF}))
    assert not store.put_new("heads/1", b"mine")
    assert inner.get("heads/1", max_bytes=10) == b"mine"
    probe_conditional_writes(FaultyStore(MemoryStore(), at({0: Fault.TAKEN_BY_ITSELF})), "token")


def test_spoilt_reads() -> None:
    inner = MemoryStore()
    inner.put("a", b"0123456789")
    store = FaultyStore(inner, at({0: Fault.FLIPPED, 1: Fault.FLIPPED, 2: Fault.TRUNCATED, 3: Fault.TRUNCATED}))
    into = bytearray(10)
    store.read_into("a", 0, memoryview(into))
    for spoilt in (bytes(into), store.get("a", max_bytes=10)):
        differing = [one ^ other for one, other in zip(spoilt, b"0123456789", strict=True)]
        assert sum(bits.bit_count() for bits in differing) == 1
    with pytest.raises(IntegrityError):
        store.get("a", max_bytes=10)
    with pytest.raises(IntegrityError):
        store.read_into("a", 0, memoryview(into))
    assert store.get("a", max_bytes=10) == b"0123456789"


def test_latency_goes_through_the_injected_clock() -> None:
    clock = _Clock()
    store = FaultyStore(MemoryStore(), at({0: Fault.SLOW}), clock=clock, slow_s=7.5)
    store.put("a", b"1")
    store.put("b", b"1")
    assert clock.slept_s == 7.5


def test_a_timeout_takes_its_time_and_applies_nothing() -> None:
    clock = _Clock()
    inner = MemoryStore()
    store = FaultyStore(inner, always(Fault.TIMED_OUT, "put", "list"), clock=clock, slow_s=30.0)
    with pytest.raises(StoreUnavailable):
        store.put("a", b"1")
    with pytest.raises(StoreUnavailable):
        store.list()
    assert clock.slept_s == 60.0
    assert list(inner.list()) == []


def test_a_read_that_breaks_off_has_spoilt_the_callers_buffer() -> None:
    inner = MemoryStore()
    inner.put("a", b"0123456789")
    store = FaultyStore(inner, always(Fault.BROKEN_OFF))
    into = bytearray(b"old bytes!")
    with pytest.raises(StoreUnavailable):
        store.read_into("a", 0, memoryview(into))
    assert into == b"01234ytes!"
    with pytest.raises(StoreUnavailable):
        store.get("a", max_bytes=10)
    store.put("b", b"1")


def test_a_stale_list_lacks_what_is_new_and_has_what_is_gone() -> None:
    store = FaultyStore(MemoryStore(), at({2: Fault.STALE, 6: Fault.STALE}))
    store.put("a/1", b"1")
    store.put("a/2", b"1")
    assert [entry.key for entry in store.list("a/")] == []
    assert [entry.key for entry in store.list("a/")] == ["a/1", "a/2"]
    store.put("a/3", b"1")
    store.delete("a/1")
    assert [entry.key for entry in store.list("a/")] == ["a/1", "a/2"]
    assert [entry.key for entry in store.list("a/")] == ["a/2", "a/3"]


def test_credentials_that_expire_and_permissions_that_are_too_narrow() -> None:
    expiring = FaultyStore(MemoryStore(), since(2, Fault.DENIED))
    expiring.put("a", b"1")
    assert expiring.put_new("b", b"1")
    for attempt in (lambda: expiring.get("a", max_bytes=1), lambda: expiring.put("c", b"1"), expiring.list):
        with pytest.raises(PermissionDenied):
            attempt()
    narrow = FaultyStore(MemoryStore(), always(Fault.DENIED, "list", "delete"))
    narrow.put("a", b"1")
    assert narrow.get("a", max_bytes=1) == b"1"
    with pytest.raises(PermissionDenied):
        narrow.list()
    with pytest.raises(PermissionDenied):
        narrow.delete("a")
    # A probe that may not be removed is no reason to refuse the store.
    probe_conditional_writes(narrow, "token")


def test_a_fault_that_does_not_suit_the_method_is_refused() -> None:
    with pytest.raises(UsageError, match="TAKEN_BY_ITSELF"):
        FaultyStore(MemoryStore(), at({0: Fault.TAKEN_BY_ITSELF})).put("a", b"1")


def test_a_seeded_plan_does_not_depend_on_the_order_of_arrival() -> None:
    def outcomes(keys: list[str]) -> dict[str, Fault | None]:
        store = FaultyStore(MemoryStore(), seeded(5, 0.5))
        for key in keys:
            try:
                store.put_new(key, b"1")
            except StoreError:
                pass
        return {entry.operation.key: entry.fault for entry in store.log}

    keys = [f"heads/{number}" for number in range(200)]
    first = outcomes(keys)
    assert first == outcomes(keys[::-1])
    assert 60 < sum(fault is not None for fault in first.values()) < 140
    assert len(set(first.values())) > 4


def test_a_store_that_overwrites_is_unsafe() -> None:
    class Overwriting(MemoryStore):
        def put_new(self, key: str, body: bytes) -> bool:
            self.put(key, body)
            return True

    store = Overwriting()
    with pytest.raises(StoreUnsafe):
        probe_conditional_writes(store, "token")
    assert list(store.list()) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("after", [False, True])
def test_a_process_can_be_ended_at_every_operation(tmp_path: os.PathLike[str], after: bool) -> None:
    from holdfast.store import LocalStore

    counting = KillSwitch(LocalStore(os.path.join(tmp_path, "all")), lambda: None, methods={"put", "put_new"})
    _three_writes(counting)
    assert counting.counted == 3
    for number in range(counting.counted):
        store = LocalStore(os.path.join(tmp_path, str(number)))
        child = os.fork()
        if child == 0:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            _three_writes(KillSwitch(store, kill, at_number=number, after=after, methods={"put", "put_new"}))
            os._exit(70)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len(list(store.list())) == number + after


def _three_writes(store: KillSwitch) -> None:
    store.put("a", b"1")
    list(store.list())
    store.put("b", [b"1", b"2"])
    store.put_new("c", b"1")
