"""Runs with a base: what is sent, what keeps the base's bytes, and which bases there can be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from run_builder import (
    Tree,
    World,
    head_of,
    newest_tree,
    tree_at,
    trees_equal,
)
from trials import (
    BASE,
    FROZEN_BYTES,
    MIDDLE,
    MOVING_BYTES,
    OTHER,
    TRIAL,
    assert_homes,
    assert_whole,
    move_on,
    sent_bytes,
    trial_tree,
    world_with_base,
)

from holdfast.checkpoint.runs.unpin import unpin
from holdfast.core.errors import (
    IntegrityError,
    PermissionDenied,
    RunConflict,
    StoreUnavailable,
    UsageError,
)
from holdfast.store.base import Store
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation


def test_the_first_save_sends_what_differs_and_a_restore_reads_the_rest_from_the_base() -> None:
    world = world_with_base()
    with world.trainer(TRIAL, base=BASE) as trial:
        assert trial.restored is None
        trial.save(1, trial_tree(1))
    assert sent_bytes(world, TRIAL) == MOVING_BYTES
    assert len(world.pins(BASE)) == len(head_of(world.open(TRIAL)).pins) == 1
    with world.trainer(TRIAL, base=BASE) as trial:
        assert trial.restored is not None
        assert trees_equal(trial.restored, trial_tree(1))
        trial.save(2, trial_tree(2))
    assert sent_bytes(world, TRIAL) == 2 * MOVING_BYTES
    key = max(world.open(BASE).list("data/"), key=lambda entry: entry.size_bytes).key
    body = bytearray(world.open(BASE).get(key, max_bytes=1 << 20))
    body[100] ^= 1
    world.open(BASE).put(key, bytes(body))
    with pytest.raises(IntegrityError):
        newest_tree(world.open(TRIAL), world.open)


def test_a_frozen_part_that_is_a_small_share_of_the_bases_objects_is_not_sent_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the base's one object, optimizer state and all, the trial wants a tenth; and of another base's, too little to count."""
    world = World()
    frozen = {"weight": np.random.default_rng(1).integers(0, 256, 5_000, dtype=np.uint8)}
    moments = {"moments": np.random.default_rng(2).integers(0, 256, 45_000, dtype=np.uint8)}
    with world.trainer(BASE) as trainer:
        trainer.save(1, {**frozen, **moments})
    assert len(list(world.open(BASE).list("data/"))) == 1
    adapter = {"adapter": np.random.default_rng(3).integers(0, 256, 500, dtype=np.uint8)}
    with world.trainer(TRIAL, base=BASE) as trial:
        trial.save(1, {**frozen, **adapter})
    assert sent_bytes(world, TRIAL) == 500
    with world.trainer(OTHER, base=BASE) as trial:
        large = np.random.default_rng(4).integers(0, 256, 5_000 * 20, dtype=np.uint8)
        trial.save(1, {**frozen, "large": large})
    assert head_of(world.open(OTHER)).pins == []
    move_on(world, BASE)
    assert len(world.pins(BASE)) == 1
    world.clean(BASE, TRIAL, OTHER)


def test_retention_in_the_base_leaves_trials_whole_until_the_last_of_them_lets_go() -> None:
    world = world_with_base()
    for url in (TRIAL, OTHER):
        with world.trainer(url, keep=1, base=BASE) as trial:
            trial.save(1, trial_tree(1))
    move_on(world, BASE)
    assert [ref.step for ref in head_of(world.open(BASE)).checkpoints] == [22]
    for url in (TRIAL, OTHER):
        assert_whole(world, url, trial_tree(1))
    world.clean(BASE, TRIAL, OTHER)
    # One lets go by retention, the other by being removed.
    with world.trainer(TRIAL, keep=1, base=BASE) as trial:
        trial.save(2, trial_tree(2, frozen=9))
    assert head_of(world.open(TRIAL)).pins == []
    move_on(world, BASE, (23,))
    assert_whole(world, OTHER, trial_tree(1))
    with pytest.raises(RunConflict, match=OTHER):
        world.remove(BASE)
    world.remove(OTHER)
    move_on(world, BASE, (24,))
    assert world.pins(BASE) == []
    world.clean(BASE, TRIAL)
    assert not any(entry.key.startswith("data/1/") for entry in world.open(BASE).list("data/"))


def test_a_trial_that_goes_on_from_its_own_checkpoint_does_not_ask_the_base() -> None:
    world = world_with_base()
    with world.trainer(TRIAL, base=BASE) as trial:
        trial.save(1, trial_tree(1))
    asked: list[Operation] = []

    def plan(operation: Operation) -> Fault | None:
        asked.append(operation)
        return Fault.DENIED if operation.method in ("list", "put", "put_new") else None

    with world.trainer(
        TRIAL, base=BASE, through=lambda store: FaultyStore(store, plan) if store.url == BASE else store
    ) as trial:
        trial.save(2, trial_tree(2))
    assert {operation.key.split("/")[0] for operation in asked} == {"data"}
    assert sent_bytes(world, TRIAL) == 2 * MOVING_BYTES
    move_on(world, BASE)
    assert_whole(world, TRIAL, trial_tree(2))


def test_nothing_in_common_lets_go_of_the_base_and_of_what_it_was_known_for() -> None:
    world = world_with_base()
    with world.trainer(TRIAL, base=BASE) as trial:
        trial.save(1, {"else": np.arange(1000)})
        assert head_of(world.open(TRIAL)).pins == []
        # The frozen tensor turns up after the pin has been released: it must be sent, not referred to.
        trial.save(2, trial_tree(2))
    assert sent_bytes(world, TRIAL) == 8000 + FROZEN_BYTES + MOVING_BYTES
    move_on(world, BASE)
    assert world.pins(BASE) == []
    assert_whole(world, TRIAL, trial_tree(2))
    world.clean(BASE, TRIAL)


def test_a_named_step_is_the_base_and_the_newest_of_the_generation_otherwise() -> None:
    world = World()
    with world.trainer(BASE, keep=None) as trainer:
        for step in (1, 2):
            trainer.save(step, tree_at(step, frozen=step))
    with world.trainer(TRIAL, base=BASE, base_step="1") as trial:
        trial.save(11, trial_tree(11, frozen=1))
    assert sent_bytes(world, TRIAL) == MOVING_BYTES
    with world.trainer(OTHER, base=BASE) as trial:
        trial.save(11, trial_tree(11, frozen=1))
    assert sent_bytes(world, OTHER) == FROZEN_BYTES + MOVING_BYTES
    with pytest.raises(UsageError, match=r"base=memory://base.*step 1, 2"):
        world.trainer(MIDDLE, base=BASE, base_step=7)


def test_a_fresh_start_uses_the_pin_that_the_old_generation_needs() -> None:
    world = world_with_base()
    with world.trainer(TRIAL, base=BASE, base_step=1) as trial:
        trial.save(11, trial_tree(11))
    move_on(world, BASE)
    pins = world.pins(BASE)
    with world.trainer(TRIAL, base=BASE, fresh=True) as trial:
        assert trial.restored is None
        trial.save(11, trial_tree(11, lineage=6))
    assert world.pins(BASE) == pins
    assert sent_bytes(world, TRIAL) == 2 * MOVING_BYTES
    with world.trainer(TRIAL, base=BASE, base_step=22, fresh=True) as trial:
        assert ["step 1 of memory://base" in line for line in trial.warnings] == [True]
        trial.save(11, trial_tree(11, lineage=7))
    assert world.pins(BASE) == pins
    unpin(world.open(BASE), TRIAL, open_home=world.open, clock=world.clock, force=True)
    with world.trainer(TRIAL, base=BASE, fresh=True) as trial:
        assert ["may be lost" in line for line in trial.warnings] == [True]
        trial.save(11, trial_tree(11, frozen=22))
    assert len(world.pins(BASE)) == 1
    assert_homes(world, TRIAL, {BASE})


def _base_is_a_new_fork(world: World) -> tuple[set[str], Tree]:
    world.fork(BASE, MIDDLE, 1)
    return {BASE}, tree_at(1)


def _base_is_a_fork_that_went_on(world: World) -> tuple[set[str], Tree]:
    world.fork(BASE, MIDDLE, 1)
    with world.trainer(MIDDLE, keep=1) as middle:
        middle.save(2, tree_at(2, lineage=1))
    return {MIDDLE, BASE}, tree_at(2, lineage=1)


def _base_is_a_trial(world: World) -> tuple[set[str], Tree]:
    with world.trainer(MIDDLE, base=BASE, base_step=1) as middle:
        middle.save(2, tree_at(2, lineage=1))
    return {MIDDLE, BASE}, tree_at(2, lineage=1)


@pytest.mark.parametrize("make", [_base_is_a_new_fork, _base_is_a_fork_that_went_on, _base_is_a_trial])
def test_a_base_that_borrows_is_referred_through_to_where_the_bytes_lie(
    make: Callable[[World], tuple[set[str], Tree]],
) -> None:
    world = world_with_base()
    homes, shared = make(world)
    with world.trainer(TRIAL, base=MIDDLE) as trial:
        trial.save(1, {**shared, "adapter": np.arange(10)})
    assert sent_bytes(world, TRIAL) == 80
    assert_homes(world, TRIAL, homes)
    with world.trainer(TRIAL, base=MIDDLE) as trial:
        trial.save(2, {**shared, "adapter": np.arange(20)})
    assert sent_bytes(world, TRIAL) == 240
    assert_homes(world, TRIAL, homes)
    for url in (MIDDLE, BASE, MIDDLE, BASE):
        move_on(world, url)
    # A fork of the trial is as safe as the trial.
    world.fork(TRIAL, OTHER, 2)
    assert_homes(world, OTHER, homes | {TRIAL})
    with world.trainer(TRIAL, keep=1) as trial:
        trial.save(3, trial_tree(3, frozen=3))
    for url in (MIDDLE, BASE):
        move_on(world, url)
    assert_whole(world, OTHER, {**shared, "adapter": np.arange(20)})
    world.remove(OTHER)
    for url in (TRIAL, MIDDLE, BASE):
        move_on(world, url)
    assert world.pins(BASE) == world.pins(MIDDLE) == world.pins(TRIAL) == []
    world.clean(BASE, MIDDLE, TRIAL)


def test_a_base_that_refers_to_the_trial_itself_is_no_way_to_keep_ones_own_objects() -> None:
    world = world_with_base()
    with world.trainer(TRIAL, keep=1) as trial:
        trial.save(1, trial_tree(1))
    with world.trainer(OTHER, base=TRIAL) as other:
        other.save(1, trial_tree(1, lineage=6))
    with world.trainer(TRIAL, keep=1, base=OTHER, fresh=True) as trial:
        trial.save(2, {"moving": trial_tree(1, lineage=6)["moving"], "frozen": tree_at(0)["frozen"]})
    assert_homes(world, TRIAL, {OTHER})
    assert list(world.open(TRIAL).list("pins/")) != []
    for url in (OTHER, TRIAL, OTHER, TRIAL):
        move_on(world, url)
    world.clean(OTHER, TRIAL)


def test_where_this_run_has_a_pin_already_only_what_that_pin_keeps_is_referred_to() -> None:
    """The trial is a fork of step 1, its base another fork, of step 2: both lie in one run, of which the trial keeps step 1."""
    world = World()
    with world.trainer(BASE, keep=None) as trainer:
        for step in (1, 2):
            trainer.save(step, tree_at(step, frozen=step))
    world.fork(BASE, OTHER, 2)
    world.fork(BASE, TRIAL, 1)
    first = {"one": tree_at(1, frozen=1)["frozen"], "two": tree_at(2, frozen=2)["frozen"]}
    with world.trainer(TRIAL, keep=1, base=OTHER) as trial:
        trial.save(3, first)
    assert sent_bytes(world, TRIAL) == FROZEN_BYTES
    assert_homes(world, TRIAL, {BASE})
    world.remove(OTHER)
    move_on(world, BASE)
    assert_whole(world, TRIAL, first)
    world.fork(TRIAL, MIDDLE)
    move_on(world, TRIAL)
    move_on(world, BASE, (23,))
    assert_whole(world, MIDDLE, first)
    world.clean(BASE, TRIAL, MIDDLE)


@pytest.mark.parametrize("what", ["missing", "empty", "removed"])
def test_a_base_that_is_not_there_stops_the_run(what: str) -> None:
    world = World()
    if what != "missing":
        world.trainer(BASE).close()
    if what == "removed":
        move_on(world, BASE)
        world.remove(BASE)
    match = {"missing": "no run here", "empty": "no checkpoint yet", "removed": "has been removed"}[what]
    with pytest.raises(UsageError, match=rf"base=memory://base: .*{match}.*leave base= out"):
        world.trainer(TRIAL, base=BASE)
    assert world.pins(BASE) == []
    assert head_of(world.open(TRIAL)).pins == []


@pytest.mark.parametrize("methods", [("list", "get", "read_into"), ("put", "put_new", "delete")])
def test_a_base_that_may_not_be_read_or_pinned_says_so(methods: tuple[str, ...]) -> None:
    world = world_with_base()

    def denied(store: Store) -> Store:
        if store.url != BASE:
            return store
        return FaultyStore(store, lambda operation: Fault.DENIED if operation.method in methods else None)

    with pytest.raises(PermissionDenied, match=r"base=memory://base: .*pins/.*leave base= out"):
        world.trainer(TRIAL, base=BASE, through=denied)
    assert head_of(world.open(TRIAL)).pins == []
    assert world.pins(BASE) == []


def test_a_checkpoint_that_does_not_verify_is_no_base() -> None:
    world = world_with_base()
    older, newest = head_of(world.open(BASE)).checkpoints
    world.open(BASE).put(f"{newest.name}/part-0", b"torn")
    with pytest.raises(IntegrityError):
        world.trainer(OTHER, base=BASE, base_step=newest.step)
    with world.trainer(TRIAL, base=BASE) as trial:
        assert ["step 2 does not verify" in line for line in trial.warnings] == [True]
        trial.save(11, trial_tree(11))
    assert sent_bytes(world, TRIAL) == MOVING_BYTES
    world.open(BASE).delete(f"{older.name}/root.json")
    with pytest.raises(IntegrityError, match="no checkpoint of it verifies"):
        world.trainer(OTHER, base=BASE)
    assert head_of(world.open(OTHER)).pins == []


@pytest.mark.parametrize(
    "fault", [Fault.UNAVAILABLE_BEFORE, Fault.UNAVAILABLE_AFTER, Fault.TAKEN_BY_ITSELF, Fault.LATE]
)
def test_a_pin_without_a_clear_answer_is_never_lost_and_never_left_behind(fault: Fault) -> None:
    world = world_with_base()
    layers: list[FaultyStore] = []

    def plan(operation: Operation) -> Fault | None:
        return fault if operation.key.startswith("pins/") and operation.method == "put_new" else None

    def layer(store: Store) -> Store:
        layers.append(FaultyStore(store, plan))
        return layers[-1]

    if fault is Fault.TAKEN_BY_ITSELF:
        with world.trainer(TRIAL, base=BASE, through=layer) as trial:
            trial.save(1, trial_tree(1))
        assert len(world.pins(BASE)) == 1
    else:
        with pytest.raises(StoreUnavailable):
            world.trainer(TRIAL, base=BASE, through=layer)
        for faulty in layers:
            while faulty.pending:
                faulty.land()
        assert len(world.pins(BASE)) == (1 if fault is Fault.LATE else 0)
        with world.trainer(TRIAL, base=BASE) as trial:
            trial.save(1, trial_tree(1))
    move_on(world, BASE)
    assert len(world.pins(BASE)) == 1
    assert_whole(world, TRIAL, trial_tree(1))
    world.clean(BASE, TRIAL)
