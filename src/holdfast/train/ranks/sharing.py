"""Which part of the state each rank writes: agreed once, and again when names, shapes, types or placements change.

    tracked objects → candidates for being the same everywhere (parameters, and what optimizers keep for them)
        → fingerprints of their bytes, compared by rank 0 → replicated, where all agree → checkpoint/shares.py

The comparison tells data-parallel replicas from parameters that only happen to have one name on several ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from holdfast.checkpoint.arrays import ArraySpec, adapter_for
from holdfast.checkpoint.collector import collector_paused
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
        self._partitions: list[Partition] = []
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
        lost = next((group for each in self._partitions if (group := _lost(each, ranks)) is not None), None)
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
        self._partitions = [_decoded(each) for each in agreed.partitions]
        together = [_with(each, self._together.rank) for each in self._partitions]
        self._holders = {name: together[number] for name, number in agreed.sharded.items() if together[number]}


class _Contents(msgspec.Struct, frozen=True):
    """What a rank has: of parameters and their state that are not sharded, and of its shards."""

    plain: dict[str, bytes]
    shards: list[tuple[ArraySpec, bytes]]


class _Agreed(msgspec.Struct, frozen=True):
    """What all have alike; and for each sharded tensor, which ranks hold the same shard: the number of one of `partitions`, since
    few of them differ."""

    replicated: list[str]
    partitions: list[bytes]
    sharded: dict[str, int]


Partition = npt.NDArray[np.int32]
"""For each rank the number of the shard that it holds; -1 where that is empty."""


def _encoded(partition: Sequence[int]) -> bytes:
    """All ranks are told, so it must be short: ranks are in some regular order, and the differences are the same ones again and
    again."""
    return zlib.compress(np.diff(np.array(partition, "<i4"), prepend=np.int32(0)).tobytes(), 9)


def _decoded(data: bytes) -> Partition:
    return np.cumsum(np.frombuffer(zlib.decompress(data), "<i4"), dtype=np.int32)


def _with(partition: Partition, rank: int) -> tuple[int, ...]:
    """The ranks that hold the same as `rank`; none where that is nothing."""
    return () if partition[rank] < 0 else tuple(np.flatnonzero(partition == partition[rank]).tolist())


def _lost(partition: Partition, ranks: Sequence[int]) -> list[int] | None:
    """The holders of a shard that none of `ranks` holds."""
    lost = set(partition.tolist()) - set(partition[list(ranks)].tolist()) - {-1}
    return np.flatnonzero(partition == min(lost)).tolist() if lost else None


def _fingerprint(leaf: Leaf) -> bytes:
    spec = leaf.spec
    digest = blake3(f"{spec.dtype} {spec.shape} ".encode())
    for start in range(0, spec.nbytes, _PIECE_BYTES):
        digest.update(leaf.adapter.stream(leaf.value, start, min(_PIECE_BYTES, spec.nbytes - start)))
    return digest.digest(8)


@collector_paused()
def _compare(payloads: list[bytes]) -> bytes:
    """Raises UnsupportedState for shards that make up no tensor."""
    ranks = [msgspec.msgpack.decode(payload, type=_Contents) for payload in payloads]
    shards = [dict(contents.shards) for contents in ranks]
    by_name: dict[str, list[int]] = {}
    for rank, (mine, holders_of) in enumerate(zip(shards, agree_on_shards(shards), strict=True)):
        for spec in mine:
            holders = holders_of[spec.name]
            # Nobody writes an empty shard, unless the whole tensor is empty.
            if holders[0] == rank and (spec.nbytes or 0 in spec.global_shape):
                partition = by_name.setdefault(spec.name, [-1] * len(ranks))
                for holder in holders:
                    partition[holder] = rank
    numbers: dict[tuple[int, ...], int] = {}
    sharded_by = {name: numbers.setdefault(tuple(each), len(numbers)) for name, each in by_name.items()}
    first, *others = ranks
    replicated = [
        name for name, content in first.plain.items() if all(other.plain.get(name) == content for other in others)
    ]
    return msgspec.msgpack.encode(_Agreed(replicated, [_encoded(each) for each in numbers], sharded_by))
