"""Ours: never late whatever it believes, the same for one job as for thousands, and as cheap as its tables say."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Bools, Choice, Floats, Ints, Situation
from holdfast.policy.market.beliefs import AGE_EDGES_S, AGES, COLD, UNSEEN_AGE_S, Beliefs, Hazard
from holdfast.policy.market.facts import Job, Market, PolicyState
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.market.tables import solve
from holdfast.simulate.market.engine import Watch, simulate
from holdfast.simulate.market.story import tell
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.fit import fit_beliefs
from holdfast.simulate.traces.lifetimes import Lifetimes, Weibull
from holdfast.simulate.traces.synthetic import Outages, Pool, PriceWalk, generate
from holdfast.simulate.traces.trace import Trace, joined

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
HOUR = 3600
SPOT, DEMAND = 973_100, 3_060_000
ROSY = Beliefs(Hazard((1e-3,) * AGES, 1000.0), Hazard((1e3,) * AGES, 1000.0))
GLOOMY = Beliefs(Hazard((1e3,) * AGES, 1000.0), Hazard((1e-3,) * AGES, 1000.0))


def market(capacity: Bools, tick_s: int, *, pools: int = 1) -> Trace:
    rows = capacity.reshape(pools, -1).astype(np.int32)
    return Trace(
        pools=tuple(f"pool-{number}" for number in range(pools)),
        tick_s=tick_s,
        capacity=rows,
        microusd_h=np.full(rows.shape, SPOT),
        on_demand_microusd_h=DEMAND,
    )


def pool(up: Lifetimes, down: Lifetimes, *, days: float, seed: int, tick_s: int = 195, **more: object) -> Trace:
    one = Pool(name=f"pool-{seed}", up=up, down=down, price=PriceWalk(mean_microusd_h=SPOT), **more)  # type: ignore[arg-type]
    outages = [Outages(region="r", apart=Weibull(1.0, 30 * HOUR), last=Weibull(0.7, 5 * HOUR))] if one.region else []
    return generate(
        [one], tick_s=tick_s, duration_s=round(days * 86400), on_demand_microusd_h=DEMAND, seed=seed, outages=outages
    )


def task(deadline_h: float = 60, changeover_h: float = 0.2) -> Job:
    return Job(work_s=48 * HOUR, deadline_s=round(deadline_h * HOUR), changeover_s=round(changeover_h * HOUR))


@pytest.mark.parametrize("beliefs", [ROSY, GLOOMY, COLD], ids=["rosy", "gloomy", "cold"])
def test_whatever_it_believes_it_is_never_late(beliefs: Beliefs) -> None:
    """Every on-off pattern of ten ticks, for ticks shorter and longer than the changeover, and with lost work."""
    ticks = 10
    patterns = (np.arange(1 << ticks)[:, None] >> np.arange(ticks)) & 1
    starts = np.arange(patterns.size, step=ticks)
    for tick_s, changeover_s, max_lost_s, spare_s in [
        (600, 0, 0, 300),
        (600, 600, 0, 1500),
        (600, 180, 0, 540),
        (600, 840, 0, 1680),
        (600, 840, 0, 3180),
        (600, 1500, 0, 1500),
        (600, 240, 420, 1860),
        (180, 240, 300, 1020),
    ]:
        deadline_s = ticks * tick_s - 60
        job = Job(work_s=deadline_s - spare_s, deadline_s=deadline_s, changeover_s=changeover_s, max_lost_s=max_lost_s)
        outcomes = simulate(market(patterns.astype(np.bool_), tick_s), Ours(beliefs), Workload(job=job), starts)
        assert not outcomes.missed.any(), job


def test_an_adversary_that_takes_what_was_just_started_cannot_make_it_late() -> None:
    """Capacity shows up until it is wanted, and is taken as soon as the changeover is over; beliefs keep saying that it lasts."""
    job, tick_s = task(changeover_h=0.3), 390
    ticks = -(-job.deadline_s // tick_s)
    for beliefs in (ROSY, COLD):
        there = np.ones(ticks, np.bool_)
        for _ in range(30 if LONG else 8):
            worked: list[int] = []

            def watch(situation: Situation, choice: Choice, worked: list[int] = worked) -> None:
                if situation.running[0] >= 0 and situation.changeover_left_s[0] == 0:
                    worked.append(situation.now_s // tick_s)

            outcomes = simulate(market(there, tick_s), Ours(beliefs), Workload(job=job), np.zeros(1, np.int64), watch)
            assert not outcomes.missed.any()
            if not worked:
                break
            there[worked[0] : worked[0] + 2] = False


def test_one_job_through_text_decides_as_a_window_among_many() -> None:
    """Two pools, one of which must be asked: the same targets, and every reason names what it would cost."""
    traces = [
        pool(Weibull(0.6, 3 * HOUR), Weibull(0.6, 2 * HOUR), days=4, seed=seed, tick_s=600, machines=3)
        for seed in (1, 2)
    ]
    trace, policy, tick_s = joined(traces), Ours(), 600
    job = Job(work_s=12 * HOUR, deadline_s=16 * HOUR, changeover_s=700, max_lost_s=300)
    for asks in (False, True):
        workload = Workload(job=job, gang=2, asks=asks)
        starts = trace.starts(job.deadline_s, (8 if LONG else 24) * HOUR)
        chosen: list[Ints] = []
        together = simulate(trace, policy, workload, starts, _keep(chosen))
        for window, start in enumerate(starts.tolist()):
            outcomes, told = tell(trace, policy, workload, start, every_tick=True)
            assert outcomes.microusd[0] == together.microusd[window]
            state = policy.start(2)
            for tick, each in enumerate(told):
                if each.context.work_left_s == 0:
                    break
                state, decision = policy.decide(each.context, PolicyState.from_json(state.to_json()))
                assert decision == each.decision
                target = chosen[tick][window]
                assert decision.pool == (trace.pools[target] if target >= 0 else None)
                assert (decision.market is Market.ON_DEMAND) == (target == ON_DEMAND)
                assert each.context.now_s == tick * tick_s


def _keep(chosen: list[Ints]) -> Watch:
    return lambda _, choice: chosen.append(choice.target.copy())


def test_reasons_say_what_each_way_is_expected_to_cost() -> None:
    there = np.array([[1] * 20 + [0] * 100], np.bool_)
    job = Job(work_s=8 * HOUR, deadline_s=12 * HOUR, changeover_s=600)
    _, told = tell(market(there, 600), Ours(), Workload(job=job), 0)
    first, taken = told[0].decision, told[2].decision
    assert "cheapest on average" in first.reasons[0]
    assert first.reasons[2].startswith("the rest is expected to cost $")
    assert " if it waits now, $" in first.reasons[2]
    assert first.reasons[2].endswith(" on on-demand now")
    assert "on spot now" in first.reasons[2]
    assert "on spot now" not in taken.reasons[2]
    assert "kept until it is taken" in told[1].decision.reasons[0]


def hazards(ages: Ints, per_h: tuple[float, ...], tick_s: int) -> Floats:
    bucket = np.searchsorted(AGE_EDGES_S, ages, side="right") - 1
    return -np.expm1(-np.array(per_h)[bucket] * tick_s / HOUR)


def believed(beliefs: Beliefs, windows: int, ticks: int, tick_s: int, up: bool, seed: int) -> Bools:
    """Windows x ticks that do just what is believed, from a state of the age that the policy takes an unseen one to have."""
    luck = np.random.default_rng(seed)
    state, age = np.full(windows, up), np.full(windows, UNSEEN_AGE_S)
    out = np.empty((windows, ticks), np.bool_)
    for tick in range(ticks):
        out[:, tick] = state
        chance = np.where(state, hazards(age, beliefs.up.per_h, tick_s), hazards(age, beliefs.down.per_h, tick_s))
        ends = luck.random(windows) < chance
        state, age = state ^ ends, np.where(ends, 0, age + tick_s)
    return out


@pytest.mark.parametrize(
    ("up", "changeover_s", "max_lost_s"),
    [
        pytest.param(True, 900, 0, marks=pytest.mark.long),
        (False, 900, 0),
        pytest.param(False, 200, 0, marks=pytest.mark.long),
        (True, 900, 900),
    ],
)
def test_the_expected_cost_is_what_it_costs_on_average(up: bool, changeover_s: int, max_lost_s: int) -> None:
    """On a market that does what is believed. The tables know one thing less: how far an age is into its bucket."""
    sure = Beliefs(Hazard(COLD.up.per_h, 1e5), Hazard(COLD.down.per_h, 1e5))
    tick_s, windows = 600, 3000
    job = Job(work_s=24 * HOUR, deadline_s=30 * HOUR, changeover_s=changeover_s, max_lost_s=max_lost_s)
    ticks = job.deadline_s // tick_s
    trace = market(believed(sure, windows, ticks, tick_s, up, seed=7), tick_s)
    foretold: list[float] = []

    def watch(situation: Situation, choice: Choice) -> None:
        if situation.now_s == 0 and choice.costs is not None:
            foretold.append(float(np.nanmin(choice.costs[:, 0])))

    starts = np.arange(windows) * ticks
    policy = Ours(sure, forget_s=1e12)
    dollars = simulate(trace, policy, Workload(job=job), starts, watch).microusd / 1e6
    error = float(dollars.std()) / windows**0.5
    assert abs(float(dollars.mean()) - foretold[0]) < 3 * error + 0.01 * foretold[0]


@pytest.mark.parametrize("shape_mean_h", [(0.6, 2.0), (1.0, 1.0), (0.8, 4.0)], ids=["falling", "constant", "long"])
def test_a_history_teaches_the_hazards_that_made_it(shape_mean_h: tuple[float, float]) -> None:
    """Bucket by bucket, as exactly as its number of ends allows."""
    shape, mean_h = shape_mean_h
    true = Weibull(shape, mean_h * HOUR)
    trace = pool(true, Weibull(1.0, HOUR), days=300, seed=3, tick_s=15)
    learned = fit_beliefs(trace)
    edges_s = np.array(AGE_EDGES_S, np.float64)
    there = trace.available()[0]
    for bucket in range(AGES - 1):
        low, high = edges_s[bucket : bucket + 2]
        # Ends by hours at risk: both by the survival function, in steps of a tick. Stretches that no probe meets are missing.
        ages = np.arange(low, high, 15.0)
        alive = np.exp(-((ages / true.scale_s) ** shape))
        gone = alive - np.exp(-(((ages + 15) / true.scale_s) ** shape))
        rate = gone.sum() / (alive.sum() / 240)
        ends = max(1.0, (there.sum() / 240 / mean_h) * gone.sum())
        assert abs(np.log(learned.up.per_h[bucket] / rate)) < 4 / ends**0.5 + 3 / ends + 0.05, bucket
    assert abs(np.log(np.array(learned.down.per_h)[:3])).max() < 0.2
    assert learned.up.certainty >= 5.6


def test_pools_that_differ_make_it_less_sure_than_pools_that_agree() -> None:
    def pools(means_h: tuple[float, ...]) -> Trace:
        return joined(
            [
                pool(Weibull(0.7, mean_h * HOUR), Weibull(0.7, 2 * HOUR), days=20, seed=seed)
                for seed, mean_h in enumerate(means_h)
            ]
        )

    agree, differ = fit_beliefs(pools((3.0, 3.0, 3.0, 3.0))), fit_beliefs(pools((0.5, 2.0, 8.0, 30.0)))
    assert differ.up.certainty < 3 < agree.up.certainty


def test_what_is_seen_overrules_what_was_believed() -> None:
    """True hazards are four times and a quarter of the believed ones: after 20 days the posterior says so."""
    base = Hazard((0.5,) * AGES, 2.0)
    policy = Ours(Beliefs(base, base), forget_s=1e12)
    trace = pool(Weibull(1.0, 0.5 * HOUR), Weibull(1.0, 8 * HOUR), days=60, seed=5, tick_s=300)
    job = Job(work_s=30 * 24 * HOUR, deadline_s=70 * 24 * HOUR, changeover_s=600)
    memory = np.array(policy.start(1).memory).reshape(-1, 1)
    there = trace.available()[0]
    for tick in range(trace.ticks):
        known = there[tick : tick + 1].astype(np.int8).reshape(1, 1)
        memory = policy._learn(
            Situation(
                job=job,
                now_s=tick * 300,
                tick_s=300,
                work_left_s=np.array([job.work_s]),
                running=np.array([NOTHING]),
                changeover_left_s=np.zeros(1, np.int64),
                available=known,
                microusd_h=np.array([[SPOT]]),
                on_demand_microusd_h=DEMAND,
                cheapest=np.where(known[0] > 0, 0, NOTHING),
            ),
            memory,
        )
    downs, ups = memory[1:7, 0], memory[7:13, 0]
    assert ups[3] / ups[4] == pytest.approx(4, rel=0.25)
    assert downs[3] / downs[4] == pytest.approx(0.25, rel=0.3)
    for track, factor in ((ups, 4), (downs, 0.25)):
        weights = base.posterior(41, track[3:4], track[4:5, None], track[5:6, None])[0]
        assert float(np.exp((weights * np.log(base.factors(41))).sum())) == pytest.approx(factor, rel=0.3)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("nearly always up", Weibull(0.7, 80 * HOUR), Weibull(0.7, 1 * HOUR)),
        ("never down", Weibull(1.0, 1e6 * HOUR), Weibull(1.0, HOUR)),
        ("nearly always down", Weibull(0.7, 1.5 * HOUR), Weibull(0.7, 60 * HOUR)),
        ("never up", Weibull(1.0, 1.0), Weibull(1.0, 1e6 * HOUR)),
        # A changeover to spot and one back pay for themselves after 2kd/(k-1) = 0.59 h.
        ("near break-even", Weibull(1.0, 0.59 * HOUR), Weibull(1.0, 0.6 * HOUR)),
        ("flapping", Weibull(1.0, 0.3 * HOUR), Weibull(1.0, 0.15 * HOUR)),
        ("long and long", Weibull(0.8, 10 * HOUR), Weibull(0.8, 10 * HOUR)),
    ],
)
def test_on_hard_pools_it_is_no_dearer_than_the_best_simple_policy(name: str, up: Weibull, down: Weibull) -> None:
    """Without any history. By more than 1 %, summed over windows."""
    job = task()
    trace = pool(up, down, days=130, seed=11, tick_s=390)
    starts = trace.starts(job.deadline_s, 24 * HOUR)
    workload = Workload(job=job)
    ours = simulate(trace, Ours(), workload, starts)
    best = min(
        int(simulate(trace, POLICIES[other], workload, starts).microusd.sum())
        for other in ("greedy", "uniform-progress", "on-demand")
    )
    assert not ours.missed.any()
    assert ours.microusd.sum() <= 1.01 * best


def test_a_gang_that_is_rarely_whole_and_a_history_that_misleads() -> None:
    """The gang's own capacity counts, not that of one machine; windows of a market ten times as rough as its history are in time,
    and no dearer than on-demand by more than 1 %."""
    calm = pool(Weibull(0.7, 20 * HOUR), Weibull(0.7, HOUR), days=30, seed=1, tick_s=390, machines=4)
    rough = pool(Weibull(0.7, 1.5 * HOUR), Weibull(0.7, 6 * HOUR), days=60, seed=2, tick_s=390, machines=4, region="r")
    workload = Workload(job=task(), gang=4)
    starts = rough.starts(workload.job.deadline_s, 12 * HOUR)
    on_demand = int(simulate(rough, POLICIES["on-demand"], workload, starts).microusd.sum())
    for beliefs in (fit_beliefs(calm), fit_beliefs(calm, gang=4), fit_beliefs(rough, gang=4)):
        outcomes = simulate(rough, Ours(beliefs), workload, starts)
        assert not outcomes.missed.any()
        assert outcomes.microusd.sum() <= 1.01 * on_demand


def test_tables_are_solved_once() -> None:
    trace = pool(Weibull(0.7, 2 * HOUR), Weibull(0.7, 2 * HOUR), days=5, seed=1, tick_s=600)
    job = Job(work_s=10 * HOUR, deadline_s=13 * HOUR, changeover_s=301)
    starts = trace.starts(job.deadline_s, 6 * HOUR)
    before = solve.cache_info().misses
    first = simulate(trace, Ours(), Workload(job=job), starts)
    again = simulate(trace, Ours(), Workload(job=job), starts)
    assert solve.cache_info().misses == before + 1
    assert (first.microusd == again.microusd).all()


@pytest.mark.parametrize(
    ("per_h", "certainty"), [((1.0,) * (AGES - 1), 1.0), ((0.0,) * AGES, 1.0), ((1.0,) * AGES, 0.0)]
)
def test_impossible_beliefs_are_refused(per_h: tuple[float, ...], certainty: float) -> None:
    with pytest.raises(UsageError, match="hazards and a certainty"):
        Hazard(per_h, certainty)


def test_a_market_of_no_pools_or_dear_ones_is_waited_for_no_longer_than_is_safe() -> None:
    job = Job(work_s=10 * HOUR, deadline_s=13 * HOUR, changeover_s=600)
    there = np.ones((1, 200), np.bool_)
    dear = replace(market(there, 600), microusd_h=np.full((1, 200), DEMAND + 1))
    outcomes, told = tell(dear, Ours(), Workload(job=job), 0)
    assert int(outcomes.spot_s[0]) == 0
    assert not outcomes.missed.any()
    context = replace(told[0].context, offers=())
    _, decision = Ours().decide(context, Ours().start(0))
    assert decision.market is not Market.SPOT
