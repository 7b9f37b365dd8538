"""Why a policy decided as it did, in words and figures that a user can check."""

from __future__ import annotations

import math

from holdfast.core.config import format_duration
from holdfast.policy.market.arrays import Why
from holdfast.policy.market.facts import Context

__all__ = ["about_time", "describe"]

_RULES = {
    Why.ON_DEMAND_ONLY: "on-demand only",
    Why.ON_DEMAND_TO_THE_END: "on on-demand, and stays there to the end",
    Why.ON_SPOT_UNTIL_TAKEN: "on spot, which is kept until it is taken away",
    Why.LEAVE_SPOT_FOR_THE_DEADLINE: "a preemption could cost the deadline now: to on-demand while there is time to change over",
    Why.TOO_LATE_TO_LEAVE: "too late to change over to on-demand in time: what runs goes on",
    Why.SPOT_IS_THERE: "spot is there",
    Why.LAST_MOMENT: "the last moment at which on-demand surely keeps the deadline",
    Why.TOO_LATE: "the deadline cannot be kept for sure any more: on-demand is the quickest",
    Why.WAIT_FOR_SPOT: "no spot, and there is time to wait",
    Why.BEHIND: "no spot, and behind uniform progress",
    Why.STILL_BEHIND: "on on-demand, and not far enough ahead of uniform progress to leave it",
    Why.AHEAD_SO_SPOT: "ahead of uniform progress, and spot is there again",
    Why.AHEAD_SO_WAIT: "ahead of uniform progress: there is time to wait for spot",
    Why.AHEAD_BUT_NO_SPOT: "ahead of uniform progress, but no spot to change to: on-demand goes on",
    Why.SPOT_IS_CHEAPEST: "spot is there, and starting on it is the cheapest on average",
    Why.WAITING_IS_CHEAPEST: "waiting for spot is the cheapest on average",
    Why.DEMAND_IS_CHEAPEST: "starting on on-demand is the cheapest on average",
    Why.STAYING_IS_CHEAPEST: "on on-demand, and to stay there is the cheapest on average",
    Why.MOVING_IS_CHEAPEST: "on spot, and what another pool saves pays for the move",
    Why.OUTSIDE_HOURS: "outside the hours that the rules allow: nothing may be started now",
    Why.HOURS_KEEP: "nothing may be started at this hour: what runs goes on",
    Why.DEADLINE_IN_HOURS: "the hours that the rules leave until the deadline ask for on-demand now",
    Why.FLOOR: "all work that is left is owed to on_demand_floor",
    Why.FLOOR_WAITS: "all work that is left is owed to on_demand_floor, and on-demand may not be had now",
    Why.RESERVED: "reserved capacity is there, and paid already",
    Why.FALLBACK: "no spot for so long that the rules fall back to on-demand",
    Why.NO_DEMAND_SO_SPOT: "the rules forbid on-demand: spot, however late it gets",
    Why.NO_DEMAND_SO_WAIT: "the rules forbid on-demand, and there is no spot: it waits, however late it gets",
}
_WAYS = ("if it waits now", "on spot now", "on on-demand now")
_ABOUT_PROGRESS = {Why.BEHIND, Why.STILL_BEHIND, Why.AHEAD_SO_SPOT, Why.AHEAD_SO_WAIT, Why.AHEAD_BUT_NO_SPOT}


def describe(context: Context, why: Why, pool: str | None, costs: tuple[float, ...] = ()) -> tuple[str, ...]:
    """The rule, the time, what the rest is expected to cost by each way to go on, and what the pool costs."""
    reasons = [_RULES[why], about_time(context)]
    ways = [f"${cost:.2f} {how}" for cost, how in zip(costs, _WAYS, strict=False) if not math.isnan(cost)]
    if ways:
        reasons.append("the rest is expected to cost " + ", ".join(ways))
    if why in _ABOUT_PROGRESS:
        reasons.append(_progress(context))
    for offer in context.offers:
        if offer.pool == pool:
            known = "" if offer.available is not None else ", if there is capacity"
            reasons.append(
                f"{pool} at ${offer.microusd_h / 1e6:.4f} an hour{known}; "
                f"on-demand costs ${context.on_demand_microusd_h / 1e6:.4f}"
            )
    if pool is None and why is not Why.ON_DEMAND_ONLY:
        dear = [o.pool for o in context.offers if o.available and o.microusd_h >= context.on_demand_microusd_h]
        if dear:
            reasons.append("spot that costs as much as on-demand is passed over: " + ", ".join(dear))
    return tuple(reasons)


def about_time(context: Context) -> str:
    slack = format_duration(abs(context.slack_s))
    room = f"{slack} to spare" if context.slack_s >= 0 else f"{slack} too little"
    left = f"{format_duration(context.work_left_s)} of work in {format_duration(max(0, context.time_left_s))}"
    return f"{left}: {room}; a changeover takes {format_duration(context.job.changeover_s)}"


def _progress(context: Context) -> str:
    job = context.job
    due_s = context.now_s * job.work_s / job.deadline_s
    return (
        f"done {format_duration(job.work_s - context.work_left_s)}; uniform progress would be {format_duration(due_s)}"
    )
