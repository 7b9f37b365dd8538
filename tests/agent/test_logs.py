"""Output on its way into the store: nothing lost, nothing sent twice under one name, nothing that makes the command wait."""

from __future__ import annotations

import io
import itertools
import re
import threading
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.agent.logs import LogKeeper, LogLimits, LogSegment, parse_log_key
from holdfast.agent.record import AgentRecord
from holdfast.checkpoint.heads import Lineage
from holdfast.cli.logs import follow, segments, write_segments
from holdfast.core.clock import SystemClock
from holdfast.core.events import Event
from holdfast.core.ids import seeded_tokens
from holdfast.ledger.read import read_events
from holdfast.store.base import Body, Store, flat_buffers
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, always, no_faults, seeded

EVER_S = 1e12
NAMES = itertools.count()


class HurriedClock(SystemClock):
    """A minute passes with every look: pauses are over at once, and nothing waits for real."""

    def __init__(self) -> None:
        self._now = itertools.count(0, 60)

    def monotonic_s(self) -> float:
        return float(next(self._now))


def new_store() -> MemoryStore:
    return MemoryStore(f"logs-{next(NAMES)}")


def kept(store: Store) -> bytes:
    out = io.BytesIO()
    write_segments(store, segments(store, None), out, {})
    return out.getvalue()


class Watched:
    """A store that remembers every put, and refuses to be told two things under one name."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.put_bodies: dict[str, set[bytes]] = defaultdict(set)

    def put(self, key: str, body: Body) -> None:
        self.put_bodies[key].add(b"".join(flat_buffers(body)))
        self._inner.put(key, body)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@given(
    st.lists(st.one_of(st.binary(max_size=300), st.just("flush"), st.just("begin")), max_size=40),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.5]),
)
def test_every_byte_arrives_once_in_order_whatever_the_store_does(
    deeds: list[bytes | str], seed: int, rate: float
) -> None:
    inner = new_store()
    faults = (Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.DENIED, Fault.FULL)
    store = Watched(FaultyStore(inner, seeded(seed, rate, faults)))
    keeper = LogKeeper(
        store,  # type: ignore[arg-type]
        token="ab12",
        clock=HurriedClock(),
        say=lambda line: None,
        limits=LogLimits(segment_bytes=100),
    )
    written, start = b"", 1
    keeper.begin(1)
    keeper.label(1, 7)
    for deed in deeds:
        if isinstance(deed, bytes):
            keeper.keep(deed)
            written += deed
        elif deed == "begin":
            start += 1
            keeper.begin(start)
            keeper.label(start, 7 + start // 2)
        else:
            assert keeper.flush(EVER_S)
    keeper.close(EVER_S)
    assert kept(inner) == written
    assert keeper.dropped_bytes == 0
    assert all(len(bodies) == 1 for bodies in store.put_bodies.values())
    series: dict[str, list[int]] = defaultdict(list)
    for segment in segments(inner, None):
        series[segment.series].append(segment.number)
    assert all(numbers == list(range(len(numbers))) for numbers in series.values()), "a series has no holes"


def test_a_store_that_stands_still_never_makes_the_command_wait_and_what_is_missing_is_said() -> None:
    class Standing:
        url = "memory://standing"

        def __init__(self) -> None:
            self.asked, self.go_on = threading.Event(), threading.Event()
            self.inner = new_store()

        def put(self, key: str, body: bytes) -> None:
            self.asked.set()
            assert self.go_on.wait(60)
            self.inner.put(key, body)

    store, said = Standing(), list[str]()
    limits = LogLimits(segment_bytes=1000, waiting_bytes=10_000)
    keeper = LogKeeper(
        store,  # type: ignore[arg-type]
        token="ab",
        clock=HurriedClock(),
        say=said.append,
        limits=limits,
    )
    keeper.begin(1)
    keeper.label(1, 1)
    lines = [f"line {number:05d}\n".encode() for number in range(10_000)]
    for number, line in enumerate(lines):
        keeper.keep(line)
        if number == 99:
            assert store.asked.wait(60)
        assert keeper._waiting_bytes <= limits.waiting_bytes
    store.go_on.set()
    keeper.close(EVER_S)
    text = kept(store.inner)
    notes = re.findall(rb"\n\[holdfast: (\d+) bytes of output are missing here[^\n]*\]\n", text)
    assert sum(int(count) for count in notes) == keeper.dropped_bytes > 90_000
    assert len(text) - sum(len(note) for note in re.findall(rb"\n\[holdfast: [^\n]*\]\n", text)) == (
        sum(map(len, lines)) - keeper.dropped_bytes
    )
    assert text.startswith(lines[0])
    assert text.endswith(lines[-1]), "the newest are what tells why a command has died"
    assert any("were not kept" in line for line in said)


def test_a_store_that_fails_for_good_costs_the_logs_and_is_told_once() -> None:
    said: list[str] = []
    store = FaultyStore(new_store(), always(Fault.DENIED))
    keeper = LogKeeper(store, token="ab", clock=SystemClock(), say=said.append, limits=LogLimits(segment_bytes=4))
    keeper.begin(1)
    keeper.label(1, 1)
    for _ in range(20):
        keeper.keep(b"words")
    assert not keeper.flush(0.05)
    keeper.close(0.05)
    assert keeper.dropped_bytes == 100
    assert len([line for line in said if "cannot be written" in line]) == 1
    assert "100 B of the command's output were not kept" in said[-1]


def test_age_closes_a_segment_without_being_asked() -> None:
    inner = new_store()
    arrived = threading.Event()

    class Telling(Watched):
        def put(self, key: str, body: Body) -> None:
            super().put(key, body)
            arrived.set()

    keeper = LogKeeper(Telling(inner), token="ab", clock=HurriedClock(), say=print)  # type: ignore[arg-type]
    keeper.begin(1)
    keeper.label(1, 1)
    keeper.keep(b"one word")
    assert arrived.wait(60)
    assert kept(inner) == b"one word"
    keeper.close(EVER_S)


@pytest.mark.parametrize("key", ["logs/1/x.log", "logs/000001/0123456789000-zz-0001-00000001.log", "data/1/x"])
def test_other_peoples_names_are_no_segments(key: str) -> None:
    assert parse_log_key(key) is None
    segment = LogSegment(3, "1795260651000-ab12-0001", 9)
    assert parse_log_key(segment.key) == segment


class Stop(Exception):
    pass


def test_following_a_machine_that_leaves_while_the_next_is_made_ready_shows_both() -> None:
    """The set-up of the coming attempt is there before the last lines of this one."""
    store, out = new_store(), io.BytesIO()
    leaving, coming = LogSegment(1, "1795260651000-ab12-0001", 0), LogSegment(2, "1795269999000-cd34-0000", 0)

    class Story(SystemClock):
        polls = 0

        def sleep(self, seconds: float) -> None:
            self.polls += 1
            script = {1: (leaving, b"a"), 2: (coming, b"b"), 8: (replace(leaving, number=1), b"c")}
            script |= {9: (replace(coming, number=1), b"d"), 11: (replace(leaving, number=2), b"e")}
            if self.polls in script:
                store.put(script[self.polls][0].key, script[self.polls][1])
            if self.polls == 30:
                raise Stop

    with pytest.raises(Stop):
        follow(store, None, out, {}, Story())
    assert out.getvalue() == b"abcde"


def test_following_shows_new_segments_new_attempts_and_nothing_twice() -> None:
    store = new_store()
    out = io.BytesIO()

    def write(attempt: int, series: str, number: int, text: bytes) -> None:
        store.put(LogSegment(attempt, series, number).key, text)

    class Story(SystemClock):
        polls = 0

        def sleep(self, seconds: float) -> None:
            self.polls += 1
            first, second = "1795260651000-ab12-0001", "1795269999000-cd34-0001"
            if self.polls == 2:
                write(1, first, 0, b"a")
            if self.polls == 3:
                write(1, first, 1, b"b")
                write(1, first, 2, b"c")
            if self.polls == 4:
                write(2, second, 0, b"d")
            if self.polls == 12:
                write(2, second, 1, b"e")
            if self.polls == 30:
                raise Stop

    with pytest.raises(Stop):
        follow(store, None, out, {}, Story())
    assert out.getvalue() == b"abcde"
    only_second = io.BytesIO()
    write_segments(store, segments(store, 2), only_second, {})
    assert only_second.getvalue() == b"de"


# The agent's record.


def claim(store: Store) -> Lineage:
    tokens = seeded_tokens(5)
    lineage = Lineage(store, "run", clock=SystemClock(), tokens=tokens)
    lineage.claim()
    return lineage


def record(store: Store, claimed: int = 0) -> AgentRecord:
    return AgentRecord(
        store,
        token="ab12",
        clock=SystemClock(),
        say=print,
        claimed=lambda: claimed,
        logs=LogLimits(),
        heartbeat_s=60,
    )


def test_the_record_carries_the_number_that_the_coming_attempt_will_claim() -> None:
    store = new_store()
    story = record(store)
    story.begin(1)
    head = story.wait_for_head(60)
    assert head is not None
    assert (head.attempt, head.step) == (1, None)
    story.emit(Event("attempt.started", 1.0, {"start": 1}))
    story.keep(b"first\n")
    claim(store)
    story.emit(Event("attempt.ended", 2.0, {}))
    story.begin(2)
    assert story.wait_for_head(60) is not None
    story.emit(Event("attempt.started", 3.0, {"start": 2}))
    story.keep(b"second\n")
    claim(store)
    story.emit(Event("agent.stopped", 4.0, {}))
    story.close(60)
    events = [(recorded.attempt, recorded.event.unix_s) for recorded in read_events(store)]
    assert sorted(events) == [(1, 1.0), (1, 2.0), (2, 3.0), (2, 4.0)]
    assert [(segment.attempt, segment.number) for segment in segments(store, None)] == [(1, 0), (2, 0)]


def test_where_a_command_claims_nothing_its_starts_are_counted_by_what_is_kept() -> None:
    store = new_store()
    for expected in (1, 2):
        story = record(store)
        story.begin(1)
        head = story.wait_for_head(60)
        assert head is not None
        assert head.attempt == expected
        story.keep(b"something")
        story.close(60)


def test_a_store_that_answers_late_costs_no_event_and_is_not_fooled_by_the_commands_own_claim() -> None:
    inner = new_store()
    store = FaultyStore(inner, always(Fault.UNAVAILABLE_BEFORE))
    story = record(store, claimed=1)
    story.begin(1)
    story.emit(Event("attempt.started", 1.0, {}))
    story.keep(b"words")
    claim(inner)
    store.plan = no_faults
    assert story.wait_for_head(60) is not None
    story.close(60)
    assert [(recorded.attempt, recorded.event.name) for recorded in read_events(inner)] == [(1, "attempt.started")]
    assert [segment.attempt for segment in segments(inner, None)] == [1]
