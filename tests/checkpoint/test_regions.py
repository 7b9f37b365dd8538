"""Rectangles against numpy, which slices the same arrays."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.regions import (
    Rectangle,
    flat_rectangles,
    intersect,
    next_element,
    run_of,
    tiling_problem,
    whole,
)

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def inside(shape: tuple[int, ...]) -> st.SearchStrategy[Rectangle]:
    """Rectangles in an array of `shape` that are not empty."""
    ends = st.tuples(*(st.tuples(st.integers(0, size - 1), st.integers(1, size)) for size in shape))
    return ends.map(
        lambda pairs: Rectangle(tuple(min(a, b - 1) for a, b in pairs), tuple(b - min(a, b - 1) for a, b in pairs))
    )


def numbers(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.arange(math.prod(shape)).reshape(shape)


@given(st.data())
def test_a_rectangle_is_what_numpy_slices(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    one, other = data.draw(inside(shape)), data.draw(inside(shape))
    array = numbers(shape)
    held = array[one.slices()].reshape(-1)
    both = sorted(set(held.tolist()) & set(array[other.slices()].reshape(-1).tolist()))
    common = intersect(one, other)
    assert both == ([] if common is None else array[common.slices()].reshape(-1).tolist())
    if common is not None:
        part = array[one.slices()][common.relative_to(one.offsets).slices()]
        assert part.reshape(-1).tolist() == both
    first = run_of(one, shape)
    is_run = held.tolist() == list(range(held[0], held[0] + held.size))
    assert first == (held[0] if is_run else None)
    position = data.draw(st.integers(0, array.size + 2))
    assert next_element(one, shape, position) == min((n for n in held.tolist() if n >= position), default=None)


@given(st.data())
def test_a_range_of_elements_is_a_few_rectangles_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    array = numbers(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, array.size)] * 2)))
    rectangles = list(flat_rectangles(shape, start, stop))
    found = [number for rectangle in rectangles for number in array[rectangle.slices()].reshape(-1).tolist()]
    assert found == list(range(start, stop))
    assert len(rectangles) <= max(1, 2 * len(shape) - 1)


def cut(rectangle: Rectangle, data: st.DataObject, depth: int) -> list[Rectangle]:
    """The rectangle in parts, as one mesh dimension after the other would cut it."""
    if depth == 0 or not rectangle.shape:
        return [rectangle]
    dimension = data.draw(st.integers(0, len(rectangle.shape) - 1))
    size = rectangle.shape[dimension]
    marks = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else []), size]
    parts = []
    for a, b in pairwise(marks):
        offsets, shape = list(rectangle.offsets), list(rectangle.shape)
        offsets[dimension] += a
        shape[dimension] = b - a
        parts += cut(Rectangle(tuple(offsets), tuple(shape)), data, depth - 1)
    return parts


@given(st.data())
def test_cut_arrays_are_whole_and_anything_else_is_not(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    parts = data.draw(st.permutations(cut(whole(shape), data, 2)))
    assert tiling_problem(shape, parts) is None
    damage = data.draw(st.sampled_from(["lose", "repeat", "move", "any"]))
    if damage == "lose":
        parts = parts[1:]
    elif damage == "repeat":
        parts = [*parts, parts[0]]
    elif damage == "move":
        parts = [data.draw(inside(shape)), *parts[1:]]
    else:
        parts = data.draw(st.lists(inside(shape), min_size=1, max_size=6))
    painted = np.zeros(shape, int)
    for part in parts:
        painted[part.slices()] += 1
    assert (tiling_problem(shape, parts) is None) == bool((painted == 1).all())


def test_a_tiling_that_no_plane_cuts_is_understood() -> None:
    pinwheel = [
        Rectangle((0, 0), (1, 2)), Rectangle((0, 2), (2, 1)), Rectangle((2, 1), (1, 2)), Rectangle((1, 0), (2, 1)),
        Rectangle((1, 1), (1, 1)),
    ]  # fmt: skip
    assert tiling_problem((3, 3), pinwheel) is None
    turned = [*pinwheel[:4], Rectangle((0, 1), (1, 1))]
    assert tiling_problem((3, 3), turned) == "has parts that overlap"


def test_many_shards_are_checked_in_no_time() -> None:
    grid = [Rectangle((4 * i, 8 * j), (4, 8)) for i, j in product(range(64), range(64))]
    assert tiling_problem((256, 512), grid) is None
