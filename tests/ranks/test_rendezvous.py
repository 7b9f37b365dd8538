"""Compare-and-set over a store that fails, lags and lies; and torch's handlers over it, in one process."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.ids import seeded_tokens
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation
from holdfast.train.elastic.backend import ObjectStoreBackend
from holdfast.train.elastic.journal import KEPT_S, TRUSTED_S, Journal
from holdfast.train.elastic.options import job_prefix, read_options
from holdfast.train.elastic.state import JobState, Node, Page, decode_page, encode_page, from_torch, into_torch

PREFIX = job_prefix("job")
FAULTS = [
    Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.LATE, Fault.TAKEN_BY_ITSELF, Fault.BROKEN_OFF,
    Fault.STALE, Fault.FLIPPED, Fault.DENIED, Fault.FULL,
]  # fmt: skip
_SUITS = {
    "put_new": {Fault.LATE, Fault.TAKEN_BY_ITSELF, Fault.FULL},
    "get": {Fault.BROKEN_OFF, Fault.FLIPPED},
    "list": {Fault.STALE},
    "delete": {Fault.LATE},
}
_SUITS_ALL = {Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.DENIED}


class _Member:
    """One node's journal, over a store of its own that misbehaves, on the objects of all."""

    def __init__(self, shared: MemoryStore, seed: int) -> None:
        self.clock, self.rng = ManualClock(), random.Random(seed)
        clock = self.clock
        self.rate = 0.0
        self.fresh_list_s = clock.unix_s()
        self.store = FaultyStore(shared, self._plan, clock=clock)
        self.journal = Journal(self.store, PREFIX, clock=clock, tokens=seeded_tokens(seed))
        self.known: int | None = None

    def _plan(self, operation: Operation) -> Fault | None:
        fault = self.rng.choice(FAULTS) if self.rng.random() < self.rate else None
        if fault is not None and fault not in _SUITS_ALL | _SUITS[operation.method]:
            fault = None
        if operation.method == "list":
            # What a list may lag behind is bounded, and so is this: what it repeats was true not long ago.
            if fault is Fault.STALE and self.clock.unix_s() - self.fresh_list_s > KEPT_S - 2 * TRUSTED_S:
                fault = None
            if fault is None:
                self.fresh_list_s = self.clock.unix_s()
        return fault


class CompareAndSet(RuleBasedStateMachine):
    """Several nodes. Who is told that it has won has won alone, and nobody ever goes back behind a version that was won."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = MemoryStore()
        self.seeds = 0
        self.members = [self._member() for _ in range(3)]
        self.won: dict[int, int] = {}
        self.proposed = 0

    def _member(self) -> _Member:
        self.seeds += 1
        member = _Member(self.shared, self.seeds)
        # A store that starts with a list of nothing would have to be that old.
        list(member.store.list(PREFIX))
        return member

    @rule(index=st.integers(0, 2), rate=st.sampled_from([0.0, 0.0, 0.3, 0.7]))
    def read(self, index: int, rate: float) -> None:
        member = self.members[index]
        member.rate = rate
        before = max(self.won, default=0)
        try:
            page = member.journal.newest()
        except HoldfastError:
            if not rate:
                raise
            return
        member.known = None if page is None else page.number
        assert (member.known or 0) >= before
        if page is not None and page.number in self.won:
            assert page.state.round == self.won[page.number]

    @rule(index=st.integers(0, 2), rate=st.sampled_from([0.0, 0.0, 0.3, 0.7]), from_nothing=st.booleans())
    def write(self, index: int, rate: float, from_nothing: bool) -> None:
        member = self.members[index]
        member.rate = rate
        after = None if from_nothing and index == 0 else member.known
        self.proposed += 1
        mine, before = self.proposed, max(self.won, default=0)
        try:
            page, won = member.journal.write(after, JobState(round=mine))
        except HoldfastError:
            if not rate:
                raise
            return
        assert page is not None
        assert page.number >= before
        assert won == (page.state.round == mine)
        if won:
            assert page.number == (after or 0) + 1
            assert page.number > before, "a number was won twice, or after a higher one"
            self.won[page.number] = mine
        member.known = page.number

    @rule(index=st.integers(0, 2))
    def restart(self, index: int) -> None:
        self.members[index] = self._member()

    @rule(index=st.integers(0, 2))
    def a_write_that_was_given_up_arrives(self, index: int) -> None:
        if self.members[index].store.pending:
            self.members[index].store.land()

    @rule(seconds=st.sampled_from([1.0, TRUSTED_S / 2, TRUSTED_S + 1, KEPT_S + 1]))
    def time_passes(self, seconds: float) -> None:
        for member in self.members:
            member.clock.advance(seconds)

    @rule(index=st.integers(0, 2), seconds=st.sampled_from([-50.0, 50.0, 2 * KEPT_S]))
    def somebody_sets_a_clock(self, index: int, seconds: float) -> None:
        self.members[index].clock.jump(seconds)

    @rule(index=st.integers(0, 2))
    def a_machine_is_suspended(self, index: int) -> None:
        """Its clock for durations stands still meanwhile."""
        for number, member in enumerate(self.members):
            pass_by = member.clock.jump if number == index else member.clock.advance
            pass_by(KEPT_S + 1)

    @invariant()
    def the_newest_is_never_deleted(self) -> None:
        numbers = [int(entry.key.rpartition("/")[2]) for entry in self.shared.list(PREFIX)]
        assert max(numbers, default=0) >= max(self.won, default=0)


CompareAndSet.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_compare_and_set = CompareAndSet.TestCase


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE_AFTER, Fault.TAKEN_BY_ITSELF])
def test_who_gets_no_answer_knows_its_own_state(fault: Fault) -> None:
    clock, shared = ManualClock(), MemoryStore()
    lost = lambda operation: fault if operation.method == "put_new" else None  # noqa: E731
    backend = ObjectStoreBackend(
        Journal(FaultyStore(shared, lost), PREFIX, clock=clock, tokens=seeded_tokens(1)), patience_s=60
    )
    token = None
    for number in (1, 2, 3):
        answer = backend.set_state(pickle.dumps(_RendezvousState()), token)
        assert answer is not None
        assert answer[1:] == (number, True)
        token = answer[1]


def test_a_writer_that_slept_in_the_middle_does_not_win() -> None:
    """Its number has been won by another, and deleted, before its put arrives."""
    clock, shared = ManualClock(), MemoryStore("asleep")
    awake = Journal(shared, PREFIX, clock=clock, tokens=seeded_tokens(1))
    assert awake.write(None, JobState())[1]
    sleeper_store = _Sleeping("asleep")
    sleeper = Journal(sleeper_store, PREFIX, clock=clock, tokens=seeded_tokens(2))
    page = sleeper.newest()
    assert page is not None

    def meanwhile() -> None:
        for number in range(page.number, page.number + 5):
            assert awake.write(number, JobState(round=number))[1]
            clock.advance(KEPT_S)

    sleeper_store.before_put = meanwhile
    newest, won = sleeper.write(page.number, JobState(round=99))
    assert not won
    assert newest is not None
    assert newest.number == page.number + 5
    # What it has left behind misleads nobody, neither who knows the newest nor who comes.
    for journal in (awake, Journal(shared, PREFIX, clock=clock, tokens=seeded_tokens(3))):
        assert journal.newest() == newest


def test_who_was_suspended_asks_anew() -> None:
    """Its clock for durations has stood still, while the number that it would write next was won by another, and deleted."""
    own, others, shared = ManualClock(), ManualClock(), MemoryStore()
    awake = Journal(shared, PREFIX, clock=others, tokens=seeded_tokens(1))
    suspended = Journal(shared, PREFIX, clock=own, tokens=seeded_tokens(2))
    assert suspended.write(None, JobState())[1]
    for number in range(1, 6):
        awake.newest()
        assert awake.write(number, JobState(round=number))[1]
        others.advance(KEPT_S + 1)
        own.jump(KEPT_S + 1)
    newest, won = suspended.write(1, JobState(round=99))
    assert not won
    assert newest == awake.newest()
    assert suspended.newest() == newest


class _Sleeping(MemoryStore):
    """A store that does something else before a put."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.before_put: Callable[[], object] = lambda: None

    def put_new(self, key: str, body: bytes) -> bool:
        self.before_put()
        return super().put_new(key, body)


def test_old_versions_go_and_requests_stay_few() -> None:
    """A heartbeat is one get and one put, a look one get; what was written 15 minutes ago is gone, whoever wrote it."""
    clock, shared = ManualClock(), MemoryStore()
    yesterday = Journal(shared, PREFIX, clock=clock, tokens=seeded_tokens(1))
    for number in range(50):
        assert yesterday.write(number or None, JobState())[1]
    counted = FaultyStore(shared)
    journal = Journal(counted, PREFIX, clock=clock, tokens=seeded_tokens(2))
    page = journal.newest()
    for _ in range(400):
        assert page is not None
        page, won = journal.write(page.number, JobState())
        assert won
        assert journal.newest() == page
        clock.advance(5.0)
    methods = [entry.operation.method for entry in counted.log]
    assert methods.count("list") == 1
    assert methods.count("put_new") == 400
    assert methods.count("get") <= 2 * 400 + 2
    assert len(list(shared.list(PREFIX))) <= KEPT_S / 5.0 + 2


nodes = st.builds(
    Node,
    addr=st.sampled_from(["10.0.0.1", "10.0.0.2", "host-3"]),
    pid=st.integers(1, 4),
    id=st.integers(0, 2**62 - 1),
    rank=st.none() | st.integers(0, 3),
    waits=st.booleans(),
    spare=st.booleans(),
    heard=st.datetimes(timezones=st.just(UTC)),
)


def test_state_through_torch_and_back() -> None:
    @settings(max_examples=100)
    @given(
        st.builds(
            JobState,
            round=st.integers(0, 99),
            first_round=st.integers(0, 9),
            complete=st.booleans(),
            deadline=st.none() | st.datetimes(timezones=st.just(UTC)),
            closed=st.booleans(),
            finished=st.booleans(),
            nodes=st.lists(nodes, unique_by=lambda node: (node.addr, node.pid, node.id)),
        )
    )
    def check(record: JobState) -> None:
        key = lambda node: (node.addr, node.pid, node.id)  # noqa: E731
        there = pickle.loads(pickle.dumps(into_torch(record)))
        assert sorted(from_torch(there).nodes, key=key) == sorted(record.nodes, key=key)
        page = Page(number=7, nonce="x", state=from_torch(there))
        assert decode_page(encode_page(page), 7, what="it") == page

    check()


def _backend(shared: MemoryStore, seed: int) -> ObjectStoreBackend:
    return ObjectStoreBackend(Journal(shared, PREFIX, clock=ManualClock(), tokens=seeded_tokens(seed)), patience_s=60)


def test_an_ended_job_begins_anew_when_all_have_gone_and_not_before() -> None:
    shared, now, dead_after = MemoryStore(), datetime(2026, 1, 1, tzinfo=UTC), timedelta(seconds=15)
    backend = _backend(shared, 1)
    assert backend.begin(now, dead_after) == JobState()
    state = _RendezvousState()
    state.round, state.closed = 4, True
    node = _NodeDesc("10.0.0.1", 1, 1)
    state.participants[node], state.last_heartbeats[node] = 0, now
    backend.set_state(pickle.dumps(state))
    assert backend.begin(now + timedelta(seconds=14), dead_after).closed
    begun = _backend(shared, 2).begin(now + timedelta(seconds=16), dead_after)
    assert begun == JobState(round=5, first_round=5)
    assert from_torch(pickle.loads(backend.get_state()[0])) == begun  # type: ignore[index]


def test_what_is_no_record_is_refused() -> None:
    """No byte from the store is unpickled, and torch's heartbeat thread hears of its own errors only."""
    for garbage in (pickle.dumps(_RendezvousState()), b"", encode_page(Page(number=2, nonce="x", state=JobState()))):
        shared = MemoryStore()
        shared.put(f"{PREFIX}{1:012d}", garbage)
        with pytest.raises(RendezvousStateError):
            _backend(shared, 1).get_state()


def test_a_store_that_hangs_does_not_hang_the_agent() -> None:
    answer = threading.Event()
    sleeping = _Sleeping("hangs")
    sleeping.before_put = lambda: answer.wait(60)
    backend = ObjectStoreBackend(
        Journal(sleeping, PREFIX, clock=ManualClock(), tokens=seeded_tokens(1)), patience_s=0.05
    )
    with pytest.raises(RendezvousConnectionError):
        backend.set_state(pickle.dumps(_RendezvousState()))
    answer.set()


def test_options() -> None:
    def read(endpoint: str = "/tmp/x", **conf: str) -> timedelta:
        parameters = RendezvousParameters("holdfast", endpoint, "job", 1, 4, None, **conf)
        return read_options(parameters, {}).dead_after

    assert read() == timedelta(seconds=15)
    assert read(keep_alive_interval="0.5", keep_alive_max_attempt="4") == timedelta(seconds=2)
    for wrong in ({"endpoint": ""}, {"keepalive": "3"}, {"poll": "0"}, {"poll": "x"}):
        with pytest.raises(UsageError):
            read(**wrong)
    assert job_prefix("my-job") == "rendezvous/my-job/"
    assert job_prefix("a/b").startswith("rendezvous/id-")
