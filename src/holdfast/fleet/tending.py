"""What one launch needs now, by where it stands: an answer, a longer grant, an end, its entry in the books."""

from __future__ import annotations

from typing import Literal

from holdfast.fleet.instructions import Book, CallCreate, Close, End, Give, Instruction, Over, Tell
from holdfast.fleet.money import as_grant, ask_for, budget_of, grant_left_s, limits_for, owed, used_s
from holdfast.fleet.phases import Phase, is_absent, is_superseded, phase_of
from holdfast.fleet.terms import Terms
from holdfast.fleet.view import LaunchView, RunView
from holdfast.policy import budget
from holdfast.policy.budget import Granted, Renewed, StopNow
from holdfast.provider.base import Machine

__all__ = ["dismiss", "tell", "tend"]

_ASK_AGAIN_S = 5
_OTHERS_S = 60
"""Whoever has written an intent is left so long to carry it out."""
_TOO_OLD_S = 900
"""An intent that nobody has carried out by then never will be: prices and plans have moved on."""
_HEARS_S = 60
"""A machine reads its commands at least this often."""


def tend(view: RunView, launch: LaunchView, terms: Terms, now_s: int, *, ending: bool) -> list[Instruction]:
    """`ending`: the run is over, and nothing is begun or lengthened any more."""
    phase = phase_of(launch)
    if phase is Phase.OVER:
        return [
            _end(launch, each, "nobody waits for this machine") for each in launch.evidence.machines if _is_there(each)
        ]
    if phase is Phase.ASKED:
        return [] if ending else _asked(view, launch, terms, now_s)
    strays = [_end(launch, each, "nobody waits for this machine") for each in launch.strays if each.state != "ending"]
    if phase is Phase.REFUSED:
        return [*strays, *_refused(view, launch, terms)]
    return [*strays, *_with_machine(view, launch, terms, now_s, phase, ending=ending)]


def dismiss(launch: LaunchView, ending: Over, *, hard: bool) -> list[Instruction]:
    """The run ends: what a live launch is told, once."""
    phase = phase_of(launch)
    if phase is Phase.ASKED:
        return [Close(launch=launch.launch, outcome="void", detail=f"the run ends: {ending.outcome}")]
    if phase in (Phase.REFUSED, Phase.OVER, Phase.LEAVING):
        return []
    if hard:
        return [_end(launch, _named(launch), f"the run ends: {ending.outcome}")]
    return [
        *tell(
            launch, "stop" if phase is Phase.WORKING else "home", (f"the run ends: {ending.outcome}", *ending.reasons)
        )
    ]


# ---- before there is a machine


def _asked(view: RunView, launch: LaunchView, terms: Terms, now_s: int) -> list[Instruction]:
    intent = launch.intent
    if intent is None:
        return []
    if launch.evidence.machines:
        first = min(launch.evidence.machines, key=lambda each: (each.state == "gone", each.created_unix_s, each.id))
        return [
            Close(
                launch=launch.launch, outcome="machine", machine=first.id, pool=first.pool, microusd_h=first.microusd_h
            )
        ]
    age_s = now_s - int(intent.created_unix_s)
    if age_s > _TOO_OLD_S:
        proven = is_absent(view, launch, terms, intent.created_unix_s + _TOO_OLD_S)
        return (
            [Close(launch=launch.launch, outcome="void", detail="nobody has carried it out in time")] if proven else []
        )
    if not launch.won and age_s < _OTHERS_S:
        return []
    if given := _give_owed(view, launch):
        return given
    if not launch.grants:
        ask = ask_for(launch.launch, intent.allowed, terms)
        _, decision = budget.grant(budget_of(view), limits_for(ask, terms), ask)
        if isinstance(decision, Granted):
            return [Give(part=0, grant=decision.grant, reasons=decision.reasons)]
        return [Close(launch=launch.launch, outcome="void", detail="; ".join(decision.reasons))]
    honours = terms.guarantees.honours_tokens
    if launch.called_s is None:
        return [CallCreate(launch=launch.launch, again=not launch.won)] if launch.won or honours else []
    if honours and now_s - launch.called_s >= _ASK_AGAIN_S:
        return [CallCreate(launch=launch.launch, again=True)]
    if not honours and is_absent(view, launch, terms, launch.called_s):
        return [Close(launch=launch.launch, outcome="void", detail="its answer was lost, and no machine has come")]
    return []


def _refused(view: RunView, launch: LaunchView, terms: Terms) -> list[Instruction]:
    assert launch.answer is not None
    machines = launch.evidence.machines
    if launch.answer.outcome == "failed" and not machines:
        return [Book(launch=launch.launch, machines=(), why="never")]
    if machines and all(each.state == "gone" for each in machines):
        return [Book(launch=launch.launch, machines=machines, why="failed")]
    # What was asked for while it was given up may come as late as a call can hang, and is then seen within the window.
    since_s = launch.answer.at_unix_s + (0 if launch.called_s is None and launch.won else _OTHERS_S)
    if is_absent(view, launch, terms, since_s):
        return [Book(launch=launch.launch, machines=machines, why="failed" if machines else "never")]
    return []


# ---- with a machine


def _with_machine(
    view: RunView, launch: LaunchView, terms: Terms, now_s: int, phase: Phase, *, ending: bool
) -> list[Instruction]:
    assert launch.answer is not None
    machine = launch.machine
    if (machine is not None and machine.state == "gone") or is_absent(view, launch, terms, launch.answer.at_unix_s):
        if any(_is_there(each) for each in launch.strays):
            return []  # its bill is not complete
        return [Book(launch=launch.launch, machines=launch.evidence.machines, why=_why(launch, phase))]
    why = _why_end(view, launch, terms, now_s, phase)
    if why is not None:
        return [_end(launch, _named(launch), why)] if machine is None or machine.state != "ending" else []
    if ending or phase is Phase.LEAVING:
        return []
    return _renew(view, launch, terms, now_s, phase)


def _why(launch: LaunchView, phase: Phase) -> Literal["preempted", "released", "stopped", "failed"]:
    by_provider = launch.machine is not None and launch.machine.ended_by == "provider"
    if by_provider or (launch.notice is not None and launch.claimed is not None and not launch.told("stop")):
        return "preempted"
    if launch.told("stop") or launch.told("home"):
        return "stopped"
    if phase is Phase.LEAVING:
        return "released"
    return "failed" if launch.claimed is None else "preempted"


def _why_end(view: RunView, launch: LaunchView, terms: Terms, now_s: int, phase: Phase) -> str | None:
    """Why the provider is asked to end it, if it has not ended by itself in time."""
    if is_superseded(view, launch):
        return "its successor has taken over"
    if launch.machine is not None and launch.machine.ended_by is not None:
        return "it has shut down, and is billed all the same"
    if grant_left_s(launch, now_s) + terms.guarantees.list_delay_s < 0:
        return "its grant is over"
    released = launch.released
    if released is not None and now_s > launch.heard_s(released) + terms.guarantees.stop_s:
        return "it has released, and has not ended"
    last = max((command.at_unix_s for command in launch.commands), default=None)
    if last is not None and now_s > last + _HEARS_S + terms.grace_s:
        return "it was told to end, and has not"
    if phase is Phase.COMING and used_s(launch, now_s) > terms.claim_limit_s:
        return f"it has not begun to work within {terms.claim_limit_s} s"
    return None


def _renew(view: RunView, launch: LaunchView, terms: Terms, now_s: int, phase: Phase) -> list[Instruction]:
    if given := _give_owed(view, launch):
        return given
    if not launch.grants:
        return [_end(launch, _named(launch), "it has no grant")]
    limits = limits_for(as_grant(launch.grants[0]).ask, terms)
    _, decision = budget.renew(budget_of(view), limits, launch.launch, used_s(launch, now_s))
    if isinstance(decision, Renewed):
        return [Give(part=max(each.part for each in launch.grants) + 1, grant=decision.grant, reasons=decision.reasons)]
    if isinstance(decision, StopNow):
        return [*tell(launch, "stop" if phase is Phase.WORKING else "home", decision.reasons)]
    return []


def _give_owed(view: RunView, launch: LaunchView) -> list[Instruction]:
    record = owed(view, launch)
    if record is None:
        return []
    return [Give(part=record.part, grant=as_grant(record), reasons=("it was set aside, and not given yet",))]


def tell(launch: LaunchView, kind: Literal["stop", "home"], reasons: tuple[str, ...]) -> tuple[Instruction, ...]:
    """A command, unless it has been given."""
    if launch.told(kind):
        return ()
    part = max((command.part for command in launch.commands), default=-1) + 1
    return (Tell(launch=launch.launch, part=part, kind=kind, reasons=reasons),)


def _named(launch: LaunchView) -> Machine | str:
    if launch.machine is not None:
        return launch.machine
    assert launch.answer is not None
    assert launch.answer.machine is not None
    return launch.answer.machine


def _end(launch: LaunchView, machine: Machine | str, why: str) -> End:
    return End(launch=launch.launch, machine=machine, reasons=(why,))


def _is_there(machine: Machine) -> bool:
    return machine.state in ("pending", "running")
