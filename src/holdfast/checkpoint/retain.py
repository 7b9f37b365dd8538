"""Which checkpoints stay, what a head condemns, and what is swept.

Invariants (docs/decisions/0002-numbered-heads.md):
  - Condemned = what was condemned, plus what no retained checkpoint reaches any more, computed after the new checkpoint has joined.
  - Only what a confirmed head condemns is deleted, and a condemned name is never referred to again.
  - Orphans are objects of attempts lower than the sweeper's own confirmed attempt, listed after that claim and reached by nothing
    retained; a head condemns them first.
  - What a fork has pinned is spared as long as the fork says that it needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import MAX_RECORD_BYTES, CheckpointRef, Head, PinnedBy, Root, digest, unseal
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, UsageError
from holdfast.store.base import Store

__all__ = [
    "Keep",
    "Roots",
    "checkpoint_keys",
    "condemn",
    "find_orphans",
    "pinned_keys",
    "read_root",
    "root_key",
    "sweep",
]

_ATTEMPT_OF = re.compile(r"(?:data/(\d+)/|checkpoints/\d+-(\d+)-)")
StoreOpener = Callable[[str], Store]


@dataclass(frozen=True, slots=True)
class Keep:
    """What retention keeps of the current generation: the newest `last` checkpoints. Of older generations the newest one stays
    until somebody removes it. `None` keeps everything."""

    last: int | None = 3

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UsageError(f"keep must be at least 1 (or None for everything), not {self.last}")

    def select(self, checkpoints: Sequence[CheckpointRef], generation: int) -> list[CheckpointRef]:
        """The checkpoints that stay, in their order (oldest first)."""
        if self.last is None:
            return list(checkpoints)
        current = [ref for ref in checkpoints if ref.generation == generation]
        kept = {ref.name for ref in current[-self.last :]}
        kept |= {
            ref.name for ref in {ref.generation: ref for ref in checkpoints if ref.generation != generation}.values()
        }
        return [ref for ref in checkpoints if ref.name in kept]


def root_key(name: str) -> str:
    return f"{name}/root.json"


def read_root(store: Store, ref: CheckpointRef) -> Root:
    """The root of a checkpoint, checked against the hash in the head.

    Raises NotFound when it is absent, IntegrityError when it is not what was committed.
    """
    key = root_key(ref.name)
    data = store.get(key, max_bytes=MAX_RECORD_BYTES)
    if digest(data) != ref.root_blake3:
        raise IntegrityError(f"{store.url}/{key}: the bytes do not match the hash in the head")
    return unseal(data, Root, what=f"{store.url}/{key}")


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
    homes = {ref.home for ref in retained} | {home for ref in retained for home in _homes(roots, ref)}
    pins = [pin for pin in head.pins if pin.home in homes]
    return msgspec.structs.replace(head, checkpoints=list(retained), condemned=sorted(condemned), pins=pins)


def _homes(roots: Roots, ref: CheckpointRef) -> list[str]:
    try:
        return roots.get(ref).homes
    except (IntegrityError, NotFound):
        return []


def find_orphans(store: Store, head: Head, roots: Roots) -> set[str]:
    """Objects of lower attempts that nothing retained reaches and no head has condemned yet. Call only after the claim of `head` has
    been confirmed; the listing must be younger than the claim."""
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


def pinned_keys(store: Store, open_home: StoreOpener) -> tuple[set[str], list[str]]:
    """Objects that forks still refer to, and the pins that nobody needs any more.

    A pin counts while its target's newest head names it. A target that cannot be read keeps its pin.
    """
    spared: set[str] = set()
    stale: list[str] = []
    for entry in store.list("pins/"):
        name = entry.key.removeprefix("pins/").removesuffix(".json")
        try:
            pin = unseal(store.get(entry.key, max_bytes=MAX_RECORD_BYTES), PinnedBy, what=f"{store.url}/{entry.key}")
            if _is_wanted(pin, name, open_home):
                spared |= checkpoint_keys(pin.checkpoint, read_root(store, pin.checkpoint))
            else:
                stale.append(entry.key)
        except NotFound:
            continue
    return spared, stale


def _is_wanted(pin: PinnedBy, name: str, open_home: StoreOpener) -> bool:
    try:
        head = read_truth(open_home(pin.target)).head
    except NotFound:
        return False
    return head is not None and any(held.name == name for held in head.pins)


def sweep(store: Store, lineage: Lineage, open_home: StoreOpener) -> set[str]:
    """Delete what the confirmed newest head condemns, except what forks have pinned. Returns the names deleted.

    Raises what the store raises; the caller goes on training: garbage is a cost, not a danger.
    """
    head = lineage.head
    spared: set[str] = set()
    if head.condemned:
        try:
            spared, stale = pinned_keys(store, open_home)
        except HoldfastError:
            # Whether a fork needs something is unknown: spare everything this time.
            return set()
        for key in stale:
            store.delete(key)
    deleted = set()
    for key in head.condemned:
        if key not in spared:
            store.delete(key)
            deleted.add(key)
    lineage.prune()
    return deleted
