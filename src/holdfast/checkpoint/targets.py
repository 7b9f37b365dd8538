"""From what somebody wants to have in memory to the requests that fetch it.

    target (an array, a range of its bytes, a rectangle of it) → pieces that hold it → whole blocks of their chunks → wanted

Only whole blocks can be verified, so only whole blocks are fetched, and of those only the ones that are needed. What is
consecutive in the piece and in the target goes straight to its place. The rest goes through memory of at most `SPAN_BYTES` for each
request, and is put in place once it is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from holdfast.checkpoint.arrays import DTYPE_BYTES
from holdfast.checkpoint.assemble import Assembled, Piece
from holdfast.checkpoint.format import BLOCK_BYTES, HASH_BYTES, Chunk
from holdfast.checkpoint.regions import Rectangle, flat_rectangles, intersect, next_element, run_of, whole
from holdfast.core.errors import UsageError

__all__ = ["SPAN_BYTES", "Target", "Wanted", "wanted_for"]

SPAN_BYTES = 8 << 20
"""With eight threads at most 64 MiB are on their way through memory of their own."""


class Target(msgspec.Struct, frozen=True, gc=False):
    """Memory that is to hold bytes of an array, in C order: all of it; or with `rectangle` that part of it; or with `start_byte`
    the bytes from there on, as many as the memory has."""

    array: Assembled
    memory: memoryview
    rectangle: Rectangle | None = None
    start_byte: int | None = None


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """Whole blocks of one chunk: `length` bytes at `offset` of object number `object`. They go to `target`; or, where that is None,
    to memory of the reader's, from which `place` takes them once they are verified."""

    object: int
    offset: int
    length: int
    hashes: bytes
    target: memoryview | None
    array: str
    place: Callable[[memoryview], None] | None = None


def wanted_for(target: Target) -> Iterable[Wanted]:
    """Raises UsageError when the memory has another size than what it is to hold."""
    array, memory = target.array, target.memory
    if target.start_byte is not None:
        return _flat(array, memory, target.start_byte)
    if target.rectangle is None and len(array.pieces) == 1:
        piece = array.pieces[0]
        chunks = piece.entry.chunks
        if len(chunks) == 1 and chunks[0].length == len(memory):
            # Most arrays of a state of thousands are such ones.
            return (_whole_chunk(array.name, piece.first_object, chunks[0], memory),)
        return _whole_piece(array.name, piece, memory)
    return _rectangle(array, memory, target.rectangle or whole(array.shape))


def _whole_chunk(name: str, first_object: int, chunk: Chunk, memory: memoryview) -> Wanted:
    return Wanted(first_object + chunk.object, chunk.offset, chunk.length, chunk.hashes, memory, name)


def _whole_piece(name: str, piece: Piece, memory: memoryview) -> Iterator[Wanted]:
    position, size_bytes = 0, len(memory)
    for chunk in piece.entry.chunks:
        target = memory[position : position + chunk.length]
        position += chunk.length
        yield _whole_chunk(name, piece.first_object, chunk, target)
    if position != size_bytes:
        raise _wrong_size(name, position, size_bytes)


def _wrong_size(name: str, array_bytes: int, memory_bytes: int) -> UsageError:
    return UsageError(f"array {name!r} has {array_bytes} bytes, its buffer {memory_bytes}")


def _flat(array: Assembled, memory: memoryview, start_byte: int) -> Iterator[Wanted]:
    item_bytes = DTYPE_BYTES[array.dtype]
    stop_byte = start_byte + len(memory)
    if not 0 <= start_byte <= stop_byte <= array.nbytes or start_byte % item_bytes or stop_byte % item_bytes:
        raise UsageError(f"array {array.name!r} of {array.nbytes} bytes has no elements at [{start_byte}, {stop_byte})")
    if len(array.pieces) == 1:
        yield from _run(array.name, array.pieces[0], start_byte, memory)
        return
    position = 0
    for rectangle in flat_rectangles(array.shape, start_byte // item_bytes, stop_byte // item_bytes):
        length = rectangle.size * item_bytes
        yield from _rectangle(array, memory[position : position + length], rectangle)
        position += length


def _rectangle(array: Assembled, memory: memoryview, rectangle: Rectangle) -> Iterator[Wanted]:
    item_bytes = DTYPE_BYTES[array.dtype]
    if rectangle.size * item_bytes != len(memory):
        raise _wrong_size(array.name, rectangle.size * item_bytes, len(memory))
    if intersect(rectangle, whole(array.shape)) != rectangle and rectangle.size:
        raise UsageError(
            f"array {array.name!r} of shape {array.shape} has no part {rectangle.shape} at {rectangle.offsets}"
        )
    for piece in array.pieces:
        common = intersect(rectangle, piece.rectangle)
        if common is None:
            continue
        there, here = common.relative_to(piece.entry.offsets), common.relative_to(rectangle.offsets)
        first, position = run_of(there, piece.entry.shape), run_of(here, rectangle.shape)
        if first is not None and position is not None:
            start, length = position * item_bytes, common.size * item_bytes
            yield from _run(array.name, piece, first * item_bytes, memory[start : start + length])
        else:
            into = np.frombuffer(memory, dtype=_same_size(item_bytes)).reshape(rectangle.shape)
            yield from _scattered(array.name, piece, there, into[here.slices()])


def _run(name: str, piece: Piece, start: int, memory: memoryview) -> Iterator[Wanted]:
    """Consecutive bytes of a piece, from `start` on, into consecutive memory."""
    stop, begin = start + len(memory), 0
    for chunk in piece.entry.chunks:
        first, last = max(start - begin, 0), min(stop - begin, chunk.length)
        if first < last:
            target = memory[begin + first - start : begin + last - start]
            yield from _run_in_chunk(name, piece.first_object, chunk, first, target)
        begin += chunk.length


def _run_in_chunk(name: str, first_object: int, chunk: Chunk, first: int, target: memoryview) -> Iterator[Wanted]:
    """The blocks that are wanted whole go straight to their place, those at either end are cut."""
    last = first + len(target)
    inner = -(-first // BLOCK_BYTES) * BLOCK_BYTES
    outer = last if last == chunk.length else last // BLOCK_BYTES * BLOCK_BYTES
    if inner >= outer:
        yield _cut(name, first_object, chunk, first, target)
        return
    if first < inner:
        yield _cut(name, first_object, chunk, first, target[: inner - first])
    yield Wanted(
        first_object + chunk.object, chunk.offset + inner, outer - inner, _hashes(chunk, inner, outer),
        target[inner - first : outer - first], name,
    )  # fmt: skip
    if outer < last:
        yield _cut(name, first_object, chunk, outer, target[outer - first :])


def _cut(name: str, first_object: int, chunk: Chunk, first: int, target: memoryview) -> Wanted:
    """Bytes of a chunk from `first` on that are no whole blocks."""
    start, stop = _blocks_around(chunk, first, first + len(target))

    def place(data: memoryview) -> None:
        target[:] = data[first - start : first - start + len(target)]

    return Wanted(
        first_object + chunk.object, chunk.offset + start, stop - start, _hashes(chunk, start, stop), None, name, place
    )


def _scattered(name: str, piece: Piece, region: Rectangle, into: npt.NDArray[np.void]) -> Iterator[Wanted]:
    """A rectangle of a piece whose elements are not consecutive there, or not in the target."""
    item_bytes, shape = into.itemsize, piece.entry.shape
    begin = 0
    for chunk in piece.entry.chunks:
        for start, stop in _needed_blocks(region, shape, item_bytes, begin, chunk.length):
            scatter = partial(_scatter, region, shape, (begin + start) // item_bytes, into)
            yield Wanted(
                piece.first_object + chunk.object, chunk.offset + start, stop - start, _hashes(chunk, start, stop), None, name,
                scatter,
            )  # fmt: skip
        begin += chunk.length


def _needed_blocks(
    region: Rectangle, shape: tuple[int, ...], item_bytes: int, begin: int, length: int
) -> Iterator[tuple[int, int]]:
    """Ranges of a chunk, whole blocks of at most `SPAN_BYTES`, that hold elements of the region. The chunk is bytes
    [begin, begin + length) of an array of `shape`."""
    position = start = stop = 0
    while position < length:
        element = next_element(region, shape, (begin + position) // item_bytes)
        if element is None or element * item_bytes >= begin + length:
            break
        first = (element * item_bytes - begin) // BLOCK_BYTES * BLOCK_BYTES
        if first != stop or first - start >= SPAN_BYTES:
            if start < stop:
                yield start, stop
            start = first
        position = stop = min(first + BLOCK_BYTES, length)
    if start < stop:
        yield start, stop


def _scatter(
    region: Rectangle, shape: tuple[int, ...], first: int, into: npt.NDArray[np.void], data: memoryview
) -> None:
    """`data` holds elements of an array of `shape`, from number `first` on; those of `region` go to their places in `into`."""
    elements = np.frombuffer(data, dtype=into.dtype)
    position = 0
    for block in flat_rectangles(shape, first, first + len(elements)):
        common = intersect(region, block)
        if common is not None:
            held = elements[position : position + block.size].reshape(block.shape)
            into[common.relative_to(region.offsets).slices()] = held[common.relative_to(block.offsets).slices()]
        position += block.size


def _blocks_around(chunk: Chunk, first: int, last: int) -> tuple[int, int]:
    return first // BLOCK_BYTES * BLOCK_BYTES, min(chunk.length, -(-last // BLOCK_BYTES) * BLOCK_BYTES)


def _hashes(chunk: Chunk, start: int, stop: int) -> bytes:
    return chunk.hashes[start // BLOCK_BYTES * HASH_BYTES : -(-stop // BLOCK_BYTES) * HASH_BYTES]


def _same_size(item_bytes: int) -> np.dtype[np.void]:
    """Numbers of the same size: they are only moved."""
    return np.dtype(f"u{item_bytes}" if item_bytes <= 8 else f"V{item_bytes}")
