"""From a notice to the end of the machine: what `policy/deadline.py` does about it, over arrays.

    heard | insurance? | train on | last save | margin and leaving | gone

It is `decide_save` where steps are short beside the notice, the state may be copied at any moment, and a save in flight takes as
long as it takes; a test holds the two side by side. Left out: saves that are due by their interval after the notice, snapshots that
only lie in memory, a local tier. An insurance costs the loop as much as any other save, and must be durable before the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import Bools, Ints
from holdfast.policy.reserves import reserves
from holdfast.simulate.uptime.fates import Conditions

__all__ = ["End", "Heard", "Plan", "after_notice"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long saves are planned to take, the same for all machines."""

    last_save_ms: int
    """At the quantile at which all holds with the confidence that was asked for."""
    long_shot_ms: int
    """With less time than this, not even an attempt is made."""
    save_cost_ms: int
    commit_ms: int

    @classmethod
    def of(cls, conditions: Conditions) -> Plan:
        spread = conditions.last_save_spread
        return cls(
            # Half of the doubt is for the step's duration, as in `decide_save`.
            last_save_ms=round(1000 * spread.quantile((1 + conditions.confidence) / 2)),
            long_shot_ms=round(1000 * spread.quantile(conditions.least_probability)),
            save_cost_ms=conditions.save_cost_ms,
            commit_ms=conditions.commit_ms,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """How things stand when the loop hears of it, one array element per machine."""

    left_ms: Ints
    """Until the machine goes."""
    lead_ms: Ints
    """Between the notice and the end of the machine; more than `left_ms` where the loop stood still when it came."""
    unsaved_ms: Ints
    """Work that no save holds, one in flight included."""
    in_flight_ms: Ints
    """Until the save in flight is durable; 0 without one."""
    last_save_ms: Ints
    """What a last save will really take."""


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """`worked_ms + save_ms + idle_ms` is the time that was left."""

    worked_ms: Ints
    """After the notice."""
    save_ms: Ints
    idle_ms: Ints
    insured: Bools
    """What was done until the notice is durable for certain."""
    committed: Bools
    """A last save is durable, with all that was done."""


def after_notice(plan: Plan, heard: Heard) -> End:
    left_ms, in_flight_ms = heard.left_ms, heard.in_flight_ms
    usable_ms = left_ms - _kept_ms(heard.lead_ms)
    fits = in_flight_ms + plan.last_save_ms <= usable_ms
    # Until when training goes on, from now.
    latest_ms = np.where(fits, usable_ms - plan.last_save_ms, 0)
    passing_ms = max(plan.save_cost_ms + plan.commit_ms, plan.last_save_ms)
    worth = (heard.unsaved_ms > 0) & (heard.unsaved_ms >= plan.last_save_ms)
    insured = fits & (in_flight_ms == 0) & worth & (passing_ms <= latest_ms)
    stall_ms = np.where(insured, plan.save_cost_ms, 0)
    worked_ms = latest_ms - stall_ms
    is_new = worked_ms + np.where(insured, 0, heard.unsaved_ms) > 0
    # Nothing fits: better a long shot than nothing, but not behind a save in flight.
    tries = is_new & (fits | ((in_flight_ms == 0) & (usable_ms >= plan.long_shot_ms)))
    rest_ms = left_ms - latest_ms
    # Whoever makes no last save waits for the one in flight, and leaves.
    saving_ms = np.where(tries, np.minimum(heard.last_save_ms, rest_ms), np.minimum(in_flight_ms, rest_ms))
    return End(
        worked_ms=worked_ms,
        save_ms=stall_ms + saving_ms,
        idle_ms=rest_ms - saving_ms,
        insured=insured,
        committed=tries & (heard.last_save_ms <= rest_ms),
    )


def _kept_ms(lead_ms: Ints) -> Ints:
    """For the margin and for leaving."""
    leads_ms, where = np.unique(lead_ms, return_inverse=True)
    kept = [reserves(lead_ms / 1000) for lead_ms in leads_ms.tolist()]
    kept_ms: Ints = np.array([round(1000 * (each.margin_s + each.leave_s)) for each in kept], np.int64)[where]
    return kept_ms
