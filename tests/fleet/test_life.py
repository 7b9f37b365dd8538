"""A run's life under a controller: launched, taken, handed over, finished; and what it costs, to the cent."""

from __future__ import annotations

import pytest
from fleet_world import DEMAND_MICROUSD_H, SPOT_MICROUSD_H, World, always
from imagined import Faults, Spec, pool

from holdfast.policy.market.rules_facts import Rules


def test_one_machine_to_the_end() -> None:
    world = World()
    over = world.play()
    assert over.outcome == "done"
    assert len(world.cloud.machines_) == 1
    world.check_end()


def test_preempted_with_notice() -> None:
    world = World()

    def script(world: World) -> None:
        machine = world.working()
        if (
            machine is not None
            and machine.launch == 1
            and world.cloud.now_s > world.born_s + 600
            and not machine.told_at_s
        ):
            world.cloud.preempt(machine, 120)

    over = world.play(script)
    assert over.outcome == "done", over
    assert [launch for _, launch, _ in world.cloud.claims] == [1, 2]
    standby = world.cloud.machines_[1]
    old = world.cloud.machines_[0]
    assert old.gone_s is not None
    assert standby.created_s < old.gone_s, "the replacement boots while the old machine still saves"
    world.check_end()


def test_lost_answers() -> None:
    world = World(cloud_options={"faults": Faults(lost_answer=1.0)})
    over = world.play()
    assert over.outcome == "done"
    assert len(world.cloud.machines_) == 1
    world.check_end()


@pytest.mark.parametrize("policy", ["greedy", "ours", "uniform-progress"])
def test_a_deadline_through_gaps(policy: str) -> None:
    """Spot is there for ten minutes of thirty, and goes without a word: on-demand when the deadline asks for it, and never late."""

    def there(now_s: int) -> bool:
        return (now_s // 600) % 3 == 0

    pools = {
        pool("z0"): Spec(lambda _: SPOT_MICROUSD_H, there),
        pool("z0", "on-demand"): Spec(lambda _: DEMAND_MICROUSD_H, always),
    }

    def script(world: World) -> None:
        machine = world.working()
        if machine is not None and machine.pool.market == "spot" and not there(world.cloud.now_s):
            world.cloud.preempt(machine, 0)

    world = World(
        pools=pools, work_s=3600, deadline_s=2 * 3600, policy=policy, rules=Rules(), budget_microusd=9_000_000
    )
    over = world.play(script)
    assert over.outcome == "done", over
    assert world.cloud.now_s - world.born_s <= 2 * 3600
    assert {machine.pool.market for machine in world.cloud.machines_} == {"spot", "on-demand"}
    alone = 3600 * DEMAND_MICROUSD_H // 3600
    assert world.cloud.spent_microusd() < 1.1 * alone
    world.check_end()


def test_nobody_tells_a_machine_that_goes() -> None:
    """After a notice the policy may want nothing at all: the old machine uses its time, and saves last."""
    world = World(work_s=3600, deadline_s=4 * 3600, policy="ours", rules=Rules())

    def script(world: World) -> None:
        machine = world.working()
        if (
            machine is not None
            and world.cloud.now_s > world.born_s + 900
            and machine.told_at_s is None
            and machine.launch == 1
        ):
            world.cloud.preempt(machine, 120)

    over = world.play(script)
    assert over.outcome == "done"
    assert world.cloud.machines_[0].exit_code == 75
    assert not [event for event in world.sink.named("launch.told") if event.fields["launch"] == 1]
    world.check_end()
