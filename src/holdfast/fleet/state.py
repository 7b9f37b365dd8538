"""What to do next for one run: a pure function of what is known. Nothing here waits, writes, calls or remembers.

    RunView, Terms, now ──→ instruct ──→ RunView (what the market policy remembers), Instructions, and why

Every instruction is safe to carry out twice, and after any of them the world may stop: whoever comes next reads the records and is
told the same again. Rules that hold in every order of events:

  - no create call without an intent and a grant in the store, and none for a launch that is answered, booked, or too old;
  - a number is proposed only by whoever knows every intent before it, so two controllers never decide on the same knowledge;
  - at most one machine works, and at most one more stands by for it; who claims is decided by the machines, on the records;
  - what has a grant no more, was given up, or came twice is ended; what cannot be seen is not gone before the provider's window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from holdfast.core.contract import (
    EXIT_DONE,
    EXIT_FENCED,
    EXIT_INFRASTRUCTURE,
    EXIT_LIMIT,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    EXIT_USAGE,
)
from holdfast.fleet.instructions import Instruction, Over, Propose
from holdfast.fleet.market import Place, Wait, ask_market, where
from holdfast.fleet.money import ask_for, budget_of, limits_for
from holdfast.fleet.phases import Phase, is_superseded, phase_of
from holdfast.fleet.tending import dismiss, tell, tend
from holdfast.fleet.terms import Terms
from holdfast.fleet.view import LaunchView, MarketView, RunView
from holdfast.policy import budget
from holdfast.policy.budget import Refused

__all__ = ["Outlook", "instruct"]

_AHEAD = (Phase.ASKED, Phase.COMING, Phase.STANDBY)
_UNCOUNTED = (EXIT_PREEMPTED, EXIT_INFRASTRUCTURE, EXIT_LIMIT, EXIT_FENCED)
"""Ends that say nothing about the job: it is started again."""
_FINAL = (EXIT_NO_PROGRESS, EXIT_USAGE)
"""Ends that another start would only repeat."""
_CANCELLED = 130


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is waited for, and why: for people (`explain`), and for the shell, which looks again by then."""

    reasons: tuple[str, ...]
    until_s: int | None = None
    """None: at the next look that is due anyway."""


def instruct(view: RunView, terms: Terms, now_s: int) -> tuple[RunView, tuple[Instruction, ...], Outlook]:
    """What to do now. Empty: wait, as the outlook says."""
    ending = verdict(view, terms)
    tended = tuple(
        each for launch in view.launches for each in tend(view, launch, terms, now_s, ending=ending is not None)
    )
    if ending is not None:
        live = [launch for launch in view.launches if phase_of(launch) is not Phase.OVER]
        hard = view.cancel is not None and view.cancel.now
        told = tuple(each for launch in live for each in dismiss(launch, ending, hard=hard))
        last = () if live or tended else (ending,)
        return view, (*tended, *told, *last), Outlook((f"the run ends: {ending.outcome}", *ending.reasons))
    if tended:
        return view, tended, Outlook(("what was launched comes first",))
    return _want(view, terms, now_s)


def verdict(view: RunView, terms: Terms) -> Over | None:
    """How the run ends, once that is known; machines may still be there."""
    failures, best_step = 0, 0
    for launch in view.launches:
        if launch.pulse is not None and launch.pulse.kept_step > best_step:
            best_step, failures = launch.pulse.kept_step, 0
        released = launch.released
        if released is None or released.exit_code is None:
            continue
        code = released.exit_code
        if code == EXIT_DONE and launch.claimed is None:
            continue
        if code == EXIT_DONE:
            return Over(outcome="done", exit_code=0, reasons=(f"launch {launch.launch} has finished the run",))
        if code in _UNCOUNTED or code in terms.retry_exit_codes or launch.told("stop") or launch.notice is not None:
            continue
        failures += 1
        if code in _FINAL or failures > terms.max_failures:
            row = "" if code in _FINAL else f", the {failures}th end of that kind without progress between them"
            said = (f"launch {launch.launch} ended with exit code {code}{row}", *released.reasons)
            return Over(outcome="failed", exit_code=code, reasons=said)
    if view.cancel is not None:
        return Over(outcome="cancelled", exit_code=_CANCELLED, reasons=(view.cancel.reason,))
    return None


def _want(view: RunView, terms: Terms, now_s: int) -> tuple[RunView, tuple[Instruction, ...], Outlook]:
    """What should be there, beside what is."""
    phases = {launch.launch: phase_of(launch) for launch in view.launches}
    workers = [each for each in view.launches if phases[each.launch] is Phase.WORKING and not is_superseded(view, each)]
    working = workers[-1] if workers else None
    ahead = next((each for each in reversed(view.launches) if phases[each.launch] in _AHEAD), None)
    going = working is not None and (working.notice is not None or working.told("stop"))
    market = ask_market(view, terms, now_s, working if working is not None and not going else ahead)
    if market is None:
        return view, (), Outlook(("no pool is known yet",))
    view = replace(view, market=market)
    stays = working is not None and not going and _is_there(working, market)
    if ahead is not None:
        told = () if working is None else _hand_over(working, ahead, phases[ahead.launch], market, stays=stays)
        return view, told, Outlook((f"launch {ahead.launch} is {phases[ahead.launch].value}", *market.reasons))
    if stays:
        return view, (), Outlook(market.reasons)
    if working is not None and not going and market.market == "nothing":
        return view, tell(working, "stop", market.reasons), Outlook(market.reasons)
    place = where(view, terms, now_s, market)
    if isinstance(place, Place):
        return _propose(view, terms, place, working, market)
    if place.until_s is None and all(phase is Phase.OVER for phase in phases.values()):
        return (
            view,
            (Over(outcome="gave up", exit_code=EXIT_INFRASTRUCTURE, reasons=place.reasons),),
            Outlook(place.reasons),
        )
    return view, (), _waiting(place)


def _waiting(place: Wait) -> Outlook:
    return Outlook(place.reasons, place.until_s)


def _is_there(working: LaunchView, market: MarketView) -> bool:
    """Whether what works is where the policy wants it."""
    pool = None if working.answer is None else working.answer.pool
    if pool is None or pool.market != market.market:
        return False
    return pool.market == "on-demand" or pool.name == market.pool


def _hand_over(
    working: LaunchView, ahead: LaunchView, phase: Phase, market: MarketView, *, stays: bool
) -> tuple[Instruction, ...]:
    """Tell the one that works to leave, once its replacement is ready; or the replacement to go, once nobody needs it. Where a
    deadline stands, nobody is told: the machine saves and leaves by itself, and the standby sees it."""
    if ahead.intent is None or ahead.intent.predecessor != working.launch or phase is Phase.ASKED:
        return ()
    notice = working.notice
    if notice is not None and notice.deadline_s is not None:
        return ()
    if stays:
        return tell(ahead, "home", ("what it was to replace stays where it is",))
    if phase is Phase.STANDBY:
        why = "advice of its provider" if notice is not None else "; ".join(market.reasons)
        return tell(working, "stop", (f"launch {ahead.launch} is ready to take over: {why}",))
    return ()


def _propose(
    view: RunView, terms: Terms, place: Place, working: LaunchView | None, market: MarketView
) -> tuple[RunView, tuple[Instruction, ...], Outlook]:
    """If the budget allows it: the grant itself is written after the number is won, on what is known then."""
    number = view.next_launch
    ask = ask_for(number, place.allowed, terms)
    _, decision = budget.grant(budget_of(view), limits_for(ask, terms), ask)
    if not isinstance(decision, Refused):
        predecessor = None if working is None else working.launch
        reasons = (*place.reasons, *decision.reasons)
        proposed = Propose(
            launch=number, allowed=place.allowed, predecessor=predecessor, policy_state=market.after.to_json(), reasons=reasons
        )  # fmt: skip
        return view, (proposed,), Outlook(reasons)
    if all(phase_of(launch) is Phase.OVER for launch in view.launches):
        return (
            view,
            (Over(outcome="budget", exit_code=EXIT_LIMIT, reasons=decision.reasons),),
            Outlook(decision.reasons),
        )
    return view, (), Outlook(decision.reasons)
