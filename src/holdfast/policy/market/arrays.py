"""Many windows at once: the same facts as in `facts`, one array element per window, and first-match rules over them.

A policy is written once, over arrays. One job is an array of length one (`situation_of`); a simulator hands in thousands of
windows. So the code that is measured is the code that decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, Context, Job, Market

__all__ = [
    "NOTHING",
    "ON_DEMAND",
    "Bools",
    "Choice",
    "Clause",
    "Flags",
    "Floats",
    "Ints",
    "Situation",
    "Why",
    "cheapest_offer",
    "first_of",
    "situation_of",
]

Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.int8]
Bools: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]

# A target as a number: an index into the pools (spot capacity there), or one of these.
NOTHING = -1
ON_DEMAND = -2


class Why(IntEnum):
    """The clause of a policy that decided. Policies share them, so that a story reads the same whichever policy told it."""

    ON_DEMAND_ONLY = 0
    ON_DEMAND_TO_THE_END = 1
    ON_SPOT_UNTIL_TAKEN = 2
    LEAVE_SPOT_FOR_THE_DEADLINE = 3
    TOO_LATE_TO_LEAVE = 4
    SPOT_IS_THERE = 5
    LAST_MOMENT = 6
    TOO_LATE = 7
    WAIT_FOR_SPOT = 8
    BEHIND = 9
    STILL_BEHIND = 10
    AHEAD_SO_SPOT = 11
    AHEAD_SO_WAIT = 12
    AHEAD_BUT_NO_SPOT = 13
    SPOT_IS_CHEAPEST = 14
    WAITING_IS_CHEAPEST = 15
    DEMAND_IS_CHEAPEST = 16
    STAYING_IS_CHEAPEST = 17
    MOVING_IS_CHEAPEST = 18
    # Of a user's rules (`rules`).
    OUTSIDE_HOURS = 40
    HOURS_KEEP = 41
    DEADLINE_IN_HOURS = 42
    FLOOR = 43
    FLOOR_WAITS = 44
    RESERVED = 45
    FALLBACK = 46
    NO_DEMAND_SO_SPOT = 47
    NO_DEMAND_SO_WAIT = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """One tick of many windows, which share the job, the clock and the pools. Arrays have one element per window."""

    job: Job
    now_s: int
    tick_s: int
    work_left_s: Ints
    running: Ints
    """The pool's number, ON_DEMAND or NOTHING."""
    changeover_left_s: Ints
    available: Flags
    """Pool x window: 1 yes, 0 no, -1 unknown."""
    microusd_h: Ints
    """Pool x window: price of spot capacity."""
    on_demand_microusd_h: int
    cheapest: Ints
    """`cheapest_offer` of the three above; handed in because a simulator knows it for a whole trace at once."""

    @property
    def slack_s(self) -> Ints:
        """As `Context.slack_s`."""
        return (self.job.deadline_s - self.now_s) - self.work_left_s


@dataclass(frozen=True, slots=True)
class Choice:
    """Per window: the target (a pool's number, ON_DEMAND or NOTHING) and the clause that decided, a `Why`."""

    target: Ints
    why: Flags
    costs: Floats | None = None
    """What a policy that counts expects the rest to cost, in dollars: waiting, spot, on-demand x window; nan where it need not
    count. None: the policy does not count."""

    def of(self, window: int) -> tuple[int, Why, tuple[float, ...]]:
        """One window's target, clause and costs."""
        costs = () if self.costs is None else tuple(self.costs[:, window].tolist())
        return int(self.target[window]), Why(int(self.why[window])), costs


@dataclass(frozen=True, slots=True)
class Clause:
    """Where `holds`, the target is this one, for that reason."""

    holds: Bools
    target: Ints | int
    why: Why


def first_of(clauses: Sequence[Clause], otherwise: tuple[int, Why]) -> Choice:
    """For each window the first clause that holds; `otherwise` where none does."""
    windows = clauses[0].holds.shape
    target = np.full(windows, otherwise[0], np.int64)
    why = np.full(windows, otherwise[1], np.int8)
    for clause in reversed(clauses):
        np.copyto(target, clause.target, where=clause.holds)
        np.copyto(why, np.int8(clause.why), where=clause.holds)
    return Choice(target, why)


def cheapest_offer(available: Flags, microusd_h: Ints, on_demand_microusd_h: int) -> Ints:
    """Number of the cheapest pool whose spot capacity is there (or may be) below the on-demand price, else NOTHING.

    Pool x windows in, one number per window out. Of pools at the same price, one that is known to have capacity goes before one
    that nobody has asked; then the first.
    """
    if not len(available):
        return np.full(available.shape[1:], NOTHING, np.int64)
    out_of_reach = np.int64(2 * HIGHEST_MICROUSD_H + 2)
    reachable = (available != 0) & (microusd_h < on_demand_microusd_h)
    # Twice the price, plus one where the answer is not known yet: one comparison for both.
    rank = np.where(reachable, 2 * microusd_h + (available < 0), out_of_reach)
    best = rank.argmin(axis=0)
    found: Ints = np.where(reachable.any(axis=0), best, NOTHING)
    return found


def situation_of(context: Context) -> Situation:
    """One job as arrays of length one."""
    offers = context.offers
    numbers = {offer.pool: number for number, offer in enumerate(offers)}
    if context.running.pool is not None:
        running = numbers[context.running.pool]
    else:
        running = ON_DEMAND if context.running.market is Market.ON_DEMAND else NOTHING
    known = [-1 if offer.available is None else int(offer.available) for offer in offers]
    available = np.array(known, np.int8).reshape(-1, 1)
    microusd_h = np.array([offer.microusd_h for offer in offers], np.int64).reshape(-1, 1)
    return Situation(
        job=context.job,
        now_s=context.now_s,
        tick_s=context.tick_s,
        work_left_s=np.array([context.work_left_s], np.int64),
        running=np.array([running], np.int64),
        changeover_left_s=np.array([context.running.changeover_left_s], np.int64),
        available=available,
        microusd_h=microusd_h,
        on_demand_microusd_h=context.on_demand_microusd_h,
        cheapest=cheapest_offer(available, microusd_h, context.on_demand_microusd_h),
    )
