"""A launch has failed, or what ran was taken: where to ask next, and when. A pure state machine.

    failed, launched, preempted ──→ RetryState          what became of launches
    next_try(state, limits, Search) ──→ TryPool | WaitUntil | GiveUp

A failure is counted where it belongs: no capacity and errors with the pool, a full quota with the quota, throttling and missing
permission with the account. What counts there is held back, for longer each time in a row, and so is a pool that has just
preempted. What would fail again for ever (a wrong request, no permission, a quota of zero) is closed, with its reason; when
nothing is open any more, it gives up. Whoever ranks pools gives the order; here is decided which of them may be asked now, and
whether it is time for on-demand. Restarts on a machine that is there are `restart`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError
from holdfast.core.failures import Failure
from holdfast.policy.backoff import Backoff, Fallback
from holdfast.policy.written import read_state, write_state

__all__ = [
    "GiveUp",
    "Hold",
    "LaunchPool",
    "RetryLimits",
    "RetryState",
    "Search",
    "TryPool",
    "WaitUntil",
    "Want",
    "failed",
    "held",
    "launched",
    "next_try",
    "preempted",
]


_AFTER_FAILURE, _AFTER_PREEMPTION, _IN_A_STORM = Backoff(30, 600), Backoff(300, 3600), Backoff(60, 1800)
_FALLBACK = Fallback()
_PERMANENT = {Failure.BAD_REQUEST, Failure.NO_PERMISSION, Failure.NO_QUOTA}


@dataclass(frozen=True, slots=True)
class LaunchPool:
    """Where a launch can be tried, and what else is shared with other pools."""

    name: str
    on_demand: bool = False
    quota: str | None = None
    account: str = ""
    """Provider and account: what permissions and request rates belong to."""

    def places(self) -> tuple[str, ...]:
        """All that may hold it back."""
        quota = () if self.quota is None else (f"quota {self.quota}",)
        return (f"pool {self.name}", *quota, f"account {self.account}")

    def place_of(self, failure: Failure) -> str:
        """What this failure says something about."""
        pool, *quota, account = self.places()
        if failure in (Failure.THROTTLED, Failure.NO_PERMISSION):
            return account
        return quota[0] if quota and failure in (Failure.QUOTA, Failure.NO_QUOTA) else pool


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """How patient to be."""

    after_failure: Backoff = _AFTER_FAILURE
    after_preemption: Backoff = _AFTER_PREEMPTION
    fallback: Fallback | None = _FALLBACK
    """To on-demand; None: only when it is wanted."""
    settled_s: int = 600
    """What lasted this long before it was taken ends a row of short lives."""
    max_errors: int = 10
    """Errors of providers in a row, over all pools, after which a person must look."""
    max_timeouts: int = 5
    """Machines in a row that did not come up: each has cost money."""
    storm_preemptions: int = 5
    """So many within `storm_window_s`, in more than one pool, are a storm: new spot capacity would be taken as well."""
    storm_window_s: int = 600
    in_a_storm: Backoff = _IN_A_STORM

    def __post_init__(self) -> None:
        if (
            min(self.max_errors, self.max_timeouts, self.storm_preemptions, self.storm_window_s) < 1
            or self.settled_s < 0
        ):
            raise UsageError("limits of errors, time-outs and storms are 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What is known against a pool, a quota or an account."""

    key: str
    failures: int = 0
    """In a row."""
    short_lives: int = 0
    """Preemptions in a row of what had not settled, the last one counted in any case."""
    not_before_s: int = 0
    why: str = ""
    closed: bool = False
    """Nothing changes by waiting."""


@dataclass(frozen=True, slots=True)
class RetryState:
    """What happened so far. Times are on the caller's clock, which goes on when a controller dies."""

    holds: tuple[Hold, ...] = ()
    since_s: int | None = None
    """Since when capacity is looked for; None: some runs, or nobody has looked."""
    tries: int = 0
    """Failed tries on spot in this search."""
    errors: int = 0
    timeouts: int = 0
    taken: tuple[tuple[int, str], ...] = ()
    """Preemptions within the storm's window: when, and which pool."""
    storm_until_s: int = 0

    def hold(self, key: str) -> Hold:
        return next((hold for hold in self.holds if hold.key == key), Hold(key=key))

    def with_hold(self, hold: Hold) -> RetryState:
        others = [each for each in self.holds if each.key != hold.key]
        kept = [] if hold == Hold(key=hold.key) else [hold]
        return replace(self, holds=tuple(sorted([*others, *kept], key=lambda each: each.key)))

    def to_json(self) -> str:
        return write_state(self)

    @classmethod
    def from_json(cls, text: str) -> RetryState:
        return read_state("a state of retries", text, cls)


class Want(Enum):
    """Which market the launch may be in."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"
    AUTO = "auto"
    """Spot, and on-demand once it is time to fall back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is looked for now."""

    now_s: int
    pools: tuple[LaunchPool, ...]
    """The best one first."""
    want: Want = Want.AUTO


@dataclass(frozen=True, slots=True)
class TryPool:
    pool: LaunchPool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Nothing may be asked before; then there is something."""

    until_s: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A person must look."""

    reasons: tuple[str, ...]


Decision: TypeAlias = TryPool | WaitUntil | GiveUp


def next_try(state: RetryState, limits: RetryLimits, search: Search) -> tuple[RetryState, Decision]:
    """Where to ask now, or until when to wait. A search begins with the first question after something ran."""
    now_s = search.now_s
    if state.since_s is None:
        state = replace(state, since_s=now_s)
    if too_many := _too_many(state, limits):
        return state, GiveUp((too_many,))
    spot = [pool for pool in search.pools if not pool.on_demand and search.want is not Want.ON_DEMAND]
    demand = [pool for pool in search.pools if pool.on_demand and search.want is not Want.SPOT]
    open_spot, open_demand = ([pool for pool in pools if not _closed(state, pool)] for pools in (spot, demand))
    if not open_spot and not open_demand:
        return state, GiveUp(_closures(state, spot + demand) or ("there is no pool to ask",))
    at = {pool.name: max(_free_s(state, pool), 0 if pool.on_demand else state.storm_until_s) for pool in spot + demand}
    passed_over = _passed_over(state, spot, now_s)
    for pool in open_spot:
        if at[pool.name] <= now_s:
            return state, TryPool(pool, ("the best spot pool that may be asked now", *passed_over))
    falls_back_s, why = _fallback(state, limits, search, open_spot=bool(open_spot))
    for pool in open_demand:
        if max(at[pool.name], falls_back_s) <= now_s:
            return state, TryPool(pool, (why, *passed_over))
    times = [at[pool.name] for pool in open_spot] + [max(at[pool.name], falls_back_s) for pool in open_demand]
    until_s = int(min(times))
    if until_s == math.inf:
        raise AssertionError("an open spot pool has a finite time")
    waits = f"every pool that may be asked is held back for {format_duration(until_s - now_s)} more"
    storm = (
        [f"a storm: {len(state.taken)} preemptions in a short time"]
        if open_spot and state.storm_until_s > now_s
        else []
    )
    return state, WaitUntil(until_s, (waits, *storm, *passed_over))


def failed(
    state: RetryState,
    limits: RetryLimits,
    pool: LaunchPool,
    failure: Failure,
    *,
    now_s: int,
    jitter: float,
    retry_after_s: int = 0,
    detail: str = "",
) -> RetryState:
    """A try has failed. `jitter` in [0, 1) is drawn by the caller; `retry_after_s` is what the provider asks for."""
    hold = state.hold(pool.place_of(failure))
    why = f"{failure.value} ({detail})" if detail else failure.value
    permanent = failure in _PERMANENT
    delay_s = 0 if permanent else math.ceil(limits.after_failure.delay_s(hold.failures + 1, jitter))
    held_s = now_s + max(1, delay_s, retry_after_s)
    hold = replace(
        hold,
        failures=hold.failures + 1,
        not_before_s=max(hold.not_before_s, held_s),
        # What closed it stays the reason.
        why=hold.why if hold.closed else why,
        closed=hold.closed or permanent,
    )
    # Throttling says nothing about capacity.
    counts = failure is not Failure.THROTTLED and not pool.on_demand
    return replace(
        state.with_hold(hold),
        tries=state.tries + counts,
        errors=state.errors + (failure is Failure.ERROR),
        timeouts=state.timeouts + (failure is Failure.TIMEOUT),
    )


def launched(state: RetryState, pool: LaunchPool) -> RetryState:
    """A machine came up and works: this search is over, and so are rows of failures there."""
    for key in pool.places():
        hold = state.hold(key)
        # A pool that gave capacity must show that it lasts, before it is forgotten that it took some.
        state = state.with_hold(replace(hold, failures=0) if hold.short_lives else Hold(key=key))
    return replace(state, since_s=None, tries=0, errors=0, timeouts=0)


def preempted(
    state: RetryState, limits: RetryLimits, pool: LaunchPool, *, now_s: int, lasted_s: int, jitter: float
) -> RetryState:
    """What ran there was taken, after so long. A gang that goes as one counts once."""
    hold = state.hold(f"pool {pool.name}")
    lives = 1 if lasted_s >= limits.settled_s else hold.short_lives + 1
    held_s = now_s + max(1, math.ceil(limits.after_preemption.delay_s(lives, jitter)))
    hold = replace(hold, short_lives=lives, not_before_s=max(hold.not_before_s, held_s), why="it has just preempted")
    taken = [each for each in state.taken if now_s - each[0] < limits.storm_window_s]
    taken.append((now_s, pool.name))
    state = replace(state.with_hold(hold), taken=tuple(taken[-_MOST_TAKEN:]))
    excess = len(taken) - limits.storm_preemptions
    if excess < 0 or len({name for _, name in taken}) < 2:
        return state
    storm_s = now_s + math.ceil(limits.in_a_storm.delay_s(excess + 1, jitter))
    return replace(state, storm_until_s=max(state.storm_until_s, storm_s))


def held(state: RetryState, pool: LaunchPool, now_s: int) -> str | None:
    """Why this pool may not be asked now; None: it may. For a market policy, a pool that is held back has no capacity."""
    for key in pool.places():
        hold = state.hold(key)
        if hold.closed:
            return f"{key} is closed: {hold.why}"
        if hold.not_before_s > now_s:
            row = f", {hold.failures} times in a row" if hold.failures > 1 else ""
            return f"{key} is held back for {format_duration(hold.not_before_s - now_s)} more: {hold.why}{row}"
    if not pool.on_demand and state.storm_until_s > now_s:
        return f"a storm of preemptions: no spot for {format_duration(state.storm_until_s - now_s)} more"
    return None


_MOST_TAKEN = 100
"""More preemptions than these in one window make no difference."""


def _closed(state: RetryState, pool: LaunchPool) -> bool:
    return any(state.hold(key).closed for key in pool.places())


def _free_s(state: RetryState, pool: LaunchPool) -> int:
    return max(state.hold(key).not_before_s for key in pool.places())


def _closures(state: RetryState, pools: list[LaunchPool]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for pool in pools for key in pool.places() if state.hold(key).closed)
    return tuple(f"{key} is closed: {state.hold(key).why}" for key in keys)


def _passed_over(state: RetryState, spot: list[LaunchPool], now_s: int) -> tuple[str, ...]:
    told = (held(state, pool, now_s) for pool in spot)
    return tuple(dict.fromkeys(reason for reason in told if reason is not None))


def _too_many(state: RetryState, limits: RetryLimits) -> str | None:
    if state.errors >= limits.max_errors:
        return f"{state.errors} errors of providers in a row, max_errors is {limits.max_errors}"
    if state.timeouts >= limits.max_timeouts:
        return f"{state.timeouts} machines in a row did not come up, max_timeouts is {limits.max_timeouts}"
    return None


def _fallback(state: RetryState, limits: RetryLimits, search: Search, *, open_spot: bool) -> tuple[float, str]:
    """From when on on-demand may be asked, and why then."""
    if search.want is Want.ON_DEMAND:
        return 0, "on-demand is wanted"
    if not open_spot:
        return 0, "no spot pool is open: on-demand"
    if limits.fallback is None:
        return math.inf, ""
    if limits.fallback.tries is not None and state.tries >= limits.fallback.tries:
        return 0, f"fallback to on-demand: {state.tries} failed tries, and no spot pool may be asked now"
    if limits.fallback.after_s is None or state.since_s is None:
        return math.inf, ""
    told = f"fallback to on-demand: {format_duration(search.now_s - state.since_s)} without spot capacity"
    return state.since_s + limits.fallback.after_s, told
