"""Derived seeds: pinned for ever, different wherever any part differs, and composable level by level."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.data.seeds import MASK64, derive_seed, fold_in

PART = st.one_of(st.integers(0, MASK64), st.text(max_size=8))


def test_seeds_never_change() -> None:
    assert derive_seed(0) == 16294208416658607535  # the first output of SplitMix64(0), a published test value
    assert derive_seed(1, 2, "x") == 10831126029054322485
    assert derive_seed(MASK64, "order", 3) == 11538140631638289611


@given(seed=st.integers(0, MASK64), parts=st.lists(PART, max_size=4), last=PART)
def test_a_seed_can_be_derived_level_by_level(seed: int, parts: list[int | str], last: int | str) -> None:
    derived = derive_seed(seed, *parts, last)
    assert 0 <= derived <= MASK64
    assert derived == fold_in(derive_seed(seed, *parts), last) != derive_seed(seed, *parts)


@given(st.lists(st.tuples(st.integers(0, MASK64), st.lists(PART, max_size=3).map(tuple)), unique=True, max_size=20))
def test_no_two_paths_share_a_seed(paths: list[tuple[int, tuple[int | str, ...]]]) -> None:
    assert len({derive_seed(seed, *parts) for seed, parts in paths}) == len(paths)


def test_neighbouring_seeds_have_nothing_in_common() -> None:
    state = derive_seed(3, "sample", 0)
    values = np.array([fold_in(state, place) for place in range(20_000)], dtype=np.uint64)
    bits = (values[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    flipped = (bits[1:] ^ bits[:-1]).mean(axis=0)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(flipped - 0.5).max() < 0.02


@pytest.mark.parametrize("wrong", [-1, MASK64 + 1])
def test_numbers_out_of_range_are_refused(wrong: int) -> None:
    with pytest.raises(UsageError, match="0 to 2"):
        derive_seed(wrong)
    with pytest.raises(UsageError, match="0 to 2"):
        derive_seed(0, wrong)
