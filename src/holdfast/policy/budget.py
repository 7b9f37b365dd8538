"""Money and machines are counted before they are spent: may this be launched, for how long, and may what runs go on?

    grant(state, limits, ask) ──→ Granted (perhaps a shorter lifetime) | Refused (and what would be needed)
    renew(state, limits, launch, used_s) ──→ Renewed | Kept | StopNow
    seen, metered, ended, absent, recall ──→ state       what has been found out

**The rule.** Σ over all launches of ceiling price x enforced lifetime, with boot, final checkpoint, stop, disks and addresses,
never exceeds the cap. A launch whose outcome is unknown stays reserved. What has ended counts as what it has cost, and of what runs
the part whose cost is known counts as that cost, so that no dollar is held back that cannot be spent any more.

**Killed at any point.** A decision is a grant in the store before it is acted on. Whoever starts again with an older state, or with
none, puts every grant that the store holds back in (`recall`), and what it finds of machines. Grants name whole lifetimes, so the
longest one that was written holds, in whatever order they are read. To ask twice for the same launch gives the same grant. An old
state has forgotten what was spent for less than the ceiling, and holds it back: look at what runs before the first `renew`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from holdfast.core.config import format_duration
from holdfast.core.errors import UsageError
from holdfast.policy.budget_facts import (
    FOREVER_S,
    HOUR_S,
    BudgetLimits,
    BudgetState,
    Grant,
    LaunchAsk,
    LaunchRecord,
)

__all__ = [
    "Granted",
    "Kept",
    "Refused",
    "Renewed",
    "StopNow",
    "absent",
    "ended",
    "free_microusd",
    "grant",
    "metered",
    "recall",
    "renew",
    "seen",
    "standing",
]


@dataclass(frozen=True, slots=True)
class Granted:
    """Write this grant into the store, then launch."""

    grant: Grant
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Do not launch."""

    needs_microusd: int
    """By how much the budget would have to be larger; 0: it is not the budget."""
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Renewed:
    """Write this grant into the store; the machine goes on."""

    grant: Grant
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """The grant stands as it is."""

    left_s: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopNow:
    """The edge: final checkpoint, then stop. What that costs is reserved."""

    reasons: tuple[str, ...]


Launching: TypeAlias = Granted | Refused
Running: TypeAlias = Renewed | Kept | StopNow


def grant(state: BudgetState, limits: BudgetLimits, ask: LaunchAsk) -> tuple[BudgetState, Launching]:
    """May this be launched? What is granted is reserved in the state that comes back."""
    known = state.of(ask.launch)
    if known is not None:
        if known.grant.ask != ask:
            raise UsageError(
                f"launch {ask.launch} has been granted with other figures; a new request needs a new number"
            )
        if not known.is_open:
            return state, Refused(0, (f"launch {ask.launch} is over; a new one needs a new number",))
        return state, Granted(known.grant, (f"launch {ask.launch} had been granted this before",))
    reasons = _not_allowed(state, limits, ask)
    if reasons:
        return state, Refused(0, reasons)
    wants_s = max(ask.least_s, limits.slice_s) if ask.wants_s is None else ask.wants_s
    free = free_microusd(state, limits)
    lifetime_s = wants_s if free is None else min(wants_s, ask.longest_s(free))
    if lifetime_s < ask.least_s:
        return state, _too_dear(state, limits, ask)
    granted = Grant(ask=ask, lifetime_s=lifetime_s)
    told = f"{format_duration(lifetime_s)} at {_dollars(ask.microusd_h)} an hour at most reserve {_of(granted)}"
    shorter = [] if lifetime_s == wants_s else [f"not {format_duration(wants_s)}: the budget allows no more"]
    after = state.with_record(LaunchRecord(grant=granted))
    return after, Granted(granted, (told, *shorter, standing(after, limits)))


def renew(state: BudgetState, limits: BudgetLimits, launch: int, used_s: int) -> tuple[BudgetState, Running]:
    """May what runs go on? `used_s` is how much of its lifetime the machine has used, by its own timer, or more.

    A lifetime is renewed to a slice from now once less than half of a slice is left, as far as there is money. It never becomes
    shorter: what was granted is the machine's.
    """
    record = _open_record(state, launch)
    granted, ask = record.grant, record.grant.ask
    left_s = granted.lifetime_s - used_s
    over = -(free_microusd(state, limits) or 0)
    if over > 0:
        # By what nobody granted: a smaller cap than before, a bill above the ceiling, a machine that was thought to be absent.
        why = f"more than the budget is spent and reserved: {_dollars(over)} too much"
        return state, StopNow((why, standing(state, limits)))
    if limits.max_microusd_h is not None and ask.machine_microusd_h > limits.max_microusd_h:
        price, most = _dollars(ask.machine_microusd_h), _dollars(limits.max_microusd_h)
        return state, StopNow((f"a machine may cost {price} an hour here, which is more than max_price, {most}",))
    if 2 * left_s >= limits.slice_s:
        return state, Kept(left_s, (f"{format_duration(left_s)} are left of the grant",))
    wants_s = max(0, used_s) + limits.slice_s
    lifetime_s = min(wants_s, _longest_s(record, free_microusd(state, limits)))
    if lifetime_s > granted.lifetime_s:
        longer = replace(granted, lifetime_s=lifetime_s)
        after = state.with_record(replace(record, grant=longer))
        full = [] if lifetime_s == wants_s else ["the last renewal: the budget allows no more"]
        told = f"{format_duration(lifetime_s - used_s)} from now, which reserve {_of(longer)} in all"
        return after, Renewed(longer, (told, *full, standing(after, limits)))
    why = "the budget is used up: the grant is not renewed"
    if left_s <= 0:
        return state, StopNow((why, standing(state, limits)))
    return state, Kept(left_s, (f"{why}, and ends in {format_duration(left_s)}", standing(state, limits)))


def seen(state: BudgetState, launch: int) -> BudgetState:
    """A machine of this launch is there. If it was thought to be absent or over, all that it can cost is reserved again."""
    record = _record(state, launch)
    return state.with_record(replace(record, seen=True, final_microusd=None))


def metered(state: BudgetState, launch: int, billed_s: int, microusd: int) -> BudgetState:
    """So much of the billed time has cost so much, as prices and the provider say. Older figures than those that are known are
    passed over."""
    record = _open_record(state, launch)
    if billed_s <= record.metered_s:
        return state
    return state.with_record(replace(record, metered_s=billed_s, metered_microusd=microusd))


def ended(state: BudgetState, launch: int, microusd: int | None = None) -> BudgetState:
    """No machine of it is left. Without a figure it counts as the most that it can have cost, until one comes."""
    record = _record(state, launch)
    if microusd is None and record.final_microusd is not None:
        return state
    final = record.reserved_microusd if microusd is None else microusd
    return state.with_record(replace(record, final_microusd=final))


def absent(state: BudgetState, launch: int) -> BudgetState:
    """There never was a machine, and there will be none: the request was refused, or its token can start nothing any more.

    A list that does not show it is no evidence before the provider's window has passed.
    """
    record = _record(state, launch)
    if record.seen:
        raise UsageError(f"a machine of launch {launch} has been seen: say what it has cost when it has ended")
    return state.with_record(replace(record, final_microusd=0))


def recall(state: BudgetState, granted: Grant) -> BudgetState:
    """Put back in what the store holds: the longest lifetime that was written for a launch is what it may use."""
    known = state.of(granted.ask.launch)
    if known is None:
        return state.with_record(LaunchRecord(grant=granted))
    if granted.lifetime_s <= known.grant.lifetime_s:
        return state
    return state.with_record(replace(known, grant=granted))


def free_microusd(state: BudgetState, limits: BudgetLimits) -> int | None:
    """What may still be reserved; below zero where the cap is broken; None without a cap."""
    return None if limits.cap_microusd is None else limits.cap_microusd - state.reserved_microusd


def standing(state: BudgetState, limits: BudgetLimits) -> str:
    """In one line: what is spent and reserved, by how many."""
    spent = sum(record.final_microusd or 0 for record in state.launches)
    held = sum(record.reserved_microusd for record in state.launches if record.is_open)
    unknown = sum(record.is_open and not record.seen for record in state.launches)
    asked = f", {unknown} of them not seen yet" if unknown else ""
    count = sum(record.is_open for record in state.launches)
    launches = "1 launch" if count == 1 else f"{count} launches"
    cap = "no budget" if limits.cap_microusd is None else f"the budget is {_dollars(limits.cap_microusd)}"
    return f"{cap}; spent {_dollars(spent)}, reserved {_dollars(held)} for {launches}{asked}"


def _not_allowed(state: BudgetState, limits: BudgetLimits, ask: LaunchAsk) -> tuple[str, ...]:
    """Everything that is against it, money aside."""
    reasons: list[str] = []
    if limits.max_microusd_h is not None and ask.machine_microusd_h > limits.max_microusd_h:
        price, most = _dollars(ask.machine_microusd_h), _dollars(limits.max_microusd_h)
        reasons.append(f"a machine may cost {price} an hour there, which is more than max_price, {most}")
    if limits.max_nodes is not None and state.nodes + ask.nodes > limits.max_nodes:
        reasons.append(
            f"{ask.nodes} machines more than the {state.nodes} that run or may run: the node cap is {limits.max_nodes}"
        )
    caps = dict(limits.quotas)
    for name, units in ask.uses:
        if name in caps and state.used(name) + units > caps[name]:
            reasons.append(f"quota {name}: {state.used(name)} of {caps[name]} are in use, and {units} are needed")
    return tuple(reasons)


def _too_dear(state: BudgetState, limits: BudgetLimits, ask: LaunchAsk) -> Refused:
    worst = ask.worst_microusd(ask.billed_s(ask.least_s))
    needs = worst - (free_microusd(state, limits) or 0)
    least = f"{format_duration(ask.least_s)} at {_dollars(ask.microusd_h)} an hour, boot and final checkpoint included"
    return Refused(
        needs,
        (
            f"the least that is of use, {least}, can cost {_dollars(worst)}",
            f"the budget would have to be {_dollars(needs)} larger",
            standing(state, limits),
        ),
    )


def _longest_s(record: LaunchRecord, free: int | None) -> int:
    """The longest lifetime of a launch that has a grant already, if it may reserve so much more."""
    if free is None:
        return FOREVER_S
    ask, may = record.grant.ask, record.reserved_microusd + free
    unknown = ask.longest_s(may)
    if not record.metered_s or not ask.microusd_h:
        return unknown
    rest_s = (may - record.metered_microusd) * HOUR_S // ask.microusd_h
    known = record.metered_s + rest_s - ask.outside_s - ask.grace_s
    above = record.metered_microusd > ask.worst_microusd(record.metered_s)
    return known if above else max(known, unknown)


def _record(state: BudgetState, launch: int) -> LaunchRecord:
    record = state.of(launch)
    if record is None:
        raise UsageError(f"launch {launch} has no grant; what has none must not run")
    return record


def _open_record(state: BudgetState, launch: int) -> LaunchRecord:
    record = _record(state, launch)
    if not record.is_open:
        raise UsageError(f"launch {launch} is over")
    return record


def _of(granted: Grant) -> str:
    return _dollars(granted.ask.worst_microusd(granted.ask.billed_s(granted.lifetime_s)))


def _dollars(microusd: int) -> str:
    return f"${microusd / 1e6:,.4f}"
