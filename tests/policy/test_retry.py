"""Where to ask next: random lives against what the whole history says; and by hand, with reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from holdfast.core.errors import FormatError, UsageError
from holdfast.core.failures import Failure
from holdfast.policy.backoff import Backoff, Fallback
from holdfast.policy.retry import (
    Decision,
    GiveUp,
    Hold,
    LaunchPool,
    RetryLimits,
    RetryState,
    Search,
    TryPool,
    WaitUntil,
    Want,
    failed,
    held,
    launched,
    next_try,
    preempted,
)

A = LaunchPool("a", quota="spot", account="aws")
B = LaunchPool("b", quota="spot", account="aws")
C = LaunchPool("c", account="gcp")
D = LaunchPool("d", on_demand=True, quota="demand", account="aws")
E = LaunchPool("e", on_demand=True, account="gcp")
POOLS = (A, B, C, D, E)
OUTCOMES = [*Failure, *[Failure.NO_CAPACITY] * 4, Failure.THROTTLED, Failure.QUOTA, Failure.ERROR]
PERMANENT = {Failure.BAD_REQUEST, Failure.NO_PERMISSION, Failure.NO_QUOTA}


@dataclass(frozen=True)
class Seen:
    """One thing that happened."""

    at_s: int
    what: Failure | str
    pool: LaunchPool
    jitter: float = 0.0
    more_s: int = 0


class Launching(RuleBasedStateMachine):
    """A controller that forgets everything but its text between any two steps. What it may do follows from the history."""

    @initialize(
        fallback=st.sampled_from([None, Fallback(3, None), Fallback(None, 300), Fallback(2, 900)]),
        errors=st.sampled_from([4, 99]),
        storm=st.sampled_from([2, 4]),
    )
    def begin(self, fallback: Fallback | None, errors: int, storm: int) -> None:
        self.limits = RetryLimits(
            after_failure=Backoff(10, 80),
            after_preemption=Backoff(40, 400),
            in_a_storm=Backoff(100, 300),
            fallback=fallback,
            max_errors=errors,
            max_timeouts=3,
            storm_preemptions=storm,
            storm_window_s=500,
        )
        self.state, self.now_s = RetryState(), 1000
        self.history: list[Seen] = []
        self.since_s: int | None = None
        self.storm_until_s = 0

    def since_last(self) -> list[Seen]:
        """What happened since a machine last came up."""
        ups = [i for i, e in enumerate(self.history) if e.what == "up"]
        return self.history[ups[-1] + 1 :] if ups else self.history

    def allowed_s(self, pool: LaunchPool) -> float:
        """When this pool may be asked at the earliest, from the whole history; infinity: never."""
        times: list[float] = [0.0]
        for place in ("pool", "quota", "account"):
            failures = 0
            of_place: list[float] = []
            for event in self.history:
                if not same(place, event.pool, pool):
                    continue
                if event.what == "up":
                    failures, of_place = 0, []
                elif isinstance(event.what, Failure) and place_of(event) == place:
                    failures += 1
                    delay_s = ceil(min(80, 10 * 2 ** (failures - 1)) * (0.5 + 0.5 * event.jitter))
                    ends_s = event.at_s + max(1, delay_s, event.more_s)
                    of_place.append(float("inf") if event.what in PERMANENT else ends_s)
            times += of_place
        lives = 0
        for event in self.history:
            if event.what == "taken" and event.pool == pool:
                lives = 1 if event.more_s >= 600 else lives + 1
                times.append(event.at_s + ceil(min(400, 40 * 2 ** (lives - 1)) * (0.5 + 0.5 * event.jitter)))
        return max([*times, 0 if pool.on_demand else self.storm_until_s])

    @rule(seconds=st.sampled_from([1, 7, 60, 300, 5000]))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(
        want=st.sampled_from([*Want, Want.AUTO]),
        pools=st.sampled_from([POOLS, (C, A, E, B, D), (A, E), (B, D, E)]),
        count=st.sampled_from([0, 1, 2, 5, 5, 5]),
        outcome=st.sampled_from([*OUTCOMES, "up", "up", "up", "nothing yet"]),
        jitter=st.floats(0, 1, exclude_max=True),
        more_s=st.sampled_from([0, 0, 33, 1000]),
    )
    def ask(
        self, want: Want, pools: tuple[LaunchPool, ...], count: int, outcome: Failure | str, jitter: float, more_s: int
    ) -> None:
        search = Search(now_s=self.now_s, pools=pools[:count], want=want)
        self.state, decision = next_try(self.state, self.limits, search)
        self.since_s = self.now_s if self.since_s is None else self.since_s
        self.judge(search, decision)
        if not isinstance(decision, TryPool) or outcome == "nothing yet":
            return
        pool = decision.pool
        if outcome == "up":
            self.history.append(Seen(self.now_s, "up", pool))
            self.state, self.since_s = launched(self.state, pool), None
        else:
            assert isinstance(outcome, Failure)
            self.history.append(Seen(self.now_s, outcome, pool, jitter, more_s))
            self.state = failed(
                self.state, self.limits, pool, outcome, now_s=self.now_s, jitter=jitter, retry_after_s=more_s
            )

    @rule(pool=st.sampled_from(POOLS), failure=st.sampled_from(OUTCOMES), jitter=st.sampled_from([0.0, 0.9]))
    def answered_late(self, pool: LaunchPool, failure: Failure, jitter: float) -> None:
        """A try that was under way while others were made."""
        self.history.append(Seen(self.now_s, failure, pool, jitter))
        self.state = failed(self.state, self.limits, pool, failure, now_s=self.now_s, jitter=jitter)

    @rule(
        pool=st.sampled_from([A, A, C, B]), lasted_s=st.sampled_from([5, 599, 600]), jitter=st.sampled_from([0.0, 0.5])
    )
    def taken(self, pool: LaunchPool, lasted_s: int, jitter: float) -> None:
        self.history.append(Seen(self.now_s, "taken", pool, jitter, lasted_s))
        self.state = preempted(self.state, self.limits, pool, now_s=self.now_s, lasted_s=lasted_s, jitter=jitter)
        recent = [e for e in self.history if e.what == "taken" and self.now_s - e.at_s < 500]
        excess = len(recent) - self.limits.storm_preemptions
        if excess >= 0 and len({e.pool for e in recent}) > 1:
            slowed_s = self.now_s + ceil(min(300, 100 * 2**excess) * (0.5 + 0.5 * jitter))
            self.storm_until_s = max(self.storm_until_s, slowed_s)

    def judge(self, search: Search, decision: Decision) -> None:
        assert decision.reasons
        now_s, since = self.now_s, self.since_last()
        spot = [p for p in search.pools if not p.on_demand and search.want is not Want.ON_DEMAND]
        demand = [p for p in search.pools if p.on_demand and search.want is not Want.SPOT]
        may = {p.name: self.allowed_s(p) for p in spot + demand}
        errors = sum(e.what is Failure.ERROR for e in since)
        timeouts = sum(e.what is Failure.TIMEOUT for e in since)
        if isinstance(decision, GiveUp):
            none_left = all(may[p.name] == float("inf") for p in spot + demand)
            assert none_left or errors >= self.limits.max_errors or timeouts >= 3
            return
        assert errors < self.limits.max_errors
        assert timeouts < 3
        ready = [p for p in spot if may[p.name] <= now_s]
        if ready:
            assert isinstance(decision, TryPool)
            assert decision.pool == ready[0], "spot first, in the order that was given"
            return
        tries = sum(
            isinstance(e.what, Failure) and e.what is not Failure.THROTTLED and not e.pool.on_demand for e in since
        )
        closed = all(may[p.name] == float("inf") for p in spot)
        rule_, when = self.limits.fallback, float("inf")
        if search.want is Want.ON_DEMAND or closed or (rule_ and rule_.tries and tries >= rule_.tries):
            when = 0
        elif rule_ and rule_.after_s is not None and self.since_s is not None:
            when = self.since_s + rule_.after_s
        ready = [p for p in demand if max(may[p.name], when) <= now_s]
        if ready:
            assert isinstance(decision, TryPool)
            assert decision.pool == ready[0]
            return
        assert isinstance(decision, WaitUntil)
        assert decision.until_s > now_s
        assert decision.until_s == min([may[p.name] for p in spot] + [max(may[p.name], when) for p in demand])
        after = next_try(self.state, self.limits, replace(search, now_s=decision.until_s))[1]
        assert isinstance(after, TryPool), "then there is something to ask"

    @invariant()
    def the_text_is_the_state(self) -> None:
        if hasattr(self, "state"):
            read = RetryState.from_json(self.state.to_json())
            assert read == self.state
            self.state = read
            for pool in POOLS:
                assert (held(self.state, pool, self.now_s) is None) == (self.allowed_s(pool) <= self.now_s)


def place_of(event: Seen) -> str:
    if event.what in (Failure.THROTTLED, Failure.NO_PERMISSION):
        return "account"
    return "quota" if event.what in (Failure.QUOTA, Failure.NO_QUOTA) and event.pool.quota else "pool"


def same(place: str, one: LaunchPool, other: LaunchPool) -> bool:
    if place == "quota":
        return one.quota is not None and one.quota == other.quota
    return one.account == other.account if place == "account" else one == other


Launching.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestLaunching = Launching.TestCase


def after(*failures: Failure, pool: LaunchPool = A, now_s: int = 0) -> RetryState:
    """One failure a minute, the last one now."""
    state = RetryState(since_s=0)
    for number, failure in enumerate(reversed(range(len(failures)))):
        at_s = now_s - 60 * failure
        state = failed(state, RetryLimits(), pool, failures[number], now_s=at_s, jitter=0.5, detail="said so")
    return state


def ask(state: RetryState, now_s: int, want: Want = Want.AUTO, pools: tuple[LaunchPool, ...] = POOLS) -> Decision:
    return next_try(state, RetryLimits(), Search(now_s=now_s, pools=pools, want=want))[1]


def test_by_hand_with_reasons() -> None:
    one = after(Failure.NO_CAPACITY)
    assert ask(one, 1) == TryPool(
        B,
        (
            "the best spot pool that may be asked now",
            "pool a is held back for 22 s more: no capacity (said so)",
        ),
    )
    alone = ask(one, 1, pools=(A,))
    assert isinstance(alone, WaitUntil)
    assert (alone.until_s, alone.reasons[0]) == (23, "every pool that may be asked is held back for 22 s more")
    thrice = after(*[Failure.NO_CAPACITY] * 3, now_s=120)
    fallback = ask(thrice, 121, pools=(A, D))
    assert isinstance(fallback, TryPool)
    assert fallback.pool == D
    assert fallback.reasons[0] == "fallback to on-demand: 3 failed tries, and no spot pool may be asked now"
    assert fallback.reasons[1].endswith("no capacity (said so), 3 times in a row")
    assert ask(thrice, 121, pools=(A, D, C)).pool == C  # type: ignore[union-attr]
    assert isinstance(ask(thrice, 121, Want.SPOT, pools=(A, D)), WaitUntil)
    for now_s, decision in ((599, WaitUntil), (600, TryPool)):
        state = after(Failure.NO_CAPACITY, now_s=598)
        assert isinstance(ask(state, now_s, pools=(A, D)), decision), "ten minutes without spot"
    assert ask(RetryState(), 0, Want.ON_DEMAND) == TryPool(D, ("on-demand is wanted",))


def test_a_pool_that_has_just_preempted_is_not_asked_at_once_and_longer_if_lives_are_short() -> None:
    limits, state = RetryLimits(), RetryState()
    delays = []
    for number, lasted_s in enumerate([60, 60, 60, 7200, 60]):
        now_s = 100_000 * number
        state = preempted(state, limits, A, now_s=now_s, lasted_s=lasted_s, jitter=0.0)
        delays.append(state.hold("pool a").not_before_s - now_s)
        assert ask(state, now_s).pool == B  # type: ignore[union-attr]
        state = launched(state, A)
    assert delays == [150, 300, 600, 150, 300]


def test_a_storm_slows_spot_down_and_not_on_demand() -> None:
    limits, state = RetryLimits(), RetryState()
    pools = tuple(LaunchPool(f"p{number}") for number in range(9))
    for number in range(6):
        state = preempted(state, limits, pools[number], now_s=number, lasted_s=9999, jitter=0.0)
    waits = ask(state, 5, pools=pools)
    assert isinstance(waits, WaitUntil)
    assert waits.until_s == 5 + 60
    assert waits.reasons[1] == "a storm: 6 preemptions in a short time"
    assert ask(state, 5, Want.ON_DEMAND).pool == D  # type: ignore[union-attr]
    calm = RetryState()
    for number in range(20):
        calm = preempted(calm, limits, A, now_s=number, lasted_s=9999, jitter=0.0)
    assert ask(calm, 20).pool == B, "one pool is no storm"  # type: ignore[union-attr]


def test_what_waiting_does_not_change_stops_with_every_reason() -> None:
    state = after(Failure.NO_PERMISSION)
    state = failed(state, RetryLimits(), C, Failure.BAD_REQUEST, now_s=0, jitter=0, detail="no such image")
    assert ask(state, 10_000_000, pools=(A, B, C)) == GiveUp(
        (
            "account aws is closed: permission is missing (said so)",
            "pool c is closed: the provider refuses the request as wrong (no such image)",
        )
    )
    no_quota = after(Failure.NO_QUOTA)
    fallback = ask(no_quota, 0, pools=(A, B, D))
    assert isinstance(fallback, TryPool)
    assert (fallback.pool, fallback.reasons[0]) == (D, "no spot pool is open: on-demand")
    assert ask(RetryState(), 0, pools=()) == GiveUp(("there is no pool to ask",))
    errors = ask(after(*[Failure.ERROR] * 10), 9999)
    assert errors == GiveUp(("10 errors of providers in a row, max_errors is 10",))
    assert isinstance(ask(launched(after(*[Failure.ERROR] * 10), A), 9999), TryPool)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 2}', RetryState().to_json().replace("0", '"x"', 1), '{"format": 1, "holds": 3}'],
)
def test_strange_states_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        RetryState.from_json(text)


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_delays_grow_to_the_cap_and_no_further(failures: int, jitter: float) -> None:
    backoff = Backoff(1, 100)
    delay_s = backoff.delay_s(failures, jitter)
    assert min(100, 2 ** min(failures - 1, 9)) / 2 <= delay_s < 100.0000001
    assert delay_s <= backoff.delay_s(failures + 1, jitter)


def test_limits_that_make_no_sense_are_refused() -> None:
    for wrong in (
        lambda: Backoff(2, 1),
        lambda: Backoff(-1, 1),
        lambda: Backoff(1, float("inf")),
        lambda: Fallback(None, None),
        lambda: Fallback(0, None),
        lambda: Fallback(None, -1),
        lambda: RetryLimits(max_errors=0),
    ):
        with pytest.raises(UsageError):
            wrong()
    assert str(Fallback(1, 90)) == "1 try or 1 min 30 s"
    assert Hold(key="pool a") == RetryState().hold("pool a")
