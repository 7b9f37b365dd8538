"""Random rules around every policy on random markets, played by the simulator: no rule is ever broken, no promise either, and a
policy that is killed at every tick decides the same."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.policy.backoff import Fallback
from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Ints, Situation
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Context, Job, Offer, PolicyState, Running
from holdfast.policy.market.greedy import Greedy
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.rules import Ruled, Rules, SpotPolicy
from holdfast.policy.market.rules_facts import MILLION
from holdfast.policy.market.rules_week import ALWAYS, WEEK_S, Weekly
from holdfast.policy.market.single_market import OnDemandOnly, SpotOnly
from holdfast.policy.market.uniform_progress import UniformProgress, UniformProgressAsWritten
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.outcome import Outcomes
from holdfast.simulate.market.story import context_of
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

HOUR, DAY = 3600, 86400
DEMAND = 3_000_000
SIMPLE = (Greedy(), UniformProgress(), UniformProgressAsWritten(), SpotOnly(), OnDemandOnly())


@dataclass(frozen=True)
class Play:
    """One world, and what is played in it."""

    trace: Trace
    workload: Workload
    rules: Rules
    inner: MarketPolicy
    starts: Ints
    zero_utc_s: int
    """When tick 0 of the trace was."""

    def ruled(self, window: int | None = None) -> Ruled:
        started = self.zero_utc_s + self.starts * self.trace.tick_s
        at = started if window is None else int(started[window])
        return Ruled(self.inner, self.rules, self.trace.pools, self.workload.gang, at)

    def first_context(self, window: int) -> Context:
        """What a job knows before its first tick."""
        at, gang = int(self.starts[window]), self.workload.gang
        return Context(
            job=self.workload.job,
            now_s=0,
            tick_s=self.trace.tick_s,
            work_left_s=self.workload.job.work_s,
            running=Running(),
            offers=tuple(
                Offer(pool, None, int(self.trace.microusd_h[row, at]) * gang)
                for row, pool in enumerate(self.trace.pools)
            ),
            on_demand_microusd_h=DEMAND * gang,
        )


@st.composite
def plays(draw: st.DrawFn, inner: tuple[MarketPolicy, ...] = SIMPLE, *, most_ticks: int = 120) -> Play:
    """The deadline is the first of a row at which the rules promise to keep it, or a random one."""
    luck = random.Random(draw(st.integers(0, 1 << 40)))
    policy = draw(st.sampled_from(inner))
    tick_s = luck.choice([600, 1800, HOUR, 5400, 2 * HOUR])
    changeover_s = luck.choice([0, 300, tick_s, 2 * tick_s + 1, 3 * HOUR])
    work_s = luck.randint(1, 40 * tick_s)
    gang = luck.choice([1, 1, 3])
    job = Job(
        work_s=work_s,
        deadline_s=work_s + luck.randint(0, 60 * tick_s),
        changeover_s=changeover_s,
        max_lost_s=luck.choice([0, 0, 1000, 4000]),
    )
    rules = _rules(luck)
    windows, pools = luck.randint(1, 3), ("a", "b", "c")[: luck.randint(1, 3)]
    if rules.reserved and luck.random() < 0.5:
        rules = replace(rules, reserved=pools[: luck.randint(1, len(pools))])
    rules = replace(rules, reserved=tuple(name for name in rules.reserved if name in pools))
    ticks = most_ticks + windows
    longest = luck.choice([2, 6, 30])
    prices = [DEMAND - 1, 900_000, 1_000_000, 2_000_000, 4_000_000]
    trace = Trace(
        pools=pools,
        tick_s=tick_s,
        capacity=np.array([_in_runs(luck, [0, gang, gang - 1, gang + 1], ticks, longest) for _ in pools], np.int32),
        microusd_h=np.array([_in_runs(luck, prices, ticks, longest) for _ in pools], np.int64),
        on_demand_microusd_h=DEMAND,
    )
    utc_s = luck.randrange(WEEK_S)
    starts = np.array(sorted(luck.sample(range(3 * windows), windows)), np.int64) % windows
    horizon_s = (ticks - windows) * tick_s
    play = Play(trace, Workload(job=job, gang=gang, asks=luck.random() < 0.4), rules, policy, starts, utc_s)
    deadlines = [job.deadline_s] if luck.random() < 0.2 else range(work_s, horizon_s, tick_s // 3 + 7)
    for deadline_s in deadlines:
        workload = replace(play.workload, job=replace(job, deadline_s=min(deadline_s, horizon_s)), horizon_s=horizon_s)
        play = replace(play, workload=workload)
        if all(play.ruled(window).promise(play.first_context(window)).kept for window in range(windows)):
            break
    return play


def _rules(luck: random.Random) -> Rules:
    window = partial(luck.choice, [ALWAYS, ALWAYS, _week(luck)])
    choice: dict[str, object] = {
        "spot_policy": luck.choice([SpotPolicy.AUTO] * 9 + list(SpotPolicy)),
        "max_microusd_h": luck.choice([None, None, DEMAND, DEMAND, DEMAND + 1, DEMAND - 1, 1_000_000]),
        "reserved": luck.choice([(), (), ("a",), ("a", "b")]),
        luck.choice(["start_window", "run_window"]): window(),
    }
    if choice["spot_policy"] is not SpotPolicy.SPOT:
        choice["floor_millionths"] = luck.choice([0, 0, 1, 250_000, 999_999, MILLION])
        choice["fallback"] = luck.choice([None, None, Fallback(3, None), Fallback(None, HOUR), Fallback(2, 7000)])
    if luck.random() < 0.1:
        choice |= {"opportunistic": True, "floor_millionths": 0, "fallback": None, "spot_policy": SpotPolicy.AUTO}
    return Rules(**choice)  # type: ignore[arg-type]


def _week(luck: random.Random) -> Weekly:
    if luck.random() < 0.5:
        begin_s, length_s = luck.randrange(0, DAY, 900), luck.randint(HOUR, 23 * HOUR)
        return Weekly.of([(day * DAY + begin_s, day * DAY + begin_s + length_s) for day in range(7)])
    begins = [luck.randrange(WEEK_S) for _ in range(luck.randint(1, 10))]
    return Weekly.of([(begin_s, begin_s + luck.randint(1, 2 * DAY)) for begin_s in begins])


def _in_runs(luck: random.Random, values: list[int], ticks: int, longest: int) -> list[int]:
    out: list[int] = []
    while len(out) < ticks:
        out += [luck.choice(values)] * luck.randint(1, longest)
    return out[:ticks]


def is_open(week: Weekly, utc_s: int) -> bool:
    """Written down anew: 1970-01-01 was a Thursday."""
    at = (utc_s + 3 * DAY) % WEEK_S
    return any(begin <= at < end or begin <= at + WEEK_S < end for begin, end in week.pieces)


class Referee:
    """Watches every tick, and knows the rules from their description only."""

    def __init__(self, play: Play) -> None:
        self.play, self.steady_s = play, np.zeros(len(play.starts), np.int64)
        self.before: tuple[Ints, Ints] | None = None
        self.seen: list[tuple[Situation, Choice]] = []

    def __call__(self, situation: Situation, choice: Choice) -> None:
        self.count(situation.work_left_s)
        target = np.where(situation.work_left_s > 0, choice.target, NOTHING)
        for window in range(len(target)):
            if situation.work_left_s[window] > 0:
                self.check(situation, window, int(target[window]), int(situation.running[window]))
        steady = (target == ON_DEMAND) | np.isin(target, [self.play.trace.pools.index(p) for p in self.rules.reserved])
        self.before = (situation.work_left_s.copy(), steady)
        self.seen.append((replace(situation, work_left_s=situation.work_left_s.copy()), choice))

    @property
    def rules(self) -> Rules:
        return self.play.rules

    def count(self, left_s: Ints) -> None:
        if self.before is not None:
            self.steady_s += (self.before[0] - left_s) * self.before[1]

    def check(self, situation: Situation, window: int, target: int, running: int) -> None:
        rules, tick_s = self.rules, self.play.trace.tick_s
        utc_s = self.play.zero_utc_s + int(self.play.starts[window]) * tick_s + situation.now_s
        if target == NOTHING:
            return
        assert all(is_open(rules.run_window, utc_s + second) for second in (0, tick_s // 2, tick_s - 1))
        assert target == running or is_open(rules.start_window, utc_s)
        reserved = target >= 0 and self.play.trace.pools[target] in rules.reserved
        spot = target >= 0 and not reserved
        assert not (spot and rules.spot_policy is SpotPolicy.ON_DEMAND)
        assert not (target == ON_DEMAND and (rules.spot_policy is SpotPolicy.SPOT or rules.opportunistic))
        if rules.max_microusd_h is not None and not reserved:
            price = situation.microusd_h[target, window] if spot else situation.on_demand_microusd_h
            assert price <= rules.max_microusd_h * self.play.workload.gang


def played(play: Play) -> tuple[Outcomes, Referee]:
    referee = Referee(play)
    outcomes = simulate(play.trace, play.ruled(), play.workload, play.starts, referee)
    referee.count(play.workload.job.work_s - outcomes.useful_s)
    return outcomes, referee


def check_all(play: Play) -> None:
    outcomes, referee = played(play)
    done = outcomes.finish_s >= 0
    owed = play.rules.floor_millionths * play.workload.job.work_s
    assert (referee.steady_s * MILLION >= owed)[done].all()
    for window in range(len(play.starts)):
        promise = play.ruled(window).promise(play.first_context(window))
        assert promise.reasons
        assert not (promise.kept and outcomes.missed[window]), promise
        if play.ruled().keeps_deadline:
            assert promise.kept == (play.first_context(window).slack_s >= play.workload.job.changeover_s)


@settings(max_examples=120, deadline=None)
@given(plays())
def test_no_rule_is_broken_and_no_promise_either(play: Play) -> None:
    check_all(play)


@settings(max_examples=8, deadline=None)
@given(plays((Ours(),), most_ticks=100))
def test_the_same_around_ours(play: Play) -> None:
    check_all(play)


@settings(max_examples=30, deadline=None)
@given(plays((*SIMPLE, Greedy(), UniformProgress()), most_ticks=100))
def test_a_policy_killed_at_every_tick_decides_the_same(play: Play) -> None:
    """Thousands at once in memory, or one by one through text: nothing hangs on what is not in the state."""
    killed_at_every_tick(play)


@settings(max_examples=4, deadline=None)
@given(plays((Ours(),), most_ticks=60))
def test_ours_killed_at_every_tick_decides_the_same(play: Play) -> None:
    killed_at_every_tick(play)


def killed_at_every_tick(play: Play) -> None:
    _, referee = played(play)
    for window in range(len(play.starts)):
        written = play.ruled(window).start(len(play.trace.pools)).to_json()
        for situation, choice in referee.seen:
            context = context_of(situation, window, play.trace.pools)
            ruled = play.ruled(window)
            state, decision = ruled.decide(context, PolicyState.from_json(written))
            written = state.to_json()
            expected = ruled.in_words(context, *choice.of(window)[:2])
            assert (decision.market, decision.pool) == (expected.market, expected.pool)
            assert decision.reasons[0] == expected.reasons[0]


@pytest.mark.parametrize("inner", SIMPLE, ids=lambda policy: policy.name)
def test_no_rules_change_nothing(inner: MarketPolicy) -> None:
    luck = random.Random(7)
    ticks = 700
    trace = Trace(
        pools=("a", "b"),
        tick_s=600,
        capacity=np.array([_in_runs(luck, [0, 1], ticks, 20) for _ in range(2)], np.int32),
        microusd_h=np.array([_in_runs(luck, [900_000, 2_000_000, 4_000_000], ticks, 20) for _ in range(2)], np.int64),
        on_demand_microusd_h=DEMAND,
    )
    for asks in (False, True):
        job = Job(work_s=48 * HOUR, deadline_s=60 * HOUR, changeover_s=720, max_lost_s=1800)
        workload = Workload(job=job, asks=asks)
        starts = trace.starts(job.deadline_s, 6 * HOUR)
        plain = simulate(trace, inner, workload, starts)
        ruled = simulate(trace, Ruled(inner, Rules()), workload, starts)
        for name in ("microusd", "finish_s", "lost_s", "spot_launches", "on_demand_launches"):
            assert (getattr(plain, name) == getattr(ruled, name)).all()
