"""The arithmetic of the last seconds: what is started finishes, more time or bandwidth never costs a step, and the reasons say why.

A small world plays decisions out: time passes, bytes flow behind the loop, a save in flight comes first. Its figures are sums of
powers of two, so that no comparison depends on rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.policy.deadline import (
    UNMEASURED_BANDWIDTH,
    DeadlineAction,
    DeadlineContext,
    DeadlineDecision,
    InFlightSave,
    LocalTier,
    MemorySnapshot,
    Spread,
    Tier,
    decide_save,
)

MIB = 1024**2
GIB = 1024**3
STARTS = {DeadlineAction.SAVE_NOW, DeadlineAction.SAVE_LOCALLY, DeadlineAction.COMMIT_NEWEST_SNAPSHOT}

quarters = st.integers(0, 40).map(lambda count: count / 4)
sizes = st.integers(0, 64).map(lambda count: count * 64)
rates = st.integers(0, 8).map(lambda power: 2.0**power * 4) | st.just(0.0)


@st.composite
def contexts(draw: st.DrawFn, *, exact: bool = False) -> DeadlineContext:
    """Any situation; `exact`: at a boundary, nothing varies, and the margins are folded into the time left."""
    step = draw(st.integers(0, 50))
    durable = draw(st.none() | st.integers(0, step))
    begun = durable or 0
    in_flight = snapshot = None
    if step > begun and draw(st.booleans()):
        in_flight = InFlightSave(draw(st.integers(begun, step)), draw(sizes), draw(st.booleans()))
        begun = max(begun, in_flight.step)
    if not exact and step > begun and draw(st.booleans()):
        snapshot = MemorySnapshot(draw(st.integers(begun + 1, step)), draw(sizes))
    varies = st.just(0.0) if exact else st.floats(0, 2)
    spread = st.builds(Spread, rates, varies)
    return DeadlineContext(
        seconds_left=draw(st.integers(-8, 160).map(lambda count: count / 4)),
        step=step, send_bytes=draw(sizes), durable_step=durable, in_flight=in_flight, snapshot=snapshot,
        bandwidth=draw(spread if exact else st.none() | spread),
        commit_latency_s=draw(quarters) / 4, snapshot_s=draw(quarters) / 8,
        step_time=draw(st.builds(Spread, st.sampled_from([0.5, 1.0, 4.0]), varies) | (st.none() if not exact else st.nothing())),
        boundary_in_s=0.0 if exact else draw(st.none() | quarters),
        leave_s=draw(quarters) / 8, margin_s=draw(quarters) / 8,
        local=draw(st.none() | st.builds(LocalTier, spread, quarters)), insured=False if exact else draw(st.booleans()),
    )  # fmt: skip


def usable_s(context: DeadlineContext) -> float:
    assert context.seconds_left is not None
    return context.seconds_left - context.margin_s - context.leave_s


def send_s(context: DeadlineContext, tier: Tier, size_bytes: int) -> float:
    """Done again here, from the definitions alone: 97.5 % of all measurements are better than what is planned with."""
    local = context.local if tier is Tier.LOCAL else None
    spread = local.bandwidth if local else context.bandwidth or UNMEASURED_BANDWIDTH
    latency_s = local.commit_latency_s if local else context.commit_latency_s
    planned = spread.quantile(0.025)
    return latency_s + (0 if size_bytes == 0 else size_bytes / planned if planned else math.inf)


@given(contexts())
@settings(max_examples=300, deadline=None)
def test_nothing_is_started_that_cannot_finish(context: DeadlineContext) -> None:
    decision = decide_save(context)
    assert decision.reasons
    if decision.action not in STARTS:
        return
    assert decision.probability is not None
    assert decision.probability >= context.least_probability
    if not decision.fits:
        assert decision.durable_step == context.durable_step, "a long shot is not counted on"
        return
    assert decision.probability >= context.confidence - 1e-9
    tier = decision.tier
    assert (tier is Tier.LOCAL) or decision.action is not DeadlineAction.SAVE_LOCALLY
    behind_s = 0.0
    if context.in_flight and tier is Tier.STORE and not decision.abandon_in_flight:
        behind_s = send_s(context, tier, context.in_flight.left_bytes)
    if decision.action is DeadlineAction.COMMIT_NEWEST_SNAPSHOT:
        assert context.snapshot is not None
        took_s = behind_s + send_s(context, tier, context.snapshot.send_bytes)
    else:
        assert context.boundary_in_s == 0, "only a boundary's state is copied"
        took_s = max(context.snapshot_s, behind_s) + send_s(context, tier, context.send_bytes)
    assert took_s <= usable_s(context) + 1e-9
    if decision.save_again and decision.save_at_latest_s is not None:
        last_s = send_s(context, decision.last_tier, context.send_bytes)
        assert decision.save_at_latest_s + context.snapshot_s + last_s <= usable_s(context) + 1e-9


@given(contexts())
@settings(max_examples=300, deadline=None)
def test_training_goes_on_only_while_the_present_step_stays_saveable(context: DeadlineContext) -> None:
    decision = decide_save(context)
    if decision.action is DeadlineAction.TRAIN_ON and context.boundary_in_s == 0:
        assert decision.durable_step is not None
        assert decision.durable_step >= context.step
        assert decision.fits
        assert decision.save_at_latest_s is not None
        assert context.step_time is not None
        if not math.isinf(decision.save_at_latest_s):
            assert decision.save_at_latest_s >= context.step_time.quantile(0.975) - 1e-9
    if decision.durable_step is not None and context.durable_step is not None:
        assert decision.durable_step >= context.durable_step


@given(contexts())
@settings(max_examples=300, deadline=None)
def test_more_time_or_bandwidth_never_promises_fewer_steps(context: DeadlineContext) -> None:
    promised = decide_save(context).durable_step or 0
    assert context.seconds_left is not None
    later = replace(context, seconds_left=context.seconds_left + 0.5)
    assert (decide_save(later).durable_step or 0) >= promised
    if context.bandwidth is not None:
        faster = replace(context, bandwidth=replace(context.bandwidth, mean=context.bandwidth.mean * 2))
        assert (decide_save(faster).durable_step or 0) >= promised


class World:
    """Plays a context out as its figures say. All that is decided is decided by `decide_save`."""

    def __init__(self, context: DeadlineContext) -> None:
        self.context = context
        self.rate = context.bandwidth.mean if context.bandwidth else 0.0
        self.sending = context.in_flight
        if self.sending is not None:
            self.sending = replace(self.sending, latency_left_s=context.commit_latency_s)
        self.waiting: InFlightSave | None = None
        self.durable = context.durable_step or 0
        self.decisions: list[DeadlineDecision] = []

    def pass_s(self, seconds: float) -> None:
        assert self.context.seconds_left is not None
        self.context = replace(self.context, seconds_left=self.context.seconds_left - seconds)
        while self.sending is not None:
            sent = self.sending
            bytes_s = 0 if sent.left_bytes == 0 else sent.left_bytes / self.rate if self.rate else math.inf
            if bytes_s > seconds:
                self.sending = replace(sent, left_bytes=sent.left_bytes - int(self.rate * seconds))
                return
            seconds -= bytes_s
            assert sent.latency_left_s is not None
            if sent.latency_left_s > seconds:
                self.sending = replace(sent, left_bytes=0, latency_left_s=sent.latency_left_s - seconds)
                return
            seconds -= sent.latency_left_s
            self.durable = max(self.durable, sent.step)
            self.context = replace(self.context, insured=True)
            self.sending, self.waiting = self.waiting, None

    def send(self) -> None:
        new = InFlightSave(self.context.step, self.context.send_bytes, latency_left_s=self.context.commit_latency_s)
        if self.sending is None:
            self.sending = new
        else:
            self.waiting = new

    def play(self) -> int:
        """The newest step that is durable when the machine must be left."""
        while True:
            durable = self.durable or self.context.durable_step
            self.context = replace(self.context, in_flight=self.sending, durable_step=durable)
            if (
                self.sending is None and self.durable > (self.decisions[0].durable_step or 0)
                if self.decisions
                else False
            ):
                raise AssertionError("more became durable than the first decision had promised")
            decision = decide_save(self.context)
            self.decisions.append(decision)
            if decision.action is DeadlineAction.TRAIN_ON:
                assert self.context.step_time is not None
                self.pass_s(self.context.step_time.mean)
                self.context = replace(self.context, step=self.context.step + 1)
                continue
            if decision.action in (DeadlineAction.SAVE_NOW, DeadlineAction.SAVE_LOCALLY):
                if decision.abandon_in_flight:
                    self.sending = None
                self.pass_s(self.context.snapshot_s)
                if decision.action is DeadlineAction.SAVE_NOW:
                    self.send()
                elif decision.fits:
                    self.durable = max(self.durable, self.context.step)
            self.context = replace(self.context, insured=True)
            if not decision.save_again:
                self.pass_s(max(0.0, usable_s(self.context)))
                return self.durable


def without_insurance_on_local(context: DeadlineContext) -> DeadlineContext:
    return replace(context, local=None)


@given(contexts(exact=True).map(without_insurance_on_local))
@settings(max_examples=300, deadline=None)
def test_played_out_the_promise_is_kept_and_more_time_or_bandwidth_saves_no_fewer_steps(
    context: DeadlineContext,
) -> None:
    promised = decide_save(context).durable_step or 0
    saved = World(context).play()
    assert saved >= promised
    assert context.seconds_left is not None
    assert context.bandwidth is not None
    for better in (
        replace(context, seconds_left=context.seconds_left + 0.25),
        replace(context, seconds_left=context.seconds_left + 4),
        replace(context, bandwidth=Spread(context.bandwidth.mean * 2)),
    ):
        assert World(better).play() >= saved


def notice(**given_figures: object) -> DeadlineContext:
    """A 120 s notice to a run that saves 12 GiB at 400 MiB/s, 300 steps after its last checkpoint."""
    figures = {
        "seconds_left": 120.0, "step": 1300, "durable_step": 1000, "send_bytes": 12 * GIB, "bandwidth": Spread(400 * MIB, 0.1),
        "step_time": Spread(0.5, 0.05), "snapshot_s": 1.0, "commit_latency_s": 0.5,
    }  # fmt: skip
    return DeadlineContext(**(figures | given_figures))  # type: ignore[arg-type]


def test_a_long_notice_buys_insurance_trains_on_and_saves_last() -> None:
    first = decide_save(notice())
    assert (first.action, first.save_again, first.fits) == (DeadlineAction.SAVE_NOW, True, True)
    assert first.save_at_latest_s is not None
    # 12 GiB at the planned 327 MiB/s take 37.6 s: 116 s to use, less upload, latency and copy.
    assert 75 < first.save_at_latest_s < 79
    assert first.durable_step is not None
    assert 1300 + 130 < first.durable_step < 1300 + 150
    assert any("as insurance" in reason for reason in first.reasons)
    after = notice(seconds_left=80.0, step=1380, insured=True, durable_step=1300)
    assert decide_save(after).action is DeadlineAction.TRAIN_ON
    last = decide_save(replace(after, seconds_left=43.5, step=1453))
    assert (last.action, last.save_again, last.durable_step) == (DeadlineAction.SAVE_NOW, False, 1453)


def test_a_notice_just_after_a_save_buys_no_insurance() -> None:
    decision = decide_save(notice(durable_step=1299))
    assert decision.action is DeadlineAction.TRAIN_ON
    assert decision.durable_step is not None
    assert decision.durable_step > 1400


def test_bandwidth_that_turns_out_worse_revises_the_choice() -> None:
    in_flight = InFlightSave(1300, 2 * GIB)
    context = notice(seconds_left=70.0, step=1360, insured=True, in_flight=in_flight)
    assert decide_save(context).action is DeadlineAction.TRAIN_ON
    slower = replace(context, bandwidth=Spread(60 * MIB, 0.3))
    revised = decide_save(slower)
    assert revised.action is DeadlineAction.FINISH_IN_FLIGHT
    assert revised.durable_step == 1300
    slowest = decide_save(replace(context, bandwidth=Spread(4 * MIB, 0.3)))
    assert slowest.action is DeadlineAction.NOTHING
    assert slowest.durable_step == 1000


def test_a_writer_that_can_abandon_does_so_only_when_the_newer_step_fits_alone() -> None:
    stuck = notice(seconds_left=30.0, send_bytes=1 * GIB, in_flight=InFlightSave(1200, 40 * GIB))
    assert decide_save(stuck).action is DeadlineAction.NOTHING
    able = replace(stuck, in_flight=InFlightSave(1200, 40 * GIB, can_abandon=True), step_time=None)
    decision = decide_save(able)
    assert (decision.action, decision.abandon_in_flight, decision.durable_step) == (DeadlineAction.SAVE_NOW, True, 1300)
    assert not decide_save(replace(able, insured=True)).abandon_in_flight, (
        "the last save is never dropped for a later one"
    )


def test_without_a_boundary_the_newest_snapshot_in_memory_is_committed() -> None:
    compiling = notice(boundary_in_s=None, snapshot=MemorySnapshot(1250, 2 * GIB))
    decision = decide_save(compiling)
    assert (decision.action, decision.durable_step) == (DeadlineAction.COMMIT_NEWEST_SNAPSHOT, 1250)
    assert decision.save_again, "a boundary may still come in time"
    late = decide_save(replace(compiling, seconds_left=20.0))
    assert (late.action, late.save_again) == (DeadlineAction.COMMIT_NEWEST_SNAPSHOT, False)
    long_evaluation = decide_save(replace(compiling, boundary_in_s=600.0))
    assert long_evaluation.action is DeadlineAction.COMMIT_NEWEST_SNAPSHOT
    empty_handed = decide_save(replace(compiling, snapshot=None))
    assert empty_handed.action is DeadlineAction.TRAIN_ON
    assert empty_handed.durable_step == 1000
    assert decide_save(replace(compiling, snapshot=None, seconds_left=20.0)).action is DeadlineAction.NOTHING


def test_a_boundary_that_comes_in_time_is_waited_for_with_the_snapshot_as_insurance() -> None:
    context = notice(boundary_in_s=10.0, snapshot=MemorySnapshot(1250, 2 * GIB))
    decision = decide_save(context)
    assert (decision.action, decision.save_again) == (DeadlineAction.COMMIT_NEWEST_SNAPSHOT, True)
    assert decision.durable_step is not None
    assert decision.durable_step >= 1300
    tight = decide_save(replace(context, seconds_left=44.5, boundary_in_s=1.0))
    assert tight.action is DeadlineAction.TRAIN_ON, "the snapshot would take the new save's time"


def test_the_local_tier_takes_what_the_store_cannot() -> None:
    disk = LocalTier(Spread(2 * GIB, 0.1), 0.1)
    decision = decide_save(notice(seconds_left=15.0, local=disk, step_time=None))
    assert (decision.action, decision.tier, decision.durable_step) == (DeadlineAction.SAVE_LOCALLY, Tier.LOCAL, 1300)
    in_time = decide_save(notice(seconds_left=60.0, local=disk, step_time=None))
    assert (in_time.action, in_time.tier) == (DeadlineAction.SAVE_NOW, Tier.STORE)
    compiling = notice(seconds_left=15.0, local=disk, boundary_in_s=None, snapshot=MemorySnapshot(1290, 12 * GIB))
    decision = decide_save(compiling)
    assert (decision.action, decision.tier) == (DeadlineAction.COMMIT_NEWEST_SNAPSHOT, Tier.LOCAL)


def test_a_store_that_was_never_measured_is_not_given_up() -> None:
    small = decide_save(notice(seconds_left=30.0, send_bytes=256 * MIB, bandwidth=None, step_time=None))
    assert (small.action, small.fits) == (DeadlineAction.SAVE_NOW, True)
    large = decide_save(notice(seconds_left=30.0, send_bytes=2 * GIB, bandwidth=None, step_time=None))
    assert (large.action, large.fits, large.durable_step) == (DeadlineAction.SAVE_NOW, False, 1000)
    assert any("assumed" in reason for reason in large.reasons)
    assert decide_save(notice(seconds_left=5.0, send_bytes=20 * GIB, bandwidth=None)).action is DeadlineAction.NOTHING


def test_the_edges() -> None:
    nothing = DeadlineAction.NOTHING
    assert decide_save(notice(seconds_left=-3.0)).action is nothing
    assert decide_save(notice(seconds_left=0.0, send_bytes=0, commit_latency_s=0.0)).action is nothing
    assert decide_save(notice(bandwidth=Spread(0.0))).action is nothing
    same = decide_save(notice(bandwidth=Spread(0.0), send_bytes=0))
    assert (same.action, same.fits) == (DeadlineAction.SAVE_NOW, True), (
        "after deduplication there is only the head to put"
    )
    first = notice(step=0, durable_step=None, seconds_left=30.0)
    assert decide_save(first).action is nothing
    assert "no step is complete yet" in " ".join(decide_save(first).reasons)
    assert decide_save(replace(first, seconds_left=120.0)).action is DeadlineAction.TRAIN_ON
    saved = decide_save(notice(durable_step=1300, seconds_left=20.0))
    assert (saved.action, saved.durable_step) == (nothing, 1300)


def test_without_a_deadline_the_newest_state_goes_out_once_and_training_goes_on() -> None:
    unknown = notice(seconds_left=None)
    assert decide_save(unknown).action is DeadlineAction.SAVE_NOW
    assert decide_save(unknown).probability is None
    assert decide_save(replace(unknown, insured=True)).action is DeadlineAction.TRAIN_ON
    compiling = replace(unknown, boundary_in_s=None)
    assert decide_save(compiling).action is DeadlineAction.TRAIN_ON
    with_snapshot = replace(compiling, snapshot=MemorySnapshot(1200, GIB))
    assert decide_save(with_snapshot).action is DeadlineAction.COMMIT_NEWEST_SNAPSHOT


@pytest.mark.parametrize(
    "wrong",
    [
        {"send_bytes": -1}, {"step": -1}, {"margin_s": -1.0}, {"commit_latency_s": math.inf}, {"seconds_left": math.nan},
        {"confidence": 1.0}, {"least_probability": 0.99}, {"step_time": Spread(0.0)}, {"in_flight": InFlightSave(1, -5)},
    ],
)  # fmt: skip
def test_figures_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        notice(**wrong)


def test_spreads_that_make_no_sense_are_refused() -> None:
    for mean, relative_sd in ((-1.0, 0.0), (math.inf, 0.0), (1.0, -0.1), (1.0, math.nan)):
        with pytest.raises(UsageError):
            Spread(mean, relative_sd)


@given(st.floats(1e-3, 1e12), st.floats(0, 50), st.floats(0.01, 0.99))
def test_a_spreads_quantiles_and_probabilities_agree(mean: float, relative_sd: float, share: float) -> None:
    spread = Spread(mean, relative_sd)
    value = spread.quantile(share)
    assert value > 0
    if relative_sd > 1e-6:
        assert spread.share_at_least(value) == pytest.approx(1 - share, abs=1e-6)
    assert spread.share_at_least(value * 2) <= spread.share_at_least(value)
