"""Rules of how often to save: what theory says of them, what the trainer's own is asked with, and that it is good enough."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from holdfast.core.errors import UsageError
from holdfast.ledger.goodput import Bucket
from holdfast.policy.interval import AutoContext, PreemptionRate, auto_interval, daly_s, exact_s, with_notice_s, young_s
from holdfast.policy.market.arrays import Floats
from holdfast.policy.spread import Spread
from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.uptime.engine import Seen, ceiling_ms, play
from holdfast.simulate.uptime.fates import Conditions, Fates, draw_fates
from holdfast.simulate.uptime.intervals import (
    FIRST_GUESS_S,
    Automatic,
    Fixed,
    best_fixed,
    daly,
    exact,
    weibull_aware,
    with_notice,
    young,
)

HOUR = 3600.0
COSTLY = Conditions(save_cost_s=60, restore_s=120)


def seen(**known: float) -> Seen:
    """One run."""
    facts = {"age_s": 120.0, "saves": 0, "saves_before": 0, "preemptions": 0, "exposure_s": 0.0, "at_work_s": 0.0}
    facts |= {"noticed": 0, "interval_s": math.nan} | known
    return Seen(conditions=COSTLY, **{name: np.array([value]) for name, value in facts.items()})


@pytest.mark.parametrize(("interval_s", "cost_s", "commit_s"), [(300, 20, 0), (2000, 60, 0), (700, 5, 300)])
def test_with_exponential_lives_the_useful_share_is_what_theory_says(
    interval_s: float, cost_s: float, commit_s: float
) -> None:
    """The j-th save is durable where a machine lives for restore + j·(interval + cost) + commit: a geometric series."""
    mean_s, conditions = 3000.0, Conditions(save_cost_s=cost_s, commit_s=commit_s, start_s=40, restore_s=60)
    fates = draw_fates(Weibull(1, mean_s), conditions, runs=400, machines=100, seed=5)
    useful_s = play(Fixed(interval_s), conditions, fates).buckets[Bucket.USEFUL] / 1000
    expected_s = interval_s * math.exp(-(100 + commit_s) / mean_s) / math.expm1((interval_s + cost_s) / mean_s)
    error_s = useful_s.std() / math.sqrt(useful_s.size)
    assert useful_s.mean() == pytest.approx(expected_s, abs=4 * error_s)
    assert error_s < 0.02 * expected_s


def test_the_formulas_are_those_of_the_policy() -> None:
    for rule, formula in ((young, young_s), (daly, daly_s), (exact, exact_s)):
        assert rule(COSTLY, HOUR).next_interval_s(seen()).tolist() == [formula(60, HOUR)]
    assert with_notice(COSTLY, HOUR, 0.75).interval_s == with_notice_s(60, HOUR, 0.75)


def test_by_hazard_is_youngs_where_the_hazard_is_constant_and_follows_it_where_not() -> None:
    flat = weibull_aware(COSTLY, Weibull(1, HOUR))
    ages_s = np.array([0.0, 1.0, 500.0, 9e4, 1e8])
    at = replace(seen(), age_s=ages_s)
    assert flat.next_interval_s(at) == pytest.approx(np.full(5, young_s(60, HOUR)), rel=1e-6)
    # ∫√(h/2·cost) from one save to the next is 1, in closed form, with a = (shape + 1) / 2.
    lives = Weibull(0.6, HOUR)
    falling, a = weibull_aware(COSTLY, lives), 0.8
    step = a * math.sqrt(2 * 60 * lives.scale_s**0.6 / 0.6)
    assert falling.next_interval_s(at)[:4] == pytest.approx((ages_s**a + step)[:4] ** (1 / a) - ages_s[:4], rel=2e-3)
    with pytest.raises(UsageError):
        weibull_aware(Conditions(save_cost_s=0), lives)


def test_the_automatic_rule_asks_the_trainers_policy_with_what_a_trainer_knows() -> None:
    conditions = replace(COSTLY, commit_s=30)
    fates = Fates.of([[7_200_000, 100_000, 3_600_000]])
    asked: list[Seen] = []

    class Spying(Automatic):
        __slots__ = ()

        def next_interval_s(self, seen: Seen) -> Floats:
            asked.append(replace(seen, interval_s=super().next_interval_s(seen)))
            return asked[-1].interval_s

    play(Spying(), conditions, fates)
    first, second = asked[0], asked[1]
    assert first.interval_s[0] == auto_interval(AutoContext(save_cost_s=FIRST_GUESS_S)).interval_s
    rate = PreemptionRate().observed(0, float(second.at_work_s[0]))
    assert second.at_work_s[0] == first.interval_s.round(3)[0] + 60
    assert second.interval_s[0] == auto_interval(AutoContext(save_cost_s=60, commit_s=30, rate=rate)).interval_s
    # The second machine died before work began: the third knows one preemption, in the first one's time at work.
    third = next(each for each in asked if each.preemptions[0])
    assert (third.preemptions[0], third.exposure_s[0], third.saves[0]) == (1, 7080, 0)
    rate = PreemptionRate().observed(1, 7080)
    assert third.interval_s[0] == auto_interval(AutoContext(save_cost_s=60, commit_s=30, rate=rate)).interval_s


def test_the_automatic_rule_leaves_out_what_it_is_told_not_to_know() -> None:
    facts = {"saves_before": 9, "preemptions": 4, "exposure_s": 4 * HOUR, "noticed": 3}

    def said(rule: Automatic) -> float:
        return float(rule.next_interval_s(seen(**facts))[0])

    rate = PreemptionRate().observed(4, 4 * HOUR)
    known = AutoContext(save_cost_s=60, rate=rate, notice_share=3 / 5)
    assert said(Automatic()) == auto_interval(known).interval_s
    assert said(Automatic(counts_notices=False)) == auto_interval(replace(known, notice_share=0)).interval_s
    assert said(Automatic(keeps_cost=False)) == auto_interval(replace(known, save_cost_s=FIRST_GUESS_S)).interval_s
    assert said(Automatic(max_lost_work_s=90)) == 90
    later = seen(**facts, saves=7, at_work_s=HOUR, age_s=HOUR + 120, interval_s=500.0)
    assert Automatic(counts_age=False).next_interval_s(later).tolist() == [500], "nothing new is known"
    older = AutoContext(save_cost_s=60, rate=rate.observed(0, HOUR), notice_share=3 / 5)
    assert Automatic().next_interval_s(later).tolist() == [auto_interval(older).interval_s]


def test_the_best_fixed_interval_is_no_worse_than_any_formula_on_the_same_machines() -> None:
    lives = Weibull(0.6, HOUR)
    for share in (0.0, 0.9):
        fates = draw_fates(lives, COSTLY, runs=20, machines=20, seed=2, notice_share=share)
        best = play(best_fixed(COSTLY, fates, young_s(60, HOUR)), COSTLY, fates).goodput
        for rule in (young(COSTLY, HOUR), daly(COSTLY, HOUR), with_notice(COSTLY, HOUR, share)):
            assert play(rule, COSTLY, fates).goodput <= best + 0.0005
        assert best <= ceiling_ms(COSTLY, fates).sum() / fates.life_ms.sum()
    always = replace(fates, notice_ms=np.full_like(fates.life_ms, 600_000), last_save_ms=np.full_like(fates.life_ms, 1))
    assert math.isinf(best_fixed(replace(COSTLY, last_save=Spread(0.001)), always, young_s(60, HOUR)).interval_s)


@pytest.mark.parametrize("shape", [0.6, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize(("mean_h", "cost_s"), [(0.25, 30), (0.25, 120), (1, 120), (5, 30), (5, 120)])
def test_the_trainers_own_interval_is_within_a_point_of_the_best_fixed_in_hindsight(
    shape: float, share: float, mean_h: float, cost_s: float
) -> None:
    """Two days of uptime from nothing known, but that a notice is to be expected where there is one."""
    conditions = Conditions(save_cost_s=cost_s, commit_s=10, restore_s=60, last_save=Spread(10))
    fates = draw_fates(
        Weibull(shape, mean_h * HOUR), conditions, runs=60, machines=round(48 / mean_h), seed=11, notice_share=share
    )
    prior = PreemptionRate(prior_noticed=0.5 if share else 0.0)
    best = play(best_fixed(conditions, fates, with_notice_s(cost_s, mean_h * HOUR, share)), conditions, fates)
    ours = play(Automatic(prior=prior), conditions, fates)
    assert ours.goodput > best.goodput - 0.01
