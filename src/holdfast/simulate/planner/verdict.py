"""Is spot worth it here? One sentence, its reasons, and what speaks against it even where the figures speak for it.

Worth it means: the cheapest mix that meets deadline and budget with the wanted confidence is not plain on-demand, and it saves at
least $10 and 5 % of the on-demand cost after the engineering time, which counts once and in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError
from holdfast.simulate.planner.breakeven import BreakEven
from holdfast.simulate.planner.case import Case
from holdfast.simulate.planner.montecarlo import Option
from holdfast.simulate.planner.terms import Terms

__all__ = [
    "LEAST_SAVING_SHARE",
    "LEAST_SAVING_USD",
    "Against",
    "Obstacle",
    "Verdict",
    "judge",
    "obstacles_of",
    "recommend",
]

LEAST_SAVING_USD, LEAST_SAVING_SHARE = 10.0, 0.05
_SHORT_S = 3600.0
_SAME = 0.01
"""Costs that differ by less than this are taken for the same."""


class Against(StrEnum):
    """Why spot may not be worth it."""

    SHORT_JOB = "short job"
    NO_SLACK = "no slack"
    NO_CHECKPOINT = "no checkpoint"
    COUPLED_GANG = "coupled gang"
    SERVING = "serving"
    NOTHING_FITS = "nothing fits"
    LITTLE_SAVED = "little saved"
    ENGINEERING = "engineering"
    NO_SPOT = "no spot"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason, with its figures."""

    kind: Against
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    worth: bool
    headline: str
    because: tuple[Obstacle, ...]
    """Why not, where it is not worth it."""
    cautions: tuple[Obstacle, ...]
    """What speaks against it all the same, where it is."""
    on_demand_usd: float | None
    saved_usd: float | None
    """On average, before engineering."""
    engineering_usd: float
    net_usd: float | None
    runs_to_pay: float | None
    """Runs like this one until what they save has paid for the engineering."""


def recommend(case: Case, options: Sequence[Option]) -> Option:
    """The cheapest that meets everything with the wanted confidence; where none does, the one that most probably does.

    Of options that cost the same, the one that is done first.
    """
    allowed = [option for option in options if option.mix == "spot"] if case.must_be_spot else list(options)
    if not allowed:
        raise UsageError(
            "the job file asks for spot only, and no spot capacity fits the price ceiling and the on-demand floor"
        )
    fitting = [option for option in allowed if option.p_both >= case.confidence]
    if not fitting:
        return max(allowed, key=_nearest)
    least = min(option.cost_usd.mean for option in fitting)
    return min(
        (option for option in fitting if option.cost_usd.mean <= least * (1 + _SAME)),
        key=lambda option: option.finish_s.middle,
    )


def _nearest(option: Option) -> tuple[float, float, float, float]:
    """Where nothing fits: what most probably does; where no deadline can be met, what is done first; then what costs least."""
    timely = 1.0 if option.p_deadline is None else option.p_deadline
    late = -option.finish_s.middle if timely < 0.01 else 0.0
    return round(option.p_both, 2), round(timely, 2), late, -option.cost_usd.mean


def obstacles_of(case: Case, terms: Terms, even: BreakEven | None) -> list[Obstacle]:
    """What the figures of the job say against spot, whatever the simulation says."""
    job, found = terms.job, []
    work_s, start_s = terms.plain_work_s, float(job.changeover_s)
    if work_s < max(_SHORT_S, 4 * start_s):
        found.append(
            Obstacle(
                Against.SHORT_JOB,
                f"it is a short job: {format_duration(work_s)} of work, and every start takes {format_duration(start_s)}",
            )
        )
    if not case.saves and not case.tasks:
        found.append(
            Obstacle(
                Against.NO_CHECKPOINT,
                "there are no checkpoints: a preemption takes back all work so far, and spot capacity lasts about "
                f"{format_duration(terms.gang_life_s)} against {format_duration(work_s)} of work",
            )
        )
    if case.deadline_s is not None:
        slack_s = case.deadline_s - job.work_s
        least_s = 2 * start_s + job.max_lost_s
        if slack_s < 2 * least_s:
            left = f"leaves {format_duration(slack_s)} of slack" if slack_s >= 0 else "is shorter than the work"
            found.append(
                Obstacle(
                    Against.NO_SLACK,
                    f"the deadline {left}; each start on spot has to leave two changeovers and what a preemption takes back, "
                    f"{format_duration(least_s)}",
                )
            )
    coupled = case.machines - case.floor
    if coupled > 1 and not case.tasks and even is not None:
        margin = even.margin
        if even.life_s is None or (margin is not None and margin < 3):
            needs = "never pays" if even.life_s is None else f"breaks even at {format_duration(even.life_s)}"
            found.append(
                Obstacle(
                    Against.COUPLED_GANG,
                    f"{coupled} machines stop when one of them goes: together they last about "
                    f"{format_duration(terms.gang_life_s)}, and spot {needs}",
                )
            )
    return found


def judge(case: Case, options: Sequence[Option], best: Option, obstacles: Sequence[Obstacle], sentence: str) -> Verdict:
    """`sentence` says what the recommended option is."""
    on_demand = min((each.cost_usd.mean for each in options if each.is_on_demand), default=None)
    saved = None if on_demand is None else on_demand - best.cost_usd.mean
    net = None if saved is None else saved - case.engineering_usd
    fits = best.p_both >= case.confidence
    because: list[Obstacle] = []
    if best.is_on_demand:
        because = [*obstacles, *_beaten(case, options, on_demand)]
    elif not fits:
        because = [*obstacles, _nothing_fits(case, best)]
    elif net is not None and on_demand is not None and net < max(LEAST_SAVING_USD, LEAST_SAVING_SHARE * on_demand):
        because = [*obstacles, _little(case, saved or 0.0, on_demand)]
    worth = not because
    return Verdict(
        worth=worth,
        headline=sentence if worth else _against(case, options, best, because[0]),
        because=tuple(because),
        cautions=tuple(obstacles) if worth else (),
        on_demand_usd=on_demand,
        saved_usd=saved,
        engineering_usd=case.engineering_usd,
        net_usd=net,
        runs_to_pay=case.engineering_usd / saved if saved and saved > 0 and case.engineering_usd else None,
    )


def _against(case: Case, options: Sequence[Option], best: Option, first: Obstacle) -> str:
    demand = max((each.p_both for each in options if each.is_on_demand), default=0.0)
    if best.is_on_demand or best.p_both >= case.confidence or demand >= best.p_both:
        return f"Spot is not worth it here, because {first.says}."
    return (
        f"Nothing meets {_wishes(case)} with {case.confidence:.0%}: {best.mix} does with {best.p_both:.0%}, "
        f"on-demand with {demand:.0%}."
    )


def _beaten(case: Case, options: Sequence[Option], on_demand: float | None) -> list[Obstacle]:
    """On-demand was the best: is it that the others do not fit, or that they do not save?"""
    others = [each for each in options if not each.is_on_demand]
    if not others:
        why = (
            "all machines are to run on demand"
            if case.floor == case.machines
            else "it costs more than the price ceiling"
        )
        return [Obstacle(Against.NO_SPOT, f"no spot capacity is wanted: {why}")]
    safest = max(others, key=lambda each: (each.p_both, -each.cost_usd.mean))
    if safest.p_both < case.confidence:
        return [_nothing_fits(case, safest)]
    return [_little(case, (on_demand or 0.0) - min(each.cost_usd.mean for each in others), on_demand or 0.0)]


def _nothing_fits(case: Case, safest: Option) -> Obstacle:
    what = f"meets {_wishes(case)}"
    return Obstacle(
        Against.NOTHING_FITS,
        f"no mix with spot {what} with {case.confidence:.0%}; the best of them does with {safest.p_both:.0%}",
    )


def _wishes(case: Case) -> str:
    named = (("the deadline", case.deadline_s), ("the budget", case.budget_usd))
    return (
        " and ".join(name for name, wanted in named if wanted is not None) or "its end in the time that it is followed"
    )


def _little(case: Case, saved: float, on_demand: float) -> Obstacle:
    if (
        case.engineering_usd
        and saved - case.engineering_usd < max(LEAST_SAVING_USD, LEAST_SAVING_SHARE * on_demand) <= saved
    ):
        return Obstacle(
            Against.ENGINEERING,
            f"it saves about ${saved:,.0f}, and the engineering costs ${case.engineering_usd:,.0f}",
        )
    what = f"saves about ${saved:,.0f} of ${on_demand:,.0f}" if saved > 0 else "saves nothing"
    return Obstacle(Against.LITTLE_SAVED, f"it {what}")
