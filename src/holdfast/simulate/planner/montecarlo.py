"""Play the real policies on made-up markets, and say what a mix costs and when it ends, with bands.

worlds, policy → the engine → one cost and one finish per sample → means, 5 % and 95 %, probabilities
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.policy.market.arrays import Bools, Floats
from holdfast.policy.market.registry import policy_named
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.outcome import UNFINISHED
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.planner.case import Case
from holdfast.simulate.planner.markets import Worlds
from holdfast.simulate.planner.terms import Terms

__all__ = ["Band", "Option", "Played", "band_of", "option_of", "play"]

_CURVE = np.linspace(0.025, 0.975, 20)


@dataclass(frozen=True, slots=True)
class Band:
    """Of the samples: 5 % lie below `low`, 5 % above `high`. inf: it did not end while it was followed."""

    mean: float
    low: float
    middle: float
    high: float
    error: float
    """Standard error of the mean, from the number of samples alone."""
    curve: tuple[float, ...]
    """Quantiles from 2.5 % to 97.5 %, in steps of 5 %."""


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """One element per sample, of all machines together."""

    cost_usd: Floats
    finish_s: Floats
    """inf where it did not end."""
    spot_share: Floats
    """Of the billed time."""
    preemptions: Floats
    lost_s: Floats
    waiting_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One mix on one set of pools, and what became of it."""

    hardware: str
    mix: str
    pools: tuple[str, ...]
    cost_usd: Band
    finish_s: Band
    p_finished: float
    p_deadline: float | None
    p_budget: float | None
    p_both: float
    """Finished, by the deadline if there is one, within the budget if there is one."""
    spot_share: float
    preemptions: float
    lost_s: float
    waiting_s: float
    keeps_deadline: bool
    """Whether the policy's limits promise the deadline, whatever the market does."""
    saving: float | None = None
    """By the cheapest on-demand option."""

    @property
    def is_on_demand(self) -> bool:
        return self.mix == "on-demand"


def play(case: Case, terms: Terms, worlds: Worlds, mix: str) -> Played:
    """All samples of one mix. What has not ended when it is followed no longer is charged as if the rest were done on demand: a job
    that waits for ever must not look cheap."""
    workload = Workload(job=terms.job, horizon_s=terms.follow_s)
    outcomes = simulate(worlds.trace, policy_named(mix), workload, worlds.starts)
    billed_s = np.maximum(outcomes.billed_s, 1)
    left_s = (outcomes.finish_s == UNFINISHED) * (terms.job.work_s - outcomes.useful_s)
    rest = left_s / 3600 * (worlds.trace.on_demand_microusd_h / 1e6)
    cost = outcomes.on_demand_microusd / 1e6 + rest, outcomes.spot_microusd / 1e6
    finish = np.where(outcomes.finish_s == UNFINISHED, math.inf, outcomes.finish_s.astype(np.float64))
    rows = (
        cost[0], cost[1], outcomes.spot_s / billed_s, outcomes.preemptions.astype(np.float64),
        outcomes.lost_s.astype(np.float64), outcomes.waiting_s.astype(np.float64),
    )  # fmt: skip
    machines = case.machines
    if case.tasks and machines > 1:
        demand, spot, share, preemptions, lost, waiting = (_apart(row, worlds, machines).sum(axis=0) for row in rows)
        # They end one after the other; what counts is the last.
        finish = _apart(finish, worlds, machines).max(axis=0)
        return Played(
            demand + spot * worlds.price, finish, share / machines, preemptions, lost / machines, waiting / machines
        )
    demand, spot, share, preemptions, lost, waiting = rows
    return Played((demand + spot * worlds.price) * machines, finish, share, preemptions, lost, waiting)


def _apart(row: Floats, worlds: Worlds, machines: int) -> Floats:
    """Machine x sample: each machine has another sample's luck, of a market that is alike."""
    order = worlds.likeness
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    steps = [(number + 1) // 2 * (1 if number % 2 else -1) for number in range(machines)]
    apart: Floats = np.stack([row[order[(place + step) % len(order)]] for step in steps])
    return apart


def option_of(case: Case, hardware: str, pools: Sequence[str], mix: str, played: Played) -> Option:
    """The figures of one mix."""
    finished: Bools = np.isfinite(played.finish_s)
    timely: Bools = finished if case.deadline_s is None else played.finish_s <= case.deadline_s
    cheap: Bools = finished if case.budget_usd is None else finished & (played.cost_usd <= case.budget_usd)
    return Option(
        hardware=hardware,
        mix=mix,
        pools=tuple(pools),
        cost_usd=band_of(played.cost_usd),
        finish_s=band_of(played.finish_s),
        p_finished=float(finished.mean()),
        p_deadline=None if case.deadline_s is None else float(timely.mean()),
        p_budget=None if case.budget_usd is None else float(cheap.mean()),
        p_both=float((timely & cheap).mean()),
        spot_share=float(played.spot_share.mean()),
        preemptions=float(played.preemptions.mean()),
        lost_s=float(played.lost_s.mean()),
        waiting_s=float(played.waiting_s.mean()),
        keeps_deadline=policy_named(mix).keeps_deadline,
    )


def band_of(values: Floats) -> Band:
    """Mean, quantiles and error. A mean of values of which one is infinite is infinite."""
    curve = np.quantile(values, [0.05, 0.5, 0.95, *_CURVE], method="inverted_cdf")
    finite = values[np.isfinite(values)]
    error = float(finite.std(ddof=1)) / math.sqrt(len(finite)) if len(finite) > 1 else 0.0
    low, middle, high = curve[:3].tolist()
    return Band(float(values.mean()), low, middle, high, error, tuple(curve[3:].tolist()))
