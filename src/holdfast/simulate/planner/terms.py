"""What the simulator is told of a job: work with its saves in it, what a preemption takes back, ticks and horizon.

A save stops the loop for its stall, so the work grows by stall / interval. A preemption takes back, on average, half an interval
and one upload; where a save fits into the notice, and the notice is heard, only what was computed during that upload. The engine
takes back half of `lost_s` on average, so `lost_s` is twice that: the mean is right and the limits of the policies are cautious.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.policy.deadline import DeadlineContext, Spread, decide_save
from holdfast.policy.interval import (
    AutoContext,
    EveryDuration,
    EverySteps,
    IntervalDecision,
    PreemptionRate,
    auto_interval,
    max_lost_work_s,
    parse_max_lost_work,
    parse_save_every,
)
from holdfast.policy.market.facts import LONGEST_S, Job
from holdfast.simulate.planner.assumed import Assumptions
from holdfast.simulate.planner.case import Case, Hardware
from holdfast.simulate.planner.prices import Price

__all__ = ["NoticeFit", "Terms", "terms_of"]

_COMMIT_S = 1.0
"""Of a save, whatever its size."""
_BANDWIDTH_SPREAD = 0.3
_FINEST_TICK_S, _COARSEST_TICK_S, _MOST_TICKS = 10, 900, 8000


@dataclass(frozen=True, slots=True)
class NoticeFit:
    """Whether the state is durable before the machine goes, if the notice comes when it should."""

    notice_s: float
    send_bytes: float
    """Of one machine."""
    send_s: float
    fits: bool
    probability: float
    needed_bytes_per_s: float | None
    """Bandwidth at which it would just do; None: at none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Of one hardware and one set of pools. Seconds."""

    job: Job
    follow_s: int
    """How long a late job is followed."""
    tick_s: int
    plain_work_s: float
    """Without saves."""
    lost_mean_s: float
    """What one preemption takes back on average."""
    interval: IntervalDecision | None
    notice: NoticeFit | None
    gang_life_s: float
    machines: int
    floor: int


def terms_of(
    case: Case,
    hardware: Hardware,
    pools: Sequence[Price],
    assumed: Assumptions,
    *,
    rough: bool = False,
    short: bool = False,
) -> Terms:
    """At the figures' likely values. `rough`: with half as many ticks, where luck blurs more than ticks do. `short`: for policies
    that keep the deadline a job is not followed far beyond it."""
    spot_machines = max(1, case.machines - case.floor)
    gang_life_s = assumed.life_s.likely / spot_machines**assumed.gang.likely
    work_s = hardware.work_s * assumed.work.likely
    interval = notice = None
    inflated_s, lost_mean_s = work_s, work_s / 2
    lost_s = work_s
    if case.saves:
        notice = _notice(case, pools, assumed)
        share = notice.probability * assumed.heard.likely if notice.notice_s > 0 else 0.0
        interval = _interval(case, assumed, gang_life_s, notice.send_s, share)
        inflated_s = work_s * (1 + assumed.stall_s.likely / max(interval.interval_s, 1.0))
        lost_mean_s = (1 - share) * (interval.interval_s / 2 + notice.send_s) + share * notice.send_s
        lost_s = 2 * lost_mean_s
    elif case.tasks:
        lost_s = min(assumed.task_s.likely, work_s)
        lost_mean_s = lost_s / 2
    deadline_s = case.deadline_s
    changeover_s = round(assumed.changeover_s.likely)
    waiting = 1 + assumed.outage_s.likely / gang_life_s
    follow_s = max(1.5 * (deadline_s or 0.0), 4 * (inflated_s + changeover_s) * min(waiting, 10.0))
    if short and deadline_s is not None:
        follow_s = max(deadline_s, 1.3 * (inflated_s + 2 * changeover_s))
    tick_s = (2 if rough else 1) * _tick(
        deadline_s or inflated_s + changeover_s, assumed.life_s.low / spot_machines**assumed.gang.likely, follow_s
    )
    follow_s = min(math.ceil(follow_s), tick_s * _MOST_TICKS * 2, LONGEST_S // 2)
    job = Job(
        work_s=max(1, round(inflated_s)),
        deadline_s=max(1, int(deadline_s)) if deadline_s is not None else follow_s,
        changeover_s=changeover_s,
        max_lost_s=min(math.ceil(lost_s), LONGEST_S // 8),
    )
    return Terms(
        job=job, follow_s=max(follow_s, job.deadline_s), tick_s=tick_s, plain_work_s=work_s, lost_mean_s=lost_mean_s,
        interval=interval, notice=notice, gang_life_s=gang_life_s, machines=case.machines, floor=case.floor,
    )  # fmt: skip


def _tick(span_s: float, life_s: float, follow_s: float) -> int:
    """Fine enough for lifetimes and for the job, coarse enough to be played."""
    wanted = min(span_s / 400, life_s / 8, _COARSEST_TICK_S)
    return math.ceil(max(wanted, _FINEST_TICK_S, follow_s / _MOST_TICKS))


def _notice(case: Case, pools: Sequence[Price], assumed: Assumptions) -> NoticeFit:
    """The same arithmetic decides when a notice comes; here with likely figures, and a state that is not in the store at all."""
    notice_s = min(pool.notice_s for pool in pools) if case.known.notice_s is None else case.known.notice_s.likely
    send_bytes = assumed.checkpoint_bytes.likely / case.machines
    bandwidth = assumed.bandwidth.likely
    spread = 0.0 if assumed.bandwidth.likely == 0 else _BANDWIDTH_SPREAD
    step_s = max(assumed.step_s.likely, 1e-3)
    context = DeadlineContext(
        seconds_left=notice_s,
        step=1000,
        send_bytes=math.ceil(send_bytes),
        durable_step=0,
        bandwidth=Spread(bandwidth, spread),
        commit_latency_s=_COMMIT_S,
        snapshot_s=assumed.stall_s.likely,
        step_time=Spread(step_s, 0.05),
        boundary_in_s=step_s,
    )
    decision = decide_save(context)
    left_s = notice_s - context.margin_s - context.leave_s - step_s - context.snapshot_s - _COMMIT_S
    return NoticeFit(
        notice_s=notice_s,
        send_bytes=send_bytes,
        send_s=send_bytes / max(bandwidth, 1.0) + _COMMIT_S,
        fits=decision.fits,
        probability=decision.probability or 0.0,
        needed_bytes_per_s=send_bytes / left_s if left_s > 0 else None,
    )


def _interval(case: Case, assumed: Assumptions, life_s: float, commit_s: float, share: float) -> IntervalDecision:
    """As the run will choose it, or as somebody wants it."""
    step_s = assumed.step_s.likely
    wanted = [
        each.seconds if isinstance(each, EveryDuration) else each.count * step_s
        for each in parse_save_every(case.save_every)
        if isinstance(each, EveryDuration | EverySteps)
    ]
    if wanted:
        return IntervalDecision(min(wanted), ("as the job says",))
    bound = {} if case.max_lost_work is None else {
        "max_lost_work_s": max_lost_work_s(parse_max_lost_work(case.max_lost_work), None)
    }  # fmt: skip
    return auto_interval(
        AutoContext(
            save_cost_s=assumed.stall_s.likely,
            commit_s=commit_s,
            rate=PreemptionRate(prior_mean_s=life_s),
            notice_share=share,
            **bound,
        )
    )
