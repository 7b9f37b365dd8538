"""What must be true before the plan is: each point with what is known of it, and how to find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from holdfast.core.config import format_bytes, format_duration
from holdfast.simulate.planner.case import Case
from holdfast.simulate.planner.montecarlo import Option
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.terms import Terms

__all__ = ["Point", "State", "checklist"]


class State(StrEnum):
    YES = "yes"
    NO = "no"
    OPEN = "to check"


@dataclass(frozen=True, slots=True)
class Point:
    state: State
    what: str
    says: str


def checklist(case: Case, terms: Terms, pools: Sequence[Price], best: Option) -> tuple[Point, ...]:
    """In the order in which they hurt."""
    points = [_restores(case), _position(case), _heard(case, terms)]
    if terms.notice is not None:
        points.append(_fits(terms))
    points += [_interval(case, terms), _slack(case, terms), _reserve(case, best)]
    dates = sorted({pool.as_of for pool in pools})
    points.append(
        Point(
            State.OPEN,
            "prices and quota",
            f"prices are of {', '.join(dates)}; spot and on-demand quota must allow the job",
        )
    )
    points.append(
        Point(State.OPEN, "on-demand is there", "the plan takes it for granted; scarce GPUs are not always to be had")
    )
    return tuple(point for point in points if point is not None)


def _restores(case: Case) -> Point | None:
    if not case.saves:
        return None
    seen = case.known.restores_seen
    if seen:
        return Point(
            State.YES, "restores work", f"the measured run was restored {seen} times; holdfast drill proves the result"
        )
    return Point(State.OPEN, "restores work", "holdfast drill -- python train.py kills it in every way and compares")


def _position(case: Case) -> Point | None:
    if not case.saves:
        return None
    return Point(
        State.OPEN, "data position is exact", "run.batches(loader) resumes at the next sample; the drill compares it"
    )


def _heard(case: Case, terms: Terms) -> Point:
    if case.known.notice_was_heard:
        return Point(State.YES, "notices are heard", "the measured run saved after one")
    lead = terms.notice.notice_s if terms.notice else 0.0
    return Point(
        State.OPEN, "notices are heard", f"rehearse: holdfast notices fake --lead {lead:.0f}s, and a run beside it"
    )  # fmt: skip


def _fits(terms: Terms) -> Point:
    fit = terms.notice
    assert fit is not None
    sent = f"{format_bytes(fit.send_bytes)} a machine, about {format_duration(fit.send_s)}, notice {format_duration(fit.notice_s)}"
    if fit.fits:
        return Point(State.YES, "a save fits into the notice", sent)
    needs = "" if fit.needed_bytes_per_s is None else f"; it would take {format_bytes(fit.needed_bytes_per_s)}/s"
    return Point(
        State.NO, "a save fits into the notice", f"{sent}{needs}. Each preemption loses work since the last save"
    )


def _interval(case: Case, terms: Terms) -> Point | None:
    if terms.interval is None:
        return None
    every = format_duration(terms.interval.interval_s)
    return Point(
        State.YES,
        "saves are frequent enough",
        f"one every {every}; a preemption loses {format_duration(terms.lost_mean_s)} on average",
    )


def _slack(case: Case, terms: Terms) -> Point | None:
    if case.deadline_s is None:
        return None
    job = terms.job
    slack_s = case.deadline_s - job.work_s
    needs_s = 2 * job.changeover_s + job.max_lost_s
    state = State.YES if slack_s >= needs_s else State.NO
    said = f"{format_duration(slack_s)}; a safe start on spot needs {format_duration(needs_s)}"
    return Point(state, "the deadline has slack", said)


def _reserve(case: Case, best: Option) -> Point | None:
    if case.budget_usd is None:
        return None
    dear = best.cost_usd.high
    state = State.YES if dear <= case.budget_usd else State.NO
    return Point(
        state, "the budget has a reserve", f"in 5 of 100 cases it costs more than about ${dear:,.0f}, of ${case.budget_usd:,.0f}"
    )  # fmt: skip
