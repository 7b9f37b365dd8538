"""Pins: how a run that refers to another one's bytes keeps them from being swept. Forks and runs with a base go this way.

    the referring run's head names its pins (the intent) → pins are put into every run that the bytes lie in
    → the origin's truth still retains the checkpoint? → only now a checkpoint of the referring run may need them

A sweeper lists pins after its condemnation is confirmed and before it deletes, so either it sees the pin, or whoever refers sees
that the checkpoint is gone and withdraws. A pin counts only while the referring run's newest head names it: whatever a crash
leaves behind is collected after that run's next claim.

Invariant: a head names at most one pin for each home, so that a pin found there protects all that is borrowed from that home.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head, Pin, PinnedBy
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import CheckpointReader, open_checkpoint
from holdfast.checkpoint.retain import StoreOpener
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, RunConflict, StoreError
from holdfast.core.sealed import FORMAT_VERSION, MAX_RECORD_BYTES, seal, unseal
from holdfast.store.base import Store

__all__ = [
    "Origin",
    "are_out_of_reach",
    "confirm",
    "open_origin",
    "pin_key",
    "put_pin",
    "read_pin",
    "remove_pins",
    "withdraw",
]

_LOCAL_SCHEMES = ("file", "memory")


@dataclass(frozen=True, slots=True)
class Origin:
    """What is referred to: the checkpoint as the origin's head names it, and the runs its bytes lie in, each with the checkpoint
    there that must be protected."""

    store: Store
    head: Head
    ref: CheckpointRef
    reader: CheckpointReader
    protect: Mapping[str, CheckpointRef]


def are_out_of_reach(source: str, target: str) -> bool:
    """Whether one of the two is a folder that the other's machines do not see: the source could not ask what is still needed."""
    kinds = [url.split("://", 1)[0] for url in (source, target)]
    return kinds[0] != kinds[1] and any(kind in _LOCAL_SCHEMES for kind in kinds)


def open_origin(source: Store, head: Head, ref: CheckpointRef, open_home: StoreOpener) -> Origin:
    """Read and verify the checkpoint's index, and find out where its bytes lie.

    Raises RunConflict when the source has dropped it meanwhile, IntegrityError or NotFound when it is damaged.
    """
    try:
        reader = open_checkpoint(source, ref, open_home)
        protect = {
            # Where the source itself only borrows, its own pin says which checkpoint there holds the bytes.
            home: ref if home == source.url else _pinned_there(head, home, open_home)
            for home in dict.fromkeys([ref.home or source.url, *reader.root.homes])
        }
    except NotFound:
        confirm(source, head, ref)
        raise
    return Origin(source, head, ref, reader, protect)


def _pinned_there(head: Head, home: str, open_home: StoreOpener) -> CheckpointRef:
    for pin in head.pins:
        if pin.home == home:
            return read_pin(open_home(home), pin_key(pin)).checkpoint
    raise IntegrityError(
        f"the source refers to objects in {home}, but its head names no pin there; they may be gone already"
    )


def pin_key(pin: Pin) -> str:
    return f"pins/{pin.name}.json"


def read_pin(home: Store, key: str) -> PinnedBy:
    """Raises NotFound, and IntegrityError when it is not what was written."""
    return unseal(home.get(key, max_bytes=MAX_RECORD_BYTES), PinnedBy, what=f"{home.url}/{key}")


def put_pin(home: Store, pin: Pin, *, target: str, checkpoint: CheckpointRef) -> None:
    """Protect `checkpoint` for `target`, whose newest head already names the pin. Raises what the store raises."""
    key = pin_key(pin)
    data = seal(PinnedBy(format=FORMAT_VERSION, target=target, checkpoint=checkpoint))
    if not home.put_new(key, data) and home.get(key, max_bytes=MAX_RECORD_BYTES) != data:
        raise RunConflict(f"{home.url}/{key}: another run holds this name; try again")


def confirm(source: Store, head: Head, ref: CheckpointRef) -> None:
    """The pins are in place; only a checkpoint that the source retains *now* is protected by them. Raises RunConflict."""
    newest = read_truth(source, head.run_id).head
    if newest is None or newest.removed or all(other.name != ref.name for other in newest.checkpoints):
        raise RunConflict(
            f"{source.url}: the checkpoint of step {ref.step} was dropped while this run was being made to refer to it; "
            "choose a newer one"
        )


def withdraw(lineage: Lineage, pins: Iterable[Pin], open_home: StoreOpener) -> None:
    """Nothing came of it. What this cannot take back now is collected after the referring run's next claim."""
    names = {pin.name for pin in pins}
    try:
        lineage.advance(
            "withdraw",
            lambda current: msgspec.structs.replace(
                current, pins=[pin for pin in current.pins if pin.name not in names]
            ),
        )
    except HoldfastError:
        return
    remove_pins(pins, open_home)


def remove_pins(pins: Iterable[Pin], open_home: StoreOpener) -> None:
    """Only after a confirmed head has stopped naming them. One that stays is stale, and the next sweep there removes it."""
    for pin in pins:
        try:
            open_home(pin.home).delete(pin_key(pin))
        except StoreError:
            continue
