"""The arrays of a checkpoint as wholes, whatever parts they were written in.

parts → arrays by name, each the rectangles that ranks wrote of it. Rectangles that do not make up the whole array exactly, or that
disagree about what it is, are damage and never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from holdfast.checkpoint.arrays import DTYPE_BYTES, ArraySpec
from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import ArrayEntry, Part
from holdfast.checkpoint.regions import Rectangle, tiling_problem
from holdfast.core.errors import FormatError

__all__ = ["Assembled", "Piece", "assemble"]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A rectangle of an array, as one part has it. Chunks count the part's objects; `first_object` is the number of the first of
    these among those of all parts."""

    first_object: int
    entry: ArrayEntry

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.entry.offsets, self.entry.shape)


class Assembled(msgspec.Struct, frozen=True, gc=False):
    """One array of a checkpoint. Its pieces are not empty, do not overlap, and leave no hole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    library: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def spec(self) -> ArraySpec:
        """Of the whole array."""
        return ArraySpec(self.name, self.dtype, self.shape, self.shape, (0,) * len(self.shape), self.library)

    def content(self) -> list[tuple[Rectangle, list[tuple[int, bytes]]]]:
        """What the index says of its bytes. Arrays for which it is equal are equal; others may be."""
        return [
            (piece.rectangle, [(chunk.length, chunk.hashes) for chunk in piece.entry.chunks])
            for piece in sorted(self.pieces, key=lambda piece: piece.entry.offsets)
        ]


@collector_paused()
def assemble(parts: Sequence[Part], *, what: str, is_whole: bool = True) -> dict[str, Assembled]:
    """Every array of the parts, by name. Raises FormatError when the parts of one do not fit together. Unless `is_whole`, these are
    not all parts of the checkpoint, and pieces may be missing."""
    arrays: dict[str, Assembled] = {}
    shared: dict[str, list[Piece]] = {}
    first_object = 0
    for part in parts:
        for entry in part.arrays:
            piece = Piece(first_object, entry)
            if entry.name in arrays:
                shared.setdefault(entry.name, [*arrays[entry.name].pieces]).append(piece)
            elif entry.shape == entry.global_shape:
                filled = (piece,) if entry.chunks else ()
                arrays[entry.name] = Assembled(entry.name, entry.dtype, entry.shape, entry.library, filled)
            else:
                arrays[entry.name] = Assembled(entry.name, entry.dtype, entry.global_shape, entry.library, ())
                shared[entry.name] = [piece]
        first_object += len(part.objects)
    for name, pieces in shared.items():
        arrays[name] = _joined(arrays[name], pieces, what, is_whole)
    return arrays


def _joined(array: Assembled, pieces: Sequence[Piece], what: str, is_whole: bool) -> Assembled:
    for piece in pieces:
        if (piece.entry.dtype, piece.entry.global_shape) != (array.dtype, array.shape):
            raise FormatError(f"{what}: array {array.name!r} has parts of different dtypes or global shapes")
    filled = tuple(piece for piece in pieces if piece.entry.chunks)
    problem = tiling_problem(array.shape, [piece.rectangle for piece in filled]) if is_whole else None
    if problem:
        raise FormatError(f"{what}: array {array.name!r} {problem}")
    return msgspec.structs.replace(array, pieces=filled)
