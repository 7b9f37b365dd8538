"""What a reader fetches for a rectangle of a tensor that several ranks wrote: the right values, verified blocks, no others."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from many_parts import Counting, opened, ref_to, small_blocks, tree_of, write
from test_regions import cut, inside

from holdfast.checkpoint.format import BLOCK_BYTES, CHUNK_BYTES, CheckpointRef, Part, decode_part, encode_part
from holdfast.checkpoint.known import KnownChunks
from holdfast.checkpoint.read import CheckpointReader, Target
from holdfast.checkpoint.regions import Rectangle, whole
from holdfast.checkpoint.write import WrittenPart, put_root
from holdfast.core.errors import FormatError, IntegrityError, NotFound, UsageError
from holdfast.core.sealed import digest
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore

shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)


def empty_store(name: str) -> MemoryStore:
    store = MemoryStore(name)
    for entry in list(store.list()):
        store.delete(entry.key)
    return store


def fetch(reader: CheckpointReader, name: str, rectangle: Rectangle | None, dtype: Any, threads: int = 2) -> Any:
    array = reader.arrays[name]
    shape = array.shape if rectangle is None else rectangle.shape
    made = np.zeros(shape, dtype)
    with ThreadPoolExecutor(threads) as pool:
        reader.read([Target(array, memoryview(made.reshape(-1)).cast("B"), rectangle)], pool)
    return made


@settings(max_examples=150)
@given(st.data())
def test_any_rectangle_of_any_sharding_is_what_numpy_slices(data: st.DataObject) -> None:
    """Many blocks, chunks and parts; every element of its own value."""
    shape, dtype = data.draw(shapes), data.draw(st.sampled_from(["u1", "<u2", "<f4", "<f8", "<c16"]))
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    parts = cut(whole(shape), data, data.draw(st.integers(0, 3)))
    ranks: list[list[tuple[Any, Rectangle]]] = [[] for _ in parts]
    for rank, part in enumerate(parts):
        ranks[rank].append((array, part))
    blocks = data.draw(st.sampled_from([(16, 48, 32), (16, 16, 16), (64, 256, 64)]))
    with small_blocks(*blocks):
        store = Counting(empty_store("targets"))
        ref, _ = write(store, [tree_of({"x": pieces}) for pieces in ranks])
        reader = opened(store, ref)
        np.testing.assert_array_equal(fetch(reader, "x", None, dtype), array, strict=True)
        wanted = data.draw(inside(shape))
        store.ranges.clear()
        np.testing.assert_array_equal(fetch(reader, "x", wanted, dtype), array[wanted.slices()], strict=True)
        needed = blocks_of(reader, wanted, array.dtype.itemsize, blocks[0])
        asked = {
            (key, start) for key, offset, length in store.ranges for start in range(offset, offset + length, blocks[0])
        }
        assert {(key, start) for key, start, _ in needed} <= asked
        assert sum(length for *_, length in store.ranges) <= sum(length for *_, length in needed) + joined_bytes(store)
        a, b = sorted(data.draw(st.tuples(*[st.integers(0, array.size)] * 2)))
        flat = np.zeros(b - a, dtype)
        with ThreadPoolExecutor(1) as pool:
            target = memoryview(flat).cast("B")
            reader.read([Target(reader.arrays["x"], target, start_byte=a * array.itemsize)], pool)
        np.testing.assert_array_equal(flat, array.reshape(-1)[a:b], strict=True)


def joined_bytes(store: Counting) -> int:
    """What lies between small blocks that are fetched by one request, at most."""
    return sum(length for *_, length in store.ranges if length < 16)


def blocks_of(
    reader: CheckpointReader, wanted: Rectangle, item_bytes: int, block_bytes: int
) -> list[tuple[str, int, int]]:
    """By brute force: the blocks (object, offset, length) that hold an element of the rectangle."""
    found = []
    for part in reader.parts:
        for entry in part.arrays:
            mask = np.zeros(entry.global_shape, bool)
            mask[wanted.slices()] = True
            held = np.repeat(mask[Rectangle(entry.offsets, entry.shape).slices()].reshape(-1), item_bytes)
            position = 0
            for chunk in entry.chunks:
                for start in range(0, chunk.length, block_bytes):
                    length = min(block_bytes, chunk.length - start)
                    if held[position + start : position + start + length].any():
                        found.append((part.objects[chunk.object].key, chunk.offset + start, length))
                position += chunk.length
    return found


def test_only_the_blocks_that_are_needed_are_read_and_each_once() -> None:
    """At real sizes: 24 MiB over three parts; rows, a column, and a few elements of it."""
    array = np.random.default_rng(0).integers(0, 2**32, (6144, 1024), dtype=np.uint32)
    store = Counting(empty_store("blocks"))
    cuts = [0, 2000, 4096, 6144]
    parts = [Rectangle((a, 0), (b - a, 1024)) for a, b in pairwise(cuts)]
    ref, _ = write(store, [tree_of({"x": [(array, part)]}) for part in parts])
    reader = opened(store, ref)
    for rectangle in (
        Rectangle((1990, 0), (20, 1024)), Rectangle((300, 0), (5000, 1024)), Rectangle((0, 1000), (6144, 24)),
        Rectangle((4095, 1023), (2, 1)), Rectangle((256, 0), (1024, 1024)),
    ):  # fmt: skip
        store.ranges.clear()
        np.testing.assert_array_equal(fetch(reader, "x", rectangle, np.uint32), array[rectangle.slices()])
        needed = blocks_of(reader, rectangle, 4, BLOCK_BYTES)
        assert sum(length for *_, length in store.ranges) == sum(length for *_, length in needed)
    store.ranges.clear()
    with ThreadPoolExecutor(2) as pool:
        reader.read([Target(reader.arrays["x"], memoryview(np.empty_like(array)).cast("B"))], pool)
    assert sum(length for *_, length in store.ranges) == array.nbytes


def test_memory_of_its_own_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of a large tensor: never more than a few MiB for each thread."""
    array = np.random.default_rng(0).random((48, 1 << 17))
    assert array.nbytes > 2 * CHUNK_BYTES
    store = empty_store("bounded")
    ref, _ = write(store, [tree_of({"x": [(array, whole(array.shape))]})])
    reader = opened(store, ref)
    lock, live, most = threading.Lock(), 0, 0
    original = CheckpointReader._read_blocks

    def watched(self: CheckpointReader, item: Any, progress: Callable[[int], None]) -> None:
        nonlocal live, most
        size = 0 if item.target is not None else item.length
        with lock:
            live += size
            most = max(most, live)
        original(self, item, progress)
        with lock:
            live -= size

    monkeypatch.setattr(CheckpointReader, "_read_blocks", watched)
    found = fetch(reader, "x", Rectangle((0, 5000), (48, 100_000)), "<f8", threads=8)
    np.testing.assert_array_equal(found, array[:, 5000:105_000])
    assert 0 < most <= 64 << 20


def test_what_cannot_be_meant_is_refused() -> None:
    array = np.arange(12.0).reshape(3, 4)
    ref, _ = write(empty_store("refused"), [tree_of({"x": [(array, whole((3, 4)))]})])
    reader = opened(MemoryStore("refused"), ref)
    x = reader.arrays["x"]
    with ThreadPoolExecutor(1) as pool:
        for target in (
            Target(x, memoryview(bytearray(95))), Target(x, memoryview(bytearray(97))),
            Target(x, memoryview(bytearray(16)), Rectangle((2, 3), (1, 2))),
            Target(x, memoryview(bytearray(8)), Rectangle((2, 3), (1, 2))),
            Target(x, memoryview(bytearray(16)), start_byte=88), Target(x, memoryview(bytearray(8)), start_byte=4),
        ):  # fmt: skip
            with pytest.raises(UsageError, match="array 'x'"):
                reader.read([target], pool)


ROWS = np.arange(70.0).reshape(7, 10)
TOP, MIDDLE, BOTTOM = Rectangle((0, 0), (3, 10)), Rectangle((3, 0), (2, 10)), Rectangle((5, 0), (2, 10))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([[TOP], [BOTTOM]], "has a hole"),
        ([[TOP], [MIDDLE], [Rectangle((4, 0), (3, 10))]], "overlap"),
        ([[TOP], [Rectangle((2, 0), (2, 10))], [BOTTOM]], "overlap"),
        ([[whole((7, 10))], [whole((7, 10))]], "overlap"),
        ([[whole((7, 10))], [BOTTOM]], "overlap"),
        ([[Rectangle((0, 0), (7, 9))]], "has a hole"),
    ],
)
def test_rectangles_that_do_not_make_up_the_tensor_are_refused(
    parts: Sequence[Sequence[Rectangle]], problem: str
) -> None:
    store = empty_store("tiles")
    ref, _ = write(store, [tree_of({"x": [(ROWS, part) for part in mine]}) for mine in parts])
    with pytest.raises(FormatError, match=problem):
        opened(store, ref)


def test_parts_that_disagree_about_a_tensor_are_refused() -> None:
    store = empty_store("disagree")
    for other, rectangle in ((ROWS.astype("f4"), BOTTOM), (np.arange(80.0).reshape(8, 10), Rectangle((5, 0), (3, 10)))):
        trees = [tree_of({"x": [(ROWS, Rectangle((0, 0), (5, 10)))]}), tree_of({"x": [(other, rectangle)]})]
        ref, _ = write(store, trees)
        with pytest.raises(FormatError, match="different dtypes or global shapes"):
            opened(store, ref)


def handmade(store: Store, change: Callable[[list[Part]], list[Part]]) -> CheckpointRef:
    """A checkpoint of two ranks whose parts are changed by somebody who makes all hashes right."""
    _, written = write(
        store, [tree_of({"x": [(ROWS, TOP), (ROWS, MIDDLE)][:1]}), tree_of({"x": [(ROWS, Rectangle((3, 0), (4, 10)))]})]
    )
    parts = change([decode_part(store.get(part.key, max_bytes=1 << 20), what="") for part in written])
    made: list[WrittenPart] = []
    for before, part in zip(written, parts, strict=True):
        data = encode_part(part)
        store.delete(before.key)
        store.put(before.key, data)
        fields = {"size_bytes": len(data), "blake3": digest(data)}
        made.append(msgspec.convert({**msgspec.to_builtins(before), **fields}, WrittenPart))
    store.delete("checkpoints/00000002-1-abc/root.json")
    _, root_blake3 = put_root(store, "run", "checkpoints/00000002-1-abc", made, {})
    return ref_to(made, root_blake3)


def test_hostile_parts_are_refused() -> None:
    def as_rank(part: Part, rank: int) -> Part:
        return msgspec.structs.replace(part, rank=rank)

    def with_entry(part: Part, **fields: Any) -> Part:
        return msgspec.structs.replace(part, arrays=[msgspec.structs.replace(part.arrays[0], **fields)])

    changes: dict[str, Callable[[list[Part]], list[Part]]] = {
        "rank 1 where that of rank 0": lambda parts: [as_rank(parts[0], 1), as_rank(parts[1], 0)],
        "listed twice": lambda parts: [msgspec.structs.replace(parts[0], arrays=parts[0].arrays * 2), parts[1]],
        "outside its global shape": lambda parts: [parts[0], with_entry(parts[1], offsets=(4, 0))],
        "overlap": lambda parts: [parts[0], with_entry(parts[1], offsets=(2, 0))],
        "shapes of different length": lambda parts: [parts[0], with_entry(parts[1], offsets=(3,))],
        "should have 400 bytes": lambda parts: [parts[0], with_entry(parts[1], shape=(5, 10), offsets=(2, 0))],
        "has a hole": lambda parts: [parts[0], msgspec.structs.replace(parts[1], arrays=[])],
        "do not have the 560 bytes": lambda parts: [msgspec.structs.replace(part, arrays=[]) for part in parts],
    }
    for problem, change in changes.items():
        store = empty_store("hostile")
        ref = handmade(store, change)
        with pytest.raises(FormatError, match=problem):
            opened(store, ref)
    opened(store, handmade(store, lambda parts: parts))


def test_every_altered_cut_or_missing_object_is_found() -> None:
    """Of three ranks, one object after the other; what is read is either right or refused."""
    array = np.random.default_rng(1).random((512, 600))
    thirds = [Rectangle((0, 200 * rank), (512, 200)) for rank in range(3)]
    store = empty_store("damage")
    ref, _ = write(
        store,
        [
            tree_of({"x": [(array, part)], f"own~r{rank}": [(np.arange(5), whole((5,)))]})
            for rank, part in enumerate(thirds)
        ],
    )
    keys = [entry.key for entry in store.list()]
    assert len(keys) >= 7
    for key in keys:
        data = store.get(key, max_bytes=1 << 30)
        flipped = bytearray(data)
        flipped[len(data) // 3] ^= 0x10
        for damaged in (bytes(flipped), data[:-1], b"", None):
            store.delete(key)
            if damaged is not None:
                store.put(key, damaged)
            with pytest.raises((IntegrityError, NotFound)):
                read_all(store, ref)
            if key.startswith("data/"):
                unharmed_or_refused(store, ref, array)
        store.delete(key)
        store.put(key, data)
    np.testing.assert_array_equal(fetch(opened(store, ref), "x", None, "<f8"), array)


def read_all(store: Store, ref: CheckpointRef) -> None:
    reader = opened(store, ref)
    for name in reader.arrays:
        fetch(reader, name, None, "<i8" if "own" in name else "<f8")


def unharmed_or_refused(store: Store, ref: CheckpointRef, array: np.ndarray[Any, Any]) -> None:
    """Ranks that need nothing of the damaged object restore; the others are told."""
    reader = opened(store, ref)
    for start in (0, 100, 250, 450):
        part = Rectangle((100, start), (200, 120))
        with suppress(IntegrityError, NotFound):
            np.testing.assert_array_equal(fetch(reader, "x", part, "<f8"), array[part.slices()])


def test_what_one_rank_has_written_another_need_not_write_again() -> None:
    """Known chunks are those of all parts, and the root names what all of them need."""
    array, store = np.random.default_rng(2).random((300, 1000)), empty_store("known")
    halves = [Rectangle((0, 0), (150, 1000)), Rectangle((150, 0), (150, 1000))]
    first, _ = write(store, [tree_of({"x": [(array, part)]}) for part in halves])
    reader, known = opened(store, first), KnownChunks()
    known.add(first.name, *reader.parts)
    name = "checkpoints/00000003-1-def"
    # The ranks have changed places.
    second, written = write(
        store, [tree_of({"x": [(array, part)]}) for part in halves[::-1]], known=known, name=name, seed=1
    )
    assert [part.sent_bytes for part in written] == [0, 0]
    assert opened(store, second).root.objects == reader.root.objects
    np.testing.assert_array_equal(fetch(opened(store, second), "x", None, "<f8"), array)
