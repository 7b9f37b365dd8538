"""Claims, commits, sweeps and readers of one run, interleaved at every store operation, with crashes and unclear answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interleaved import RUN_ID, SCALE, Actor, ActorStore, FakeClock, Suffers, World, attempt, play, reader

from holdfast.checkpoint import heads, pack
from holdfast.checkpoint.format import Head, head_key
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.core.errors import Fenced, RestoreError, RunConflict, StoreUnavailable
from holdfast.core.ids import seeded_tokens
from holdfast.core.sealed import digest, seal
from holdfast.store.base import Entry
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation, at

_WRITERS = ("A", "B", "C")
_ACTIONS = (*_WRITERS, "R", "land", *(fault.name for fault in Suffers))


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array in an object of its own, and old heads pruned at once."""
    monkeypatch.setattr(pack, "OBJECT_BYTES", 64)
    monkeypatch.setattr(heads, "HEADS_KEPT", 1)


def _cast(world: World, names: str) -> list[Actor]:
    programs = {name: (lambda actor: attempt(actor, saves=4)) for name in _WRITERS}
    programs["R"] = lambda actor: reader(actor, times=3)
    return [world.actor(name, programs[name]) for name in names]


def _operations_alone() -> int:
    """How many store operations an attempt has."""
    world = World()
    alone = world.actor("A", lambda actor: attempt(actor, saves=4))
    alone.run(1 << 30)
    assert alone.outcome == "done"
    return alone.operations


@settings(
    max_examples=3000 if SCALE > 1 else 200, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(_ACTIONS)), max_size=16))
def test_any_schedule(events: list[tuple[int, str]]) -> None:
    world = World()
    play(world, _cast(world, "ABCR"), events)


def test_every_pair_of_preemptions() -> None:
    """A stops anywhere, B takes over and stops anywhere, A wakes up and goes on, then B."""
    total = _operations_alone()
    for first in range(total + 1):
        for second in range(first % 5, total + 12, 1 if SCALE > 1 else 5):
            world = World()
            play(world, _cast(world, "AB"), [(first, "B"), (second, "A")])


@pytest.mark.parametrize("suffers", Suffers)
def test_every_operation_suffers_once(suffers: Suffers) -> None:
    """A is hurt at one operation, then B takes over, A goes on, and what was late lands before or after that."""
    for number in range(_operations_alone()):
        for late in (0, 2, 9):
            world = World()
            play(world, _cast(world, "AB"), [(number, suffers.name), (6, "B"), (late, "land"), (20, "A")])


# Single rules, on the smallest stories in which they matter


def _lineage(store: MemoryStore | FaultyStore, seed: int) -> Lineage:
    return Lineage(store, RUN_ID, clock=FakeClock(), tokens=seeded_tokens(seed))


def _same(head: Head) -> Head:
    return head


def test_a_stale_attempt_that_wins_a_pruned_number_learns_it() -> None:
    store = MemoryStore()
    stale, owner = _lineage(store, 1), _lineage(store, 2)
    stale.claim()
    owner.claim()
    for _ in range(3):
        owner.advance("save", _same)
    owner.prune()
    with pytest.raises(Fenced):
        stale.advance("save", _same)
    with pytest.raises(Fenced):
        stale.claim()
    assert read_truth(store, RUN_ID).head == owner.head


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE_AFTER, Fault.TAKEN_BY_ITSELF])
def test_a_write_that_was_applied_counts_whatever_the_client_says(fault: Fault) -> None:
    plain = MemoryStore()
    lineage = _lineage(FaultyStore(plain, lambda operation: fault if operation.method == "put_new" else None), 1)
    lineage.claim()
    lineage.advance("save", _same)
    assert read_truth(plain, RUN_ID).head == lineage.head
    assert lineage.head.number == 2


def test_an_unknown_outcome_is_found_out_by_the_next_call() -> None:
    plain = MemoryStore()
    store = FaultyStore(plain)
    lineage = _lineage(store, 1)
    lineage.claim()
    store.plan = lambda operation: Fault.LATE if operation.method == "put_new" else None
    with pytest.raises(StoreUnavailable):
        lineage.advance("save", _same)
    store.plan = lambda operation: None
    store.land()
    lineage.advance("save", _same)
    assert lineage.head.number == 3
    assert read_truth(plain, RUN_ID).head == lineage.head


def test_a_write_that_lands_between_the_read_and_the_list_is_not_taken_for_another_one() -> None:
    plain = MemoryStore()
    store = FaultyStore(plain)
    lineage = _lineage(store, 1)
    lineage.claim()

    def plan(operation: Operation) -> Fault | None:
        if operation.method == "put_new" and not store.pending:
            return Fault.LATE
        if operation.method == "list" and store.pending:
            store.land()
        return None

    store.plan = plan
    lineage.advance("save", _same)
    assert read_truth(plain, RUN_ID).head == lineage.head


def test_a_head_that_arrives_flipped_is_read_again() -> None:
    plain = MemoryStore()
    lineage = _lineage(plain, 1)
    lineage.claim()
    lineage.advance("save", _same)
    truth = read_truth(FaultyStore(plain, at({1: Fault.FLIPPED})), RUN_ID)
    assert (truth.head, truth.altered) == (lineage.head, ())


def test_an_altered_head_is_passed_over_and_its_number_is_not_used_again() -> None:
    store = MemoryStore()
    lineage = _lineage(store, 1)
    first = lineage.claim()
    lineage.advance("save", _same)
    store.put(head_key(2), b"{}")
    truth = read_truth(store, RUN_ID)
    assert (truth.head, truth.highest, len(truth.altered)) == (first, 2, 1)
    claimed = _lineage(store, 2).claim()
    assert (claimed.number, claimed.parent) == (3, first.nonce)


def test_heads_of_which_none_verifies_are_not_an_empty_run() -> None:
    store = MemoryStore()
    _lineage(store, 1).claim()
    store.put(head_key(1), b"{}")
    with pytest.raises(RestoreError, match="none of the run's 1 heads verifies"):
        _lineage(store, 2).claim()
    assert _lineage(store, 3).claim(revive=True).number == 2


def test_a_newer_format_is_not_taken_for_damage() -> None:
    store = MemoryStore()
    head = _lineage(store, 1).claim()
    newer = seal(head).replace(b'"format":1', b'"format":2')
    body = newer[newer.index(b'"body":') + 7 : -2]
    store.put(head_key(2), newer.replace(newer[11:75], digest(body).encode(), 1))
    with pytest.raises(RunConflict, match="newer holdfast"):
        read_truth(store, RUN_ID)


def test_a_store_that_lists_what_it_does_not_have_is_unavailable() -> None:
    store = MemoryStore()
    store.put("heads/000000007.json", b"not a name that holdfast gives")
    assert read_truth(store, RUN_ID).head is None

    class Ghosts(MemoryStore):
        def list(self, prefix: str = "") -> Iterator[Entry]:
            return iter([Entry(head_key(3), 10)])

    with pytest.raises(StoreUnavailable, match="cannot be read"):
        read_truth(Ghosts(), RUN_ID)


def test_the_world_notices_a_hole() -> None:
    """The checker itself: a truth whose object is deleted must not pass."""
    world = World()
    alone = world.actor("A", lambda actor: attempt(actor, saves=2))
    alone.run(1 << 30)
    key = next(key for key in world.reached() if key.startswith("data/"))
    world.condemned.add(key)
    with pytest.raises(AssertionError, match="gone"):
        ActorStore(world.actor("B", lambda actor: None))._world.delete(key)


def test_a_newest_head_that_arrives_altered_twice_is_not_passed_over_by_a_claim() -> None:
    """A reader may make do with the head below; a claim on that one would drop the newest checkpoint for good."""
    inner = MemoryStore()
    first = _lineage(inner, 1)
    first.claim()
    newest = first.advance("save", lambda head: head)
    reads = 0

    def plan(operation: Operation) -> Fault | None:
        nonlocal reads
        if operation.method != "get" or operation.key != head_key(newest.number):
            return None
        reads += 1
        return Fault.FLIPPED if reads <= 2 else None

    store = FaultyStore(inner, plan, clock=FakeClock())
    assert _lineage(store, 2).claim().parent == newest.nonce
