"""Which part of the state each rank writes: agreed once, and again when names, shapes, types or placements change.

    tracked objects → candidates for being the same everywhere (parameters, and what optimizers keep for them)
        → fingerprints of their bytes, compared by rank 0 → replicated, where all agree → checkpoint/shares.py

The comparison tells data-parallel replicas from parameters that only happen to have one name on several ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from blake3 import blake3

from holdfast.checkpoint.arrays import ArraySpec, adapter_for
from holdfast.checkpoint.shares import OWN, REPLICATED, Sharing, agree_on_shards, sharded, share_out, staged
from holdfast.checkpoint.tree import FlatTree, Leaf, flatten
from holdfast.core.errors import SaveError
from holdfast.train.ranks.together import Together
from holdfast.train.tracked import Tracker

__all__ = ["Sharer"]

_PIECE_BYTES = 16 << 20


class Sharer:
    """Owned by the loop's thread."""

    def __init__(self, together: Together, tracker: Tracker) -> None:
        self._together, self._tracker = together, tracker
        self._signature: list[tuple[object, ...]] | None = None
        self._replicated: frozenset[str] = frozenset()
        self._holders: dict[str, tuple[int, ...]] = {}
        self._holder_groups: list[list[int]] = []
        """Every group of ranks that alone hold some shard."""
        self._agreements: dict[int, int] = {}

    def take(self, tree: dict[str, Any], step: int, ranks: tuple[int, ...]) -> FlatTree:
        """What this rank stages of the state. All `ranks` call it at the same step; fewer than there were, if some are gone.

        Raises RanksApart when one of them does not, SaveError when what they hold is not the whole state.
        """
        if len(ranks) < self._together.size:
            return self._take_without(tree, ranks)
        flat = flatten(tree, rank=self._together.rank, is_own=self._is_own)
        signature = self._describe(flat)
        if signature != self._signature:
            self._agree(flatten(tree), step)
            flat = flatten(tree, rank=self._together.rank, is_own=self._is_own)
            self._signature = self._describe(flat)
        return self._mine(flat, ranks)

    def _take_without(self, tree: dict[str, Any], ranks: tuple[int, ...]) -> FlatTree:
        """What was agreed on by all holds on; nothing that only the others had may be missing."""
        lost = next((group for group in self._holder_groups if not set(group) & set(ranks)), None)
        now = self._describe(flatten(tree, rank=self._together.rank, is_own=self._is_own))
        if lost is not None or self._signature != now:
            whose = "others" if lost is None else " and ".join(map(str, lost))
            raise SaveError(f"the state is not whole without what only rank {whose} had; the checkpoint before stands")
        return self._mine(flatten(tree, rank=ranks.index(self._together.rank), is_own=self._is_own), ranks)

    def _mine(self, flat: FlatTree, ranks: tuple[int, ...]) -> FlatTree:
        number_of = {rank: number for number, rank in enumerate(ranks)}
        specs, sharing = [leaf.spec for leaf in flat.leaves], [self._sharing(leaf, number_of) for leaf in flat.leaves]
        return staged(flat, share_out(specs, sharing, rank=number_of[self._together.rank], world_size=len(ranks)))

    def _is_own(self, path: str, value: Any) -> bool:
        adapter = adapter_for(value)
        return path not in self._replicated and (adapter is None or adapter.holders(value) is None)

    def _sharing(self, leaf: Leaf, number_of: Mapping[int, int]) -> Sharing:
        if leaf.adapter.holders(leaf.value) is not None:
            holders = self._holders.get(leaf.name, (self._together.rank,))
            return sharded([number_of[rank] for rank in holders if rank in number_of])
        return REPLICATED if leaf.name in self._replicated else OWN

    def _describe(self, flat: FlatTree) -> list[tuple[object, ...]]:
        """What the agreement was about. A rank's own leaves may change as they like."""
        addresses = self._addresses()
        return [
            (leaf.name, leaf.spec, holders)
            for leaf in flat.leaves
            if (holders := leaf.adapter.holders(leaf.value)) is not None
            or leaf.name in self._replicated
            or leaf.adapter.address(leaf.value) in addresses
        ]

    def _addresses(self) -> set[int]:
        """Where the memory of parameters, and of what optimizers keep for them, begins."""
        found: set[int] = set()
        for module in self._tracker.modules().values():
            found |= {parameter.data_ptr() for parameter in module.parameters()}
        for optimizer in self._tracker.optimizers().values():
            for state in optimizer.state.values():
                found |= {value.data_ptr() for value in state.values() if isinstance(value, torch.Tensor)}
        return found - {0}

    def _agree(self, flat: FlatTree, step: int) -> None:
        addresses = self._addresses()
        shards = [leaf for leaf in flat.leaves if leaf.adapter.holders(leaf.value) is not None]
        plain = [
            leaf
            for leaf in flat.leaves
            if leaf.adapter.holders(leaf.value) is None and leaf.adapter.address(leaf.value) in addresses
        ]
        mine = _Contents(
            {leaf.name: _fingerprint(leaf) for leaf in plain}, [(leaf.spec, _fingerprint(leaf)) for leaf in shards]
        )
        number = self._agreements[step] = self._agreements.get(step, 0) + 1
        answer = self._together.exchange(
            f"shares {step}.{number}", msgspec.msgpack.encode(mine), _compare,
            what=f"sharing out the state at step {step}",
        )  # fmt: skip
        agreed = msgspec.msgpack.decode(answer, type=_Agreed)
        self._replicated = frozenset(agreed.replicated)
        self._holder_groups = agreed.holder_groups
        held = {(name, tuple(offsets)): tuple(holders) for name, offsets, holders in agreed.held_by_several}
        self._holders = {
            leaf.name: held[leaf.name, leaf.spec.offsets] for leaf in shards if (leaf.name, leaf.spec.offsets) in held
        }


class _Contents(msgspec.Struct, frozen=True):
    """What a rank has: of parameters and their state that are not sharded, and of its shards."""

    plain: dict[str, bytes]
    shards: list[tuple[ArraySpec, bytes]]


class _Agreed(msgspec.Struct, frozen=True):
    """What all have alike; shards, by name and offsets, that more than one rank holds; and every group of ranks that alone hold
    some shard."""

    replicated: list[str]
    held_by_several: list[tuple[str, list[int], list[int]]]
    holder_groups: list[list[int]]


def _fingerprint(leaf: Leaf) -> bytes:
    spec = leaf.spec
    digest = blake3(f"{spec.dtype} {spec.shape} ".encode())
    for start in range(0, spec.nbytes, _PIECE_BYTES):
        digest.update(leaf.adapter.stream(leaf.value, start, min(_PIECE_BYTES, spec.nbytes - start)))
    return digest.digest(8)


def _compare(payloads: list[bytes]) -> bytes:
    """Raises UnsupportedState for shards that make up no tensor."""
    ranks = [msgspec.msgpack.decode(payload, type=_Contents) for payload in payloads]
    shards = [dict(contents.shards) for contents in ranks]
    several: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    groups: set[tuple[int, ...]] = set()
    for mine, holders_of in zip(shards, agree_on_shards(shards), strict=True):
        for spec in mine:
            if spec.nbytes:
                groups.add(holders_of[spec.name])
            if len(holders_of[spec.name]) > 1:
                several[spec.name, spec.offsets] = holders_of[spec.name]
    first, *others = ranks
    replicated = [
        name for name, content in first.plain.items() if all(other.plain.get(name) == content for other in others)
    ]
    held = [(name, list(offsets), list(holders)) for (name, offsets), holders in several.items()]
    return msgspec.msgpack.encode(_Agreed(replicated, held, sorted(map(list, groups))))
