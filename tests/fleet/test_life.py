"""A run's life under a controller: launched, taken, handed over, finished; and what it costs, to the cent."""

from __future__ import annotations

from imagined import Faults
from worlds import World


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
