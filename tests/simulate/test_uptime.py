"""The simulated life of machines: equal to a slow reference to the millisecond, and sane whatever the rule and the machines are."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_uptime import Known, Machine, World, run

from holdfast.core.errors import UsageError
from holdfast.ledger.goodput import Bucket
from holdfast.policy.deadline import DeadlineAction, DeadlineContext, InFlightSave, decide_save
from holdfast.policy.market.arrays import Floats, Ints
from holdfast.policy.reserves import reserves
from holdfast.policy.spread import Spread
from holdfast.simulate.traces.lifetimes import Bathtub, Weibull
from holdfast.simulate.uptime.engine import BUCKETS, Seen, Uptimes, ceiling_ms, play
from holdfast.simulate.uptime.fates import NO_NOTICE, Conditions, Fates, Observed, draw_fates
from holdfast.simulate.uptime.intervals import Fixed
from holdfast.simulate.uptime.last_save import Heard, Plan, after_notice

PRIME = 1_000_003


@dataclass(frozen=True)
class Erratic:
    """Any interval up to a bound, by all that it may see: what it sees has to be right for both to agree."""

    longest_ms: int
    learns: bool = True
    name: str = "erratic"

    def next_interval_s(self, seen: Seen) -> Floats:
        def ms(seconds: Floats) -> Ints:
            whole: Ints = np.rint(np.nan_to_num(seconds) * 1000).astype(np.int64)
            return whole

        mixed = ms(seen.age_s) * 31 + seen.saves * 7919 + ms(seen.at_work_s) * 13 + ms(seen.interval_s) * 3
        if self.learns:
            mixed += (
                seen.saves_before * 104729 + seen.preemptions * 1299709 + ms(seen.exposure_s) * 17 + seen.noticed * 51
            )
        interval_s: Floats = (1 + mixed % PRIME % self.longest_ms) / 1000
        return interval_s

    def slowly(self, known: Known) -> Fraction:
        mixed = (known.age * 31 + known.at_work * 13 + (known.said or 0) * 3) * 1000 + known.saves * 7919
        if self.learns:
            mixed += (
                known.saves_before * 104729 + known.preemptions * 1299709 + known.exposure * 17000 + known.noticed * 51
            )
        return Fraction(1 + int(mixed) % PRIME % self.longest_ms, 1000)


@dataclass(frozen=True)
class Case:
    conditions: Conditions
    fates: Fates
    rule: Erratic


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Seconds are short and often the same, so that everything also happens at the same moment."""
    luck = random.Random(draw(st.integers(0, 1 << 32)))

    def ms(*options: int) -> int:
        return luck.choice([0, luck.randint(0, 30), luck.randint(0, 5000), *options])

    stall, commit, last = ms(1000), ms(1000), ms(2000)
    spread = luck.choice([0.0, 0.3, 1.0])
    conditions = Conditions(
        save_cost_s=stall / 1000,
        commit_s=commit / 1000,
        start_s=ms(1000) / 1000,
        restore_s=ms(1000) / 1000,
        last_save=luck.choice([None, Spread(last / 1000, spread), Spread(last / 1000)]),
        confidence=luck.choice([0.95, 0.5]),
        least_probability=luck.choice([0.05, 0.3]),
    )
    runs, machines = luck.randint(1, 4), luck.randint(1, 4)
    rule = Erratic(luck.choice([5, 300, 4000, 40_000]), luck.random() < 0.7)
    longest = min(60_000, 60 * rule.longest_ms)
    lives = [luck.choice([1, 40, 1000, longest, longest]) for _ in range(runs * machines)]
    long = luck.choice([10, 1000, 20_000, 50_000])
    fates = Fates.of(
        np.array([luck.randint(1, life) for life in lives]).reshape(runs, machines),
        [[luck.choice([NO_NOTICE, 0, luck.randint(0, long), long]) for _ in range(machines)] for _ in range(runs)],
        [[luck.choice([last, last, luck.randint(0, 5000)]) for _ in range(machines)] for _ in range(runs)],
        [[luck.randint(0, 9) for _ in range(machines)] for _ in range(runs)],
    )
    return Case(conditions, fates, rule)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_machine_is_as_the_slow_reference_has_it(case: Case) -> None:
    conditions, fates = case.conditions, case.fates
    spread = conditions.last_save_spread
    world = World(
        start=Fraction(conditions.start_ms, 1000),
        restore=Fraction(conditions.restore_ms, 1000),
        stall=Fraction(conditions.save_cost_ms, 1000),
        commit=Fraction(conditions.commit_ms, 1000),
        last_save_mean=Fraction(round(1000 * spread.mean), 1000),
        last_save_sd=spread.relative_sd,
        confidence=conditions.confidence,
        least=conditions.least_probability,
    )
    played = play(case.rule, conditions, fates)
    for row in range(len(fates.life_ms)):
        machines = [
            Machine(Fraction(life, 1000), None if notice < 0 else Fraction(notice, 1000), Fraction(last, 1000))
            for life, notice, last in zip(
                *(each[row].tolist() for each in (fates.life_ms, fates.notice_ms, fates.last_save_ms)), strict=True
            )
        ]
        for number, diary in enumerate(run(world, machines, case.rule.slowly)):
            seconds = {bucket: Fraction(int(played.buckets[bucket][row, number]), 1000) for bucket in BUCKETS}
            assert seconds == {bucket: getattr(diary, bucket.value) for bucket in BUCKETS}
            assert (played.saves[row, number], played.noticed[row, number]) == (diary.saves, diary.noticed)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_second_is_in_one_bucket_and_nobody_beats_the_ceiling(case: Case) -> None:
    played = play(case.rule, case.conditions, case.fates)
    assert (np.sum([*played.buckets.values()], axis=0) == case.fates.life_ms).all()
    assert min(int(each.min()) for each in played.buckets.values()) >= 0
    assert (played.buckets[Bucket.USEFUL] <= ceiling_ms(case.conditions, case.fates)).all()
    assert (played.queue_wait_ms == case.fates.gap_ms).all()
    assert not (played.noticed & (played.buckets[Bucket.LOST] > 0)).any()
    assert not (played.noticed & (case.fates.notice_ms < 0)).any()


EIGHTH_MS = 125
eighths_ms = st.integers(0, 400).map(lambda count: count * EIGHTH_MS)


@settings(max_examples=300, deadline=None)
@given(
    left=eighths_ms, behind=st.sampled_from([0, 0, 250, 4000]), unsaved=eighths_ms, flies=st.just(0) | eighths_ms,
    last=eighths_ms, sd=st.sampled_from([0.0, 0.4, 1.5]),
)  # fmt: skip
def test_after_a_notice_it_does_what_the_trainers_policy_decides(
    left: int, behind: int, unsaved: int, flies: int, last: int, sd: float
) -> None:
    """Steps of a millisecond, a byte per millisecond. With a save in flight, a bandwidth that does not vary."""
    sd = 0.0 if flies else sd
    lead = max(20_000, left + behind)
    bandwidth = Spread(1000.0, sd)
    growth = 1 + sd * sd  # of the mean of 1 / bandwidth
    plan = Plan.of(Conditions(save_cost_s=0.0, last_save=Spread(last / 1000 * growth, sd)))
    kept = reserves(lead / 1000)
    done = 1_000_000 + unsaved
    decision = decide_save(
        DeadlineContext(
            seconds_left=left / 1000,
            step=done,
            send_bytes=last,
            durable_step=1 if flies else done - unsaved,
            in_flight=InFlightSave(done - unsaved, flies, latency_left_s=0.0) if flies else None,
            bandwidth=bandwidth,
            commit_latency_s=0.0,
            step_time=Spread(0.001),
            leave_s=kept.leave_s,
            margin_s=kept.margin_s,
        )
    )
    each = (left, lead, unsaved, flies, last)
    end = after_notice(plan, Heard(*(np.array([value]) for value in each)))
    worked, insured = int(end.worked_ms[0]), bool(end.insured[0])
    if decision.action is DeadlineAction.TRAIN_ON or decision.save_again:
        assert insured == decision.save_again
        assert decision.save_at_latest_s == pytest.approx(worked / 1000, abs=0.001)
    elif decision.action is DeadlineAction.SAVE_NOW:
        assert (worked, insured) == (0, False) or worked == 1
        assert end.save_ms[0] == min(last, left - worked)
    else:
        assert decision.action in (DeadlineAction.FINISH_IN_FLIGHT, DeadlineAction.NOTHING)
        assert (worked, insured, int(end.save_ms[0])) == (0, False, min(flies, left))


def everything(played: Uptimes) -> list[list[list[int]]]:
    return [each.tolist() for each in (*played.buckets.values(), played.saves, played.noticed)]


def test_a_life_by_hand() -> None:
    """60 s of restoring, saves of 5 s after each 100 s, durable 20 s later."""
    conditions = Conditions(save_cost_s=5, commit_s=20, start_s=10, restore_s=50, last_save=Spread(8))
    lives = (55, 160, 165, 184.999, 185, 400)
    fates = Fates.of([[round(1000 * life) for life in lives]])
    played = play(Fixed(100), conditions, fates)
    assert (played.buckets[Bucket.USEFUL] / 1000).tolist() == [[0, 0, 0, 0, 100, 300]]
    assert (played.buckets[Bucket.LOST] / 1000).tolist() == [[0, 100, 100, 119.999, 20, 25]]
    assert (played.buckets[Bucket.SAVE] / 1000).tolist() == [[0, 0, 5, 5, 5, 15]]
    assert played.buckets[Bucket.INITIALISATION].tolist() == [[10_000, 0, 0, 0, 0, 0]]
    assert played.saves.tolist() == [[0, 0, 1, 1, 1, 3]]
    # Durable at the very moment when the machine goes is durable.
    at_once = play(Fixed(100), replace(conditions, commit_s=0), fates)
    assert (at_once.buckets[Bucket.USEFUL] / 1000).tolist() == [[0, 0, 100, 100, 100, 300]]
    # Of 30 s of notice 4 s are kept, the last save takes 8 s, and until then work goes on. An insurance would not be durable before
    # the last save begins. The last machine has stood still for two saves.
    zero = fates.life_ms * 0
    noticed = play(Fixed(100), conditions, replace(fates, notice_ms=zero + 30_000, last_save_ms=zero + 8000))
    assert (noticed.buckets[Bucket.USEFUL] / 1000).tolist() == [[0, 88, 93, 112.999, 113, 318]]
    assert not noticed.buckets[Bucket.LOST].any()
    assert noticed.buckets[Bucket.IDLE].tolist() == [[0, 4000, 4000, 4000, 4000, 4000]]
    # Of 60 s an insurance takes 5 s.
    longer = play(Fixed(100), conditions, replace(fates, notice_ms=zero + 60_000, last_save_ms=zero + 8000))
    assert (longer.buckets[Bucket.USEFUL] / 1000).tolist() == [[0, 83, 88, 107.999, 108, 313]]
    # A last save of 30 s that was planned to take 8 s comes too late: what the insurance holds stays.
    slow = play(Fixed(100), conditions, replace(fates, notice_ms=zero + 60_000, last_save_ms=zero + 30_000))
    assert (slow.buckets[Bucket.USEFUL] / 1000).tolist() == [[0, 40, 45, 64.999, 65, 270]]
    assert not slow.noticed.any()


def test_the_same_seed_draws_the_same_and_notices_do_not_change_the_lives() -> None:
    conditions = Conditions(save_cost_s=3, restore_s=60, last_save=Spread(10, 0.5))

    def draw(share: float, seed: int = 7) -> Fates:
        return draw_fates(
            Weibull(0.6, 3600), conditions, runs=200, machines=50, seed=seed, notice_share=share, notice=Weibull(3, 90)
        )

    one, again, never = draw(0.7), draw(0.7), draw(0.0)
    assert everything(play(Fixed(300), conditions, one)) == everything(play(Fixed(300), conditions, again))
    assert (one.life_ms == never.life_ms).all()
    assert (one.life_ms != draw(0.7, 8).life_ms).any()
    assert (never.notice_ms == NO_NOTICE).all()
    assert (one.notice_ms >= 0).mean() == pytest.approx(0.7, abs=0.02)
    assert one.notice_ms[one.notice_ms >= 0].mean() == pytest.approx(90_000, rel=0.03)
    assert one.last_save_ms.mean() == pytest.approx(10_000, rel=0.03)
    assert one.last_save_ms.std() == pytest.approx(5000, rel=0.1)
    assert (draw(1.0).notice_ms >= 0).all()


def test_machines_side_by_side_are_machines_one_after_the_other() -> None:
    """A rule that does not learn is played on all machines at once."""
    conditions = Conditions(save_cost_s=3, commit_s=9, start_s=20, restore_s=60)
    fates = draw_fates(
        Weibull(0.7, 1800), conditions, runs=20, machines=9, seed=3, notice_share=0.5, gap=Weibull(1, 600)
    )

    @dataclass(frozen=True)
    class InTurn:
        learns: bool
        name: str = "in turn"

        def next_interval_s(self, seen: Seen) -> Floats:
            interval_s: Floats = 100 + 7.0 * seen.saves.astype(np.float64)
            return interval_s

    assert everything(play(InTurn(True), conditions, fates)) == everything(play(InTurn(False), conditions, fates))


def test_lifetimes_may_be_real_or_of_any_shape() -> None:
    conditions = Conditions(save_cost_s=5, restore_s=60)
    real = draw_fates(Observed((100.0, 7200.0)), conditions, runs=50, machines=40, seed=1)
    assert set(np.unique(real.life_ms).tolist()) == {100_000, 7_200_000}
    edge = draw_fates(Bathtub(0.2, 600, 86400, 0.3), conditions, runs=5, machines=40, seed=1)
    assert edge.life_ms.max() == 86_400_000
    assert 0.9 < play(Fixed(600), conditions, edge).goodput < 1


def test_nonsense_is_refused() -> None:
    conditions = Conditions(save_cost_s=1)
    with pytest.raises(UsageError, match="at least"):
        play(Fixed(0.0), conditions, Fates.of([[1000]]))
    with pytest.raises(UsageError):
        Conditions(save_cost_s=-1)
    with pytest.raises(UsageError):
        Fates.of([[0]])
    with pytest.raises(UsageError):
        Fates.of([[1000]], last_save_ms=-1)
    with pytest.raises(UsageError):
        draw_fates(Weibull(1, 60), conditions, runs=1, machines=1, seed=1, notice_share=1.5)
    with pytest.raises(UsageError, match="durations"):
        draw_fates(Weibull(1, 60), conditions, runs=1, machines=1, seed=1, notice=-3.0)
    with pytest.raises(UsageError):
        Observed(())
