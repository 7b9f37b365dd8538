"""The saver beside a training loop: which snapshot is written, what callers are told, how much is sent and kept."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaved import RUN_ID, SCALE, no_home
from parts import Attempt, begin, garbage, request, restore

from holdfast.checkpoint import write
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import SaverOptions, SaveState
from holdfast.core.errors import Fenced, IntegrityError, SaveError, StoreUnavailable, TooManyUnsaved, UsageError
from holdfast.store.base import Body
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation

_KEEP_ALL = SaverOptions(keep=Keep(None))


class GatedStore(MemoryStore):
    """Data is put only while the gate is open; `arrived` says that somebody waits at it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()

    def put(self, key: str, body: Body) -> None:
        if key.startswith("data/") and not self.gate.is_set():
            self.arrived.set()
            assert self.gate.wait(60)
        super().put(key, body)


@pytest.fixture
def gated() -> GatedStore:
    return GatedStore()


@pytest.fixture
def attempt(gated: GatedStore) -> Iterator[Attempt]:
    made = begin(gated)
    yield made
    gated.gate.set()
    made.saver.close(60)


def _state(value: int) -> dict[str, Any]:
    return {"x": np.full(5000, value), "t": torch.full((33,), float(value)), "n": value}


def _value(tree: Any) -> int:
    assert np.array_equal(tree["x"], np.full(5000, tree["n"]))
    assert torch.equal(tree["t"], torch.full((33,), float(tree["n"])))
    return int(tree["n"])


def _ignore(message: str) -> None:
    return None


def _block(attempt: Attempt, gated: GatedStore) -> Any:
    """A save that hangs while its data is sent."""
    gated.gate.clear()
    handle = attempt.saver.save(request(_state(1), 1))
    assert gated.arrived.wait(60)
    return handle


# Which snapshot is written


def test_a_newer_snapshot_replaces_the_one_that_waits(attempt: Attempt, gated: GatedStore) -> None:
    first = _block(attempt, gated)
    second, third, fourth = (attempt.saver.save(request(_state(n), n)) for n in (2, 3, 4))
    assert (first.state, second.state, fourth.state) == (SaveState.WRITING, SaveState.SUPERSEDED, SaveState.WAITING)
    assert not first.done()
    assert not second.done()
    assert attempt.saver.busy
    with pytest.raises(TimeoutError, match="step 2"):
        second.wait(0)
    gated.gate.set()
    assert [handle.wait(60).step for handle in (first, second, third, fourth)] == [1, 4, 4, 4]
    assert [event.fields["step"] for event in attempt.sink.named("save.committed")] == [1, 4]
    assert second.done()
    assert third.state is SaveState.SUPERSEDED


def test_a_snapshot_is_what_the_state_was_when_save_returned(attempt: Attempt, gated: GatedStore) -> None:
    """Whatever the loop does to the live arrays afterwards, of every kind of memory layout."""
    torch.manual_seed(1)
    live: dict[str, Any] = {
        "plain": torch.randn(300, 7), "transposed": torch.randn(5, 9).T, "strided": torch.randn(40)[::3],
        "expanded": torch.randn(1, 6).expand(4, 6), "conj": torch.randn(8, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3.0), "half": torch.randn(9).bfloat16(), "bool": torch.rand(9) > 0.5,
        "big": torch.randn(600_000), "numpy": np.arange(12.0).reshape(3, 4).T, "list": [torch.zeros(2), {"k": 1}],
    }  # fmt: skip
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in live.items()}
    before["numpy"], before["list"] = live["numpy"].copy(), [torch.zeros(2), {"k": 1}]
    gated.gate.clear()
    handle = attempt.saver.save(request(live, 1))
    attempt.saver.release()
    for key in ("plain", "strided", "scalar", "half", "big"):
        live[key].zero_()
    live["transposed"].add_(1)
    live["conj"].mul_(2)
    live["bool"].logical_not_()
    live["numpy"][:] = -1
    live["list"][0].add_(5)
    live["list"][1]["k"] = 2
    gated.gate.set()
    handle.wait(60)
    found = restore(gated)
    assert found.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
    assert np.array_equal(found["numpy"], before["numpy"])
    assert torch.equal(found["list"][0], torch.zeros(2))
    assert found["list"][1] == {"k": 1}


def test_a_waiting_save_does_not_keep_the_live_arrays(attempt: Attempt, gated: GatedStore) -> None:
    _block(attempt, gated)
    tensor = torch.zeros(1000)
    gone = weakref.ref(tensor)
    attempt.saver.save(request({"t": tensor}, 2))
    del tensor
    assert gone() is None


def test_the_held_snapshot_is_written_only_when_asked_for(attempt: Attempt, gated: GatedStore) -> None:
    attempt.saver.hold(request(_state(1), 1))
    attempt.saver.hold(request(_state(2), 2))
    assert attempt.saver.drain(60)
    assert restore(gated) is None
    handle = attempt.saver.commit_held()
    assert handle is not None
    assert handle.wait(60).step == 2
    assert _value(restore(gated)) == 2
    assert attempt.saver.commit_held() is None
    attempt.saver.hold(request(_state(3), 3))
    attempt.saver.drop_held()
    assert attempt.saver.commit_held() is None
    attempt.saver.hold(request(_state(4), 4))
    attempt.save(_state(5), 5)
    assert attempt.saver.commit_held() is None
    assert _value(restore(gated)) == 5


def test_a_snapshot_is_held_while_another_is_written(attempt: Attempt, gated: GatedStore) -> None:
    first = _block(attempt, gated)
    attempt.saver.hold(request(_state(2), 2))
    handle = attempt.saver.commit_held()
    assert handle is not None
    gated.gate.set()
    assert (first.wait(60).step, handle.wait(60).step) == (1, 2)


def test_holding_never_throws_away_a_save_that_waits(attempt: Attempt, gated: GatedStore) -> None:
    """The held one takes its place in the queue: a newer state than the one that was asked for is as good."""
    _block(attempt, gated)
    second = attempt.saver.save(request(_state(2), 2))
    attempt.saver.hold(request(_state(3), 3))
    gated.gate.set()
    assert second.wait(60).step == 3


# Memory


@pytest.mark.parametrize("slots", [2, 1, 0])
def test_the_cap_decides_how_and_not_what_is_saved(slots: int) -> None:
    """Staged and streamed saves leave the same bytes."""
    state = _state(1) | {"t2": torch.randn(70, 50, generator=torch.Generator().manual_seed(1)).T, "e": torch.empty(0)}
    bytes_total = sum(leaf.spec.nbytes + 16 for leaf in request(state, 1).flat.leaves)
    cap_bytes = [bytes_total // 2, -(-bytes_total // 4096) * 4096, 1 << 30][slots]
    store = MemoryStore()
    attempt = begin(store, options=SaverOptions(keep=Keep(2), staging_cap_bytes=cap_bytes))
    attempt.save(state, 1)
    assert attempt.sink.named("staging.planned")[0].fields["slots"] == slots
    messages: list[str] = []
    attempt.saver.check(messages.append)
    assert len(messages) == (1 if slots == 0 else 0)
    attempt.save({**state, "n": 2}, 2)
    attempt.saver.hold(request(state, 3))
    assert (attempt.saver.commit_held() is None) == (slots < 2)
    attempt.saver.close(60)
    found = restore(store)
    assert torch.equal(found["t2"], state["t2"])
    assert _value({**found, "n": 1}) == 1
    data = sorted(body for key, body in store._contents.objects.items() if key.startswith("data/"))
    reference = MemoryStore()
    other = begin(reference)
    other.save(state, 1)
    other.saver.close(60)
    assert data == sorted(body for key, body in reference._contents.objects.items() if key.startswith("data/"))


def test_a_state_that_grows_gets_new_slots(attempt: Attempt, gated: GatedStore) -> None:
    attempt.save({"x": np.zeros(10)}, 1)
    attempt.saver.hold(request({"x": np.zeros(10)}, 2))
    attempt.save({"x": np.zeros(100_000), "y": torch.ones(3)}, 3)
    attempt.save({"x": np.ones(10)}, 4)
    planned = [event.fields["slot_bytes"] for event in attempt.sink.named("staging.planned")]
    assert len(planned) == 2
    assert planned[1] >= 800_000
    assert attempt.saver.commit_held() is None
    assert np.array_equal(restore(gated)["x"], np.ones(10))


def test_a_copy_that_fails_costs_neither_a_slot_nor_a_waiting_caller(attempt: Attempt, gated: GatedStore) -> None:
    from dataclasses import replace

    _block(attempt, gated)
    waiting = attempt.saver.save(request(_state(2), 2))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            attempt.saver.save(replace(request(_state(3), 3), deferrable=lambda leaf: 1 // 0 > 0))
    with pytest.raises(SaveError, match="step 3 could not be copied"):
        waiting.wait(60)
    gated.gate.set()
    attempt.save(_state(4), 4)
    assert _value(restore(gated)) == 4


# Failures


def test_failures_are_warned_about_and_then_raised_until_a_save_succeeds() -> None:
    plain = MemoryStore()
    store = FaultyStore(plain)
    attempt = begin(store, options=SaverOptions(keep=Keep(2), max_unsaved=2))
    warned: list[str] = []

    def fail(step: int) -> None:
        store.plan = lambda operation: Fault.FULL if operation.method == "put" else None
        with pytest.raises(SaveError, match=f"step {step} failed"):
            attempt.saver.save(request(_state(step), step)).wait(60)
        store.plan = lambda operation: None
        attempt.saver.drain(60)

    for step in (1, 2):
        fail(step)
        attempt.saver.check(warned.append)
    attempt.save(_state(3), 3)
    attempt.saver.check(warned.append)
    for step in (4, 5):
        fail(step)
        attempt.saver.check(warned.append)
    fail(6)
    with pytest.raises(TooManyUnsaved, match="3 saves in a row"):
        attempt.saver.check(warned.append)
    assert len(warned) == 5
    assert len(attempt.sink.named("save.failed")) == 5
    assert _value(restore(plain)) == 3
    attempt.saver.close(60)


def test_a_save_with_an_unknown_outcome_counts_when_it_was_applied() -> None:
    plain = MemoryStore()
    store = FaultyStore(plain)
    attempt = begin(store)
    attempt.save(_state(1), 1)

    def plan(operation: Operation) -> Fault | None:
        if operation.key.startswith("heads/"):
            return Fault.UNAVAILABLE_AFTER if operation.method in ("put_new", "get") else None
        return None

    store.plan = plan
    with pytest.raises(SaveError):
        attempt.saver.save(request(_state(2), 2)).wait(60)
    attempt.saver.drain(60)
    assert _value(restore(plain)) == 2
    store.plan = lambda operation: None
    attempt.save(_state(3), 3)
    head = read_truth(plain, RUN_ID).head
    assert head is not None
    assert [ref.step for ref in head.checkpoints] == [2, 3]
    assert garbage(plain) == set()
    attempt.saver.close(60)


def test_another_attempt_fences_this_one_before_it_sends_again(gated: GatedStore, attempt: Attempt) -> None:
    attempt.save(_state(1), 1)
    other = begin(gated)
    handle = attempt.saver.save(request(_state(2), 2))
    with pytest.raises(Fenced, match="stale"):
        handle.wait(60)
    attempt.saver.drain(60)
    stored = set(gated._contents.objects)
    with pytest.raises(Fenced):
        attempt.saver.check(_ignore)
    with pytest.raises(Fenced):
        attempt.saver.save(request(_state(3), 3)).wait(60)
    assert set(gated._contents.objects) == stored
    other.save(_state(4), 4)
    other.saver.close(60)
    assert garbage(gated) == set()


def test_an_observer_that_fails_does_not_end_the_saving() -> None:
    def broken(ref: object) -> None:
        raise OSError("the page is gone")

    store = MemoryStore()
    attempt = begin(store, committed=broken)
    for step in (1, 2, 3):
        attempt.save(_state(step), step)
    warned: list[str] = []
    attempt.saver.check(warned.append)
    assert len(warned) == 3
    assert "the page is gone" in warned[0]
    attempt.saver.close(60)
    assert _value(restore(store)) == 3


def test_closing_finishes_what_is_queued(gated: GatedStore, attempt: Attempt) -> None:
    first = _block(attempt, gated)
    second = attempt.saver.save(request(_state(2), 2))
    threading.Timer(0, gated.gate.set).start()
    attempt.saver.close(60)
    assert (first.wait(0).step, second.wait(0).step) == (1, 2)
    with pytest.raises(UsageError, match="closed"):
        attempt.saver.save(request(_state(3), 3))


_HUNG = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
from holdfast.store.memory import MemoryStore
from parts import begin, request

class Hung(MemoryStore):
    def put(self, key, body):
        print("hangs", flush=True)
        threading.Event().wait()

attempt = begin(Hung())
attempt.saver.save(request({"x": np.zeros(3)}, 1))
assert not attempt.saver.drain(0.1)
attempt.saver.close(0.0)
print("left", flush=True)
"""


def test_a_process_can_end_while_the_store_hangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HUNG, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["hangs", "left"]


# What is sent, and what is kept


def _sent(attempt: Attempt) -> int:
    return int(attempt.sink.named("save.committed")[-1].fields["sent_bytes"])


def test_only_what_changed_is_sent(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "CHUNK_BYTES", 1 << 20)
    rng = np.random.default_rng(1)
    state: dict[str, Any] = {
        "big": rng.integers(0, 255, 5 << 20, dtype=np.uint8),
        "small": rng.random(100),
        "twin": rng.random(100),
    }
    attempt.save(state, 1)
    assert _sent(attempt) == (5 << 20) + 1600
    attempt.save(state, 2)
    assert _sent(attempt) == 0
    state["big"][3 << 20] ^= 1
    state["twin"] = state["small"].copy()
    attempt.save(state, 3)
    assert _sent(attempt) == 1 << 20
    assert np.array_equal(restore(attempt.store)["big"], state["big"])


def test_equal_chunks_are_sent_once_also_when_the_old_object_is_not_worth_keeping(attempt: Attempt) -> None:
    """Counting the same old bytes many times must not make a dead object look alive."""
    piece = np.arange(1000)
    attempt.save({"piece": piece, "rest": np.random.default_rng(1).random(9000)}, 1)
    copies = {f"c{number}": piece.copy() for number in range(50)}
    attempt.save(copies, 2)
    assert _sent(attempt) == piece.nbytes
    attempt.save(copies, 3)
    assert _sent(attempt) == 0


@settings(max_examples=15 * SCALE)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]))
def test_storage_stays_within_four_times_what_is_alive(seed: int, keep: int) -> None:
    """Whatever changes from save to save; and nothing that is not reached stays behind."""
    rng = random.Random(seed)
    arrays = {str(number): np.random.default_rng(number).random(100 + 37 * number) for number in range(12)}
    store = MemoryStore()
    attempt = begin(store, options=SaverOptions(keep=Keep(keep)))
    for step in range(8):
        for name in rng.sample(list(arrays), rng.randrange(13)):
            arrays[name] = np.random.default_rng(rng.randrange(5)).random(rng.choice([10, 400, 900]))
        attempt.save(arrays, step)
        head = read_truth(store, RUN_ID).head
        assert head is not None
        for ref in head.checkpoints:
            index = open_checkpoint(store, ref, no_home)
            alive = {
                (chunk.object, chunk.offset): chunk.length for entry in index.parts[0].arrays for chunk in entry.chunks
            }
            stored = sum(reference.size_bytes for reference in index.parts[0].objects)
            assert stored <= 4 * sum(alive.values())
        assert garbage(store) == set()
        assert all(np.array_equal(value, arrays[name]) for name, value in restore(store).items())
    attempt.saver.close(60)


@pytest.mark.parametrize("error", [StoreUnavailable, IntegrityError])
def test_reading_prefers_the_error_that_is_no_loss(error: type[Exception], gated: GatedStore, attempt: Attempt) -> None:
    """While requests fail nothing may be declared lost; bytes that are lost make restore fall back."""
    attempt.save(_state(1), 1)
    attempt.save(_state(2), 2)
    store = FaultyStore(gated, _reads_fail(Fault.UNAVAILABLE_BEFORE if error is StoreUnavailable else Fault.FLIPPED))
    if error is StoreUnavailable:
        with pytest.raises(StoreUnavailable):
            restore(store)
    else:
        fallbacks: list[Any] = []
        assert _value(restore(store, fallbacks)) == 1
        assert len(fallbacks) == 1


def _reads_fail(fault: Fault) -> Callable[[Operation], Fault | None]:
    first: list[str] = []

    def plan(operation: Operation) -> Fault | None:
        if operation.method != "read_into":
            return None
        first.append(operation.key)
        return fault if operation.key == first[0] else None

    return plan
