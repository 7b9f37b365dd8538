"""What the rules did, and what is left of the promise to be in time, in words and figures that a user can check."""

from __future__ import annotations

from holdfast.core.config import format_duration
from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Situation, Why
from holdfast.policy.market.facts import Context
from holdfast.policy.market.rules_facts import MILLION, Promise, Rules
from holdfast.policy.market.rules_hours import Hours
from holdfast.policy.market.rules_week import Weekly

__all__ = ["about_rules", "promise"]

_HOURS = {Why.OUTSIDE_HOURS, Why.HOURS_KEEP, Why.DEADLINE_IN_HOURS}
_NO_DEMAND = {Why.NO_DEMAND_SO_SPOT, Why.NO_DEMAND_SO_WAIT, Why.FLOOR_WAITS}


def about_rules(rules: Rules, machines: int, context: Context, why: Why) -> tuple[str, ...]:
    """The rules that had a part in a decision."""
    told: list[str] = []
    if why in _HOURS:
        told += _hours(rules)
    if why in _NO_DEMAND:
        told.append(_why_no_demand(rules, machines, context.on_demand_microusd_h) or "this is not among the hours")
    if why in (Why.FLOOR, Why.FLOOR_WAITS):
        told.append(f"on_demand_floor is {rules.floor_millionths / MILLION:.4g} of the work")
    if why is Why.FALLBACK:
        told.append(f"fallback_after is {rules.fallback}")
    most = rules.max_microusd_h
    if most is not None:
        free = set(rules.reserved)
        dear = [o.pool for o in context.offers if o.microusd_h > most * machines and o.pool not in free]
        if dear:
            told.append(f"dearer than max_price, {_dollars(most)} per machine and hour: {', '.join(dear)}")
    return tuple(told)


def promise(
    rules: Rules, machines: int, policy: str, context: Context, situation: Situation, hours: Hours, *, safe: bool
) -> Promise:
    """`safe`: the policy of that name keeps deadlines where it may take on-demand, and it may."""
    if not safe:
        no_demand = _why_no_demand(rules, machines, context.on_demand_microusd_h)
        return Promise(False, (no_demand or f"the policy {policy} keeps no deadline",))
    spare_s, job = _spare_s(rules, context, situation, hours), context.job
    if spare_s >= 0:
        return Promise(True, (f"{format_duration(spare_s)} to spare",))
    needed = f"{format_duration(context.work_left_s)} of work and a changeover of {format_duration(job.changeover_s)}"
    left = f"more than is left until the deadline in {format_duration(context.time_left_s)}"
    return Promise(False, (f"{needed} need {format_duration(-spare_s)} {left}", *_hours(rules)))


def _spare_s(rules: Rules, context: Context, situation: Situation, hours: Hours) -> int:
    """What is left of the slack once on-demand works, if it is started as soon as it may be."""
    slack_s, gap_s, place = int(hours.slack_s[0]), int(hours.gap_s[0]), int(situation.running[0])
    changeover_s, may_start = context.job.changeover_s, bool(hours.may_start[0])
    if place == ON_DEMAND:
        return slack_s - context.running.changeover_left_s
    if not bool(hours.may_run[0]):
        # The time left counts a changeover for each opening that comes.
        return slack_s
    if may_start:
        return slack_s - changeover_s
    if place == NOTHING:
        return slack_s - changeover_s - context.tick_s - gap_s
    stay_s = min(context.running.changeover_left_s, context.tick_s) + context.job.max_lost_s
    return slack_s - gap_s - changeover_s - stay_s


def _hours(rules: Rules) -> list[str]:
    named: tuple[tuple[str, Weekly], ...] = (("start_window", rules.start_window), ("run_window", rules.run_window))
    return [f"{name} is {window.text} (UTC)" for name, window in named if not window.always]


def _why_no_demand(rules: Rules, machines: int, on_demand_microusd_h: int) -> str | None:
    if rules.opportunistic:
        return "opportunistic: spot only, and no deadline"
    if not rules.allow_on_demand:
        return "spot_policy is spot: on-demand is never taken"
    most = rules.max_microusd_h
    if most is not None and on_demand_microusd_h > most * machines:
        return (
            f"on-demand costs {_dollars(on_demand_microusd_h)} an hour for {machines} machines, "
            f"which is more than max_price, {_dollars(most)} each"
        )
    return None


def _dollars(microusd: int) -> str:
    return f"${microusd / MILLION:.4f}"
