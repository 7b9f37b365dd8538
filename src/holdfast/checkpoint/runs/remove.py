"""Removing a whole run, so that it stays removed.

    tombstone head → pins looked at once more → objects → older heads

The tombstone is put first and is never deleted: a late put or a machine thought dead finds it as the truth, and a removal that
was cut short goes on from it. The objects are listed, then the truth is read once more, then they are deleted: a run that somebody
begins anew at this URL puts its head before its first object, so none of its objects can be among them. What other runs have pinned
is kept unless the caller insists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import Head, Pin, head_key
from holdfast.checkpoint.heads import Lineage, head_numbers, read_truth
from holdfast.checkpoint.retain import Pinned, StoreOpener, pinned_keys
from holdfast.checkpoint.runs.inspect import list_forks, read_run
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, RunConflict, StoreError
from holdfast.core.ids import TokenSource
from holdfast.store.base import Entry, Store

__all__ = ["Removal", "plan_removal", "remove"]

_PREFIXES = ("checkpoints/", "data/", "events/", "logs/", "notes/", "probes/", "rendezvous/")
"""`run.json` stays with the tombstone. What lies beside these is not the run's and is never touched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What was (or would be) removed. `kept_objects` are needed by the runs in `forks`; `head` is the tombstone's number, 0 in a
    plan."""

    url: str
    objects: int
    removed_bytes: int
    kept_objects: int
    forks: tuple[str, ...]
    head: int = 0


def plan_removal(store: Store, *, open_home: StoreOpener, force: bool = False) -> Removal:
    """What `remove` would do now. Changes nothing. Raises UsageError when there is no run, and what the stores raise."""
    read_run(store)
    pinned = Pinned(set(), [], [fork.target for fork in list_forks(store)]) if force else pinned_keys(store, open_home)
    entries = _entries(store)
    going = [entry for entry in entries if entry.key not in pinned.spared]
    return Removal(
        url=store.url, objects=len(going), removed_bytes=sum(entry.size_bytes for entry in going),
        kept_objects=len(entries) - len(going), forks=tuple(pinned.targets),
    )  # fmt: skip


def remove(
    store: Store,
    *,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Removal:
    """Remove the run; its tombstone and `run.json` stay. Repeating it finishes a removal that was cut short.

    While forks refer to the run it is refused (RunConflict), and with `force` done all the same: those forks then lose what they
    borrowed. A fork that appears at the very moment keeps its objects. A trainer that runs on it is fenced. `progress` is told
    (objects done, objects in all). Raises UsageError when there is no run, Fenced when somebody else claims it at the same moment.
    """
    state = read_run(store)
    if not state.head.removed and not force:
        forks = pinned_keys(store, open_home).targets
        if forks:
            raise RunConflict(
                f"{store.url}: other runs still refer to checkpoints of this one: {', '.join(forks)}. Remove them first, or remove "
                "this run all the same with --force: they then lose what they borrowed"
            )
    tombstone, borrowed = state.head, list[Pin]()
    if not tombstone.removed:

        def bury(body: Head) -> Head:
            borrowed[:] = body.pins
            return msgspec.structs.replace(body, kind="remove", checkpoints=[], condemned=[], pins=[], removed=True)

        tombstone = Lineage(store, state.head.run_id, clock=clock, tokens=tokens).claim(bury)
    removal = _empty(store, tombstone, open_home, force, progress)
    for pin in borrowed:
        # Ours, and no head of ours names it any more. One that stays is stale: the next sweep there removes it.
        try:
            open_home(pin.home).delete(f"pins/{pin.name}.json")
        except StoreError:
            continue
    return removal


def _empty(
    store: Store, tombstone: Head, open_home: StoreOpener, force: bool, progress: Callable[[int, int], None]
) -> Removal:
    """Delete what the confirmed tombstone leaves to nobody."""
    forgotten = Pinned(set(), [entry.key for entry in store.list("pins/")], [])
    pinned = forgotten if force else pinned_keys(store, open_home)
    entries = _entries(store)
    going = [entry for entry in entries if entry.key not in pinned.spared]
    _still_dead(store, tombstone)
    for key in pinned.stale:
        store.delete(key)
    for done, entry in enumerate(going):
        progress(done, len(going))
        store.delete(entry.key)
    progress(len(going), len(going))
    for number in head_numbers(store):
        if number < tombstone.number:
            store.delete(head_key(number))
    return Removal(
        url=store.url, objects=len(going), removed_bytes=sum(entry.size_bytes for entry in going),
        kept_objects=len(entries) - len(going), forks=tuple(pinned.targets), head=tombstone.number,
    )  # fmt: skip


def _entries(store: Store) -> list[Entry]:
    return [entry for prefix in _PREFIXES for entry in store.list(prefix)]


def _still_dead(store: Store, tombstone: Head) -> None:
    """Raises Fenced when the run has been begun anew."""
    head = read_truth(store, tombstone.run_id).head
    if head is None or head.nonce != tombstone.nonce:
        raise Fenced(f"{store.url}: the run has been begun anew while it was being removed; nothing more is deleted")
