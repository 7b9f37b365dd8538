"""One window of one policy, as it is drawn: what ran when, where capacity was lost, how the work got on.

Made of what `story` tells tick by tick, so that a picture shows what was simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Market
from holdfast.simulate.market.outcome import UNFINISHED
from holdfast.simulate.market.story import Told, tell
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

__all__ = ["Lane", "Stretch", "lane_of"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The same thing running, or nothing. Seconds since the start of the window."""

    begin_s: int
    end_s: int
    market: Market
    pool: str | None
    ready_s: int
    """When its changeover was over; the stretch may have ended before that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A window from its start to its end."""

    policy: str
    stretches: tuple[Stretch, ...]
    preempted_s: tuple[int, ...]
    progress: tuple[tuple[int, int], ...]
    """Time, and work that was done by then; both in seconds."""
    finish_s: int | None
    missed: bool
    microusd: int


def lane_of(trace: Trace, policy: MarketPolicy, workload: Workload, start: int) -> Lane:
    """Play one window and keep what happened."""
    outcomes, told = tell(trace, policy, workload, start, every_tick=True)
    finish_s = int(outcomes.finish_s[0])
    end_s = workload.follow_s if finish_s == UNFINISHED else finish_s
    ends_s = [*(each.context.now_s for each in told[1:]), end_s]
    stretches: list[Stretch] = []
    preempted_s: list[int] = []
    for number, (each, tick_end_s) in enumerate(zip(told, ends_s, strict=True)):
        if number and _was_taken(told[number - 1], each):
            preempted_s.append(each.context.now_s)
        if stretches and _goes_on(stretches[-1], each):
            last = stretches[-1]
            stretches[-1] = Stretch(last.begin_s, tick_end_s, last.market, last.pool, last.ready_s)
        else:
            stretches.append(_stretch(each, tick_end_s))
    work_s = workload.job.work_s
    progress = [(each.context.now_s, work_s - each.context.work_left_s) for each in told]
    return Lane(
        policy=policy.name,
        stretches=tuple(stretches),
        preempted_s=tuple(preempted_s),
        progress=(*progress, (end_s, int(outcomes.useful_s[0]))),
        finish_s=None if finish_s == UNFINISHED else finish_s,
        missed=bool(outcomes.missed[0]),
        microusd=int(outcomes.microusd[0]),
    )


def _was_taken(before: Told, now: Told) -> bool:
    return before.decision.market is Market.SPOT and now.context.running.market is Market.NOTHING


def _goes_on(last: Stretch, now: Told) -> bool:
    """Whether the same thing runs on. What was taken and is started again in the same pool does not."""
    running, decision = now.context.running, now.decision
    return (last.market, last.pool) == (running.market, running.pool) == (decision.market, decision.pool)


def _stretch(told: Told, end_s: int) -> Stretch:
    now_s, market = told.context.now_s, told.decision.market
    changeover_s = 0 if market is Market.NOTHING else told.context.job.changeover_s
    return Stretch(now_s, end_s, market, told.decision.pool, now_s + changeover_s)
