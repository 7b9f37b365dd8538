"""Small segments become large ones while somebody reads or writes, and while the machine dies: no event twice, none lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.clock import SystemClock
from holdfast.core.errors import StoreUnavailable
from holdfast.core.events import Event
from holdfast.ledger.append import Ledger
from holdfast.ledger.compact import compact, plan_compaction
from holdfast.ledger.read import read_events
from holdfast.ledger.segments import Segment, list_segments, merged_key, segment_key
from holdfast.store.base import Entry, Store
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, KillSwitch, seeded

HONEST = (Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.LATE, Fault.BROKEN_OFF)
Told = list[tuple[int, str, int]]


class Power(Exception):
    """The machine is gone."""


def cut() -> None:
    raise Power


class Writer:
    """Closes segments of a few numbered events each, as the ledger does."""

    def __init__(self, store: Store, attempt: int, node: str = "0") -> None:
        self.store, self.attempt, self.node = store, attempt, node
        self.segment = 0
        self.told: Told = []

    def write(self, segments: int, torn: bool = False) -> None:
        import msgspec

        for _ in range(segments):
            events = [Event("e", 0.0, {"number": len(self.told) + offset}) for offset in range(1 + self.segment % 3)]
            self.told += [(self.attempt, self.node, event.fields["number"]) for event in events]
            body = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
            end = b'{"name": "torn", "unix_s": 1.0, "fie' if torn else b""
            self.store.put(segment_key(self.attempt, self.node, self.segment), body + end)
            self.segment += 1


def read(store: Store) -> Told:
    return [(one.attempt, one.node, one.event.fields["number"]) for one in read_events(store)]


def grown(store: Store) -> Told:
    """An attempt that is over, one with two nodes of which one has a hole, and the live one."""
    over, first, second, live = Writer(store, 1), Writer(store, 2), Writer(store, 2, "1-b"), Writer(store, 3)
    over.write(7)
    first.write(3)
    second.write(4)
    second.segment += 1
    second.write(3)
    live.write(70)
    return [*over.told, *first.told, *second.told, *live.told]


def copy_of(store: MemoryStore) -> MemoryStore:
    twin = MemoryStore()
    for entry in store.list():
        twin.put(entry.key, store.get(entry.key, max_bytes=1 << 30))
    return twin


def operations(make: Callable[[KillSwitch], None], store: Store) -> int:
    switch = KillSwitch(store, cut)
    make(switch)
    return switch.counted


def test_killed_at_every_operation() -> None:
    before = MemoryStore()
    told = grown(before)
    count = operations(_compact, copy_of(before))
    assert count > 100
    for number in range(count):
        for after in (False, True):
            store = copy_of(before)
            with pytest.raises(Power):
                _compact(KillSwitch(store, cut, at_number=number, after=after))
            assert read(store) == told
            _compact(store)
            assert read(store) == told
            # 7 of attempt 1; 3 and 4 + 3 of attempt 2; twice 32 and 6 of attempt 3.
            assert len(list_segments(store)) == 1 + 1 + 2 + 2 + 6


def _compact(store: Store) -> None:
    compact(store, live_attempt=3)


def test_read_while_it_is_compacted() -> None:
    """At every operation of the reader, a compaction gets to every one of its own."""
    before = MemoryStore()
    told = grown(before)
    steps = operations(_compact, copy_of(before))
    reads = operations(lambda switch: _read(switch, told), copy_of(before))
    for at_read in range(0, reads, 3):
        for until in [*range(0, steps, 11), None]:
            store = copy_of(before)

            def meanwhile(store: Store = store, until: int | None = until) -> None:
                with_end = KillSwitch(store, cut, at_number=until)
                try:
                    _compact(with_end)
                except Power:
                    return

            _read(KillSwitch(store, meanwhile, at_number=at_read), told)


def _read(store: Store, told: Told) -> None:
    # Where a writer's segments are read while they are replaced, its own order still holds.
    found = read(store)
    assert sorted(found) == sorted(told)
    for attempt, node in {(attempt, node) for attempt, node, _ in told}:
        numbers = [number for a, n, number in found if (a, n) == (attempt, node)]
        assert numbers == sorted(numbers)


class Unordered(KillSwitch):
    """Lists as a file system may: names are read in the order of their hashes, and while they are, something happens."""

    def __init__(self, inner: Store, meanwhile: Callable[[], None], salt: int) -> None:
        super().__init__(inner, cut)
        self._store, self._meanwhile, self._salt = inner, meanwhile, salt

    def list(self, prefix: str = "") -> Iterator[Entry]:
        early = [entry for entry in self._store.list(prefix) if self._is_early(entry)]
        self._meanwhile()
        late = [entry for entry in self._store.list(prefix) if not self._is_early(entry)]
        return iter(sorted(early + late))

    def _is_early(self, entry: Entry) -> bool:
        return bool(crc32(entry.key.encode(), self._salt) >> 16 & 1)


@pytest.mark.parametrize("salt", range(4))
def test_listed_while_it_is_compacted(salt: int) -> None:
    before = MemoryStore()
    told = grown(before)
    for until in range(operations(_compact, copy_of(before))):
        store = copy_of(before)

        def meanwhile(store: Store = store, until: int = until) -> None:
            try:
                _compact(KillSwitch(store, cut, at_number=until))
            except Power:
                return

        _read(Unordered(store, meanwhile, salt), told)


def test_two_compactions_and_a_writer_at_the_same_time() -> None:
    before = MemoryStore()
    told = grown(before)
    for number in range(0, operations(_compact, copy_of(before)), 2):
        store = copy_of(before)
        more = Writer(store, 2, "1-b")
        more.segment, more.told = 8, [one for one in told if one[:2] == (2, "1-b")]
        known = len(more.told)

        def meanwhile(store: Store = store, more: Writer = more) -> None:
            more.write(5)
            compact(store, live_attempt=4)

        compact(KillSwitch(store, meanwhile, at_number=number), live_attempt=3)
        assert sorted(read(store)) == sorted([*told, *more.told[known:]])
        compact(store, live_attempt=4)
        compact(store, live_attempt=4)
        assert sorted(read(store)) == sorted([*told, *more.told[known:]])
        assert len(list_segments(store)) == 5


@pytest.mark.parametrize("seed", range(12))
def test_a_store_that_fails(seed: int) -> None:
    inner = MemoryStore()
    told = grown(inner)
    faulty = FaultyStore(inner, seeded(seed, 0.15, HONEST))
    for _ in range(20):
        try:
            _compact(faulty)
        except StoreUnavailable:
            assert read(inner) == told
        while faulty.pending:
            # What was thought to have failed lands after all: a segment that is long replaced, or deleted again.
            faulty.land()
    assert read(inner) == told


def test_a_late_segment_comes_back_and_counts_once() -> None:
    store = MemoryStore()
    writer = Writer(store, 1)
    writer.write(9)
    key = segment_key(1, "0", 4)
    body = store.get(key, max_bytes=1000)
    compact(store, live_attempt=2)
    assert len(list_segments(store)) == 1
    store.put(key, body)
    assert read(store) == writer.told
    compact(store, live_attempt=2)
    assert read(store) == writer.told
    assert len(list_segments(store)) == 1


@pytest.mark.parametrize("compacted", [False, True])
def test_a_torn_end_costs_its_line_and_is_told(tmp_path: Path, compacted: bool) -> None:
    store = LocalStore(tmp_path / "run")
    writer = Writer(store, 1)
    writer.write(4)
    writer.write(1, torn=True)
    writer.write(2)
    store.put("events/000001-0-strange.jsonl", b"not ours")
    if compacted:
        compact(store, live_attempt=2)
        assert len(list_segments(store)) == 1
    told: list[str] = []
    found = [one.event.fields["number"] for one in read_events(store, told.append)]
    assert found == [number for _, _, number in writer.told]
    assert told == ["segment 4 of attempt 1, writer '0': the last line is torn and is left out"]
    store.close()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=40))
def test_plans_merge_neighbours_only(ranges: list[tuple[int, int]]) -> None:
    """Whatever compactions left behind: what a merge claims to hold, its sources hold."""
    segments = [
        Segment(
            merged_key(1, "0", first, first + count - 1) if count > 1 else segment_key(1, "0", first),
            1, "0", first, first + count - 1, 100,
        )
        for first, count in set(ranges)
    ]  # fmt: skip
    everything = {number for one in segments for number in range(one.first, one.last + 1)}
    for live in (1, 2):
        held: list[int] = []
        for merge in plan_compaction(segments, live_attempt=live):
            last, count = merge.key.removesuffix(".jsonl").rsplit("-", 1)[1].split("_")
            claimed = set(range(int(last) - int(count) + 1, int(last) + 1))
            assert claimed == {number for one in merge.sources for number in range(one.first, one.last + 1)}
            assert len(merge.sources) > 1
            held += sorted(claimed)
        assert len(held) == len(set(held))
        assert set(held) <= everything


def test_a_long_run_stays_small() -> None:
    """A writer that closes thousands of segments: few objects at any time, and every byte rewritten a few times only."""
    store = MemoryStore()
    writer, written, most = Writer(store, 1), 0, 0
    counting = KillSwitch(store, cut, methods=("put",))
    for _ in range(200):
        writer.write(32)
        compact(counting, live_attempt=1)
        most = max(most, len(list_segments(store)))
        written = counting.counted
    assert writer.segment == 6400
    assert most < 3 * 32 + 6400 // 1024
    assert written <= 6400 / 32 * 1.1
    assert read(store) == writer.told


def test_the_ledger_compacts_by_itself() -> None:
    """Beside the writing, without anybody asking, and what it says stays readable at every moment."""
    store = MemoryStore()
    earlier = Writer(store, 1)
    earlier.write(5)
    ledger = Ledger(store, attempt=2, node="0", clock=SystemClock(), flush_every_s=0.001)
    number, give_up_s = 0, time.monotonic() + 120
    while (
        len(list_segments(store)) > 40 or not any(one.first < one.last for one in list_segments(store)) or number < 3000
    ):
        assert time.monotonic() < give_up_s, "the ledger does not compact"
        ledger.emit(Event("e", 0.0, {"number": number}))
        number += 1
        if number % 50 == 0:
            ledger.flush()
            assert len(read(store)) >= number
    ledger.close()
    assert read(store) == [*earlier.told, *((2, "0", told) for told in range(number))]
