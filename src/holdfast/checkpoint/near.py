"""Copies on this machine of objects that a checkpoint needs: on its disk, or in memory that trainers have left.

Whatever is read here is verified like anything else; what is missing or altered comes from the store.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from holdfast.checkpoint.format import CheckpointRef, Part
from holdfast.checkpoint.handover import Inherited
from holdfast.core.errors import HoldfastError
from holdfast.store.base import Store

__all__ = ["Near", "NearDisk", "NearFor", "Readable", "near_disk", "near_memory"]


class Readable(Protocol):
    """What bytes can be read from."""

    @property
    def is_near(self) -> bool: ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None: ...


class Near(Readable, Protocol):
    """What may hold copies of the run's own objects."""

    @property
    def keys(self) -> Collection[str]: ...


NearFor = Callable[[CheckpointRef, Sequence[Part]], Near | None]
"""What is near of this checkpoint, of which these parts are known."""


class NearDisk:
    """A store on this machine's disk, which has copies of objects under their names."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_near = True
        try:
            self.keys: Collection[str] = {entry.key for entry in store.list("data/")}
        except HoldfastError:
            self.keys = ()

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._store.read_into(key, offset, buffer)


def near_disk(store: Store) -> NearFor:
    return lambda ref, parts: NearDisk(store)


class _Stretch(NamedTuple):
    """Bytes of an object from `offset` on."""

    offset: int
    memory: memoryview


class _Memory:
    """Objects, or stretches of them, that lie in memory as arrays. What lies nowhere reads as anything: hashes tell."""

    def __init__(self, stretches: dict[str, list[_Stretch]]) -> None:
        self.is_near = True
        self._stretches = {key: sorted(found, key=lambda stretch: stretch.offset) for key, found in stretches.items()}
        self.keys: Collection[str] = stretches.keys()

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        stretches, end = self._stretches[key], offset + len(buffer)
        number = max(0, bisect_right(stretches, offset, key=lambda stretch: stretch.offset) - 1)
        while number < len(stretches) and stretches[number].offset < end:
            begin, memory = stretches[number]
            first, last = max(begin, offset), min(begin + len(memory), end)
            if first < last:
                buffer[first - offset : last - offset] = memory[first - begin : last - begin]
            number += 1


def near_memory(found: Sequence[Inherited], run_id: str) -> NearFor:
    """Snapshots that were left in memory, where the checkpoint is one of the same step."""

    def of(ref: CheckpointRef, parts: Sequence[Part]) -> Near | None:
        stretches: dict[str, list[_Stretch]] = {}
        at_hand = {part.rank: part for part in parts}
        for one in found:
            share = one.left.share
            if (share.run_id, share.generation, share.step) != (run_id, ref.generation, ref.step):
                continue
            if share.number in at_hand:
                for key, stretch in _stretches(one, at_hand[share.number]):
                    stretches.setdefault(key, []).append(stretch)
        return _Memory(stretches) if stretches else None

    return of


def _stretches(one: Inherited, part: Part) -> Iterator[tuple[str, _Stretch]]:
    """Where in the memory the bytes are that `part` has in objects."""
    left = one.left
    places = {
        (spec.name, spec.offsets, spec.shape): offset for spec, offset in zip(left.specs, left.offsets, strict=True)
    }
    for entry in part.arrays:
        position = places.get((entry.name, entry.offsets, entry.shape))
        if position is None:
            continue
        for chunk in entry.chunks:
            target = part.objects[chunk.object]
            if target.home == 0:
                yield target.key, _Stretch(chunk.offset, one.slot.memory[position : position + chunk.length])
            position += chunk.length
