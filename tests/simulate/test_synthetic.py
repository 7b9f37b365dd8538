"""Traces that are made: the same from the same seed, and like what they were asked to be like, as a fit sees them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from holdfast.core.errors import UsageError
from holdfast.policy.market.facts import Job
from holdfast.policy.market.registry import POLICIES
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.fit import fit_pool, runs
from holdfast.simulate.traces.lifetimes import Bathtub, Weibull, fit_weibull
from holdfast.simulate.traces.synthetic import Outages, Pool, PriceWalk, generate
from holdfast.simulate.traces.trace import Trace

HOUR, DAY = 3600, 86400
PRICE = PriceWalk(mean_microusd_h=1_000_000)
POOL = Pool(name="a", up=Weibull(0.7, 3 * HOUR), down=Weibull(1, HOUR), price=PRICE)


def make(*pools: Pool, days: int = 60, seed: int = 7, outages: tuple[Outages, ...] = ()) -> Trace:
    return generate(
        pools, tick_s=300, duration_s=days * DAY, on_demand_microusd_h=3_000_000, seed=seed, outages=outages
    )


def test_the_same_seed_makes_the_same_trace_and_pools_do_not_depend_on_each_other() -> None:
    one, again, other = make(POOL), make(POOL), make(POOL, seed=8)
    assert (one.capacity == again.capacity).all()
    assert (one.capacity != other.capacity).any()
    two = make(POOL, replace(POOL, name="b"))
    assert (two.capacity[0] == one.capacity[0]).all()
    assert (two.capacity[0] != two.capacity[1]).any()


@pytest.mark.parametrize("shape", [0.57, 0.79, 1.0, 1.6])
def test_a_fit_finds_what_was_drawn_even_where_much_was_cut_off(shape: float) -> None:
    luck = np.random.default_rng(3)
    lives = Weibull(shape, 5000).draw(luck, 4000)
    cut = luck.exponential(8000, 4000)
    seen = fit_weibull(np.minimum(lives, cut), lives <= cut)
    assert seen.shape == pytest.approx(shape, rel=0.07)
    assert seen.mean_s == pytest.approx(5000, rel=0.12)


def test_a_made_trace_is_like_its_pool() -> None:
    trace = make(replace(POOL, up=Weibull(0.7, 8 * HOUR), down=Weibull(1.2, 4 * HOUR)), days=3000)
    like = fit_pool(trace, "a")
    assert like.availability == pytest.approx(8 / 12, abs=0.03)
    assert like.up is not None
    assert like.down is not None
    assert like.up.shape == pytest.approx(0.7, rel=0.1)
    assert like.up.mean_s == pytest.approx(8 * HOUR, rel=0.1)
    assert like.down.shape == pytest.approx(1.2, rel=0.1)
    assert like.down.mean_s == pytest.approx(4 * HOUR, rel=0.1)
    # P(life <= 10 min) of that Weibull, without the lives that no probe has seen.
    assert 0.02 < like.young_share < 0.2
    twin = generate([like.as_pool()], tick_s=300, duration_s=3000 * DAY, on_demand_microusd_h=3_000_000, seed=1)
    assert twin.available().mean() == pytest.approx(like.availability, abs=0.03)


def test_tides_come_at_their_hour() -> None:
    by_hour = fit_pool(make(replace(POOL, tide=3.0, busiest_hour=14.0), days=400), "a").by_hour
    quiet, busy = np.mean(by_hour[1:5]), np.mean(by_hour[13:17])
    assert quiet > busy + 0.3
    flat = fit_pool(make(POOL, days=400), "a").by_hour
    assert max(flat) - min(flat) < 0.15


def test_shared_outages_correlate_the_pools_of_a_region() -> None:
    east = tuple(replace(POOL, name=name, region="east") for name in "ab")
    west = replace(POOL, name="c", region="west")
    outages = (Outages(region="east", apart=Weibull(1, 12 * HOUR), last=Weibull(1, 8 * HOUR)),)
    trace = make(*east, west, days=300, outages=outages)
    together = np.corrcoef(trace.available().astype(float))
    assert together[0, 1] > 0.3
    assert abs(together[0, 2]) < 0.1
    alone = make(*east, west, days=300)
    assert (trace.capacity[2] == alone.capacity[2]).all()
    assert not (trace.capacity[0] > alone.capacity[0]).any()


def test_a_bathtub_has_its_edge() -> None:
    lives = Bathtub(early_share=0.2, early_mean_s=600, edge_s=DAY, at_edge_share=0.3).draw(
        np.random.default_rng(1), 20000
    )
    assert lives.max() == DAY
    assert (lives == DAY).mean() == pytest.approx(0.3, abs=0.02)
    assert (lives < 600).mean() == pytest.approx(0.2 * (1 - math.exp(-1)), abs=0.02)
    assert (lives > 0).all()


def test_prices_wander_as_asked_within_their_bounds() -> None:
    walk = PriceWalk(
        mean_microusd_h=1_000_000, spread=0.2, memory_s=DAY, floor_microusd_h=600_000, ceiling_microusd_h=1_700_000
    )
    trace = make(replace(POOL, price=walk), days=1000)
    prices = trace.microusd_h[0]
    assert 600_000 <= prices.min() <= prices.max() <= 1_700_000
    assert prices.reshape(-1, 12).std(axis=1).max() == 0
    seen = fit_pool(trace, "a").price
    assert seen.mean_microusd_h == pytest.approx(1_000_000, rel=0.03)
    assert seen.spread == pytest.approx(0.2, rel=0.1)
    assert seen.memory_s == pytest.approx(DAY, rel=0.15)


def test_gangs_find_less_than_one_machine_does() -> None:
    trace = make(replace(POOL, machines=4))
    shares = [float(trace.available(gang).mean()) for gang in (1, 2, 3, 4, 5)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[3] + 0.2
    assert shares[4] == 0


def test_runs_know_what_they_have_seen_whole() -> None:
    lengths, up, whole = runs(np.array([1, 1, 0, 1, 1, 1, 0], np.bool_))
    assert (lengths.tolist(), up.tolist()) == ([2, 1, 3, 1], [True, False, True, False])
    assert whole.tolist() == [False, True, True, False]


def test_what_never_goes_away_cannot_be_fitted_but_can_be_simulated() -> None:
    always = make(replace(POOL, up=Weibull(1, 1e9)), days=4)
    like = fit_pool(always, "a")
    assert (like.availability, like.up, like.down) == (1.0, None, None)
    with pytest.raises(UsageError, match="too rarely"):
        like.as_pool()
    job = Job(work_s=10 * HOUR, deadline_s=20 * HOUR, changeover_s=600)
    outcomes = simulate(always, POLICIES["uniform-progress"], Workload(job=job), always.starts(job.deadline_s, HOUR))
    assert set(outcomes.microusd.tolist()) == {round((10 + 1 / 6) * 1e6)}


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError):
        Weibull(0, 1)
    with pytest.raises(UsageError):
        Bathtub(early_share=0.8, early_mean_s=1, edge_s=2, at_edge_share=0.3)
    with pytest.raises(UsageError):
        PriceWalk(mean_microusd_h=1, floor_microusd_h=2)
    with pytest.raises(UsageError, match="too few"):
        fit_weibull([1.0, 2.0], [True, False])
    with pytest.raises(UsageError):
        generate([], tick_s=1, duration_s=1, on_demand_microusd_h=1, seed=1)
