"""Every byte that all ranks have is written by one of them, and by none twice."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_parts import NAME, opened, write

from holdfast.checkpoint import shares
from holdfast.checkpoint.arrays import ArraySpec
from holdfast.checkpoint.read import Target
from holdfast.checkpoint.shares import (
    OWN,
    REPLICATED,
    WHOLE_BELOW_BYTES,
    Sharing,
    Stretch,
    agree_on_shards,
    sharded,
    share_out,
    staged,
)
from holdfast.checkpoint.tree import decode_document, flatten, unflatten
from holdfast.core.errors import UnsupportedState, UsageError
from holdfast.store.base import PAGE_BYTES
from holdfast.store.memory import MemoryStore


def spec(number: int, shape: tuple[int, ...], dtype: str = "f32", offsets: tuple[int, ...] | None = None) -> ArraySpec:
    return ArraySpec(f"leaf/{number}", dtype, shape, shape, offsets or (0,) * len(shape), "torch")


sizes = st.one_of(st.integers(0, 3), st.integers(0, 3000), st.sampled_from([1 << 16, 1 << 20]))
leaf_shapes = st.one_of(
    st.just(()), st.tuples(sizes), st.tuples(st.integers(0, 2000), st.integers(0, 1500)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4000)),
)  # fmt: skip


@given(
    st.lists(st.tuples(leaf_shapes, st.sampled_from(["f32", "bf16", "u8"]), st.booleans()), max_size=12),
    st.integers(1, 9),
    st.sampled_from([1, 1 << 20, shares.LEAST_STRETCH_BYTES]),
    st.randoms(use_true_random=False),
)
def test_all_is_written_once_and_shared_out_evenly(
    leaves: list[tuple[tuple[int, ...], str, bool]], world_size: int, least_bytes: int, order: random.Random
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "LEAST_STRETCH_BYTES", least_bytes)
        check_shares(leaves, world_size, least_bytes, order)


def check_shares(
    leaves: list[tuple[tuple[int, ...], str, bool]], world_size: int, least_bytes: int, order: random.Random
) -> None:
    specs = [spec(number, shape, dtype) for number, (shape, dtype, _) in enumerate(leaves)]
    sharing = [REPLICATED if is_shared else OWN for *_, is_shared in leaves]
    shared = [number for number, how in enumerate(sharing) if how == REPLICATED]
    total_bytes = sum(specs[number].nbytes for number in shared)
    rows: dict[int, list[tuple[int, int]]] = {number: [] for number in shared}
    for rank in range(world_size):
        plan = share_out(specs, sharing, rank=rank, world_size=world_size)
        assert [stretch.leaf for stretch in plan] == sorted({stretch.leaf for stretch in plan})
        assert {stretch.leaf for stretch in plan if stretch.leaf not in rows} == set(range(len(specs))) - set(shared)
        mine = 0
        for number, stretch in plan:
            if number in rows:
                first, last = stretch or (0, max(1, specs[number].shape[0] if specs[number].shape else 1))
                rows[number].append((first, last))
                whole = max(1, specs[number].shape[0] if specs[number].shape else 1)
                mine += specs[number].nbytes // whole * (last - first)
        largest_row = max((specs[n].nbytes // max(1, (specs[n].shape or (1,))[0]) for n in shared), default=0)
        writers = min(world_size, max(1, total_bytes // least_bytes))
        even_bytes = total_bytes / writers if rank < writers else 0
        assert abs(mine - even_bytes) <= largest_row + 2 * WHOLE_BELOW_BYTES
        # The order in which a rank meets its leaves means nothing.
        shuffled = list(range(len(specs)))
        order.shuffle(shuffled)
        again = share_out(
            [specs[n] for n in shuffled], [sharing[n] for n in shuffled], rank=rank, world_size=world_size
        )
        assert sorted(Stretch(shuffled[s.leaf], s.rows) for s in again) == sorted(plan)
    for number, ranges in rows.items():
        whole = max(1, specs[number].shape[0] if specs[number].shape else 1)
        marks = sorted(ranges)
        assert [marks[0][0], marks[-1][1]] == [0, whole]
        assert all(before[1] == after[0] for before, after in pairwise(marks))


@pytest.mark.parametrize("row", [1024, 768, 1000])
def test_stretches_are_whole_pages_where_rows_allow_it(row: int) -> None:
    """A stretch of whole pages is written without a copy; only the last of a leaf may be another."""
    specs = [spec(0, (40_000, row))]
    row_bytes = 4 * row
    step_bytes = math.lcm(PAGE_BYTES, row_bytes)
    for rank in range(7):
        ((_, rows),) = share_out(specs, [REPLICATED], rank=rank, world_size=7)
        assert rows is not None
        if step_bytes <= WHOLE_BELOW_BYTES and rank < 6:
            assert (rows[1] - rows[0]) * row_bytes % PAGE_BYTES == 0


def test_of_the_holders_of_a_shard_one_writes_it_and_they_share_the_bytes() -> None:
    holders = {0: (0, 2), 2: (0, 2), 1: (1, 3), 3: (1, 3)}
    # As in a transformer: large weights and small biases in turn.
    specs = [spec(number, (1000,) if number % 2 else (1000, 1000)) for number in range(40)]
    written: dict[int, list[int]] = {}
    for rank, who in holders.items():
        plan = share_out(specs, [sharded(who)] * len(specs), rank=rank, world_size=4)
        written[rank] = [stretch.leaf for stretch in plan]
        assert all(stretch.rows is None for stretch in plan)
    for pair in ((0, 2), (1, 3)):
        assert sorted(written[pair[0]] + written[pair[1]]) == list(range(40))
        loads = [sum(specs[number].nbytes for number in written[rank]) for rank in pair]
        assert abs(loads[0] - loads[1]) <= 1000 * 1000 * 4


def test_empty_shards_are_not_written_but_empty_tensors_are() -> None:
    empty_shard = ArraySpec("a", "f32", (0, 3), (5, 3), (5, 0), "torch")
    empty_tensor = ArraySpec("b", "f32", (0, 3), (0, 3), (0, 0), "torch")
    plan = share_out([empty_shard, empty_tensor], [sharded([1]), sharded([1, 2])], rank=1, world_size=3)
    assert plan == (Stretch(1),)
    assert share_out([empty_tensor], [sharded([1, 2])], rank=2, world_size=3) == ()
    with pytest.raises(UsageError, match="rank 0 holds a shard"):
        share_out([empty_tensor], [sharded([1, 2])], rank=0, world_size=3)


def test_replicas_that_write_a_part_each_are_read_back_as_they_were() -> None:
    """From trees over shares and parts to the tree again, with arrays of each rank's own."""
    generator = np.random.default_rng(0)
    common = {
        "w": generator.random((1500, 333)), "small": generator.random(7), "scalar": np.array(3.5),
        "empty": np.zeros((0, 4)), "row": generator.random((1, 90_000)),
    }  # fmt: skip

    def tree(rank: int) -> dict[str, Any]:
        # The keys 1 and "1" look the same in a name.
        return {"model": common, "tied": common["w"], "rng": {1: np.array([rank]), "1": np.arange(rank)}, "rank": rank}

    def is_own(path: str, value: Any) -> bool:
        return path.startswith("rng")

    world_size, store = 3, MemoryStore("shares")
    trees = []
    for rank in range(world_size):
        flat = flatten(tree(rank), rank=rank, is_own=is_own)
        sharing = [OWN if is_own(leaf.name, None) else REPLICATED for leaf in flat.leaves]
        plan = share_out([leaf.spec for leaf in flat.leaves], sharing, rank=rank, world_size=world_size)
        trees.append(staged(flat, plan))
    ref, written = write(store, trees, name=NAME)
    common_bytes = sum(array.nbytes for array in common.values())
    assert sum(part.total_bytes for part in written) == common_bytes + sum(8 + 8 * rank for rank in range(world_size))
    reader = opened(store, ref)
    assert {name for name in reader.arrays if "~r" in name} == {
        f"rng/1{number}~r{rank}" for rank in (1, 2) for number in ("", "~2")
    }
    with ThreadPoolExecutor(2) as pool:
        for rank in range(world_size):
            made = {
                name: np.empty(array.shape, "f8" if array.dtype == "f64" else "i8")
                for name, array in reader.arrays.items()
            }
            wanted = [(name, memoryview(array).cast("B")) for name, array in made.items() if array.size]
            reader.read([Target(reader.arrays[name], memory) for name, memory in wanted], pool)
            found = unflatten(decode_document(reader.document(rank)), made.__getitem__)
            assert found["tied"] is found["model"]["w"]
            assert found["rank"] == rank
            for key, array in common.items():
                np.testing.assert_array_equal(found["model"][key], array, strict=True)
            np.testing.assert_array_equal(found["rng"][1], [rank])
            np.testing.assert_array_equal(found["rng"]["1"], np.arange(rank))


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="does not exist"):
        share_out([spec(0, (3,))], [Sharing("replicated")], rank=2, world_size=2)


def shard(name: str, offsets: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...] = (4, 6)) -> ArraySpec:
    return ArraySpec(name, "f32", shape, whole, offsets, "torch")


def test_ranks_that_hold_the_same_shard_are_found_whatever_their_meshes_know() -> None:
    """As FSDP over tensor-parallel does it: what is not tensor-parallel is sharded on the first dimension of the mesh only."""
    grid = {rank: shard("grid", (2 * (rank // 2), 3 * (rank % 2)), (2, 3)) for rank in range(4)}
    rows = {rank: shard("rows", (2 * (rank // 2), 0), (2, 6)) for rank in range(4)}
    uneven = {rank: shard("uneven", (rank // 2, 0), (1 - rank // 2, 5), (1, 5)) for rank in range(4)}
    shards = [{grid[rank]: b"g%d" % rank, rows[rank]: b"r%d" % (rank // 2), uneven[rank]: b""} for rank in range(4)]
    agreed = agree_on_shards(shards)
    assert [mine["grid"] for mine in agreed] == [(0,), (1,), (2,), (3,)]
    assert [mine["rows"] for mine in agreed] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    written = []
    for rank in range(4):
        specs = list(shards[rank])
        plan = share_out(specs, [sharded(agreed[rank][spec.name]) for spec in specs], rank=rank, world_size=4)
        written += [specs[stretch.leaf] for stretch in plan]
    assert len(written) == len(set(written)) == 4 + 2 + 1


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({shard("x", (0, 0), (4, 6)): b"1"}, {shard("x", (0, 0), (4, 6)): b"2"}, "0, 1 should be the same"),
        (
            {shard("x", (0, 0), (2, 6)): b""},
            {shard("x", (0, 0), (3, 6), (3, 6)): b""},
            "differ in dtype or global shape",
        ),
        ({shard("x", (0, 0), (2, 6)): b""}, {}, "has a hole"),
        ({shard("x", (0, 0), (3, 6)): b""}, {shard("x", (2, 0), (2, 6)): b""}, "overlap"),
    ],
)
def test_what_no_reader_could_put_together_is_not_written(
    one: dict[ArraySpec, bytes], other: dict[ArraySpec, bytes], said: str
) -> None:
    with pytest.raises(UnsupportedState, match=f"x: its shards on the ranks .*{said}"):
        agree_on_shards([one, other])
