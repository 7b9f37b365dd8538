"""The budget of a run, summed up from its records each time it is asked: nothing is remembered that the store does not hold."""

from __future__ import annotations

from dataclasses import replace

from holdfast.core.launches import Allowed, GrantRecord
from holdfast.fleet.terms import Terms
from holdfast.fleet.view import LaunchView, RunView
from holdfast.policy import budget
from holdfast.policy.budget_facts import HOUR_S, BudgetLimits, BudgetState, Grant, LaunchAsk

__all__ = ["as_grant", "ask_for", "budget_of", "grant_left_s", "limits_for", "owed", "used_s"]

_SLICES = 4
"""A budget pays for at least so many slices."""


def as_grant(record: GrantRecord) -> Grant:
    return Grant(
        ask=LaunchAsk(
            launch=record.launch, machine_microusd_h=record.machine_microusd_h, extras_microusd_h=record.extras_microusd_h,
            once_microusd=record.once_microusd, nodes=record.nodes, uses=record.uses, outside_s=record.outside_s,
            grace_s=record.grace_s, minimum_s=record.minimum_s, least_s=record.least_s, wants_s=record.wants_s,
        ),
        lifetime_s=record.lifetime_s,
    )  # fmt: skip


def ask_for(launch: int, allowed: tuple[Allowed, ...], terms: Terms) -> LaunchAsk:
    """What is reserved: the dearest pool that the provider may pick."""
    return LaunchAsk(
        launch=launch,
        machine_microusd_h=max(each.ceiling_microusd_h for each in allowed),
        extras_microusd_h=terms.extras_microusd_h,
        outside_s=terms.outside_s,
        grace_s=terms.grace_s,
        minimum_s=terms.guarantees.minimum_s,
        least_s=terms.changeover_s + terms.useful_s,
    )


def limits_for(ask: LaunchAsk, terms: Terms) -> BudgetLimits:
    """The budget's limits, with slices that leave room for a second machine: where one grant took all that is left, no replacement
    could be made ready while the old machine still saves."""
    limits = terms.budget
    if limits.cap_microusd is None or not ask.microusd_h:
        return limits
    share_s = limits.cap_microusd * HOUR_S // (_SLICES * ask.microusd_h)
    return replace(limits, slice_s=max(ask.least_s, min(limits.slice_s, share_s)))


def budget_of(view: RunView) -> BudgetState:
    """What is spent and reserved. What is set aside counts, whether its grant is given yet or not."""
    state = BudgetState()
    for reservation in view.reservations:
        state = budget.recall(state, as_grant(reservation.grant))
    for launch in view.launches:
        for record in launch.grants:
            state = budget.recall(state, as_grant(record))
        if state.of(launch.launch) is None:
            continue
        if launch.ended is not None:
            state = budget.ended(state, launch.launch, launch.ended.cost_microusd)
            continue
        if launch.evidence.machines:
            state = budget.seen(state, launch.launch)
        if launch.metered_s:
            state = budget.metered(state, launch.launch, launch.metered_s, launch.metered_microusd)
    return state


def owed(view: RunView, launch: LaunchView) -> GrantRecord | None:
    """A grant that was set aside and never given: whoever did so has died between the two. The longest one."""
    given = {each.part for each in launch.grants}
    missing = [each.grant for each in view.reservations if each.grant.launch == launch.launch]
    return max((each for each in missing if each.part not in given), key=lambda each: each.lifetime_s, default=None)


def used_s(launch: LaunchView, now_s: int) -> int:
    """How much of its lifetime the machine has used, or more: it has booted after it was created."""
    created_s = launch.machine.created_unix_s if launch.machine is not None else None
    if created_s is None:
        created_s = launch.intent.created_unix_s if launch.intent is not None else now_s
    return max(0, now_s - int(created_s))


def grant_left_s(launch: LaunchView, now_s: int) -> int:
    """Until the machine has to be gone, grace and boot included; below zero: it is overdue."""
    if not launch.grants:
        return 0
    grant = as_grant(max(launch.grants, key=lambda record: record.lifetime_s))
    return grant.ask.billed_s(grant.lifetime_s) - used_s(launch, now_s)
