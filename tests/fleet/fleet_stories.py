"""What happens to a run while controllers look after it, or die: six stories of the imagined world."""

from __future__ import annotations

from fleet_world import DEMAND_MICROUSD_H, SPOT_MICROUSD_H, World, always
from imagined import Faults, Spec, pool

from holdfast.policy.backoff import Fallback
from holdfast.policy.market.rules_facts import Rules

__all__ = ["NAMES", "SCRIPTS", "advised", "handed_over", "scenario"]


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
