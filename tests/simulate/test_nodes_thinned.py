"""Thinned traces: as much capacity as measured, as correlated as asked for, the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from holdfast.core.errors import UsageError
from holdfast.simulate.traces.fit import runs
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.traces.synthetic import Pool, PriceWalk, generate
from holdfast.simulate.traces.thinned import thinned
from holdfast.simulate.traces.trace import Trace

HOUR = 3600


def measured() -> Trace:
    pools = [
        Pool(
            name=name, up=Weibull(0.7, up_h * HOUR), down=Weibull(0.8, HOUR), price=PriceWalk(mean_microusd_h=1_000_000)
        )
        for name, up_h in (("calm", 4.0), ("rough", 1.0))
    ]
    return generate(pools, tick_s=300, duration_s=90 * 24 * HOUR, on_demand_microusd_h=3_000_000, seed=5)


def test_each_place_is_as_often_there_as_was_measured() -> None:
    trace = measured()
    for correlation in (0.0, 0.4, 1.0):
        many = thinned(trace, 12, seed=1, correlation=correlation)
        assert many.capacity.max() <= 12
        share = many.capacity.mean(axis=1) / 12
        assert share == pytest.approx(trace.available().mean(axis=1), abs=0.05)


def test_two_places_are_as_correlated_as_asked_for() -> None:
    """The variance of the sum of n places with variance v and correlation c is n v (1 + (n - 1) c)."""
    trace = measured()
    for correlation in (0.0, 0.25, 0.6, 1.0):
        many = thinned(trace, 16, seed=2, correlation=correlation)
        for pool in range(2):
            share = trace.available()[pool].mean()
            found = (many.capacity[pool].var() / (16 * share * (1 - share)) - 1) / 15
            assert found == pytest.approx(correlation, abs=0.08)


def test_one_place_alone_lives_as_long_as_measured() -> None:
    trace = measured()
    one = thinned(trace, 1, seed=3)
    lengths = [np.sort(runs(each.available()[0])[0]) for each in (trace, one)]
    # Turned, so that only the stretches at the two ends may be others.
    assert abs(len(lengths[0]) - len(lengths[1])) <= 2
    assert lengths[1].mean() == pytest.approx(lengths[0].mean(), rel=0.01)
    assert (thinned(trace, 5, seed=9, correlation=1.0).capacity == 5 * trace.available()).all()


def test_the_same_seed_is_the_same_trace_and_pools_do_not_depend_on_each_other() -> None:
    trace = measured()
    again = [thinned(trace, 8, seed=seed, correlation=0.3).capacity for seed in (1, 1, 2)]
    assert (again[0] == again[1]).all()
    assert (again[0] != again[2]).any()
    assert (thinned(trace.only("calm"), 8, seed=1, correlation=0.3).capacity[0] == again[0][0]).all()
    wrong: dict[str, Any]
    for wrong in ({"nodes": 0}, {"correlation": 1.1}, {"stretch_s": 0}):
        with pytest.raises(UsageError, match="thinned to 1 to 4096 nodes"):
            thinned(trace, **({"nodes": 2, "seed": 1} | wrong))
