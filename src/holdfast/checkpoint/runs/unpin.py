"""Pins that nobody takes back: a fork, or a run with a base, that was deleted by hand instead of removed.

A pin counts while its target cannot be seen, since an absent target may be a folder on another machine. So where the target is gone
for good only a person can say so, and the source keeps the bytes until then. Here the target is looked at once more before a pin
goes; what the pin alone protected is deleted by the source's next sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.retain import StoreOpener
from holdfast.checkpoint.runs.inspect import read_run
from holdfast.checkpoint.runs.pins import read_pin
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, RunConflict, UsageError
from holdfast.store.base import Store

__all__ = ["PinLine", "PinState", "list_pins", "refuse_needed", "select_pins", "unpin"]

PinState = Literal["in use", "released", "no target", "unknown", "altered"]
"""`released`: the target is there and refers to this pin no more; `no target`: there is no run at its URL; `unknown`: the target
cannot be read now; `altered`: the pin itself does not verify, and stops every sweep."""
_FREE: frozenset[PinState] = frozenset({"released", "no target"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PinLine:
    """One pin. `age_s` is that of the checkpoint that it keeps (a pin is never older); it and the rest are empty where the pin does
    not verify. `detail` says why the state is what it is, where that needs words."""

    pin: str
    target: str
    checkpoint: str
    step: int | None
    age_s: float | None
    state: PinState
    detail: str


def list_pins(store: Store, *, open_home: StoreOpener, clock: Clock) -> tuple[PinLine, ...]:
    """Every pin in this run, each with what its target says now. Raises UsageError where there is no run, and what the store
    raises."""
    keys = [entry.key for entry in store.list("pins/")]
    if not keys:
        read_run(store)
    lines = (_line(store, key, open_home, clock.unix_s()) for key in keys)
    return tuple(line for line in lines if line is not None)


def select_pins(lines: Sequence[PinLine], target: str, *, url: str) -> list[PinLine]:
    """The pins of one target, named by its URL in the one spelling; or the one pin of that name. Raises UsageError for none."""
    chosen = [line for line in lines if target in (line.target, line.pin)]
    if not chosen:
        there = ", ".join(sorted({line.target or line.pin for line in lines})) or "nobody"
        raise UsageError(f"{url}: {target} has no pin here; there are pins of {there}")
    return chosen


def unpin(
    store: Store, target: str, *, open_home: StoreOpener, clock: Clock, force: bool = False
) -> tuple[PinLine, ...]:
    """Remove the pins of `target` (as in `select_pins`) and return them.

    Refused (RunConflict), with nothing removed, unless every one of them is found to be released or without a target; `force`
    removes them all the same: a target that still refers to this run then loses what it borrowed.
    """
    chosen = select_pins(list_pins(store, open_home=open_home, clock=clock), target, url=store.url)
    if not force:
        refuse_needed(chosen, url=store.url)
    for line in chosen:
        store.delete(line.pin)
    return tuple(chosen)


def refuse_needed(lines: Sequence[PinLine], *, url: str) -> None:
    """Raises RunConflict for a pin that is, or may be, needed."""
    for line in lines:
        if line.state not in _FREE:
            raise RunConflict(f"{url}/{line.pin}: {_refusal(line)}")


def _refusal(line: PinLine) -> str:
    if line.state == "in use":
        return (
            f"{line.target} still refers to the checkpoint of step {line.step}. Remove that run with `holdfast checkpoints rm` "
            "instead; or insist with --force, and it loses what it borrowed"
        )
    if line.state == "altered":
        return f"the pin does not verify, so it is not known who needs it ({line.detail}). If nobody does, remove it with --force"
    return f"whether {line.target} still needs it is not known ({line.detail}). Try again; or, if it does not, insist with --force"


def _line(store: Store, key: str, open_home: StoreOpener, now_s: float) -> PinLine | None:
    try:
        pin = read_pin(store, key)
    except NotFound:
        return None
    except IntegrityError as error:
        return PinLine(pin=key, target="", checkpoint="", step=None, age_s=None, state="altered", detail=str(error))
    state, detail = _judge(pin.target, key, open_home)
    ref = pin.checkpoint
    return PinLine(
        pin=key, target=pin.target, checkpoint=ref.name, step=ref.step, age_s=max(0.0, now_s - ref.unix_s), state=state,
        detail=detail,
    )  # fmt: skip


def _judge(target: str, key: str, open_home: StoreOpener) -> tuple[PinState, str]:
    """Invariant: a run names a pin in its head before the pin is put, and never again once it has stopped naming it."""
    try:
        truth = read_truth(open_home(target))
    except HoldfastError as error:
        return "unknown", str(error)
    if truth.altered:
        return "unknown", truth.altered[0]
    if truth.head is None:
        return (
            "no target",
            "no run is there; a folder of another machine, or a disk that is not mounted, looks like this too",
        )
    name = key.removeprefix("pins/").removesuffix(".json")
    return ("in use", "") if any(pin.name == name for pin in truth.head.pins) else ("released", "")
