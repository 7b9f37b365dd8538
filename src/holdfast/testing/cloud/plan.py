"""Who is taken, and when: pure. Capacity that falls takes machines, and so does a price above what a machine may cost.

What is scripted is known beforehand, so a notice comes its lead before the fall, and the machine is gone when the trace says so.
What changes without warning gives the machine its lead from then on, if it is announced at all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.testing.cloud.config import NoticeConfig
from holdfast.testing.cloud.life import Life
from holdfast.testing.cloud.market import CloudTime, Steps

__all__ = ["Doom", "announced", "dooms", "horizon_real_s"]


@dataclass(frozen=True, slots=True)
class Doom:
    """A machine's preemption. None: that will not be."""

    machine: str
    deadline_real_s: float
    notice_real_s: float | None
    withdraw_real_s: float | None
    advice: bool


def horizon_real_s(notice: NoticeConfig) -> float:
    """How far ahead the cloud looks."""
    return notice.lead_s + (notice.rebalance_before_s if notice.rebalance else 0.0)


def dooms(
    lives: Sequence[Life],
    capacity: Steps,
    price: Steps,
    time: CloudTime,
    real_s: float,
    notice: NoticeConfig,
    seed: int,
) -> list[Doom]:
    """Of the machines of one spot pool, those that are newly taken."""
    now_s = time.unix_s(real_s) - time.start_unix_s
    until_s = now_s + horizon_real_s(notice) * time.speed
    staying = sorted(
        (life for life in lives if life.deadline_real_s is None and not life.spared), key=lambda life: life.id
    )
    made: list[Doom] = []
    rooms = [(now_s, capacity.at(now_s)), *capacity.changes(now_s, until_s)]
    prices = [(now_s, price.at(now_s)), *price.changes(now_s, until_s)]
    for second, room, microusd_h in sorted(
        [*((at, value, None) for at, value in rooms), *((at, None, value) for at, value in prices)],
        key=lambda each: each[0],
    ):
        if microusd_h is not None:
            taken = [life for life in staying if life.ceiling_microusd_h < microusd_h]
        else:
            draw = random.Random(f"{seed}/taken/{second}/{len(staying)}")
            taken = draw.sample(staying, max(0, len(staying) - (room or 0)))
        foreseen = time.real_s(time.start_unix_s + second) if second > now_s else None
        made += [
            announced(life.id, foreseen, real_s, notice, f"{seed}/{life.id}/{len(life.moments)}") for life in taken
        ]
        staying = [life for life in staying if life not in taken]
    return made


def announced(machine: str, foreseen_real_s: float | None, real_s: float, notice: NoticeConfig, seed: str) -> Doom:
    """With what it is announced, drawn from the seed."""
    draw = random.Random(f"{seed}/announced")
    told, withdrawn, advice = (draw.random() for _ in range(3))
    is_told = notice.lead_s > 0 and told < notice.chance
    deadline_real_s = foreseen_real_s or real_s + (notice.lead_s if is_told else 0.0)
    notice_real_s = max(real_s, deadline_real_s - notice.lead_s) if is_told else None
    withdraw_real_s = None
    if notice_real_s is not None and withdrawn < notice.withdrawn:
        withdraw_real_s = (notice_real_s + deadline_real_s) / 2
    return Doom(machine, deadline_real_s, notice_real_s, withdraw_real_s, advice < notice.rebalance)
