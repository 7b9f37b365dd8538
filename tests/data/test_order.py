"""The shuffled order: a bijection for every length, pinned for ever, and as random as a shuffle has to be."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.data.order import Permutation
from holdfast.data.seeds import GAMMA, MASK64, derive_seed, mix64

EDGES = sorted({0, 1, 2, 3, 4095, 4096, 4097, 4098, *(2**k + d for k in range(1, 17) for d in (-1, 0, 1))})
SEEDS = st.integers(0, MASK64)


@given(length=st.one_of(st.sampled_from(EDGES), st.integers(0, 30_000)), seed=SEEDS, epoch=st.integers(0, 1000))
def test_it_is_a_bijection_that_can_be_read_anywhere(length: int, seed: int, epoch: int) -> None:
    order = Permutation(length, seed, epoch)
    whole = order.take(0, length)
    assert whole.dtype == np.int64
    assert np.array_equal(np.sort(whole), np.arange(length))
    assert order.take(0, length + 5).size == len(order) == length
    third = length // 3
    assert np.array_equal(order.take(third, 2 * third), whole[third : 2 * third])
    assert order.take(length, length + 3).size == 0
    if length:
        assert [order[third], order[-1]] == [whole[third], whole[-1]]
    with pytest.raises(IndexError):
        order[length]


def reference(length: int, seed: int, epoch: int, position: int) -> int:
    """The description in `order.py`, written down once more in plain integers."""
    key = derive_seed(seed, "order", epoch)
    if length <= 4096:
        return sorted(range(length), key=lambda i: (mix64((key + (i + 1) * GAMMA) & MASK64), i))[position]
    bits = (length - 1).bit_length()
    low = bits // 2
    high = bits - low
    x = position
    while True:
        a, b = x & ((1 << low) - 1), x >> low
        for number in range(12):
            round_key = mix64((key + (number + 1) * GAMMA) & MASK64)
            if number % 2 == 0:
                b ^= mix64((a + round_key) & MASK64) & ((1 << high) - 1)
            else:
                a ^= mix64((b + round_key) & MASK64) & ((1 << low) - 1)
        x = (b << low) | a
        if x < length:
            return x


@given(length=st.integers(1, 2**62), seed=SEEDS, epoch=st.integers(0, MASK64), data=st.data())
def test_it_is_what_its_description_says(length: int, seed: int, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, length - 1))
    assert Permutation(length, seed, epoch)[position] == reference(length, seed, epoch, position)


def test_the_order_never_changes() -> None:
    assert Permutation(10, 0, 0).take(0, 10).tolist() == [2, 0, 3, 4, 6, 1, 7, 5, 8, 9]
    assert Permutation(10, 0, 1).take(0, 10).tolist() == [4, 6, 0, 8, 3, 5, 9, 1, 2, 7]
    assert Permutation(1_000_003, MASK64, 5).take(0, 5).tolist() == [333610, 539686, 314893, 244268, 456548]
    assert Permutation(1 << 62, 9, 9).take(0, 2).tolist() == [119118425390862944, 4284935904443078424]


def chi_square(counts: np.ndarray, cells: int) -> float:
    """In standard deviations from what chance gives; `counts` over `cells` equally likely cells (one constraint)."""
    expected = counts.sum() / cells
    return float((((counts - expected) ** 2 / expected).sum() - (cells - 1)) / (2 * (cells - 1)) ** 0.5)


def test_small_permutations_are_equally_likely() -> None:
    every = list(itertools.permutations(range(5)))
    seen = Counter(tuple(Permutation(5, 1, epoch).take(0, 5).tolist()) for epoch in range(120 * 60))
    assert abs(chi_square(np.array([seen[p] for p in every]), len(every))) < 4


@pytest.mark.parametrize("length", [100, 5000])
def test_positions_and_neighbours_are_uniform_and_epochs_unrelated(length: int) -> None:
    epochs = np.array([Permutation(length, 7, epoch).take(0, length) for epoch in range(200)])
    grid = np.zeros((20, 20))
    np.add.at(grid, (np.broadcast_to(np.arange(length) * 20 // length, epochs.shape), epochs * 20 // length), 1)
    # Rows and columns are fixed by the bijection: (20 - 1)^2 degrees of freedom.
    expected = epochs.size / 400
    assert abs(((grid - expected) ** 2 / expected).sum() - 361) < 5 * (2 * 361) ** 0.5
    steps = np.diff(epochs, axis=1) % length
    assert abs(chi_square(np.bincount(steps.ravel(), minlength=length)[1:], length - 1)) < 5
    correlation = np.corrcoef(epochs[:60])
    assert np.abs(correlation[~np.eye(60, dtype=bool)]).max() < 5 / length**0.5


def test_other_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(Permutation(50, seed, epoch).take(0, 50).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("length", [-1, 2**62 + 1])
def test_impossible_lengths_are_refused(length: int) -> None:
    with pytest.raises(UsageError, match="length of a permutation"):
        Permutation(length, 0, 0)
