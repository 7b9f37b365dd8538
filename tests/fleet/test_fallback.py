"""On-demand that only fills a gap: it stays until spot is back, for every controller, and goes then."""

from __future__ import annotations

from typing import Any

import pytest
from fleet_world import DEMAND_MICROUSD_H, SPOT_MICROUSD_H, World, always
from imagined import Spec, pool

from holdfast.policy.backoff import Fallback
from holdfast.policy.market.rules_facts import Rules


def gap_world(gap_s: range, **options: Any) -> World:
    """Spot in two zones, and nowhere during the gap."""
    world: World

    def there(now_s: int) -> bool:
        return now_s - world.born_s not in gap_s

    pools = {pool(zone): Spec(lambda _: SPOT_MICROUSD_H, there) for zone in ("z0", "z1")}
    pools[pool("z0", "on-demand")] = Spec(lambda _: DEMAND_MICROUSD_H, always)
    world = World(pools=pools, rules=Rules(fallback=Fallback(None, 60)), **options)
    return world


def ends_the_gap_with_its_machines(gap_s: range) -> Any:
    def script(world: World) -> None:
        machine = world.working()
        if machine is not None and machine.pool.market == "spot" and world.cloud.now_s - world.born_s in gap_s:
            world.cloud.preempt(machine, 0)

    return script


@pytest.mark.parametrize("controllers", ["one", "a new one every five minutes"])
@pytest.mark.parametrize("policy", ["greedy", "ours"])
def test_through_a_gap_on_one_machine(policy: str, controllers: str) -> None:
    """With hours to spare the policy would rather wait; the user has said to wait a minute at most."""
    gap_s = range(600, 3000)
    world = gap_world(gap_s, work_s=5400, deadline_s=12 * 3600, policy=policy)
    script = ends_the_gap_with_its_machines(gap_s)
    over = None
    for _ in range(12 * 12):
        over = world.play_for(300 if controllers != "one" else 12 * 3600, script)
        if over is not None:
            break
    assert over is not None, world.story()
    assert over.outcome == "done"
    markets = [machine.pool.market for machine in world.cloud.machines_]
    assert markets == ["spot", "on-demand", "spot"], world.story()
    world.check_end()


def test_back_to_spot_after_a_standby_was_lost() -> None:
    """The first replacement is taken while it boots; what fills the gap is left for the second one all the same."""
    gap_s = range(600, 1800)
    world = gap_world(gap_s, work_s=5400, deadline_s=12 * 3600, policy="greedy")
    gap = ends_the_gap_with_its_machines(gap_s)

    def script(world: World) -> None:
        gap(world)
        standby = [machine for machine in world.cloud.machines_ if machine.pool.market == "spot"][1:]
        if len(standby) == 1 and standby[0].preempt_at_s is None and standby[0].gone_s is None:
            world.cloud.preempt(standby[0], 0)

    over = world.play(script)
    assert over.outcome == "done"
    markets = [machine.pool.market for machine in world.cloud.machines_]
    assert markets == ["spot", "on-demand", "spot", "spot"], world.story()
    world.check_end()


@pytest.mark.parametrize("later_s", [0, 30, 640, 700])
def test_two_controllers_of_one_mind(later_s: int) -> None:
    """Whichever of them bought what fills the gap, the other one does not take it for something that nobody asked for."""
    gap_s = range(600, 3000)
    world = gap_world(gap_s, work_s=5400, deadline_s=12 * 3600, policy="ours")
    script = ends_the_gap_with_its_machines(gap_s)
    assert world.play_for(later_s, script) is None
    both = [world.controller(), world.controller()]
    overs: list[Any] = []
    while not overs:
        script(world)
        for controller in both:
            over = controller.step()
            overs += [] if over is None else [over]
            world.check()
            world.cloud.advance(5)
        assert world.cloud.now_s < world.born_s + 12 * 3600, world.story()
    markets = [machine.pool.market for machine in world.cloud.machines_]
    assert markets == ["spot", "on-demand", "spot"], world.story()
    for _ in range(10):
        both[0].step()
        world.cloud.advance(10)
    world.check_end()
