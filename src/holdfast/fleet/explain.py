"""Why a run stands where it stands, and what a controller would do for it now: the code that decides is asked, and that is all.

records, prices, list, bills (all only read) → RunView → state.instruct → instructions in words, and what is waited for
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.errors import HoldfastError
from holdfast.core.ids import TokenSource
from holdfast.core.jobfile import parse_job
from holdfast.fleet.instructions import Book, CallCreate, Close, End, Give, Instruction, Over, Propose, Tell
from holdfast.fleet.mandate import Mandate, terms_of, wanted_of
from holdfast.fleet.phases import Phase, phase_of
from holdfast.fleet.records import RunRecords
from holdfast.fleet.state import instruct
from holdfast.fleet.view import Listed, Metered, Offered, RunView, see
from holdfast.provider.base import Instances, Machine
from holdfast.store.base import Store

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """For people."""

    launched: tuple[tuple[int, tuple[str, ...]], ...]
    """Each launch, and why it was made."""
    known: tuple[str, ...]
    """What the rest is concluded from."""
    would: tuple[tuple[str, tuple[str, ...]], ...]
    """What a controller would do now, and why; empty: it waits."""
    because: tuple[str, ...]
    """What is waited for, or why something is done."""
    wait_s: int | None
    """Until it looks anew, where a moment is known."""
    problem: str | None
    """Why what would be done is not known."""


def explain(
    mandate: Mandate, store: Store, open_provider: Callable[[], Instances], *, clock: Clock, tokens: TokenSource
) -> Explanation:
    """Nothing is written, launched or ended. Raises what reading records raises; a provider that cannot be asked is a part of the
    answer."""
    records, view = RunRecords(store, clock=clock, tokens=tokens), RunView()
    for event in records.read():
        view = see(view, event)
    launched = tuple((launch.launch, launch.intent.reasons) for launch in view.launches if launch.intent is not None)
    known = [f"{len(view.launches)} launches in the records"]
    known += [f"not believed: {problem}" for problem in records.altered.values()]
    try:
        provider = open_provider()
        terms = terms_of(mandate, store.url, provider, slice_s=_slice_s(view))
        for seen in _looked(view, provider, mandate, known):
            view = see(view, seen)
        now_s = int(provider.clock.unix_s())
        _, instructions, outlook = instruct(view, terms, now_s)
    except HoldfastError as error:
        return Explanation(
            launched=launched,
            known=tuple(known),
            would=(),
            because=(),
            wait_s=None,
            problem=f"{mandate.provider}: {error}",
        )
    return Explanation(
        launched=launched, known=tuple(known), would=tuple(_in_words(each) for each in instructions),
        because=outlook.reasons, wait_s=None if outlook.until_s is None else max(0, outlook.until_s - now_s), problem=None,
    )  # fmt: skip


def _slice_s(view: RunView) -> int | None:
    """That of the controller which was here last: it stands in no record but the grants. None: the usual one."""
    first = [record.lifetime_s for launch in view.launches for record in launch.grants if record.part == 0]
    return first[-1] if first else None


def _looked(
    view: RunView, provider: Instances, mandate: Mandate, known: list[str]
) -> Iterator[Listed | Offered | Metered]:
    """As a controller looks. Without a list nothing counts as gone; without prices nothing is launched."""
    asked_s = int(provider.clock.unix_s())
    try:
        machines = provider.machines(mandate.fleet, mandate.run_id)
    except HoldfastError as error:
        known.append(f"the list of machines could not be had: {error}")
    else:
        there = [each for each in machines if each.state != "gone"]
        shown = ", ".join(f"{each.id} of launch {each.launch} is {each.state}" for each in there)
        known.append(f"{provider.name} lists {len(there)} machines of it{': ' if there else ''}{shown}")
        yield Listed(asked_s, tuple(machines))
        yield from _metered(view, provider, machines)
    offers = provider.offers(wanted_of(parse_job(mandate.job_text)))
    known.append(f"{provider.name} offers {len(offers)} pools that fit")
    yield Offered(asked_s, tuple(offers))


def _metered(view: RunView, provider: Instances, machines: list[Machine]) -> Iterator[Metered]:
    for machine in machines:
        if (
            phase_of(view.of(machine.launch)) is Phase.OVER
            or sum(each.launch == machine.launch for each in machines) != 1
        ):
            continue
        try:
            bill = provider.bill(machine)
        except HoldfastError:
            continue
        yield Metered(machine.launch, bill.billed_s, bill.microusd)


def _in_words(instruction: Instruction) -> tuple[str, tuple[str, ...]]:
    match instruction:
        case Propose(launch=launch, allowed=allowed, predecessor=predecessor):
            place = allowed[0].pool.name + (f", or one of {len(allowed) - 1} others" if len(allowed) > 1 else "")
            after = "" if predecessor is None else f", to stand by for launch {predecessor}"
            return f"launch {launch} in {place}{after}", instruction.reasons
        case Give(grant=grant):
            return f"let launch {grant.ask.launch} work for {format_duration(grant.lifetime_s)}", instruction.reasons
        case CallCreate(launch=launch, again=again):
            return f"ask for launch {launch}'s machine{' again, with the same token' if again else ''}", ()
        case Close(launch=launch, outcome=outcome, machine=machine, detail=detail):
            what = f"take {machine} for launch {launch}'s" if outcome == "machine" else f"give launch {launch} up"
            return what, (detail,) if detail else ()
        case Tell(launch=launch, kind=kind):
            what = "save and stop" if kind == "stop" else "go home"
            return f"tell launch {launch} to {what}", instruction.reasons
        case End(launch=launch, machine=machine):
            name = machine.id if isinstance(machine, Machine) else machine
            return f"end {name} of launch {launch}", instruction.reasons
        case Book(launch=launch, why=why):
            return f"book launch {launch}: {why}", ()
        case Over(outcome=outcome):
            return f"leave: {outcome}", instruction.reasons
