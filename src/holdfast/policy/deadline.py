"""The machine is about to go: what can still be made durable, and until when may training go on?

A frozen context goes in, a frozen decision with its reasons comes out. It is asked when a notice comes, and again at every step
boundary after that, with the bandwidth as it has turned out by then.

    usable = seconds left - margin - time to leave
    a save = copy + bytes / bandwidth + commit latency      (behind a save in flight: what that one still needs comes first)

Bandwidth and step time are planned at quantiles that hold together with probability `confidence`. What fits at them *fits*; among
all that fits, what leaves the newest step durable is done. When nothing fits, the most probable attempt is made, unless even that
is less probable than `least_probability`: what cannot finish is not started.

One save at once insures against a machine that dies early or a store that turns slow; training goes on, and the last save begins at
the latest safe moment. The insurance is bought only where both saves fit and it insures more work than the upload takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from holdfast.core.config import format_bytes, format_duration
from holdfast.policy.deadline_case import (
    UNMEASURED_BANDWIDTH,
    DeadlineAction,
    DeadlineContext,
    DeadlineDecision,
    InFlightSave,
    LocalTier,
    MemorySnapshot,
    Tier,
)
from holdfast.policy.deadline_sums import Candidate, Sums, is_unsaved, new_saves, newest_begun, ready_saves
from holdfast.policy.spread import Spread

__all__ = [
    "UNMEASURED_BANDWIDTH",
    "DeadlineAction",
    "DeadlineContext",
    "DeadlineDecision",
    "InFlightSave",
    "LocalTier",
    "MemorySnapshot",
    "Spread",
    "Tier",
    "decide_save",
]


def decide_save(context: DeadlineContext) -> DeadlineDecision:
    """What to do now so that the newest possible step is durable before the machine goes.

    More time or bandwidth never makes the final durable step older, and training on is chosen only when the save of the present
    step would still fit after it.
    """
    if context.seconds_left is None:
        return _without_deadline(context)
    sums = Sums(context, context.seconds_left - context.margin_s - context.leave_s)
    news = new_saves(sums)
    olds = ready_saves(sums)
    fitting = [candidate for candidate in (*news, *olds) if sums.fits(candidate)]
    reasons = [_time(sums)]
    if not fitting:
        return _last_resort(sums, [*news, *olds], reasons)
    # max returns the first of equals: the store before the local tier, a new save before an old one.
    best = max(fitting, key=lambda candidate: candidate.step + candidate.more_steps)
    if best in olds:
        return _from_memory(sums, best, reasons)
    return _new(sums, best, next((old for old in olds if sums.fits(old)), None), reasons)


# The decision, once it is known what fits.


def _new(sums: Sums, best: Candidate, ready: Candidate | None, reasons: list[str]) -> DeadlineDecision:
    """The newest step comes from a save that is still to be copied, now or later."""
    context = sums.context
    send_s = sums.send_s(best.tier, best.send_bytes)
    reasons.append(_save(sums, best))
    durable_step, latest_s = best.step + best.more_steps, best.latest_s
    decided = _Decided(sums, best, durable_step, latest_s)
    if context.boundary_in_s:
        snapshot = ready if ready and ready.action is DeadlineAction.COMMIT_NEWEST_SNAPSHOT else None
        after_s = snapshot.ends_s if snapshot and snapshot.tier is best.tier else 0.0
        if snapshot and max(after_s, context.boundary_in_s + context.snapshot_s) + send_s <= sums.usable_s:
            reasons.append(f"until then step {snapshot.step}, which lies in memory, is committed as insurance")
            return decided.now(snapshot, reasons, again=True)
        reasons.append(f"the state can be copied in {format_duration(context.boundary_in_s)}")
        return decided.train_on(reasons)
    if best.more_steps == 0:
        if math.isinf(sums.planned_step_s()):
            reasons.append("nobody knows how long a step takes, so no further one is begun before the save")
        else:
            step = format_duration(sums.planned_step_s())
            reasons.append(f"another step may take {step}, and the save would no longer fit after it")
        return decided.now(best, reasons)
    insurance = _insurance(sums, best, send_s)
    steps = "1 more step" if best.more_steps == 1 else f"{best.more_steps} more steps"
    at = format_duration(best.latest_s or 0.0)
    reasons.append(
        f"{steps} of up to {format_duration(sums.planned_step_s())} fit before it; it begins in {at} at the latest"
    )
    if insurance is not None:
        unsaved = format_duration(_unsaved_s(context))
        reasons.append(
            f"{unsaved} of work is unsaved: step {insurance.step} goes to {insurance.tier.value} at once as insurance"
        )
        return decided.now(insurance, reasons, again=True)
    return decided.train_on(reasons)


def _insurance(sums: Sums, last: Candidate, last_send_s: float) -> Candidate | None:
    """A save of now that leaves the last one its time, and that insures more work than its own upload takes."""
    context = sums.context
    if context.insured or context.in_flight or not is_unsaved(context):
        return None
    for candidate in new_saves(sums):
        room_s = sums.usable_s - (last_send_s if candidate.tier is last.tier else 0.0)
        if candidate.ends_s <= room_s and _unsaved_s(context) >= sums.send_s(candidate.tier, candidate.send_bytes):
            return candidate
    return None


def _unsaved_s(context: DeadlineContext) -> float:
    step_s = context.step_time.mean if context.step_time else 0.0
    return (context.step - newest_begun(context)) * step_s


def _from_memory(sums: Sums, best: Candidate, reasons: list[str]) -> DeadlineDecision:
    """No copy of the present state comes in time, or nobody knows: what is in memory or on its way is made durable."""
    context = sums.context
    decided = _Decided(sums, best, best.step, None)
    if context.boundary_in_s is None:
        reasons.append("nobody knows when the state can be copied next")
        after = best if best.action is DeadlineAction.COMMIT_NEWEST_SNAPSHOT else None
        latest_s = _latest_if_a_boundary_comes(sums, after)
        if latest_s is not None:
            reasons.append(f"a save of a boundary that comes within {format_duration(latest_s)} still fits")
            decided = _Decided(sums, best, best.step, latest_s)
            if best.action is DeadlineAction.FINISH_IN_FLIGHT:
                reasons.append(_save(sums, best))
                return decided.train_on(reasons)
            reasons.append(_save(sums, best))
            return decided.now(best, reasons, again=True)
    elif is_unsaved(context):
        reasons.append(f"a save of step {context.step} does not fit any more")
    reasons.append(_save(sums, best))
    return decided.now(best, reasons)


def _latest_if_a_boundary_comes(sums: Sums, after: Candidate | None) -> float | None:
    """Until when a boundary comes in time for a save to the store behind what is sent before it; None: too late already."""
    context = sums.context
    ahead_s = after.ends_s if after and after.tier is Tier.STORE else sums.wait_s(Tier.STORE)
    send_s = sums.send_s(Tier.STORE, context.send_bytes)
    if max(ahead_s, context.snapshot_s) + send_s > sums.usable_s:
        return None
    return sums.usable_s - send_s - context.snapshot_s


def _last_resort(sums: Sums, candidates: list[Candidate], reasons: list[str]) -> DeadlineDecision:
    """Nothing fits at the planned quantiles. A long shot is taken, since nothing better can be done with the time."""
    context = sums.context
    nothing = DeadlineDecision(DeadlineAction.NOTHING, (), durable_step=context.durable_step)
    if context.boundary_in_s is None:
        reasons.append("nobody knows when the state can be copied next")
        latest_s = _latest_if_a_boundary_comes(sums, None)
        if latest_s is not None:
            reasons.append(f"a save of a boundary that comes within {format_duration(latest_s)} still fits")
            return DeadlineDecision(
                DeadlineAction.TRAIN_ON, tuple(reasons), save_at_latest_s=latest_s, durable_step=context.durable_step
            )
    if not candidates:
        begun = newest_begun(context)
        what = f"everything up to step {begun} is saved or on its way" if begun else "no step is complete yet"
        reasons.append(f"{what}, and no further step can be completed and saved in time: there is nothing to save")
        return _with_reasons(nothing, reasons)
    best = max(candidates, key=lambda candidate: (candidate.probability, candidate.step))
    reasons.append(f"{_save(sums, best)}; that does not fit")
    percent = _percent(best.probability)
    if best.probability < context.least_probability:
        reasons.append(f"it would succeed with a probability of {percent}: it is not started")
        return _with_reasons(nothing, reasons)
    reasons.append(f"it may succeed with a probability of {percent}, and nothing better can be done")
    decided = _Decided(sums, best, context.durable_step, None)
    return decided.train_on(reasons) if _waits(context, best) else decided.now(best, reasons)


def _waits(context: DeadlineContext, candidate: Candidate) -> bool:
    return bool(context.boundary_in_s) and candidate.latest_s is not None


def _without_deadline(context: DeadlineContext) -> DeadlineDecision:
    """Nobody knows how long there is: the newest state goes out as soon as it can, and then training goes on."""
    begun = newest_begun(context)
    snapshot = context.snapshot if context.snapshot and context.snapshot.step > begun else None
    if context.insured or not (is_unsaved(context) or snapshot):
        action = DeadlineAction.TRAIN_ON
        why = "what can be saved is saved or on its way" if begun else "no step is complete yet"
    elif context.boundary_in_s == 0:
        action, why = DeadlineAction.SAVE_NOW, f"step {context.step} is saved at once"
    elif snapshot is not None:
        action = DeadlineAction.COMMIT_NEWEST_SNAPSHOT
        why = f"the state cannot be copied now; step {snapshot.step}, which lies in memory, is committed at once"
    else:
        action, why = DeadlineAction.TRAIN_ON, "the state cannot be copied now; it is saved at the next boundary"
    reasons = ("nobody knows when the machine goes", why)
    return DeadlineDecision(action, reasons, durable_step=context.durable_step, probability=None)


@dataclass(frozen=True, slots=True)
class _Decided:
    """Turns what was chosen into a decision. `last` is the save that the durable step comes from."""

    sums: Sums
    last: Candidate
    durable_step: int | None
    latest_s: float | None

    def now(self, chosen: Candidate, reasons: list[str], *, again: bool = False) -> DeadlineDecision:
        in_flight = self.sums.context.in_flight
        if chosen.abandons and in_flight is not None:
            reasons.append(
                f"the save of step {in_flight.step}, in flight, would take the time from it and is abandoned"
            )
        newer = (step for step in (self.durable_step, self.sums.context.durable_step) if step is not None)
        return DeadlineDecision(
            chosen.action,
            tuple(reasons),
            save_at_latest_s=self.latest_s if again else None,
            save_again=again,
            durable_step=max(newer, default=None),
            tier=chosen.tier,
            last_tier=self.last.tier,
            fits=self.sums.fits(chosen),
            probability=chosen.probability,
            abandon_in_flight=chosen.abandons,
        )

    def train_on(self, reasons: list[str]) -> DeadlineDecision:
        fits = self.sums.fits(self.last)
        chance = self.sums.context.confidence if fits and self.last.more_steps else self.last.probability
        return DeadlineDecision(
            DeadlineAction.TRAIN_ON,
            tuple(reasons),
            save_at_latest_s=self.latest_s,
            durable_step=self.durable_step,
            tier=self.last.tier,
            last_tier=self.last.tier,
            fits=fits,
            probability=chance,
        )


def _with_reasons(decision: DeadlineDecision, reasons: list[str]) -> DeadlineDecision:
    return replace(decision, reasons=tuple(reasons))


# Words.


def _time(sums: Sums) -> str:
    context = sums.context
    left = format_duration(context.seconds_left or 0.0)
    kept = f"{format_duration(context.margin_s)} of margin and {format_duration(context.leave_s)} to leave"
    return f"{left} left, less {kept}: {format_duration(sums.usable_s)} to use"


def _save(sums: Sums, candidate: Candidate) -> str:
    """What the save needs, with the figures that say so."""
    tier, context = candidate.tier, sums.context
    spread, planned = sums.bandwidth(tier), sums.planned_bytes_per_s(tier)
    if tier is Tier.STORE and context.bandwidth is None:
        source = f"assumed, nothing has been measured yet: {format_bytes(spread.mean)}/s ± {spread.relative_sd:.0%}"
    else:
        source = f"measured {format_bytes(spread.mean)}/s ± {spread.relative_sd:.0%}"
    rate = f"{format_bytes(planned)}/s ({source}, planned so that all holds with {context.confidence:.0%})"
    behind = ""
    if context.in_flight and tier is Tier.STORE and candidate.action is not DeadlineAction.FINISH_IN_FLIGHT:
        behind = "" if candidate.abandons else f", behind {format_bytes(context.in_flight.left_bytes)} still in flight"
    needs = "no end" if math.isinf(candidate.ends_s) else format_duration(candidate.ends_s)
    verb = "finishing" if candidate.action is DeadlineAction.FINISH_IN_FLIGHT else "saving"
    return f"{verb} step {candidate.step} sends {format_bytes(candidate.send_bytes)} to {tier.value} at {rate}{behind}: {needs}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 or share == 0 else "less than 1 %"
