"""Rectangles of n-dimensional arrays, as arithmetic: which part of what a rank stored another rank wants, and where it lies.

Everything counts elements in C order; nothing here knows of bytes, files or tensors. A rectangle is `shape` at `offsets` in a
larger one. Who reads uses it so: a target's rectangle ∩ a stored piece → a run of consecutive elements on both sides, or, where
the rows of one are longer than those of the other, blocks of the piece and the rectangles that they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "Rectangle",
    "flat_rectangles",
    "intersect",
    "next_element",
    "run_of",
    "tiling_problem",
    "whole",
]

Shape = tuple[int, ...]


class Rectangle(NamedTuple):
    """`shape` elements that begin at `offsets`."""

    offsets: Shape
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def relative_to(self, origin: Shape) -> Rectangle:
        """The same rectangle seen from `origin`."""
        return Rectangle(tuple(a - b for a, b in zip(self.offsets, origin, strict=True)), self.shape)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.offsets, self.shape, strict=True))


def whole(shape: Shape) -> Rectangle:
    return Rectangle((0,) * len(shape), shape)


def intersect(one: Rectangle, other: Rectangle) -> Rectangle | None:
    """What both have in common; None where that is nothing."""
    offsets, shape = [], []
    for a, n, b, m in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        offsets.append(start)
        shape.append(stop - start)
    return Rectangle(tuple(offsets), tuple(shape))


def run_of(region: Rectangle, shape: Shape) -> int | None:
    """The number of the first element of `region` in an array of `shape`, if the region's elements are consecutive there."""
    position, is_open = 0, False
    for offset, size, extent in zip(region.offsets, region.shape, shape, strict=True):
        if is_open and size != extent:
            return None
        is_open = is_open or size != 1
        position = position * extent + offset
    return position


def next_element(region: Rectangle, shape: Shape, position: int) -> int | None:
    """The first element of `region` whose number in an array of `shape` is at least `position`; None where there is none."""
    index = []
    for extent in reversed(shape):
        position, digit = divmod(position, extent)
        index.append(digit)
    index.reverse()
    if position:
        return None
    found = _at_or_after(region, index)
    if found is None:
        return None
    number = 0
    for digit, extent in zip(found, shape, strict=True):
        number = number * extent + digit
    return number


def _at_or_after(region: Rectangle, index: list[int]) -> list[int] | None:
    """The least index in the region that is not before `index` in C order."""
    ends = [a + n for a, n in zip(region.offsets, region.shape, strict=True)]
    for dimension, (digit, start, end) in enumerate(zip(index, region.offsets, ends, strict=True)):
        if digit < start:
            return [*index[:dimension], *region.offsets[dimension:]]
        if digit >= end:
            # Carry: the last dimension before this one that can be counted up, and the region's beginning behind it.
            for earlier in range(dimension - 1, -1, -1):
                if index[earlier] + 1 < ends[earlier]:
                    return [*index[:earlier], index[earlier] + 1, *region.offsets[earlier + 1 :]]
            return None
    return index


def flat_rectangles(shape: Shape, start: int, stop: int) -> Iterator[Rectangle]:
    """Elements [start, stop) of an array of `shape` as rectangles, in order, each of consecutive elements; at most 2n - 1."""
    if start >= stop:
        return
    if not shape:
        yield Rectangle((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _within_row(shape, start // row, start % row, stop - start // row * row)
        return
    if start % row:
        yield from _within_row(shape, first - 1, start % row, row)
    if first < last:
        yield Rectangle((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if stop % row:
        yield from _within_row(shape, last, 0, stop % row)


def _within_row(shape: Shape, number: int, start: int, stop: int) -> Iterator[Rectangle]:
    for inner in flat_rectangles(shape[1:], start, stop):
        yield Rectangle((number, *inner.offsets), (1, *inner.shape))


def tiling_problem(shape: Shape, rectangles: Sequence[Rectangle]) -> str | None:
    """None if every element of an array of `shape` lies in exactly one of the rectangles, each of which lies within the array and
    is not empty; otherwise what is wrong."""
    if len(rectangles) == 1 and rectangles[0].shape == shape:
        return None
    covered = sum(rectangle.size for rectangle in rectangles)
    if covered < math.prod(shape):
        return "has a hole: not all of it is there"
    # With as many elements as the array has, no overlap means no hole; with more there is an overlap in any case.
    if covered > math.prod(shape) or _overlap(list(rectangles)):
        return "has parts that overlap"
    return None


def _overlap(rectangles: list[Rectangle]) -> bool:
    """Shards come from cutting along one dimension after the other, so they are taken apart in the same way."""
    waiting = [rectangles]
    while waiting:
        group = waiting.pop()
        if len(group) < 2:
            continue
        parts = _cut(group)
        if parts is None:
            if _overlap_in_pairs(group):
                return True
        else:
            waiting += parts
    return False


def _cut(group: list[Rectangle]) -> list[list[Rectangle]] | None:
    """The group in parts with planes between them that cut no rectangle; None where there is no such plane."""
    for dimension in range(len(group[0].shape)):
        ordered = sorted(group, key=lambda rectangle: rectangle.offsets[dimension])
        parts: list[list[Rectangle]] = []
        end = -1
        for rectangle in ordered:
            if not parts or rectangle.offsets[dimension] >= end:
                parts.append([])
            parts[-1].append(rectangle)
            end = max(end, rectangle.offsets[dimension] + rectangle.shape[dimension])
        if len(parts) > 1:
            return parts
    return None


def _overlap_in_pairs(group: list[Rectangle]) -> bool:
    starts = np.array([rectangle.offsets for rectangle in group], dtype=np.int64)
    ends = starts + np.array([rectangle.shape for rectangle in group], dtype=np.int64)
    for number in range(len(group) - 1):
        meets = (starts[number + 1 :] < ends[number]) & (starts[number] < ends[number + 1 :])
        if meets.all(axis=1).any():
            return True
    return False
