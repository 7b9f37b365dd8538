"""A base and its trials, for tests: what both save, and what must hold for them whatever happens."""

from __future__ import annotations

from collections.abc import Callable

from run_builder import (
    Trainer,
    Tree,
    World,
    head_of,
    newest_tree,
    tree_at,
    trees_equal,
)

from holdfast.checkpoint.runs.verify import verify
from holdfast.store.base import Store

BASE, TRIAL, OTHER, MIDDLE = "memory://base", "memory://trial", "memory://other", "memory://middle"
FROZEN_BYTES = 20_000
MOVING_BYTES = 300 * 8 + 8
"""What a trial trains: everything of `tree_at` that is not frozen."""


def world_with_base(steps: tuple[int, ...] = (1, 2), keep: int = 2) -> World:
    world = World()
    with world.trainer(BASE, keep) as trainer:
        for step in steps:
            trainer.save(step)
    return world


def trial_tree(step: int, lineage: int = 5, frozen: int = 0) -> Tree:
    return tree_at(step, lineage=lineage, frozen=frozen)


def move_on(world: World, url: str, steps: tuple[int, ...] = (21, 22)) -> None:
    """The run goes on to where it retains nothing of what it had."""
    with world.trainer(url, keep=1) as trainer:
        for step in steps:
            trainer.save(step, tree_at(step, frozen=step))


def sent_bytes(world: World, url: str) -> int:
    return sum(entry.size_bytes for entry in world.open(url).list("data/"))


def assert_whole(world: World, url: str, tree: Tree) -> None:
    assert trees_equal(newest_tree(world.open(url), world.open), tree)
    assert verify(world.open(url), open_home=world.open).good


def assert_homes(world: World, url: str, homes: set[str]) -> None:
    """One pin for each home, and all of them in place."""
    pins = head_of(world.open(url)).pins
    assert sorted(pin.home for pin in pins) == sorted(homes)
    for pin in pins:
        assert f"pins/{pin.name}.json" in world.pins(pin.home)


def open_and_save(world: World, through: Callable[[Store], Store], url: str = TRIAL) -> Trainer:
    trainer = world.trainer(url, base=BASE, through=through)
    with trainer:
        trainer.save(1, trial_tree(1))
    return trainer
