"""Which bytes the store holds already: the index by which a save sends only what is new.

Chunks of checkpoints that the head retains, and of a base that the run has pinned, by their block hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import Part

__all__ = ["KnownChunks", "Location"]


class Location(NamedTuple):
    """Where a chunk already is. `home` is None for the run itself."""

    home: str | None
    key: str
    object_bytes: int
    offset: int
    length: int


class KnownChunks:
    """Chunks that retained checkpoints hold, by their block hashes. One index per checkpoint, dropped with it; and those of a base,
    another run whose checkpoint this one has pinned, dropped with the pin.

    Thread safety: one thread changes it; others may look at the same time.
    """

    def __init__(self) -> None:
        self._by_checkpoint: dict[str, dict[bytes, Location]] = {}
        self._of_base: dict[bytes, Location] = {}

    @collector_paused()
    def add(self, checkpoint: str, *parts: Part, home: str | None = None) -> None:
        """Remember every chunk of `parts`. `home` is where the checkpoint itself lies when it is another run's."""
        index: dict[bytes, Location] = {}
        for part in parts:
            homes = [home, *part.homes]
            for entry in part.arrays:
                for chunk in entry.chunks:
                    target = part.objects[chunk.object]
                    index[chunk.hashes] = Location(
                        homes[target.home], target.key, target.size_bytes, chunk.offset, chunk.length
                    )
        self._by_checkpoint = {**self._by_checkpoint, checkpoint: index}

    @collector_paused()
    def add_base(self, parts: Sequence[Part], home: str, pinned: Mapping[str, Set[str]]) -> None:
        """Remember the chunks of a base's `parts` that lie in objects which are pinned: their keys by the run they lie in. `home`
        is the run that the parts lie in."""
        index: dict[bytes, Location] = {}
        for part in parts:
            homes = [home, *part.homes]
            allowed = [target.key in pinned.get(homes[target.home], ()) for target in part.objects]
            index |= {
                chunk.hashes: Location(
                    homes[part.objects[chunk.object].home], part.objects[chunk.object].key,
                    part.objects[chunk.object].size_bytes, chunk.offset, chunk.length,
                )
                for entry in part.arrays for chunk in entry.chunks if allowed[chunk.object]
            }  # fmt: skip
        self._of_base = index

    def retain(self, checkpoints: set[str], homes: set[str]) -> None:
        """Forget checkpoints that the head no longer retains, and what lies in runs where it names no pin any more: what only they
        held may be deleted at any time."""
        self._by_checkpoint = {name: index for name, index in self._by_checkpoint.items() if name in checkpoints}
        if any(location.home not in homes for location in self._of_base.values()):
            self._of_base = {key: location for key, location in self._of_base.items() if location.home in homes}

    def find(self, hashes: bytes) -> Location | None:
        for index in reversed(self._by_checkpoint.values()):
            location = index.get(hashes)
            if location is not None:
                return location
        return self._of_base.get(hashes)
