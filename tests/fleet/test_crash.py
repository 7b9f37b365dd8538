"""The controller dies before and after each of its requests, to the store and to the provider, and another one goes on.

No orphan, no second machine for a launch, no theft of a run from a machine that still saves, every cent booked.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache

import pytest
from fleet_world import DEMAND_MICROUSD_H, SPOT_MICROUSD_H, World, always, standing_pools
from imagined import Faults, Fuse, GivenUp, Spec, pool

from holdfast.policy.backoff import Fallback
from holdfast.policy.market.rules_facts import Rules

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"


def handed_over(world: World) -> None:
    """A notice after ten minutes, a loss without one after twenty."""
    machine, now_s = world.working(), world.cloud.now_s - world.born_s
    if machine is None or machine.preempt_at_s is not None:
        return
    if 600 <= now_s < 1200 and len(world.cloud.claims) == 1:
        world.cloud.preempt(machine, 120)
    if now_s >= 1200 and len(world.cloud.claims) == 2:
        world.cloud.preempt(machine, 0)


def advised(world: World) -> None:
    """Advice to move after ten minutes, with nothing behind it; a second one that is taken back while its replacement boots."""
    machine, now_s = world.working(), world.cloud.now_s - world.born_s
    if machine is None or machine.told_at_s is not None:
        return
    if now_s >= 600 and len(world.cloud.claims) == 1:
        machine.told_at_s, machine.withdraw_at_s = world.cloud.now_s, world.cloud.now_s + 900
    elif now_s >= 1300 and len(world.cloud.claims) == 2 and not machine.heard_notice:
        machine.told_at_s, machine.withdraw_at_s = world.cloud.now_s, world.cloud.now_s + 40


def scenario(name: str) -> World:
    if name == "handed over":
        return World()
    if name == "advised":
        return World(cloud_options={"advice": True})
    if name == "lost answers":
        return World(cloud_options={"faults": Faults(lost_answer=1.0)}, work_s=900)
    if name == "tokens ignored":
        return World(cloud_options={"honours_tokens": False, "faults": Faults(lost_answer=0.5)}, work_s=900)
    if name == "blind":
        return World(cloud_options={"list_delay_s": 300, "faults": Faults(lost_answer=1.0)}, work_s=900)
    assert name == "gap"
    pools = {
        pool("z0"): Spec(lambda _: SPOT_MICROUSD_H, lambda now_s: (now_s // 600) % 3 == 0),
        pool("z0", "on-demand"): Spec(lambda _: DEMAND_MICROUSD_H, always),
    }
    return World(pools=pools, rules=Rules(fallback=Fallback(2, 120)), work_s=1500)


SCRIPTS = {"handed over": handed_over, "advised": advised}
NAMES = ("handed over", "advised", "lost answers", "tokens ignored", "blind", "gap")


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
