"""A user's rules around any market policy: what it may buy, at which hours, at which price, and when it must not wait any longer.

    situation → what the rules leave of it → the policy's wish → reserved capacity, fallback → deadline → floor, hours → choice

`Ruled` is a market policy itself, so the simulator plays it as it plays any other. A rule is never broken for the deadline; but
where the rules leave on-demand, and the policy inside keeps deadlines, the rules keep them too: hours in which nothing may start
or run are counted as time that is not there. What is left of the promise is said before the start (`Ruled.promise`).

**Reserved capacity** is named pools, whose hours are paid already: they count as free, are taken first when there, and count for
the on-demand floor. **The floor** (a share of the work) is kept by doing the last part of the work on on-demand: whatever
on-demand the deadline or an outage asked for before counts, so that no more is bought than must be.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import (
    NOTHING,
    ON_DEMAND,
    Bools,
    Choice,
    Clause,
    Floats,
    Ints,
    Situation,
    Why,
    cheapest_offer,
    situation_of,
)
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Context, Decision, Job, PolicyState
from holdfast.policy.market.rules_facts import MILLION, Promise, Rules, SpotPolicy
from holdfast.policy.market.rules_hours import Hours, hold_the_deadline, overlaid
from holdfast.policy.market.rules_words import about_rules, promise
from holdfast.policy.market.single_market import OnDemandOnly, SpotOnly

__all__ = ["Promise", "Ruled", "Rules", "SpotPolicy"]

# What is remembered, in front of what the policy inside remembers: work left at the last look (-1: none yet), whether the work
# since then counts for the floor, the work that counted so far; since when spot is searched for (-1: not now), looks without any;
# whether on-demand runs only because there was none.
_LEFT, _COUNTS, _COUNTED, _SINCE, _TRIES, _FALLEN_BACK = range(6)
_FIRST = (-1.0, 0.0, 0.0, -1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Ruled(MarketPolicy):
    """`inner`, as far as the rules let it."""

    inner: MarketPolicy
    rules: Rules
    pools: tuple[str, ...] = ()
    """All pools in the order in which they are offered; needed where some are reserved."""
    machines: int = 1
    """Machines of which one hour is what offers name the price of: the gang."""
    start_utc_s: Ints | int | None = None
    """When the job's clock began, in UTC seconds; in a simulator one for each window. Needed where hours are given."""
    _reserved: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        unknown = [name for name in self.rules.reserved if name not in self.pools]
        if unknown:
            known = ", ".join(self.pools) or "none"
            raise UsageError(f"the reserved pool {unknown[0]!r} is not among the pools of this job: {known}")
        if self.start_utc_s is None and not (self.rules.start_window.always and self.rules.run_window.always):
            raise UsageError("hours of the week mean nothing without the moment at which the job starts (start_utc_s)")
        rows = tuple(number for number, name in enumerate(self.pools) if name in self.rules.reserved)
        object.__setattr__(self, "_reserved", rows)

    # One instance wraps one policy: these are not the class's as elsewhere.
    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self._asked.name}, ruled"

    @property
    def summary(self) -> str:  # type: ignore[override]
        return f"{self._asked.summary}; as far as the rules let it"

    @property
    def keeps_deadline(self) -> bool:  # type: ignore[override]
        """Whatever the job and the prices are. Where this is False, `promise` says what holds for one job."""
        rules = self.rules
        unbound = rules.start_window.always and rules.run_window.always and rules.max_microusd_h is None
        return self._asked.keeps_deadline and rules.allow_on_demand and unbound

    @property
    def _asked(self) -> MarketPolicy:
        if self.rules.opportunistic:
            return SpotOnly()
        return OnDemandOnly() if self.rules.spot_policy is SpotPolicy.ON_DEMAND else self.inner

    def first_memory(self, pools: int) -> tuple[float, ...]:
        return _FIRST + self._asked.first_memory(pools)

    def decide(self, context: Context, state: PolicyState) -> tuple[PolicyState, Decision]:
        offered = tuple(offer.pool for offer in context.offers)
        if self.pools and offered != self.pools:
            raise UsageError(f"the rules are for the pools {', '.join(self.pools)}; offered are {', '.join(offered)}")
        return MarketPolicy.decide(self, context, state)

    def reasons(self, context: Context, why: Why, pool: str | None, costs: tuple[float, ...]) -> tuple[str, ...]:
        told = self._asked.reasons(context, why, pool, costs)
        return told + about_rules(self.rules, self.machines, context, why)

    def promise(self, context: Context) -> Promise:
        """Whether this job is never late from here on, whatever the spot market does, and if not, why."""
        situation = situation_of(context)
        hours = self.hours(situation)
        safe = self.allows_demand(situation) and self._asked.keeps_deadline
        return promise(self.rules, self.machines, self._asked.name, context, situation, hours, safe=safe)

    def hours(self, situation: Situation) -> Hours:
        start = np.asarray(0 if self.start_utc_s is None else self.start_utc_s, np.int64)
        return Hours.of(situation, self.rules.start_window, self.rules.run_window, start)

    def allows_demand(self, situation: Situation) -> bool:
        """On-demand, at its price."""
        most = self.rules.max_microusd_h
        return self.rules.allow_on_demand and (most is None or situation.on_demand_microusd_h <= most * self.machines)

    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        own, theirs = memory[: len(_FIRST)], memory[len(_FIRST) :]
        own = self._count(situation, own)
        hours, demand = self.hours(situation), self.allows_demand(situation)
        seen, alive = self._seen(situation, own, hours)
        own[_FALLEN_BACK] *= alive == ON_DEMAND
        learned, choice = self._asked.choose(seen, theirs)
        # Of hours that it may not use it learns nothing: they are another market, and its wishes are not tried.
        used = hours.may_start | (hours.may_run & (alive != NOTHING))
        theirs = np.where(used, learned, theirs)
        own = _search(situation.now_s, own, seen, choice, hours.may_start)
        choice = overlaid(choice, self._wishes(situation, own, seen, alive, choice, hours, demand))
        if self._asked.keeps_deadline and demand:
            choice = overlaid(choice, hold_the_deadline(situation, alive, choice, hours))
        choice = overlaid(choice, self._limits(situation, own, alive, choice, hours, demand))
        if not (self.rules.start_window.always and self.rules.run_window.always):
            # What it was told to be work is partly time in which nothing may run.
            choice = replace(choice, costs=None)
        return np.vstack([self._remember(own, alive, choice), theirs]), choice

    def _count(self, situation: Situation, own: Floats) -> Floats:
        """The memory with the work that was done since the last look, if it counts for the floor."""
        own = own.copy()
        done_s = np.where(own[_LEFT] >= 0, own[_LEFT] - situation.work_left_s, 0.0)
        own[_COUNTED] += own[_COUNTS] * done_s
        own[_LEFT] = situation.work_left_s
        return own

    def _seen(self, situation: Situation, own: Floats, hours: Hours) -> tuple[Situation, Ints]:
        """What the policy inside is told, and what runs and may go on. A pool that the rules forbid is not there, and what runs
        in it does not run any more; on-demand that only fills a gap does not bind."""
        prices, usable = situation.microusd_h, self._usable(situation)
        if self._reserved:
            prices = prices.copy()
            prices[list(self._reserved)] = 0
        available = np.where(usable, situation.available, np.int8(0))
        forbidden = situation.running >= 0
        if len(usable):
            forbidden &= ~usable[np.maximum(situation.running, 0), np.arange(len(forbidden))]
        alive = np.where(forbidden, NOTHING, situation.running)
        fills = (own[_FALLEN_BACK] > 0) & (alive == ON_DEMAND) & (situation.changeover_left_s == 0)
        job = situation.job
        if not self.rules.run_window.always:
            job = replace(job, work_s=job.work_s + self._closed_s(job))
        seen = replace(
            situation,
            job=job,
            work_left_s=situation.work_left_s + hours.not_there_s(situation),
            running=np.where(fills, NOTHING, alive),
            changeover_left_s=np.where(forbidden, 0, situation.changeover_left_s),
            available=available,
            microusd_h=prices,
            cheapest=cheapest_offer(available, prices, situation.on_demand_microusd_h),
        )
        return seen, alive

    def _closed_s(self, job: Job) -> int:
        """About how much of the time to the deadline is closed; the same for windows that start at different hours. Some slack is
        left in any case. Only what is cheap depends on it, not what is safe."""
        closed_s = round(job.deadline_s * (1 - self.rules.run_window.open_share))
        return max(0, min(closed_s, 3 * (job.deadline_s - job.work_s) // 4))

    def _usable(self, situation: Situation) -> Bools:
        """Pool x window."""
        usable = np.full(situation.available.shape, self.rules.spot_policy is not SpotPolicy.ON_DEMAND)
        if self.rules.max_microusd_h is not None:
            usable &= situation.microusd_h <= self.rules.max_microusd_h * self.machines
        usable[list(self._reserved)] = True
        return usable

    def _wishes(
        self,
        situation: Situation,
        own: Floats,
        seen: Situation,
        alive: Ints,
        choice: Choice,
        hours: Hours,
        demand: bool,
    ) -> list[Clause]:
        """What goes before the wish of the policy inside, as long as there is time."""
        reserved = self._is_reserved(alive)
        clauses = [Clause(reserved, alive, Why.RESERVED)]
        for row in reversed(self._reserved):
            free = ~reserved & (situation.available[row] != 0)
            if self._asked.keeps_deadline and demand:
                free &= hours.may_start_spot(situation.job)
            clauses.append(Clause(free, row, Why.RESERVED))
        if demand and self.rules.fallback is not None:
            fills, waits = own[_FALLEN_BACK] > 0, own[_SINCE] >= 0
            tries, after_s = self.rules.fallback.tries, self.rules.fallback.after_s
            due = fills.copy()
            if tries is not None:
                due |= own[_TRIES] >= tries
            if after_s is not None:
                due |= situation.now_s - own[_SINCE] >= after_s
            warming = fills & (alive == ON_DEMAND) & (situation.changeover_left_s > 0)
            clauses.append(Clause(warming | (waits & due), ON_DEMAND, Why.FALLBACK))
        if not demand:
            wanted = choice.target == ON_DEMAND
            clauses += [
                Clause(wanted & (alive >= 0), alive, Why.NO_DEMAND_SO_SPOT),
                Clause(wanted & (seen.cheapest >= 0), seen.cheapest, Why.NO_DEMAND_SO_SPOT),
                Clause(wanted, NOTHING, Why.NO_DEMAND_SO_WAIT),
            ]
        return clauses

    def _limits(
        self, situation: Situation, own: Floats, alive: Ints, choice: Choice, hours: Hours, demand: bool
    ) -> list[Clause]:
        """What no wish and no deadline overrules."""
        closed, target = ~hours.may_start, choice.target
        clauses = [Clause(~hours.may_run, NOTHING, Why.OUTSIDE_HOURS)]
        if self.rules.floor_millionths:
            # Spot may go on until the next look at which on-demand can be started; all work that is left then must suffice.
            share, work_s = self.rules.floor_millionths, situation.job.work_s
            owed_s = -(-share * work_s // MILLION) - own[_COUNTED]
            left_s = situation.work_left_s
            due = (owed_s > 0) & (left_s > 0) & (left_s - situation.tick_s - hours.gap_s < owed_s)
            counts, kept = ((each == ON_DEMAND) | self._is_reserved(each) for each in (target, alive))
            clauses += [
                Clause(due & closed & ~kept, NOTHING, Why.FLOOR_WAITS),
                Clause(due & ~counts & demand & (~closed | (alive == ON_DEMAND)), ON_DEMAND, Why.FLOOR),
                Clause(due & ~counts, NOTHING, Why.FLOOR_WAITS),
            ]
        changes = closed & (target != alive) & (target != NOTHING)
        return [
            *clauses,
            Clause(changes & (alive == NOTHING), NOTHING, Why.OUTSIDE_HOURS),
            Clause(changes, alive, Why.HOURS_KEEP),
        ]

    def _is_reserved(self, target: Ints) -> Bools:
        return np.isin(target, self._reserved) if self._reserved else np.zeros(target.shape, np.bool_)

    def _remember(self, own: Floats, alive: Ints, choice: Choice) -> Floats:
        on_demand = choice.target == ON_DEMAND
        own[_COUNTS] = on_demand | self._is_reserved(choice.target)
        kept = (own[_FALLEN_BACK] > 0) & (choice.why == Why.HOURS_KEEP)
        # What fills a gap still does so while its replacement boots, and when that never comes.
        left = (own[_FALLEN_BACK] > 0) & (alive == ON_DEMAND) & (choice.target >= 0)
        own[_FALLEN_BACK] = (on_demand & ((choice.why == Why.FALLBACK) | kept)) | left
        return own


def _search(now_s: int, own: Floats, seen: Situation, choice: Choice, may_start: Bools) -> Floats:
    """The memory with this look in it: does the job wait for spot, and there is none?"""
    looks = may_start | (own[_FALLEN_BACK] > 0)
    none = looks & (seen.running == NOTHING) & (seen.cheapest == NOTHING) & (choice.target == NOTHING)
    own[_SINCE] = np.where(none, np.where(own[_SINCE] < 0, now_s, own[_SINCE]), -1.0)
    own[_TRIES] = np.where(none, own[_TRIES] + 1, 0.0)
    return own
