"""A checkpoint of many ranks, as one of many reads it: not every rank needs every part.

    its own part, or those of the ranks that had its share → rank 0's → the next ones, twice as many each time → all

More parts are read only while something is wanted that those at hand do not hold. Where a job comes back on as many ranks as
before, each reads a part or two, and the store serves a number of requests that grows with the ranks and not with their square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.format import CheckpointRef, Part, Root
from holdfast.checkpoint.near import NearFor
from holdfast.checkpoint.read import CheckpointReader, Target, check_total, find_root, read_parts
from holdfast.checkpoint.regions import intersect, tiling_problem, whole
from holdfast.checkpoint.retain import StoreOpener
from holdfast.store.base import Store

__all__ = ["RankReader", "open_for_rank"]


class RankReader(CheckpointReader):
    """As `CheckpointReader`, for one thread. Reading a part may raise what opening a checkpoint raises, so here any method may.

    What `find` returns may lack pieces that lie in parts which are not at hand; `read` gets those that it needs. `parts` and
    `arrays` are all of them, and get all.
    """

    def __init__(
        self,
        store: Store,
        ref: CheckpointRef,
        root: Root,
        open_home: StoreOpener,
        near: Sequence[NearFor] = (),
        *,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(store, ref, root, [], open_home)
        self._near_for = near
        self._at_hand: dict[int, Part] = {}
        self._next = _in_turn(rank, world_size, len(root.parts))

    @property
    def parts(self) -> tuple[Part, ...]:
        while self._get_more():
            pass
        return tuple(self._at_hand[rank] for rank in range(len(self.root.parts)))

    @property
    def arrays(self) -> dict[str, Assembled]:
        while self._get_more():
            pass
        return self._arrays

    def part(self, rank: int) -> Part:
        if rank not in self._at_hand:
            self._get([rank])
        return self._at_hand[rank]

    def find(self, name: str) -> Assembled | None:
        while name not in self._arrays and self._get_more():
            pass
        return self._arrays.get(name)

    def read(
        self, wanted: Iterable[Target], pool: ThreadPoolExecutor, progress: Callable[[int], None] | None = None
    ) -> None:
        super().read(self._complete(wanted), pool, progress)

    def objects_of(self, wanted: Iterable[Target]) -> dict[str, int]:
        return super().objects_of(self._complete(wanted))

    def _complete(self, wanted: Iterable[Target]) -> list[Target]:
        """With all pieces that they need."""
        targets = list(wanted)
        missing = [target for target in targets if not self._holds(target)]
        while missing and self._get_more():
            missing = [target for target in missing if not self._holds(target)]
        return [msgspec.structs.replace(target, array=self._arrays[target.array.name]) for target in targets]

    def _holds(self, target: Target) -> bool:
        """Whether the pieces at hand make up what is wanted."""
        array = self._arrays[target.array.name]
        where = target.rectangle or whole(array.shape)
        found = [common for piece in array.pieces if (common := intersect(where, piece.rectangle)) is not None]
        return not where.size or tiling_problem(where.shape, [one.relative_to(where.offsets) for one in found]) is None

    def _get_more(self) -> bool:
        """False: all parts are at hand."""
        for ranks in self._next:
            missing = [rank for rank in ranks if rank not in self._at_hand]
            if missing:
                self._get(missing)
                return True
        return False

    def _get(self, ranks: list[int]) -> None:
        self._at_hand |= zip(ranks, read_parts(self._store, self.root, ranks), strict=True)
        is_whole = len(self._at_hand) == len(self.root.parts)
        parts = [self._at_hand[rank] for rank in sorted(self._at_hand)]
        self._near = [one for look in self._near_for if (one := look(self.ref, parts)) is not None]
        self._lay_out(parts, is_whole=is_whole)
        if is_whole:
            check_total(self)


def _in_turn(rank: int, world_size: int, count: int) -> Iterator[range]:
    """Which of `count` parts to look into, in which order: first those of the same share of the ranks, then from the first on."""
    yield range(rank * count // world_size, -(-(rank + 1) * count // world_size))
    start, stop = 0, 1
    while start < count:
        yield range(start, min(stop, count))
        start, stop = stop, 2 * stop


def open_for_rank(
    store: Store,
    ref: CheckpointRef,
    open_home: StoreOpener,
    near: Sequence[NearFor] = (),
    *,
    rank: int,
    world_size: int,
) -> CheckpointReader:
    """As `open_checkpoint`, for `rank` of `world_size`: parts are read when they are needed. Raises IntegrityError or NotFound."""
    where, root = find_root(store, ref, open_home)
    near = near if ref.home is None else ()
    return RankReader(where, ref, root, open_home, near, rank=rank, world_size=world_size)
