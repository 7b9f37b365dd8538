"""Pins that nobody takes back: which may go, and which are kept."""

from __future__ import annotations

import pytest
from run_builder import (
    head_of,
)
from trials import (
    BASE,
    MIDDLE,
    OTHER,
    TRIAL,
    move_on,
    open_and_save,
    trial_tree,
    world_with_base,
)

from holdfast.checkpoint.runs.unpin import list_pins, unpin
from holdfast.core.errors import (
    RunConflict,
    UsageError,
)
from holdfast.store.base import Store
from holdfast.testing.faulty_store import Fault, FaultyStore


def test_a_pin_goes_only_when_nobody_can_need_it() -> None:
    world = world_with_base()
    base = world.open(BASE)
    open_and_save(world, lambda store: store)
    world.fork(BASE, OTHER, 1)

    def states() -> dict[str, str]:
        lines = list_pins(base, open_home=world.open, clock=world.clock)
        return {line.target: line.state for line in lines}

    def take(target: str, *, force: bool = False, denied: bool = False) -> None:
        def open_home(url: str) -> Store:
            return (
                FaultyStore(world.open(url), lambda operation: Fault.DENIED)
                if denied and url != BASE
                else world.open(url)
            )

        unpin(base, target, open_home=open_home, clock=world.clock, force=force)

    assert states() == {TRIAL: "in use", OTHER: "in use"}
    with pytest.raises(RunConflict, match=r"still refers to the checkpoint of step 2.*checkpoints rm"):
        take(TRIAL)
    with pytest.raises(RunConflict, match=r"is not known"):
        take(TRIAL, denied=True)
    with pytest.raises(UsageError, match=f"there are pins of {OTHER}, {TRIAL}"):
        take(MIDDLE)
    with world.trainer(TRIAL, keep=1) as trial:
        trial.save(2, trial_tree(2, frozen=3))
    assert states() == {TRIAL: "released", OTHER: "in use"}
    take(TRIAL)
    for entry in list(world.open(OTHER).list()):
        world.open(OTHER).delete(entry.key)
    assert states() == {OTHER: "no target"}
    move_on(world, BASE)
    kept = len(list(base.list("data/")))
    take(OTHER)
    move_on(world, BASE, (23,))
    assert len(list(base.list("data/"))) < kept
    assert world.pins(BASE) == []
    world.clean(BASE)
    with pytest.raises(UsageError, match="nobody"):
        take(OTHER)
    with pytest.raises(UsageError, match="no run here"):
        list_pins(world.open(MIDDLE), open_home=world.open, clock=world.clock)


def test_a_pin_whose_target_has_an_altered_head_is_kept_and_an_altered_pin_can_be_forced_away() -> None:
    world = world_with_base()
    open_and_save(world, lambda store: store)
    number = head_of(world.open(TRIAL)).number
    world.open(TRIAL).put(f"heads/{number + 1:08d}.json", b"{}")
    (line,) = list_pins(world.open(BASE), open_home=world.open, clock=world.clock)
    assert (line.state, line.step, line.age_s) == ("unknown", 2, 0.0)
    world.open(BASE).put(line.pin, b"{}")
    (line,) = list_pins(world.open(BASE), open_home=world.open, clock=world.clock)
    assert (line.state, line.target, line.step) == ("altered", "", None)
    with pytest.raises(RunConflict, match="does not verify"):
        unpin(world.open(BASE), line.pin, open_home=world.open, clock=world.clock)
    unpin(world.open(BASE), line.pin, open_home=world.open, clock=world.clock, force=True)
    assert world.pins(BASE) == []
