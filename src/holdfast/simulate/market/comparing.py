"""Policies beside each other: every policy on every window of every trace and deadline, what it comes to, and how sure that is.

    traces, jobs, policies ──→ Request ──→ compare ──→ Comparison: sections of lines      tables, JSON, pictures
                                             │  engine, once per trace, deadline and policy
                                             └─ bounds, once per window: what it costs at least

A **ground** is a trace that is played by itself: one pool, or several together. Grounds of one group share a section, and
their windows count alike. Nothing is read or printed here.

**The share of the gap** from greedy to the optimum is a ratio of summed costs, (greedy - policy) / (greedy - optimum): 0 is as
dear as greedy, 1 as cheap as anybody who knows the future could be. A policy that was late in any window has none: a job that is
not finished is no bargain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Floats, Ints
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.ours import Ours
from holdfast.policy.market.registry import policy_named
from holdfast.simulate.market.bands import DAY_S, Band, Days
from holdfast.simulate.market.bounds import Bounds, bounds_here
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.outcome import UNFINISHED, Outcomes
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.fit import fit_beliefs
from holdfast.simulate.traces.trace import Trace

__all__ = [
    "BASELINE", "Comparison", "Given", "Ground", "Line", "Played", "Request", "Section", "compare", "policy_on", "windows_of",
]  # fmt: skip

BASELINE = "greedy"


class Given(Enum):
    """What a policy that learns knows before its first tick."""

    COLD = "cold"
    PAST = "past"


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """A trace that is played by itself."""

    group: str
    trace: Trace
    history_ticks: int = 0
    """No window starts in these: they are what `Given.PAST` learns from."""

    @property
    def name(self) -> str:
        """The pool's; the group's where several are played together."""
        return self.trace.pools[0] if len(self.trace.pools) == 1 else self.group

    @property
    def history(self) -> Trace:
        """The part before the windows."""
        part, trace = slice(0, self.history_ticks), self.trace
        return replace(trace, capacity=trace.capacity[:, part], microusd_h=trace.microusd_h[:, part])

    def __post_init__(self) -> None:
        if not 0 <= self.history_ticks < self.trace.ticks:
            raise UsageError(f"{self.name}: the history is longer than the trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be compared."""

    grounds: Sequence[Ground]
    policies: Sequence[str]
    workloads: Sequence[Workload]
    """One per deadline."""
    every_s: int
    """Between two windows' starts."""
    most_windows: int | None = None
    """Per ground and deadline, spread evenly over the trace; None: all."""
    given: Given = Given.COLD
    with_optimum: bool = True

    def __post_init__(self) -> None:
        if not (self.grounds and self.policies and self.workloads):
            raise UsageError("a comparison has at least one trace, one policy and one deadline")
        if self.every_s < 1 or (self.most_windows is not None and self.most_windows < 1):
            raise UsageError("windows start every second at most, and there is at least one")
        for workload in self.workloads:
            _check_time(workload)
        if self.given is Given.PAST and not all(ground.history_ticks for ground in self.grounds):
            raise UsageError("nothing lies before the windows to learn from: keep a part of the trace as history")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Played:
    """One ground, one deadline: all windows of all policies."""

    ground: Ground
    workload: Workload
    starts: Ints
    outcomes: Mapping[str, Outcomes]
    """By policy; the baseline is always there."""
    optimum_microusd: Ints | None
    optimum_is_exact: bool

    @property
    def day(self) -> Ints:
        """Of each window's start, since the beginning of the trace."""
        day: Ints = self.starts * self.ground.trace.tick_s // DAY_S
        return day

    def start_s(self, window: int) -> int:
        """Since the beginning of the trace. Windows are numbered from 0."""
        return int(self.starts[window]) * self.ground.trace.tick_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One policy over all windows of a section. Means are per window; bands are of the mean, percentiles of the windows."""

    policy: str
    windows: int
    mean_usd: float
    band_usd: Band | None
    cheapest_usd: float
    """5th percentile of the windows."""
    dearest_usd: float
    """95th percentile of the windows."""
    above_optimum: float | None
    """How much dearer than the optimum, as a share of it."""
    above_optimum_band: Band | None
    gap_closed: float | None
    gap_closed_band: Band | None
    """None for the baseline too, whose share is 0 by definition."""
    misses: int
    unfinished: int
    """Of the misses, those that were not done when the horizon came."""
    left_s: float
    """Work left in those, on average."""
    finish_s: float | None
    """Of those that finished."""
    spot_share: float
    """Of the billed time."""
    preemptions: float
    goodput: float
    """Useful time by billed time."""
    refund_usd: float
    """What a provider that refunds early preemptions would pay back; not subtracted anywhere."""
    useful_s: float
    lost_s: float
    changeover_s: float
    waiting_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """One group, one deadline."""

    group: str
    workload: Workload
    played: Sequence[Played]
    lines: Sequence[Line]
    optimum_usd: float | None
    optimum_band_usd: Band | None
    blocks: int
    """Stretches of days that do not overlap; see `bands`."""

    def costs_usd(self, policy: str) -> Floats:
        """Of every window of every ground."""
        costs: Floats = np.concatenate([each.outcomes[policy].microusd for each in self.played]) / 1e6
        return costs

    def least_usd(self) -> Floats | None:
        """The optimum of every window, in the same order."""
        each = [played.optimum_microusd for played in self.played if played.optimum_microusd is not None]
        return np.concatenate(each) / 1e6 if len(each) == len(self.played) else None

    def most_telling(self) -> tuple[int, Played, int]:
        """The window in which policies that were in time differ most, after that difference. Policies that cost the same whatever
        the market does are left out, where others are left: they tell nothing about a window."""
        names = [line.policy for line in self.lines]
        names = [name for name in names if np.ptp(self.costs_usd(name)) > 0] or names
        widest, found = -1, (self.played[0], 0)
        for played in self.played:
            costs = np.vstack([played.outcomes[name].microusd for name in names])
            late = np.vstack([played.outcomes[name].missed for name in names])
            highest = costs.max(axis=0, where=~late, initial=0)
            spread = np.maximum(highest - costs.min(axis=0, where=~late, initial=1 << 62), 0)
            if int(spread.max()) > widest:
                widest, found = int(spread.max()), (played, int(spread.argmax()))
        return widest, *found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Everything that was asked for."""

    request: Request
    sections: Sequence[Section]


def windows_of(ground: Ground, workload: Workload, every_s: int, most: int | None = None) -> Ints:
    """First ticks of the windows. UsageError where none fits."""
    trace = ground.trace
    last = trace.ticks - -(-workload.follow_s // trace.tick_s)
    if last < ground.history_ticks:
        after_s = (trace.ticks - ground.history_ticks) * trace.tick_s
        history_s = ground.history_ticks * trace.tick_s
        after = f" after its history of {format_duration(history_s)}" if history_s else ""
        raise UsageError(
            f"{ground.name}: no window of {format_duration(workload.follow_s)} fits into the {format_duration(after_s)} of the "
            f"trace{after}: take a longer trace{', a shorter history' if history_s else ''} or a shorter deadline or horizon"
        )
    starts = np.arange(ground.history_ticks, last + 1, max(1, every_s // trace.tick_s), dtype=np.int64)
    if most is not None and most < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(np.int64)]
    return starts


def policy_on(name: str, ground: Ground, workload: Workload, given: Given) -> MarketPolicy:
    """The policy as it is played there; one that learns, with what it is given."""
    policy = policy_named(name)
    if given is Given.PAST and isinstance(policy, Ours):
        return replace(policy, beliefs=fit_beliefs(ground.history, gang=workload.gang))
    return policy


def compare(
    request: Request, bounds: Bounds = bounds_here, told: Callable[[int, int], None] = lambda done, total: None
) -> Comparison:
    """Play everything. `told` hears how much is done, in windows."""
    names = [*dict.fromkeys([*request.policies, BASELINE])]
    rounds = [
        (ground, workload, windows_of(ground, workload, request.every_s, request.most_windows))
        for workload in request.workloads
        for ground in request.grounds
    ]
    total = sum(len(starts) for _, _, starts in rounds) * (len(names) + request.with_optimum)
    done = 0

    def count(windows: int = 1) -> None:
        nonlocal done
        done += windows
        told(done, total)

    count(0)
    played: list[Played] = []
    for ground, workload, starts in rounds:
        outcomes: dict[str, Outcomes] = {}
        for name in names:
            policy = policy_on(name, ground, workload, request.given)
            outcomes[name] = simulate(ground.trace, policy, workload, starts)
            count(len(starts))
        least = bounds(ground.trace, workload, starts, count) if request.with_optimum else None
        played.append(
            Played(
                ground=ground,
                workload=workload,
                starts=starts,
                outcomes=outcomes,
                optimum_microusd=None if least is None else np.array([each.microusd for each in least], np.int64),
                optimum_is_exact=least is not None and all(each.exact for each in least),
            )
        )
    keys = dict.fromkeys((each.ground.group, each.workload) for each in played)
    sections = [
        _section(request, [each for each in played if (each.ground.group, each.workload) == key]) for key in keys
    ]
    return Comparison(request=request, sections=sections)


def _check_time(workload: Workload) -> None:
    job = workload.job
    if job.deadline_s < job.work_s + job.changeover_s:
        raise UsageError(
            f"{format_duration(job.work_s)} of work and one changeover of {format_duration(job.changeover_s)} do not fit into a "
            f"deadline of {format_duration(job.deadline_s)}: nothing could be in time; give a later deadline or less work"
        )
    if workload.follow_s < job.deadline_s:
        raise UsageError(
            f"the horizon ({format_duration(workload.follow_s)}) lies before the deadline ({format_duration(job.deadline_s)}); "
            f"give a later one, or none"
        )


def _section(request: Request, played: Sequence[Played]) -> Section:
    workload = played[0].workload
    days = Days.of(
        np.concatenate([each.day for each in played]), block_days=max(1, -(-workload.job.deadline_s // DAY_S))
    )
    section = Section(
        group=played[0].ground.group,
        workload=workload,
        played=played,
        lines=(),
        optimum_usd=None,
        optimum_band_usd=None,
        blocks=days.blocks,
    )
    least = section.least_usd()
    return replace(
        section,
        lines=[_line(section, name, days, least) for name in request.policies],
        optimum_usd=None if least is None else float(least.mean()),
        optimum_band_usd=None if least is None else days.mean(least),
    )


def _line(section: Section, policy: str, days: Days, least: Floats | None) -> Line:
    ends = [each.outcomes[policy] for each in section.played]

    def of(figure: str) -> Ints:
        joined: Ints = np.concatenate([getattr(each, figure) for each in ends])
        return joined

    costs, finish_s, late = section.costs_usd(policy), of("finish_s"), of("missed")
    useful_s, billed_s = of("useful_s"), of("billed_s")
    finished = finish_s != UNFINISHED
    above, above_band, closed, closed_band = None, None, None, None
    if least is not None and not late.any():
        above, above_band = _ratio(days, costs - least, least)
        base = section.costs_usd(BASELINE)
        closed, closed_band = _ratio(days, base - costs, base - least)
        if policy == BASELINE:
            closed_band = None
    left_s = section.workload.job.work_s - useful_s[~finished]
    cheapest, dearest = np.quantile(costs, (0.05, 0.95)).tolist()
    return Line(
        policy=policy,
        windows=len(costs),
        mean_usd=int(of("microusd").sum()) / 1e6 / len(costs),
        band_usd=days.mean(costs),
        cheapest_usd=cheapest,
        dearest_usd=dearest,
        above_optimum=above,
        above_optimum_band=above_band,
        gap_closed=closed,
        gap_closed_band=closed_band,
        misses=int(late.sum()),
        unfinished=int((~finished).sum()),
        left_s=float(left_s.mean()) if len(left_s) else 0.0,
        finish_s=float(finish_s[finished].mean()) if finished.any() else None,
        spot_share=float(of("spot_s").sum() / max(1, billed_s.sum())),
        preemptions=float(of("preemptions").mean()),
        goodput=float(useful_s.sum() / max(1, billed_s.sum())),
        refund_usd=float(of("refund_microusd").mean() / 1e6),
        useful_s=float(useful_s.mean()),
        lost_s=float(of("lost_s").mean()),
        changeover_s=float(of("changeover_s").mean()),
        waiting_s=float(of("waiting_s").mean()),
    )


def _ratio(days: Days, above: Floats, below: Floats) -> tuple[float | None, Band | None]:
    """A ratio of two sums and its band; None where there is nothing below (less than a cent per window)."""
    if below.sum() < 0.01 * len(below):
        return None, None
    return float(above.sum() / below.sum()), days.ratio(days.sums(above), days.sums(below))
