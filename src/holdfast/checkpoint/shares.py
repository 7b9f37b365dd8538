"""Which rank writes which part of which array, so that a state that several ranks hold is written once.

    all ranks' shards → who holds which                      (`agree_on_shards`, once)
    each leaf's spec, and who holds it → what this rank writes: whole leaves, and rows of those that all ranks have

A pure function: all ranks compute it from the same words and come to plans that fit together. `staged` then makes of a rank's tree
what it stages: a leaf that is written elsewhere is left out, of a leaf that is cut only this rank's rows stay. The document is
untouched, since it names arrays as they are put together again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from holdfast.checkpoint.arrays import ArraySpec
from holdfast.checkpoint.regions import Rectangle, tiling_problem
from holdfast.checkpoint.tree import FlatTree, Leaf
from holdfast.core.errors import UnsupportedState, UsageError
from holdfast.store.base import PAGE_BYTES

__all__ = [
    "LEAST_STRETCH_BYTES",
    "OWN",
    "REPLICATED",
    "WHOLE_BELOW_BYTES",
    "Sharing",
    "Stretch",
    "agree_on_shards",
    "sharded",
    "share_out",
    "staged",
]

WHOLE_BELOW_BYTES = 256 << 10
"""A replicated leaf that is no larger is written by one rank. A cut moves by at most as much to make stretches whole pages."""
LEAST_STRETCH_BYTES = 16 << 20
"""So many ranks write what all have that each gets at least so much: at a restore, every rank reads from each that has written."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who holds a leaf. `own`: this rank alone. `replicated`: every rank, with the same content. `sharded`: `holders` are the
    global ranks, this one included, that hold this very shard (the same rectangle of the same tensor)."""

    kind: Literal["own", "replicated", "sharded"]
    holders: tuple[int, ...] = ()


OWN = Sharing("own")
REPLICATED = Sharing("replicated")


def sharded(holders: Sequence[int]) -> Sharing:
    return Sharing("sharded", tuple(sorted(holders)))


class Stretch(NamedTuple):
    """What a rank writes of leaf number `leaf`: all that it holds (`rows` is None), or rows [start, stop) of dimension 0."""

    leaf: int
    rows: tuple[int, int] | None = None


def agree_on_shards(shards: Sequence[Mapping[ArraySpec, bytes]]) -> list[dict[str, tuple[int, ...]]]:
    """For each rank and each of its sharded leaves, by name, the ranks that hold this very shard. `shards`: by rank, the specs of
    its sharded leaves, each with a fingerprint of the content (or b"").

    A tensor's own mesh does not know of all holders: over a mesh of two dimensions, what only the first shards lies in every row of
    the second alike. Raises UnsupportedState when the shards of one name are not one tensor: a reader could not put it together.
    """
    held: dict[ArraySpec, dict[int, bytes]] = {}
    by_name: dict[str, list[ArraySpec]] = {}
    for rank, mine in enumerate(shards):
        for spec, fingerprint in mine.items():
            if spec not in held:
                held[spec] = {}
                by_name.setdefault(spec.name, []).append(spec)
            held[spec][rank] = fingerprint
    for name, specs in by_name.items():
        problem = _shards_problem(specs, held)
        if problem:
            raise UnsupportedState(
                f"{name}: its shards on the ranks {problem}. Give what is not the same tensor another name on each rank"
            )
    holders = {spec: tuple(ranks) for spec, ranks in held.items()}
    return [{spec.name: holders[spec] for spec in mine} for mine in shards]


def _shards_problem(specs: Sequence[ArraySpec], held: Mapping[ArraySpec, Mapping[int, bytes]]) -> str | None:
    if len({(spec.dtype, spec.global_shape) for spec in specs}) > 1:
        ranks = [min(held[spec]) for spec in specs]
        return f"differ in dtype or global shape (ranks {', '.join(map(str, ranks))})"
    for spec in specs:
        if spec.nbytes and len(set(held[spec].values())) > 1:
            return f"{', '.join(map(str, held[spec]))} should be the same and are not"
    filled = [Rectangle(spec.offsets, spec.shape) for spec in specs if spec.nbytes]
    problem = tiling_problem(specs[0].global_shape, filled)
    return None if problem is None else f"do not make up the whole tensor: it {problem}"


def share_out(
    specs: Sequence[ArraySpec], sharing: Sequence[Sharing], *, rank: int, world_size: int
) -> tuple[Stretch, ...]:
    """What `rank` writes, in the order of the leaves.

    Replicated leaves must be the same ones on all ranks, and sharded leaves the same ones on all of their holders, in any order;
    own leaves may differ. Every byte of a replicated leaf is then in the plan of exactly one rank; where there are fewer of them
    than `LEAST_STRETCH_BYTES` for each, the last ranks write none. The bytes of them that another writes differ from the even share
    by what two cuts are off: each by half a row, or by `WHOLE_BELOW_BYTES`, at most.
    """
    by_name = sorted(range(len(specs)), key=lambda number: specs[number].name)
    replicated = [number for number in by_name if sharing[number].kind == "replicated"]
    plan = [Stretch(number) for number, how in enumerate(sharing) if how.kind == "own"]
    plan += [
        Stretch(replicated[position], rows)
        for position, rows in _stretches([specs[number] for number in replicated], rank, world_size)
    ]
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    for number in by_name:
        if sharing[number].kind == "sharded" and _writer(specs[number], sharing[number].holders, loads, rank) == rank:
            plan.append(Stretch(number))
    return tuple(sorted(plan, key=lambda stretch: stretch.leaf))


def _writer(
    spec: ArraySpec, holders: tuple[int, ...], loads: dict[tuple[int, ...], dict[int, int]], rank: int
) -> int | None:
    """The holder that has the fewest bytes of what the same ranks hold together; None for a shard that nobody has to write."""
    if rank not in holders:
        raise UsageError(
            f"{spec.name}: rank {rank} holds a shard of it, and is not among the ranks that do ({holders})"
        )
    if spec.nbytes == 0:
        # A reader must find the name of a tensor without elements somewhere; other empty shards say nothing.
        return holders[0] if math.prod(spec.global_shape) == 0 else None
    load = loads.setdefault(holders, dict.fromkeys(holders, 0))
    writer = min(holders, key=lambda holder: (load[holder], holder))
    load[writer] += spec.nbytes
    return writer


def _stretches(specs: Sequence[ArraySpec], rank: int, world_size: int) -> list[tuple[int, tuple[int, int] | None]]:
    """By number, what of the replicated leaves lies between this rank's two cuts."""
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} does not exist among {world_size}")
    total_bytes = sum(spec.nbytes for spec in specs)
    writers = min(world_size, max(1, total_bytes // LEAST_STRETCH_BYTES))
    begin, end = (total_bytes * min(number, writers) // writers for number in (rank, rank + 1))
    found: list[tuple[int, tuple[int, int] | None]] = []
    position = 0
    for number, spec in enumerate(specs):
        nbytes = spec.nbytes
        if nbytes == 0:
            if rank == 0:
                found.append((number, None))
            continue
        rows = _rows(spec)
        first, last = (_cut(spec, rows, mark - position) for mark in (begin, end))
        if first < last:
            found.append((number, None if (first, last) == (0, rows) else (first, last)))
        position += nbytes
    return found


def _rows(spec: ArraySpec) -> int:
    """Into how many pieces a leaf may be cut."""
    return 1 if spec.nbytes <= WHOLE_BELOW_BYTES or not spec.shape else spec.shape[0]


def _cut(spec: ArraySpec, rows: int, mark_bytes: int) -> int:
    """The row before which a leaf is cut that should be cut at `mark_bytes`.

    Invariant: it grows with the mark, from 0 to `rows`, and depends on nothing else, so that neighbours cut at the same row.
    """
    nbytes = spec.nbytes
    if mark_bytes <= 0 or mark_bytes >= nbytes:
        return 0 if mark_bytes <= 0 else rows
    row_bytes = nbytes // rows
    # So many rows are whole pages.
    step = PAGE_BYTES // math.gcd(PAGE_BYTES, row_bytes)
    if step * row_bytes > WHOLE_BELOW_BYTES:
        step = 1
    return min(rows, (2 * mark_bytes + step * row_bytes) // (2 * step * row_bytes) * step)


def staged(flat: FlatTree, plan: Sequence[Stretch]) -> FlatTree:
    """The tree of which a rank stages its part: the document as it is, and of the leaves what the plan says."""
    leaves = []
    for number, rows in plan:
        leaf = flat.leaves[number]
        leaves.append(leaf if rows is None else _rows_of(leaf, *rows))
    return FlatTree(flat.document, tuple(leaves))


def _rows_of(leaf: Leaf, start: int, stop: int) -> Leaf:
    spec = leaf.spec
    shape, offsets = (stop - start, *spec.shape[1:]), (start, *spec.offsets[1:])
    return Leaf(
        leaf.name,
        leaf.adapter.rows(leaf.value, start, stop),
        leaf.adapter,
        spec._replace(shape=shape, offsets=offsets),
    )
