"""Which checkpoints stay, what a head condemns, and what is swept.

Invariants (docs/decisions/0002-numbered-heads.md):
  - Condemned = what was condemned, plus what no retained checkpoint reaches any more, computed after the new checkpoint has joined.
  - Only what a confirmed head condemns is deleted, and a condemned name is never referred to again.
  - Orphans are objects of attempts lower than the sweeper's own confirmed attempt, listed after that claim and reached by nothing
    retained; a head condemns them first.
  - What a fork has pinned is spared as long as the fork says that it needs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from holdfast.checkpoint.format import CheckpointRef, Head, Pin, PinnedBy, Root
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.core.config import Duration, parse_duration_s
from holdfast.core.errors import FormatError, HoldfastError, IntegrityError, NotFound, UsageError
from holdfast.core.sealed import MAX_RECORD_BYTES, digest, unseal
from holdfast.store.base import Store, is_key

__all__ = [
    "Keep",
    "Pinned",
    "Roots",
    "checkpoint_keys",
    "condemn",
    "find_orphans",
    "needed_pins",
    "pinned_keys",
    "read_root",
    "root_key",
    "sweep",
]

_CHECKPOINT_NAME = re.compile(r"checkpoints/\d{8,12}-\d{1,12}-[0-9a-z]{1,64}")
_ATTEMPT_OF = re.compile(r"(?:data/(\d+)/|checkpoints/\d+-(\d+)-)")
_SWEPT = ("data/", "checkpoints/")
StoreOpener = Callable[[str], Store]


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints of the current generation stay: those that any of the rules wants. Of older generations the newest one
    stays until somebody removes it.

    last: the newest ones; None keeps everything.
    every: also one per so much time ("6 h"): the first, and each that is at least so much younger than the one kept before it.
    best: also the best by this logged metric, as it was last logged before the checkpoint's step ended. Among equals (no new value
        was logged in between) the oldest, which is the one that was measured.
    best_count: how many of the best.
    mode: whether a smaller ("min") or a larger ("max") figure is better. nan is never the best.
    """

    last: int | None = 3
    every: Duration | None = None
    best: str | None = None
    best_count: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UsageError(f"keep must be at least 1 (or None for everything), not {self.last}")
        if self.best_count < 1 or self.mode not in ("min", "max"):
            raise UsageError(
                f'Keep: best_count={self.best_count} must be at least 1, mode={self.mode!r} "min" or "max"'
            )
        if self.every is not None:
            parse_duration_s(self.every)

    def select(self, checkpoints: Sequence[CheckpointRef], generation: int) -> list[CheckpointRef]:
        """The checkpoints that stay, in their order (oldest first)."""
        if self.last is None:
            return list(checkpoints)
        current = [ref for ref in checkpoints if ref.generation == generation]
        kept = {ref.name for ref in (*current[-self.last :], *self._periodic(current), *self._best(current))}
        kept |= {
            ref.name for ref in {ref.generation: ref for ref in checkpoints if ref.generation != generation}.values()
        }
        return [ref for ref in checkpoints if ref.name in kept]

    def _periodic(self, current: Sequence[CheckpointRef]) -> list[CheckpointRef]:
        # Each choice depends only on older ones that stay, so dropping a newer checkpoint never changes it.
        chosen: list[CheckpointRef] = []
        if self.every is not None:
            period_s = parse_duration_s(self.every)
            for ref in current:
                if not chosen or ref.unix_s - chosen[-1].unix_s >= period_s:
                    chosen.append(ref)
        return chosen

    def _best(self, current: Sequence[CheckpointRef]) -> list[CheckpointRef]:
        if self.best is None:
            return []
        sign = 1 if self.mode == "min" else -1
        measured = {
            ref.figure: ref for ref in reversed(current) if ref.figure is not None and not math.isnan(ref.figure)
        }
        return sorted(measured.values(), key=lambda ref: sign * (ref.figure or 0.0))[: self.best_count]


def root_key(name: str) -> str:
    return f"{name}/root.json"


def read_root(store: Store, ref: CheckpointRef) -> Root:
    """The root of a checkpoint, checked against the hash in the head.

    Raises NotFound when it is absent, IntegrityError when it is not what was committed.
    """
    if not _CHECKPOINT_NAME.fullmatch(ref.name):
        raise FormatError(f"{store.url}: {ref.name!r} is not a checkpoint's name")
    key = root_key(ref.name)
    data = store.get(key, max_bytes=MAX_RECORD_BYTES)
    if digest(data) != ref.root_blake3:
        raise IntegrityError(f"{store.url}/{key}: the bytes do not match the hash in the head")
    root = unseal(data, Root, what=f"{store.url}/{key}")
    if root.name != ref.name or not all(_is_part_of(part.key, root) for part in root.parts):
        raise FormatError(f"{store.url}/{key}: names parts of another checkpoint ({root.name!r})")
    return root


def _is_part_of(key: str, root: Root) -> bool:
    return key.startswith(f"{root.name}/part-") and is_key(key)


class Roots:
    """Roots of retained checkpoints, read once. A root that cannot be read reaches nothing that may be deleted: see `condemn`."""

    def __init__(self, store: Store, open_home: StoreOpener) -> None:
        self._store = store
        self._open_home = open_home
        self._known: dict[str, Root] = {}

    def remember(self, root: Root) -> None:
        self._known[root.name] = root

    def get(self, ref: CheckpointRef) -> Root:
        root = self._known.get(ref.name)
        if root is None:
            store = self._store if ref.home is None else self._open_home(ref.home)
            root = self._known[ref.name] = read_root(store, ref)
        return root

    def forget_except(self, refs: Iterable[CheckpointRef]) -> None:
        names = {ref.name for ref in refs}
        self._known = {name: root for name, root in self._known.items() if name in names}


def checkpoint_keys(ref: CheckpointRef, root: Root) -> set[str]:
    """Every object of this run that a checkpoint needs. A fork's borrowed checkpoint needs none of ours."""
    if ref.home is not None:
        return set()
    return {root_key(ref.name), *(part.key for part in root.parts), *root.objects}


def condemn(head: Head, retained: Sequence[CheckpointRef], roots: Roots, deleted: Iterable[str] = ()) -> Head:
    """`head` with `retained` as its checkpoints and everything that they no longer reach condemned.

    `deleted` are condemned names whose deletion is known to have been applied; they leave the list. When the root of a retained
    checkpoint cannot be read, nothing new is condemned: what it needs is unknown.
    """
    reached: set[str] = set()
    dropped: set[str] = set()
    kept = {ref.name for ref in retained}
    try:
        for ref in retained:
            reached |= checkpoint_keys(ref, roots.get(ref))
    except (IntegrityError, NotFound):
        dropped_refs: list[CheckpointRef] = []
    else:
        dropped_refs = [ref for ref in head.checkpoints if ref.name not in kept]
    for ref in dropped_refs:
        try:
            dropped |= checkpoint_keys(ref, roots.get(ref))
        except (IntegrityError, NotFound):
            # Its own root and parts are still found by name; its data stays until the orphan sweep of a later attempt.
            dropped.add(root_key(ref.name))
    condemned = (set(head.condemned) | (dropped - reached)) - set(deleted)
    pins = needed_pins(head.pins, retained, roots)
    return msgspec.structs.replace(head, checkpoints=list(retained), condemned=sorted(condemned), pins=pins)


def needed_pins(pins: Sequence[Pin], retained: Sequence[CheckpointRef], roots: Roots) -> list[Pin]:
    """The pins into runs that a retained checkpoint refers to; all of them when a root cannot be read."""
    if not pins:
        return []
    try:
        homes = {home for ref in retained for home in [ref.home, *roots.get(ref).homes]}
    except (IntegrityError, NotFound):
        return list(pins)
    return [pin for pin in pins if pin.home in homes]


def find_orphans(store: Store, head: Head, roots: Roots) -> set[str]:
    """Objects of lower attempts that nothing retained reaches and no head has condemned yet.

    Call only after the claim of `head` has been confirmed: the listing must be younger than the claim.
    """
    reached = set(head.condemned)
    try:
        for ref in head.checkpoints:
            reached |= checkpoint_keys(ref, roots.get(ref))
    except (IntegrityError, NotFound):
        return set()
    orphans = set()
    for prefix in ("data/", "checkpoints/"):
        for entry in store.list(prefix):
            match = _ATTEMPT_OF.match(entry.key)
            if match and int(match[1] or match[2]) < head.attempt and entry.key not in reached:
                orphans.add(entry.key)
    return orphans


class Pinned(NamedTuple):
    """`spared`: objects that other runs refer to; `targets`: those runs; `stale`: pins that nobody needs any more."""

    spared: set[str]
    stale: list[str]
    targets: list[str]


def pinned_keys(store: Store, open_home: StoreOpener) -> Pinned:
    """What the pins in this run protect.

    A pin counts while its target's newest head names it, and while that cannot be known: an absent target may be a folder that
    this machine does not see. Invariant: the pins are listed again after the last of them was judged. A fork of a fork is protected
    by the fork's pin until its own is in place, and puts its own before it relies on the other; so when one is found stale, a pin
    that took over from it can be seen. Raises IntegrityError when a pin, or what it protects, does not verify.
    """
    pinned = Pinned(set(), [], [])
    judged: set[str] = set()
    while True:
        new = [entry.key for entry in store.list("pins/") if entry.key not in judged]
        if not new:
            return pinned
        for key in new:
            _judge_pin(store, key, open_home, pinned)
        judged.update(new)


def _judge_pin(store: Store, key: str, open_home: StoreOpener, pinned: Pinned) -> None:
    name = key.removeprefix("pins/").removesuffix(".json")
    try:
        pin = unseal(store.get(key, max_bytes=MAX_RECORD_BYTES), PinnedBy, what=f"{store.url}/{key}")
    except NotFound:
        return
    truth = read_truth(open_home(pin.target))
    if truth.head is not None and not truth.altered and all(held.name != name for held in truth.head.pins):
        pinned.stale.append(key)
        return
    if pin.target not in pinned.targets:
        pinned.targets.append(pin.target)
    try:
        pinned.spared.update(checkpoint_keys(pin.checkpoint, read_root(store, pin.checkpoint)))
    except NotFound as error:
        # A run that came too late and has not withdrawn yet protects nothing. One whose checkpoints refer to this relies on what
        # is lost.
        if truth.head is not None and _refers(truth.head, open_home(pin.target), store.url, open_home):
            raise IntegrityError(
                f"{store.url}/{key}: the checkpoint that {pin.target} refers to is damaged: {error}"
            ) from error


def _refers(head: Head, target: Store, url: str, open_home: StoreOpener) -> bool:
    """Whether a checkpoint that `target` retains lies in, or refers to, the run at `url`; also when that cannot be known."""
    roots = Roots(target, open_home)
    try:
        return any(url in (ref.home, *roots.get(ref).homes) for ref in head.checkpoints)
    except (IntegrityError, NotFound):
        return True


def sweep(store: Store, lineage: Lineage, open_home: StoreOpener) -> set[str]:
    """Delete what the confirmed newest head condemns, except what forks have pinned. Returns the names deleted.

    Raises what the store raises; the caller goes on training: garbage is a cost, not a danger.
    """
    deleted: set[str] = set()
    try:
        pinned = pinned_keys(store, open_home)
    except HoldfastError:
        # Whether a fork needs something is unknown: spare everything this time.
        lineage.prune()
        return deleted
    for key in pinned.stale:
        store.delete(key)
    for key in lineage.head.condemned:
        if key not in pinned.spared and key.startswith(_SWEPT):
            store.delete(key)
            deleted.add(key)
    lineage.prune()
    return deleted
