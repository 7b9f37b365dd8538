"""Forks against everything that can happen to them: retention and removal of the source at every moment, a crash at every
moment."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from run_builder import (
    Crash,
    FakeClock,
    Interruptions,
    Trainer,
    World,
    checkpoints_of,
    head_of,
    newest_tree,
    read_tree,
    tree_at,
    trees_equal,
)

from holdfast.checkpoint.retain import pinned_keys
from holdfast.checkpoint.runs.fork import Forked, Mode, fork
from holdfast.checkpoint.runs.remove import remove
from holdfast.checkpoint.runs.verify import verify
from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    RunConflict,
    RunRemoved,
    StoreUnavailable,
    UsageError,
)
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation

MODES: tuple[Mode, ...] = ("reference", "copy")


SOURCE, TARGET, THIRD = "memory://source", "memory://target", "memory://third"


def world_with_source(steps: tuple[int, ...] = (1, 2), keep: int = 2) -> World:
    world = World()
    with world.trainer(SOURCE, keep) as trainer:
        for step in steps:
            trainer.save(step)
    return world


@pytest.mark.parametrize("mode", MODES)
def test_a_fork_resumes_from_the_step_and_goes_its_own_way(mode: Mode) -> None:
    world = world_with_source()
    forked = world.fork(SOURCE, TARGET, 1, mode)
    assert (forked.checkpoint.step, forked.mode) == (1, mode)
    assert forked.homes == ((SOURCE,) if mode == "reference" else ())
    assert len(world.pins(SOURCE)) == (1 if mode == "reference" else 0)
    with world.trainer(TARGET) as trainer:
        assert trainer.restored is not None
        assert trees_equal(trainer.restored, tree_at(1))
        trainer.save(2, tree_at(2, lineage=7))
    saved = trainer.sink.named("save.committed")[0].fields
    assert saved["deduplicated_bytes"] == 20_000
    assert trees_equal(newest_tree(world.open(TARGET), world.open), tree_at(2, lineage=7))
    assert verify(world.open(TARGET), open_home=world.open).good
    assert head_of(world.open(TARGET)).run_id != head_of(world.open(SOURCE)).run_id
    world.clean(SOURCE, TARGET)


def test_a_copy_stands_alone() -> None:
    world = world_with_source()
    forked = world.fork(SOURCE, TARGET, "latest", "copy")
    assert forked.copied_bytes == 20_000 + 300 * 8 + 8
    for entry in list(world.open(SOURCE).list()):
        world.open(SOURCE).delete(entry.key)
    assert trees_equal(newest_tree(world.open(TARGET), world.open), tree_at(2))
    world.clean(TARGET)


def test_the_source_spares_what_is_pinned_until_the_fork_no_longer_needs_it() -> None:
    world = world_with_source()
    world.fork(SOURCE, TARGET, 1)
    with world.trainer(SOURCE, keep=1) as source:
        for step in (3, 4, 5):
            # Nothing of the forked checkpoint is retained any more: all of its bytes live by the pin alone.
            source.save(step, tree_at(step, frozen=step))
    assert [ref.step for ref in head_of(world.open(SOURCE)).checkpoints] == [5]
    world.clean(SOURCE)
    with world.trainer(TARGET, keep=1) as target:
        assert target.restored is not None
        assert trees_equal(target.restored, tree_at(1))
        target.save(2, tree_at(2, lineage=1))
    # The borrowed checkpoint is gone, but the fork's own one shares the frozen array with it.
    assert [ref.home for ref in head_of(world.open(TARGET)).checkpoints] == [None]
    assert len(head_of(world.open(TARGET)).pins) == 1
    with world.trainer(SOURCE, keep=1) as source:
        source.save(6, tree_at(6, frozen=6))
    assert trees_equal(newest_tree(world.open(TARGET), world.open), tree_at(2, lineage=1))
    with world.trainer(TARGET, keep=1) as target:
        target.save(3, tree_at(3, lineage=1, frozen=99))
    assert head_of(world.open(TARGET)).pins == []
    with world.trainer(SOURCE, keep=1) as source:
        source.save(7, tree_at(7, frozen=7))
    assert world.pins(SOURCE) == []
    world.clean(SOURCE, TARGET)


def test_a_fork_of_a_fork_pins_every_run_that_its_bytes_lie_in() -> None:
    world = world_with_source()
    world.fork(SOURCE, TARGET, 1)
    with world.trainer(TARGET) as target:
        target.save(2, tree_at(2, lineage=1))
    forked = world.fork(TARGET, THIRD, 2)
    assert forked.homes == (TARGET, SOURCE)
    # Both ancestors go on without anything of it, and the fork in the middle drops its pin.
    for url in (TARGET, SOURCE, TARGET, SOURCE):
        with world.trainer(url, keep=1) as trainer:
            trainer.save(9, tree_at(9, frozen=50))
            trainer.save(10, tree_at(10, frozen=51))
    assert head_of(world.open(TARGET)).pins == []
    assert len(world.pins(SOURCE)) == 1
    assert trees_equal(newest_tree(world.open(THIRD), world.open), tree_at(2, lineage=1))
    assert verify(world.open(THIRD), open_home=world.open).good
    world.clean(SOURCE, TARGET, THIRD)
    with world.trainer(THIRD, keep=1) as third:
        third.save(3, tree_at(3, frozen=60))
    for url in (TARGET, SOURCE):
        with world.trainer(url, keep=1) as trainer:
            trainer.save(11, tree_at(11, frozen=61))
    assert world.pins(SOURCE) == world.pins(TARGET) == []
    world.clean(SOURCE, TARGET, THIRD)


def test_a_borrowed_checkpoint_forked_again_is_pinned_where_it_lies() -> None:
    world = world_with_source()
    world.fork(SOURCE, TARGET, 1)
    forked = world.fork(TARGET, THIRD)
    assert forked.homes == (SOURCE,)
    assert world.pins(TARGET) == []
    remove(world.open(TARGET), open_home=world.open, clock=world.clock, tokens=seeded_tokens(5))
    with world.trainer(SOURCE, keep=1) as source:
        source.save(3, tree_at(3, frozen=3))
        source.save(4, tree_at(4, frozen=4))
    assert trees_equal(newest_tree(world.open(THIRD), world.open), tree_at(1))
    world.clean(SOURCE)


def _source_retention(world: World) -> Callable[[], None]:
    trainer = world.trainer(SOURCE, keep=1)

    def act() -> None:
        trainer.save(8, tree_at(8, frozen=8))
        trainer.close()

    return act


def _source_removal(world: World) -> Callable[[], None]:
    def act() -> None:
        try:
            remove(world.open(SOURCE), open_home=world.open, clock=world.clock, tokens=seeded_tokens(77))
        except RunConflict:
            pass

    return act


def _target_trainer(world: World) -> Callable[[], None]:
    def act() -> None:
        with world.trainer(TARGET) as trainer:
            trainer.save(1, tree_at(1, lineage=5))

    return act


def _settle(world: World, *urls: str) -> None:
    """The next attempts of everybody: whatever was left behind must be gone afterwards."""
    for url in (*urls, *urls):
        if not (any(world.open(url).list("heads/")) and head_of(world.open(url)).removed):
            with world.trainer(url, keep=1) as trainer:
                trainer.save(20, tree_at(20, frozen=20))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adversary", [_source_retention, _source_removal, _target_trainer])
def test_somebody_acts_at_any_moment_of_a_fork(mode: Mode, adversary: Callable[[World], Callable[[], None]]) -> None:
    outcomes = set()
    for at in itertools.count():
        world = world_with_source()
        act = adversary(world)
        interruptions = Interruptions(at, act, after=True)
        forked: Forked | None = None
        try:
            forked = world.fork(SOURCE, TARGET, 1, mode, through=interruptions.wrap)
            outcomes.add("forked")
        except HoldfastError as error:
            outcomes.add(type(error).__name__)
        if interruptions.counted <= at:
            act()
            break
        checkpoints = checkpoints_of(world.open(TARGET))
        if forked is not None and checkpoints[-1] == forked.checkpoint:
            assert trees_equal(newest_tree(world.open(TARGET), world.open), tree_at(1))
        if checkpoints:
            assert verify(world.open(TARGET), open_home=world.open).good
        _settle(world, TARGET, SOURCE)
        assert world.pins(SOURCE) == [] or head_of(world.open(SOURCE)).removed
        world.clean(TARGET)
        if not head_of(world.open(SOURCE)).removed:
            world.clean(SOURCE)
    assert "forked" in outcomes
    assert outcomes - {"forked"} <= {"RunConflict", "RunRemoved", "Fenced", "UsageError"}
    assert len(outcomes) > 1


def test_retention_of_both_ancestors_at_any_moment_of_a_fork_of_a_fork() -> None:
    outcomes = set()
    for at in itertools.count():
        world = world_with_source()
        world.fork(SOURCE, TARGET, 1)
        with world.trainer(TARGET) as target:
            target.save(2, tree_at(2, lineage=1))
        middle, oldest = world.trainer(TARGET, keep=1), world.trainer(SOURCE, keep=1)

        def act(middle: Trainer = middle, oldest: Trainer = oldest) -> None:
            with middle, oldest:
                middle.save(5, tree_at(5, frozen=5))
                oldest.save(5, tree_at(5, frozen=5))

        interruptions = Interruptions(at, act, after=True)
        try:
            world.fork(TARGET, THIRD, 2, through=interruptions.wrap)
            outcomes.add("forked")
        except (RunConflict, UsageError) as error:
            outcomes.add(type(error).__name__)
        if interruptions.counted <= at:
            middle.close()
            oldest.close()
            break
        if checkpoints_of(world.open(THIRD)):
            assert trees_equal(newest_tree(world.open(THIRD), world.open), tree_at(2, lineage=1))
        _settle(world, THIRD, TARGET, SOURCE)
        assert world.pins(SOURCE) == world.pins(TARGET) == []
        world.clean(TARGET, SOURCE)
    assert outcomes == {"forked", "RunConflict", "UsageError"}


def test_a_fork_of_a_fork_happens_within_a_sweep_of_the_oldest_run() -> None:
    """The oldest run lists its pins; then a third run takes over from the fork, and the fork drops its own pin: the sweep must
    see."""
    outcomes = set()
    for at in itertools.count():
        world = world_with_source()
        world.fork(SOURCE, TARGET, 1)
        with world.trainer(SOURCE, keep=1) as source:
            source.save(5, tree_at(5, frozen=5))

        def act(world: World = world) -> None:
            world.fork(TARGET, THIRD, 1)
            with world.trainer(TARGET, keep=1) as target:
                target.save(6, tree_at(6, frozen=6))

        interruptions = Interruptions(at, act, after=True)
        trainer = Trainer(
            interruptions.wrap(world.open(SOURCE)),
            lambda url, world=world, around=interruptions: around.wrap(world.open(url)),  # type: ignore[misc]
            keep=1,
            seed=500,
        )
        trainer.save(7, tree_at(7, frozen=7))
        trainer.close()
        if interruptions.counted <= at:
            break
        outcomes.add(len(pinned_keys(world.open(SOURCE), world.open).targets))
        assert trees_equal(newest_tree(world.open(THIRD), world.open), tree_at(1))
    assert outcomes == {1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", ["train", "fork", "remove"])
@pytest.mark.parametrize("after", [False, True])
def test_a_fork_that_crashes_at_any_moment_leaves_nothing_behind(mode: Mode, again: str, after: bool) -> None:
    for at in itertools.count():
        world = world_with_source()
        crash = Interruptions(at, after=after, crash=True)
        try:
            world.fork(SOURCE, TARGET, 1, mode, through=crash.wrap)
            break
        except Crash:
            pass
        with world.trainer(SOURCE, keep=1) as source:
            source.save(3, tree_at(3, frozen=3))
        target = world.open(TARGET)
        if again == "fork" and not checkpoints_of(target):
            world.fork(SOURCE, TARGET, 3, mode)
            assert trees_equal(newest_tree(target, world.open), tree_at(3, frozen=3))
        if again == "remove" and any(target.list("heads/")):
            remove(target, open_home=world.open, clock=world.clock, tokens=seeded_tokens(78))
        else:
            with world.trainer(TARGET) as trainer:
                assert trainer.restored is None or trees_equal(trainer.restored, tree_at(1)) or again == "fork"
                trainer.save(4, tree_at(4, lineage=2))
            world.clean(TARGET)
        _settle(world, SOURCE)
        world.clean(SOURCE)
        if again == "remove":
            assert world.pins(SOURCE) == []
    assert at > 10


@pytest.mark.parametrize(
    "fault", [Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.TAKEN_BY_ITSELF, Fault.LATE]
)
def test_a_pin_without_a_clear_answer_is_never_lost_and_never_left_behind(fault: Fault) -> None:
    world = world_with_source()
    layers: list[FaultyStore] = []

    def plan(operation: Operation) -> Fault | None:
        return fault if operation.key.startswith("pins/") and operation.method == "put_new" else None

    def layer(store: Store) -> Store:
        layers.append(FaultyStore(store, plan))
        return layers[-1]

    if fault is Fault.TAKEN_BY_ITSELF:
        world.fork(SOURCE, TARGET, 1, through=layer)
        assert len(world.pins(SOURCE)) == 1
    else:
        with pytest.raises(StoreUnavailable):
            world.fork(SOURCE, TARGET, 1, through=layer)
        for faulty in layers:
            while faulty.pending:
                faulty.land()
        assert len(world.pins(SOURCE)) == (1 if fault is Fault.LATE else 0)
    _settle(world, TARGET, SOURCE)
    assert world.pins(SOURCE) == []
    world.clean(SOURCE, TARGET)


def test_a_source_that_may_only_be_read_can_be_copied() -> None:
    world = world_with_source()

    def read_only(store: Store) -> Store:
        if store.url != SOURCE:
            return store
        return FaultyStore(
            store, lambda operation: Fault.DENIED if operation.method in ("put", "put_new", "delete") else None
        )

    with pytest.raises(PermissionDenied, match="--copy"):
        world.fork(SOURCE, TARGET, 1, through=read_only)
    world.fork(SOURCE, TARGET, 1, "copy", through=read_only)
    assert trees_equal(newest_tree(world.open(TARGET), world.open), tree_at(1))
    world.clean(SOURCE)


def test_a_copy_never_carries_altered_bytes_over() -> None:
    world = world_with_source()
    source = world.open(SOURCE)
    key = max(source.list("data/"), key=lambda entry: entry.size_bytes).key
    body = bytearray(source.get(key, max_bytes=1 << 20))
    body[100] ^= 1
    source.put(key, bytes(body))
    with pytest.raises(IntegrityError, match=key):
        world.fork(SOURCE, TARGET, 1, "copy")
    assert head_of(world.open(TARGET)).checkpoints == []
    assert world.pins(SOURCE) == []


def test_what_cannot_be_forked_is_refused_before_anything_is_written() -> None:
    world = world_with_source()
    with pytest.raises(UsageError, match="itself"):
        world.fork(SOURCE, SOURCE)
    with pytest.raises(UsageError, match="step 1, 2"):
        world.fork(SOURCE, TARGET, 5)
    with pytest.raises(UsageError, match="no run"):
        world.fork(THIRD, TARGET)
    with pytest.raises(UsageError, match="--copy"):
        world.fork(SOURCE, "s3://bucket/run")
    assert list(world.open(TARGET).list()) == []
    world.fork(SOURCE, TARGET)
    with pytest.raises(RunConflict, match="already"):
        world.fork(SOURCE, TARGET)
    remove(world.open(TARGET), open_home=world.open, clock=world.clock, tokens=seeded_tokens(3))
    with pytest.raises(RunConflict, match="another URL"):
        world.fork(SOURCE, TARGET)
    with pytest.raises(RunRemoved):
        world.fork(TARGET, THIRD)


def test_a_damaged_pinned_checkpoint_stops_the_sweep_instead_of_losing_what_is_left() -> None:
    world = world_with_source()
    forked = world.fork(SOURCE, TARGET, 1)
    world.open(SOURCE).delete(f"{forked.checkpoint.name}/root.json")
    with pytest.raises(IntegrityError, match=TARGET):
        pinned_keys(world.open(SOURCE), world.open)
    with world.trainer(SOURCE, keep=1) as source:
        source.save(3, tree_at(3, frozen=3))
        source.save(4, tree_at(4, frozen=4))
    assert any(entry.key.startswith("data/1/") for entry in world.open(SOURCE).list("data/"))


def test_a_target_that_cannot_be_seen_keeps_its_pin() -> None:
    """An absent folder may be a disk that is not mounted here."""
    world = world_with_source()
    world.fork(SOURCE, TARGET, 1)
    for entry in list(world.open(TARGET).list()):
        world.open(TARGET).delete(entry.key)
    with world.trainer(SOURCE, keep=1) as source:
        source.save(3, tree_at(3, frozen=3))
    assert len(world.pins(SOURCE)) == 1
    world.clean(SOURCE)


def test_forks_between_folders(tmp_path: object) -> None:
    stores: dict[str, Store] = {}

    def open_home(url: str) -> Store:
        return stores.setdefault(url, LocalStore(url.removeprefix("file://")))

    source, target, copy = (f"file://{tmp_path}/{name}" for name in ("source", "target", "copy"))
    with Trainer(open_home(source), open_home, seed=1) as trainer:
        trainer.save(1)
    for url, mode in zip((target, copy), MODES, strict=True):
        fork(source, url, 1, mode, open_home=open_home, clock=FakeClock(), tokens=seeded_tokens(9 + MODES.index(mode)))
        with Trainer(open_home(url), open_home, seed=2) as trainer:
            assert trainer.restored is not None
            assert trees_equal(trainer.restored, tree_at(1))
            trainer.save(2, tree_at(2, lineage=1))
    with Trainer(open_home(source), open_home, seed=3, keep=1) as trainer:
        trainer.save(5, tree_at(5, frozen=5))
    for url in (target, copy):
        ref = head_of(open_home(url)).checkpoints[-1]
        assert trees_equal(read_tree(open_home(url), ref, open_home), tree_at(2, lineage=1))
    for store in stores.values():
        store.close()


def test_a_reference_whose_source_has_lost_the_object_is_found_by_verify() -> None:
    world = world_with_source()
    forked = world.fork(SOURCE, TARGET, 1)
    key = max(world.open(SOURCE).list("data/"), key=lambda entry: entry.size_bytes).key
    world.open(SOURCE).delete(key)
    report = verify(world.open(TARGET), open_home=world.open)
    assert not report.good
    assert [(problem.kind, problem.home) for problem in report.checkpoints[0].problems] == [("missing", SOURCE)]
    with pytest.raises(NotFound):
        read_tree(world.open(TARGET), forked.checkpoint, world.open)
