"""A consistent copy of the training state, taken at a step boundary.

Staged: the bytes lie in a slot of shared memory, one array after the other in the order of the tree, and the writer works from
there while training goes on. Streamed (when not even one snapshot fits under the cap): nothing is copied, the writer reads the
live arrays and the loop waits until it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint.arrays import ArrayAdapter, ArraySpec, Copy
from holdfast.checkpoint.staging import Slot
from holdfast.checkpoint.tree import FlatTree, Leaf
from holdfast.store.base import PAGE_BYTES

__all__ = ["PAGED_FROM_BYTES", "Layout", "Snapshot", "lay_out", "stage", "stream"]

_ALIGN_BYTES = 16  # the widest element (complex128), so that every array can be viewed in place
PAGED_FROM_BYTES = 64 << 10
"""Arrays from this size on begin on a page, so that a disk can take them from there directly."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each array lies in a slot."""

    specs: tuple[ArraySpec, ...]
    offsets: tuple[int, ...]
    total_bytes: int


def lay_out(flat: FlatTree, previous: Layout | None = None) -> Layout:
    """Arrays in tree order, aligned. `previous` itself where nothing has changed, so that what was made for it is used again."""
    specs = tuple([leaf.spec for leaf in flat.leaves])
    if previous is not None and specs == previous.specs:
        return previous
    offsets, position = [], 0
    for spec in specs:
        nbytes = spec.nbytes
        align = PAGE_BYTES if nbytes >= PAGED_FROM_BYTES else _ALIGN_BYTES
        position = -(-position // align) * align
        offsets.append(position)
        position += nbytes
    return Layout(specs, tuple(offsets), position)


@dataclass(slots=True)
class Snapshot:
    """What a checkpoint is made from. `metadata` is JSON for the root; `step` and `epoch` are also in it. `ranks`: who holds the
    rest of the same state; the place of a rank among them is the number of its part. `take` tells snapshots of one step apart."""

    document: bytes
    layout: Layout
    step: int
    epoch: int
    metadata: dict[str, Any]
    slot: Slot | None
    copies: list[Copy] = field(default_factory=list)
    leaves: tuple[Leaf, ...] = ()
    ranks: tuple[int, ...] = (0,)
    take: int = 0

    def release(self) -> None:
        """Before an optimizer writes."""
        for copy in self.copies:
            copy.release()

    def complete(self) -> None:
        """Wait until every byte is in place."""
        for copy in self.copies:
            copy.wait()

    def hashes(self, index: int, start: int, length: int) -> bytes:
        """The block hashes of those bytes where they are known without reading them, else b"". A copy knows none."""
        return b""

    def read(self, index: int, start: int, length: int) -> memoryview:
        """Bytes [start, start + length) of array number `index`."""
        if self.slot is not None:
            offset = self.layout.offsets[index] + start
            return self.slot.memory[offset : offset + length]
        leaf = self.leaves[index]
        return leaf.adapter.stream(leaf.value, start, length)


def stage(
    flat: FlatTree,
    layout: Layout,
    slot: Slot,
    *,
    step: int,
    epoch: int,
    metadata: dict[str, Any],
    deferrable: Callable[[Leaf], bool] | None,
    ranks: tuple[int, ...] = (0,),
) -> Snapshot:
    """Copy every array into `slot`. With CUDA the copy may still run when this returns: see `Snapshot.release`.

    Arrays for which `deferrable` is true are written only by optimizers, so their copy may go on until one steps.
    """
    targets = _targets(flat, layout, slot)
    by_adapter: dict[ArrayAdapter, list[int]] = {}
    for index, leaf in enumerate(flat.leaves):
        by_adapter.setdefault(leaf.adapter, []).append(index)
    copies: list[Copy] = []
    for indices in by_adapter.values():
        leaves = [flat.leaves[index] for index in indices]
        if slot.unpin is None:
            slot.unpin = leaves[0].adapter.pin([leaf.value for leaf in leaves], slot.address, slot.size_bytes)
        values = [leaf.value for leaf in leaves]
        later = [deferrable(leaf) for leaf in leaves] if deferrable else [False] * len(leaves)
        copies.append(leaves[0].adapter.copy(values, [targets[index] for index in indices], later))
    return Snapshot(flat.document, layout, step, epoch, metadata, slot, copies, ranks=ranks)


def stream(
    flat: FlatTree,
    layout: Layout,
    *,
    step: int,
    epoch: int,
    metadata: dict[str, Any],
    ranks: tuple[int, ...] = (0,),
) -> Snapshot:
    """No copy: valid only while the caller keeps the state unchanged."""
    return Snapshot(flat.document, layout, step, epoch, metadata, None, leaves=flat.leaves, ranks=ranks)


def _targets(flat: FlatTree, layout: Layout, slot: Slot) -> list[Any]:
    """Each array's place in the slot, as an array of its library; made once for a layout."""
    if slot.layout is not layout:
        slot.layout, slot.targets = layout, []
        for leaf, spec, offset in zip(flat.leaves, layout.specs, layout.offsets, strict=True):
            slot.targets.append(leaf.adapter.view(spec, slot.memory[offset : offset + spec.nbytes]))
    return slot.targets
