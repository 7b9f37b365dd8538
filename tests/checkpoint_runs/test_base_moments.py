"""Everything that can happen to a run with a base, at every store operation of its opening and its first save."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from run_builder import (
    Crash,
    Interruptions,
    Trainer,
    World,
    checkpoints_of,
    head_of,
    tree_at,
)
from trials import (
    BASE,
    FROZEN_BYTES,
    MOVING_BYTES,
    OTHER,
    TRIAL,
    assert_whole,
    move_on,
    open_and_save,
    sent_bytes,
    trial_tree,
    world_with_base,
)

from holdfast.checkpoint.retain import pinned_keys
from holdfast.core.errors import (
    Fenced,
    HoldfastError,
    RunConflict,
    SaveError,
)
from holdfast.testing.faulty_store import Fault, FaultyStore, Operation


@pytest.mark.parametrize("after", [False, True])
# A process that is gone in the middle of a sweep is an exception in the saver's thread here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("again", ["with base", "without", "remove"])
def test_killed_at_every_store_operation(again: str, after: bool) -> None:
    """It dies anywhere between its claim and the end of its first save's sweep; then the base goes on, and somebody comes back."""
    left_pins = 0
    for at in itertools.count():
        world = world_with_base()
        crash = Interruptions(at, after=after, crash=True)
        try:
            open_and_save(world, crash.wrap)
        except (Crash, SaveError):
            pass
        if crash.counted <= at:
            break
        committed = checkpoints_of(world.open(TRIAL))
        left_pins += bool(world.pins(BASE)) and not committed
        move_on(world, BASE)
        if committed:
            assert_whole(world, TRIAL, trial_tree(1))
        if again == "remove" and any(world.open(TRIAL).list("heads/")):
            world.remove(TRIAL)
        else:
            with world.trainer(TRIAL, keep=1, base=BASE if again == "with base" else None) as trial:
                assert (trial.restored is not None) == bool(committed)
                trial.save(2, trial_tree(2, frozen=22 if not committed else 0))
            assert_whole(world, TRIAL, trial_tree(2, frozen=22 if not committed else 0))
            assert len(head_of(world.open(TRIAL)).pins) == int(bool(committed) or again == "with base")
            world.clean(TRIAL)
        move_on(world, BASE, (23,))
        assert len(world.pins(BASE)) == len(head_of(world.open(TRIAL)).pins)
        world.clean(BASE)
    assert at > 25
    assert left_pins > 2


def _base_retention(world: World) -> Callable[[], None]:
    trainer = world.trainer(BASE, keep=1)

    def act() -> None:
        with trainer:
            trainer.save(8, tree_at(8, frozen=8))

    return act


def _base_saves_and_sweeps_twice(world: World) -> Callable[[], None]:
    trainer = world.trainer(BASE, keep=1)

    def act() -> None:
        with trainer:
            trainer.save(8)
            trainer.save(9)

    return act


def _base_removal(world: World) -> Callable[[], None]:
    def act() -> None:
        try:
            world.remove(BASE)
        except RunConflict:
            pass

    return act


def _another_attempt(world: World) -> Callable[[], None]:
    def act() -> None:
        with world.trainer(TRIAL, base=BASE) as trainer:
            trainer.save(1, trial_tree(1))

    return act


def _another_trial(world: World) -> Callable[[], None]:
    def act() -> None:
        open_and_save(world, lambda store: store, OTHER)
        move_on(world, OTHER)

    return act


@pytest.mark.parametrize(
    ("adversary", "outcomes_allowed"),
    [
        (_base_retention, {"saved"}),
        (_base_saves_and_sweeps_twice, {"saved"}),
        (_base_removal, {"saved", "UsageError"}),
        (_another_attempt, {"saved", "Fenced"}),
        (_another_trial, {"saved"}),
    ],
)
def test_somebody_acts_at_every_store_operation(
    adversary: Callable[[World], Callable[[], None]], outcomes_allowed: set[str]
) -> None:
    outcomes = set()
    for at in itertools.count():
        world = world_with_base()
        act = adversary(world)
        interruptions = Interruptions(at, act, after=True)
        try:
            open_and_save(world, interruptions.wrap)
            outcomes.add("saved")
        except (HoldfastError, Fenced) as error:
            outcomes.add(type(error).__name__)
        if interruptions.counted <= at:
            act()
            break
        if checkpoints_of(world.open(TRIAL)):
            assert_whole(world, TRIAL, trial_tree(1))
        gone = head_of(world.open(BASE)).removed
        for url in (TRIAL, BASE, TRIAL, BASE):
            if not (gone and url == BASE):
                move_on(world, url)
        world.clean(TRIAL)
        if not gone:
            assert world.pins(BASE) == []
            world.clean(BASE)
    assert outcomes == outcomes_allowed


def test_two_trials_at_once_share_one_base_at_every_interleaving_of_the_second_within_the_first() -> None:
    """The second opens before, and saves and lets go after, any operation of the first."""
    for at in itertools.count():
        world = world_with_base()
        second = world.trainer(OTHER, keep=1, base=BASE)

        def act(world: World = world, second: Trainer = second) -> None:
            second.save(1, trial_tree(1, lineage=6))
            move_on(world, BASE)

        interruptions = Interruptions(at, act, after=True)
        try:
            open_and_save(world, interruptions.wrap)
            if interruptions.counted <= at:
                act()
                break
        finally:
            second.close()
        assert_whole(world, OTHER, trial_tree(1, lineage=6))
        assert_whole(world, TRIAL, trial_tree(1))
        assert sent_bytes(world, OTHER) == MOVING_BYTES
        move_on(world, BASE, (23,))
        assert len(world.pins(BASE)) == sum(len(head_of(world.open(url)).pins) for url in (TRIAL, OTHER))
        world.clean(BASE, TRIAL, OTHER)


def test_a_sweep_of_the_base_that_is_under_way_sees_a_trial_that_comes_to_be() -> None:
    outcomes = set()
    for at in itertools.count():
        world = world_with_base()

        def act(world: World = world) -> None:
            open_and_save(world, lambda store: store)

        interruptions = Interruptions(at, act, after=True)
        with world.trainer(BASE, keep=1, through=interruptions.wrap) as base:
            base.save(8, tree_at(8, frozen=8))
            base.save(9, tree_at(9, frozen=9))
        if interruptions.counted <= at:
            break
        outcomes.add(sent_bytes(world, TRIAL))
        assert_whole(world, TRIAL, trial_tree(1))
        move_on(world, BASE)
        assert_whole(world, TRIAL, trial_tree(1))
        world.clean(BASE, TRIAL)
    assert outcomes == {MOVING_BYTES, MOVING_BYTES + FROZEN_BYTES}


def test_a_trial_with_checkpoints_of_its_own_that_pinned_too_late_and_died_does_not_stop_the_bases_sweeps() -> None:
    world = world_with_base()
    with world.trainer(TRIAL) as trial:
        trial.save(1, {"own": np.arange(5)})

    dying = False

    def plan(operation: Operation) -> Fault | None:
        """Between the choice and the pin the base drops the checkpoint, and right after the pin the trial dies."""
        nonlocal dying
        if dying:
            raise Crash
        if operation.key.startswith("pins/") and operation.method == "put_new":
            move_on(world, BASE)
            dying = True
        return None

    with pytest.raises(Crash):
        world.trainer(TRIAL, base=BASE, through=lambda store: FaultyStore(store, plan) if store.url == BASE else store)
    assert pinned_keys(world.open(BASE), world.open).targets == [TRIAL]
    move_on(world, BASE)
    world.clean(BASE)
    with world.trainer(TRIAL, keep=1) as trial:
        trial.save(2, {"own": np.arange(6)})
    move_on(world, BASE)
    assert world.pins(BASE) == []
