"""Listing, showing and verifying: every figure against what is really stored, every damage found and named."""

from __future__ import annotations

import pytest
from run_builder import FakeClock, Trainer, head_of, tree_at

from holdfast.checkpoint.format import head_key
from holdfast.checkpoint.runs.inspect import find_checkpoint, freed_bytes, list_checkpoints, show
from holdfast.checkpoint.runs.verify import verify
from holdfast.core.errors import IntegrityError, StoreUnavailable, UsageError
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.testing.faulty_store import Fault, FaultyStore, at

FROZEN_BYTES, MOVING_BYTES = 20_000, 300 * 8 + 8


def no_home(url: str) -> Store:
    raise AssertionError(url)


@pytest.fixture
def store() -> Store:
    made = MemoryStore()
    with Trainer(made, no_home) as trainer:
        for step in (1, 2, 3):
            trainer.save(step, learning_rates={"sgd": [0.1 / step]}, batch_size=8)
    return made


def test_the_listing_adds_up(store: Store) -> None:
    listing = list_checkpoints(store, clock=FakeClock(1_000_060.0))
    assert [(line.step, line.epoch, line.age_s) for line in listing.checkpoints] == [
        (1, 0, 60.0),
        (2, 0, 60.0),
        (3, 0, 60.0),
    ]
    assert {line.total_bytes for line in listing.checkpoints} == {FROZEN_BYTES + MOVING_BYTES}
    sizes = {entry.key: entry.size_bytes for entry in store.list()}
    assert listing.stored_bytes == sum(size for key, size in sizes.items() if key.startswith(("data/", "checkpoints/")))
    assert listing.unreached_bytes == 0
    head = head_of(store)
    for line, ref in zip(listing.checkpoints, head.checkpoints, strict=True):
        assert line.own_bytes == freed_bytes(store, head, [ref])
        index_bytes = sum(size for key, size in sizes.items() if key.startswith(f"{ref.name}/"))
        # The frozen array lies in the first checkpoint's object, which all three need.
        assert line.own_bytes == index_bytes + (0 if ref.step == 1 else MOVING_BYTES)
    assert (listing.attempt, listing.generation, listing.finished, listing.removed) == (1, 1, False, False)
    store.put("data/1/orphan", b"x" * 50)
    assert list_checkpoints(store, clock=FakeClock()).unreached_bytes == 50


def test_a_root_that_cannot_be_read_is_listed_all_the_same(store: Store) -> None:
    store.delete(f"{head_of(store).checkpoints[1].name}/root.json")
    assert [line.own_bytes is None for line in list_checkpoints(store, clock=FakeClock()).checkpoints] == [
        False,
        True,
        False,
    ]


def test_a_checkpoint_is_shown_with_what_changed(store: Store) -> None:
    details = show(store, 2, open_home=no_home, clock=FakeClock())
    assert (details.new_bytes, details.shared_bytes, details.borrowed_bytes) == (MOVING_BYTES, FROZEN_BYTES, 0)
    assert [(item.name, item.dtype, item.shape, item.size_bytes) for item in details.arrays] == [
        ("frozen", "u8", (20_000,), 20_000), ("moving", "f64", (300,), 2400), ("empty", "f32", (0, 3), 0), ("step", "i64", (), 8),
    ]  # fmt: skip
    assert sum(item.live_bytes for item in details.objects) == details.total_bytes
    assert [(change.path, change.before, change.now) for change in details.changes] == [
        ("step", 1, 2), ("learning_rates.sgd", [0.1], [0.05]),
    ]  # fmt: skip
    assert not details.newest
    assert show(store, open_home=no_home, clock=FakeClock()).newest
    first = show(store, 1, open_home=no_home, clock=FakeClock())
    assert (first.previous, first.changes, first.shared_bytes) == (None, (), 0)


def test_a_checkpoint_is_found_by_step_name_and_last(store: Store) -> None:
    head = head_of(store)
    second = head.checkpoints[1]
    for which in (2, "2", second.name, second.name.removeprefix("checkpoints/")):
        assert find_checkpoint(head, which, url="u") == second
    assert find_checkpoint(head, url="u") == head.checkpoints[2]
    with pytest.raises(UsageError, match="step 1, 2, 3"):
        find_checkpoint(head, 7, url="u")
    with pytest.raises(UsageError, match="no run"):
        list_checkpoints(MemoryStore(), clock=FakeClock())


def _data_of(store: Store, step: int) -> str:
    ref = find_checkpoint(head_of(store), step, url="u")
    details = show(store, ref.name, open_home=no_home, clock=FakeClock())
    return details.objects[0].key


def _flip(store: Store, key: str, place: int) -> None:
    body = bytearray(store.get(key, max_bytes=1 << 20))
    body[place] ^= 0x10
    store.put(key, bytes(body))


def test_every_single_damage_is_found_and_named(store: Store) -> None:
    healthy = {entry.key: store.get(entry.key, max_bytes=1 << 20) for entry in store.list()}
    refs = head_of(store).checkpoints
    seen: list[tuple[int, int]] = []
    report = verify(store, open_home=no_home, progress=lambda done, total: seen.append((done, total)))
    assert report.good
    assert [verdict.status for verdict in report.checkpoints] == ["ok"] * 3
    # Shared bytes are read once.
    assert report.read_bytes == FROZEN_BYTES + 3 * MOVING_BYTES
    assert (seen[0], seen[-1]) == ((0, report.read_bytes), (report.read_bytes, report.read_bytes))
    for key, body in healthy.items():
        if not key.startswith(("data/", "checkpoints/")):
            continue
        for kind in ("missing", "altered", "short"):
            if kind == "missing":
                store.delete(key)
            else:
                store.put(key, body[:-1] if kind == "short" else body[:-5] + bytes([body[-5] ^ 1]) + body[-4:])
            report = verify(store, open_home=no_home)
            assert not report.good
            bad = [verdict for verdict in report.checkpoints if not verdict.good]
            assert {verdict.status for verdict in bad} == {"missing" if kind == "missing" else "altered"}
            assert {problem.key for verdict in bad for problem in verdict.problems} == {key}
            if key.startswith("checkpoints/"):
                assert [verdict.name for verdict in bad] == [key.rsplit("/", 1)[0]]
            store.put(key, body)
    assert verify(store, open_home=no_home).good
    # An object that all share spoils all, and the arrays in it are named; a flip in what only one needs spoils that one.
    _flip(store, _data_of(store, 1), 5)
    report = verify(store, open_home=no_home)
    assert [[problem.arrays for problem in verdict.problems] for verdict in report.checkpoints] == [[("frozen",)]] * 3
    assert [verdict.status for verdict in verify(store, 2, open_home=no_home).checkpoints] == ["altered"]
    store.put(_data_of(store, 1), healthy[_data_of(store, 1)])
    _flip(store, _data_of(store, 3), 3)
    assert [verdict.name for verdict in verify(store, open_home=no_home).checkpoints if not verdict.good] == [
        refs[2].name
    ]
    assert verify(store, 2, open_home=no_home).good


def test_a_store_that_fails_is_never_taken_for_damage(store: Store) -> None:
    faulty = FaultyStore(store)
    verify(faulty, open_home=no_home)
    for number in range(len(faulty.log)):
        with pytest.raises(StoreUnavailable):
            verify(FaultyStore(store, at({number: Fault.UNAVAILABLE_BEFORE})), open_home=no_home)


def test_what_retention_drops_meanwhile_is_no_damage(store: Store) -> None:
    trainer = Trainer(store, no_home, keep=1)

    class Retaining(FaultyStore):
        done = False

        def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
            if not self.done:
                self.done = True
                with trainer:
                    trainer.save(4, tree_at(4, frozen=4))
            super().read_into(key, offset, buffer)

    report = verify(Retaining(store), open_home=no_home)
    assert report.good
    assert "dropped" in {verdict.status for verdict in report.checkpoints}


def test_altered_heads_are_reported_and_the_one_below_counts(store: Store) -> None:
    number = head_of(store).number
    _flip(store, head_key(number), 200)
    assert len(list_checkpoints(store, clock=FakeClock()).altered) == 1
    report = verify(store, open_home=no_home)
    assert (report.head, report.good) == (number - 1, False)
    for below in range(1, number):
        _flip(store, head_key(below), 200)
    with pytest.raises(IntegrityError, match="none of the run's heads"):
        list_checkpoints(store, clock=FakeClock())


def test_run_json_can_be_lost_or_altered(store: Store) -> None:
    run_id = head_of(store).run_id
    _flip(store, "run.json", 100)
    listing = list_checkpoints(store, clock=FakeClock())
    assert (listing.run_id, len(listing.altered)) == (run_id, 1)
    store.delete("run.json")
    assert list_checkpoints(store, clock=FakeClock()).run_id == run_id
