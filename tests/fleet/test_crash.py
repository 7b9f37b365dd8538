"""The controller dies before and after each of its requests, to the store and to the provider, and another one goes on.

No orphan, no second machine for a launch, no theft of a run from a machine that still saves, every cent booked.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache

import pytest
from fleet_stories import NAMES, SCRIPTS, handed_over, scenario
from fleet_world import World, standing_pools
from imagined import Fuse, GivenUp

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


@cache
def requests_of(name: str) -> int:
    world, fuse = scenario(name), Fuse()
    over = world.play(SCRIPTS.get(name, lambda world: None), fuse=fuse)
    assert over.outcome == "done"
    world.check_end()
    return fuse.count


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_request(name: str) -> None:
    count = requests_of(name)
    points = range(count) if LONG else sorted({*range(30), *range(30, count, max(1, count // 12))})
    for at in points:
        for after in (False, True):
            for away_s in (30, 1500) if LONG else (30,):
                world = scenario(name)
                over = world.play(SCRIPTS.get(name, lambda world: None), fuse=Fuse(at, after=after), away_s=away_s)
                assert over.outcome == "done", (name, at, after, over, world.story())
                assert world.controllers == 2
                world.check_end()


def test_nobody_comes_back() -> None:
    """The laptop is closed: no machine outlives its grant."""
    for at in range(0, 120, 7):
        world = World(budget_microusd=5_000_000)
        controller = world.controller(Fuse(at))
        with suppress(GivenUp):
            for _ in range(60):
                controller.step()
                world.cloud.advance(10)
        world.abandon(3600)
        world.check_end(booked=False)


def test_two_controllers_at_once() -> None:
    """Two laptops on one run, both at work all the time: one machine for each launch, and no launch on the same knowledge twice."""
    for seed in range(10 if LONG else 3):
        world = World(pools=standing_pools(3), seed=seed)
        first, second = world.controller(), world.controller()
        over = None
        for turn in range(2000):
            handed_over(world)
            for controller in (first, second) if turn % 2 else (second, first):
                over = controller.step() or over
                world.check()
            if over is not None and first.over is not None and second.over is not None:
                break
            world.cloud.advance(10)
        assert first.over is not None
        assert second.over is not None
        assert over is not None
        assert over.outcome == "done"
        assert len(world.cloud.machines_) == 3, world.story()
        world.check_end()
