"""A base: another run whose unchanged tensors are referred to and not sent again. Nothing is loaded from it.

    claimed → (does the newest checkpoint here refer to the base already? then nothing is to be done)
    → choose a checkpoint of the base → pin it in every run that its bytes lie in (pins.py) → the base still retains it?
    → its chunks are known: the next save sends what differs

A pin that no retained checkpoint here refers to is released by the next save, like a fork's; until then its chunks may be referred
to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head, Part, Pin, PinnedBy
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.read import CheckpointReader, open_checkpoint
from holdfast.checkpoint.retain import Roots, StoreOpener, needed_pins, read_root
from holdfast.checkpoint.runs.inspect import current_checkpoints, find_checkpoint, read_run
from holdfast.checkpoint.runs.pins import (
    Origin,
    confirm,
    open_origin,
    pin_key,
    put_pin,
    read_pin,
    remove_pins,
    withdraw,
)
from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    RunConflict,
    UsageError,
)
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["Adopted", "adopt_base", "relies_on"]

_TRIES = 10
"""How often another checkpoint is chosen because the base has dropped the one before meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """What a run may refer to from now on: chunks of `parts` in the objects `keys`, which are pinned, by the run they lie in.
    `home` is where the checkpoint `ref` itself lies."""

    ref: CheckpointRef
    home: str
    parts: tuple[Part, ...]
    keys: Mapping[str, frozenset[str]]


def relies_on(head: Head, roots: Roots, url: str) -> bool:
    """Whether the newest checkpoint of the current generation refers to the run at `url`. False when that cannot be read."""
    for ref in current_checkpoints(head)[-1:]:
        try:
            return url in (ref.home, *roots.get(ref).homes)
        except (IntegrityError, NotFound):
            return False
    return False


def adopt_base(
    target: Store,
    base: Store,
    step: str | int,
    lineage: Lineage,
    *,
    roots: Roots,
    open_home: StoreOpener,
    tokens: TokenSource,
    warn: Callable[[str], None],
) -> Adopted:
    """Pin a checkpoint of `base` for the run of `lineage` (`step` as in `find_checkpoint`), before its first save.

    The newest is the newest of the base's current generation whose index verifies; `warn` is told of others that were passed over.
    A checkpoint that is pinned here already, because retained ones refer to it, is taken instead of another. Raises UsageError when
    there is no such base or checkpoint (missing, empty, removed), IntegrityError when none verifies, PermissionDenied when the base
    may not be read or pinned, RunConflict when it drops its checkpoints faster than they can be pinned, Fenced, and what the stores
    raise. Nothing stays behind then, or a pin that is collected after the next claim.
    """
    try:
        held, vouched = _held(lineage.head, roots)
        if base.url in held and base.url in vouched:
            try:
                pinned = read_pin(base, pin_key(held[base.url])).checkpoint
            except NotFound:
                warn(f"{base.url}: the pin that this run put there has been removed; what it borrowed may be lost")
                del held[base.url]
            else:
                return _pinned_before(base, step, pinned, _kept(held, vouched, open_home), open_home, warn)
        for _ in range(_TRIES - 1):
            try:
                return _adopt(target, base, step, lineage, held, vouched, open_home, tokens, warn)
            except RunConflict:
                continue
        return _adopt(target, base, step, lineage, held, vouched, open_home, tokens, warn)
    except UsageError as error:
        raise UsageError(
            f"base={base.url}: {error}. Name another base, or leave base= out: then everything is sent"
        ) from error
    except PermissionDenied as error:
        raise PermissionDenied(
            f"base={base.url}: a base is read, and a pin is written there (pins/) so that its bytes are kept; that is not allowed "
            f"({error}). Allow it, or leave base= out: then everything is sent"
        ) from error


def _held(head: Head, roots: Roots) -> tuple[dict[str, Pin], set[str]]:
    """The pins that retained checkpoints may need, by home; and the homes that they certainly refer to."""
    vouched: set[str] = set()
    for ref in head.checkpoints:
        try:
            vouched |= {home for home in (ref.home, *roots.get(ref).homes) if home is not None}
        except (IntegrityError, NotFound):
            continue
    return {pin.home: pin for pin in needed_pins(head.pins, head.checkpoints, roots)}, vouched


def _pinned_before(
    base: Store,
    step: str | int,
    ref: CheckpointRef,
    kept: Mapping[str, CheckpointRef],
    open_home: StoreOpener,
    warn: Callable[[str], None],
) -> Adopted:
    if step != "latest" and str(step) not in (str(ref.step), ref.name, ref.name.rsplit("/", 1)[-1]):
        warn(
            f"checkpoints of this run still refer to step {ref.step} of {base.url}, so that one is its base, and not {step}, "
            "until they are gone"
        )
    return _adopted(ref, base.url, open_checkpoint(base, ref, open_home), kept, open_home)


def _kept(held: Mapping[str, Pin], vouched: set[str], open_home: StoreOpener) -> dict[str, CheckpointRef]:
    """By home, the checkpoint that a pin of before certainly keeps there."""
    kept = {}
    for home in held.keys() & vouched:
        try:
            kept[home] = read_pin(open_home(home), pin_key(held[home])).checkpoint
        except NotFound:
            continue
    return kept


def _adopt(
    target: Store,
    base: Store,
    step: str | int,
    lineage: Lineage,
    held: Mapping[str, Pin],
    vouched: set[str],
    open_home: StoreOpener,
    tokens: TokenSource,
    warn: Callable[[str], None],
) -> Adopted:
    origin = _choose(base, step, open_home, warn)
    before = lineage.head.pins
    mine: dict[str, Pin] = {}
    fresh: list[Pin] = []
    for home, checkpoint in origin.protect.items():
        # What lies in this run is referred to through its own checkpoints only; and there is one pin for each home.
        if home == target.url or home in held:
            continue
        left = _left_here(before, home, target.url, checkpoint, open_home)
        mine[home] = left or Pin(name=tokens(), home=home)
        if left is None:
            fresh.append(mine[home])
    pins = [*held.values(), *mine.values()]
    if {pin.name for pin in pins} != {pin.name for pin in before}:
        lineage.advance("base", lambda current: msgspec.structs.replace(current, pins=pins))
        remove_pins([pin for pin in before if pin not in pins], open_home)
    try:
        for pin in fresh:
            put_pin(open_home(pin.home), pin, target=target.url, checkpoint=origin.protect[pin.home])
        confirm(base, origin.head, origin.ref)
        kept = {**_kept(held, vouched, open_home), **{home: origin.protect[home] for home in mine}}
        return _adopted(origin.ref, origin.ref.home or base.url, origin.reader, kept, open_home)
    except HoldfastError:
        if fresh:
            withdraw(lineage, fresh, open_home)
        raise


def _left_here(
    pins: list[Pin], home: str, target: str, checkpoint: CheckpointRef, open_home: StoreOpener
) -> Pin | None:
    """A pin on this very checkpoint that an attempt before has left; the base is asked once more whether it still retains it."""
    for pin in pins:
        if pin.home == home:
            try:
                record: PinnedBy = read_pin(open_home(home), pin_key(pin))
            except (NotFound, IntegrityError):
                return None
            return pin if (record.target, record.checkpoint) == (target, checkpoint) else None
    return None


def _choose(base: Store, step: str | int, open_home: StoreOpener, warn: Callable[[str], None]) -> Origin:
    """The checkpoint that is meant; where that is the newest, one that does not verify is passed over."""
    head = read_run(base).head
    if head.removed:
        raise UsageError(f"{base.url}: this run has been removed")
    candidates = [find_checkpoint(head, step, url=base.url)]
    if step == "latest":
        candidates = current_checkpoints(head)[::-1]
    problems = []
    for ref in candidates:
        try:
            return open_origin(base, head, ref, open_home)
        except (IntegrityError, NotFound) as error:
            confirm(base, head, ref)
            problems.append(f"step {ref.step}: {error}")
            warn(f"{base.url}: the checkpoint of step {ref.step} does not verify and is no base: {error}")
    raise IntegrityError(f"{base.url}: no checkpoint of it verifies, so it can be no base:\n  " + "\n  ".join(problems))


def _adopted(
    ref: CheckpointRef,
    home: str,
    reader: CheckpointReader,
    kept: Mapping[str, CheckpointRef],
    open_home: StoreOpener,
) -> Adopted:
    """Invariant: whatever its history is, a pin keeps exactly the objects that its checkpoint reaches."""
    keys = {
        name: frozenset(read_root(open_home(name), kept[name]).objects)
        for name in {home, *reader.root.homes} & kept.keys()
    }
    return Adopted(ref=ref, home=home, parts=reader.parts, keys=keys)
