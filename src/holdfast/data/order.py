"""The shuffled order of an epoch as a function, not as a list: position in, sample index out, nothing to store or to replay.

A stored permutation of a billion samples is 8 GB, and a generator that is replayed to position k costs O(k) at each resume.
Here any stretch of the order is computed from (length, seed, epoch) alone, so resuming in the middle of an epoch costs the same
as starting it.

The algorithm uses only 64-bit integer arithmetic modulo 2^64, never a library's generator, so the order is the same on every
platform and version. It is part of a run's meaning and never changes (`seeds.py` defines derive_seed, fold, mix64 and gamma):

    key       = derive_seed(seed, "order", epoch)

Up to 4096 samples, `order` lists the indices i = 0 .. length - 1 sorted by fold(key, i), equal keys by i. Every permutation is
then equally likely; a network over so few bits would prefer some (measured: a chi-square of 20 sigma for 5 samples). Above, it
is a keyed Feistel network on `bits` bits with cycle walking:

    bits      = bit length of (length - 1)               the domain [0, 2^bits) is less than twice the length
    low       = bits // 2;   high = bits - low           x is split into its `low` lowest bits and its `high` highest bits
    key[r]    = mix64(key + (r + 1) * gamma)             r = 0 .. 11
    round r   : r even:  highest bits ^= mix64(lowest bits + key[r])  truncated to its `high` lowest bits
                r odd:   lowest bits  ^= mix64(highest bits + key[r]) truncated to its `low` lowest bits
    order(i)  = the twelve rounds applied to i, and applied again while the result is not below `length`

Every round can be undone, so the rounds are a bijection of the domain, and walking its cycles back into [0, length) is one of
the range.

The order does not depend on the world size: it is one global order, from which the ranks of a job take disjoint stretches of each
global batch (see `global_batch.py`).
"""

from __future__ import annotations

from operator import index as as_integer

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import UsageError
from holdfast.data.seeds import GAMMA, MASK64, derive_seed, mix64

__all__ = ["Permutation"]

_ROUNDS = 12
_LONGEST = 1 << 62
_SORTED_UP_TO = 4096


class Permutation:
    """A pseudo-random permutation of `range(length)`. Immutable, at most 32 KiB whatever the length, any number of threads."""

    __slots__ = ("_bits", "_keys", "_low", "_table", "epoch", "length", "seed")

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        if not 0 <= length <= _LONGEST:
            raise UsageError(f"the length of a permutation must be from 0 to 2**62, got {length}")
        self.length, self.seed, self.epoch = length, seed, epoch
        key = derive_seed(seed, "order", epoch)
        self._table = _sorted_order(length, key) if length <= _SORTED_UP_TO else None
        self._bits = (length - 1).bit_length()
        self._low = self._bits // 2
        self._keys = tuple(mix64((key + (number + 1) * GAMMA) & MASK64) for number in range(_ROUNDS))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> int:
        """The index at `position`; negative positions count from the end, as in a list."""
        position = as_integer(position)
        if position < 0:
            position += self.length
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} of a permutation of {self.length}")
        return int(self.take(position, position + 1)[0])

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """The indices at positions start .. stop - 1, cut at the length; costs O(stop - start) wherever `start` is."""
        start, stop = max(start, 0), min(stop, self.length)
        return self.at(np.arange(start, max(start, stop), dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices at any positions, each of them in [0, length)."""
        if self._table is not None:
            return self._table[positions]
        values = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= np.uint64(self.length))
        while outside.size:
            walked = self._encrypt(values[outside])
            values[outside] = walked
            outside = outside[walked >= np.uint64(self.length)]
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low = np.uint64(self._low)
        low_mask = np.uint64((1 << self._low) - 1)
        high_mask = np.uint64((1 << (self._bits - self._low)) - 1)
        lowest, highest = values & low_mask, values >> low
        scratch = np.empty_like(values)
        shifted = np.empty_like(values)
        for number, key in enumerate(self._keys):
            source, target, mask = (lowest, highest, high_mask) if number % 2 == 0 else (highest, lowest, low_mask)
            np.add(source, np.uint64(key), out=scratch)
            _mix64_in_place(scratch, shifted)
            scratch &= mask
            target ^= scratch
        highest <<= low
        highest |= lowest
        return highest


def _sorted_order(length: int, key: int) -> NDArray[np.int64]:
    weights = np.arange(1, length + 1, dtype=np.uint64)
    weights *= np.uint64(GAMMA)
    weights += np.uint64(key)
    _mix64_in_place(weights, np.empty_like(weights))
    return np.argsort(weights, kind="stable").astype(np.int64)


def _mix64_in_place(values: NDArray[np.uint64], shifted: NDArray[np.uint64]) -> None:
    """`seeds.mix64` for an array; array arithmetic in uint64 wraps silently. `shifted` is scratch of the same shape."""
    np.right_shift(values, np.uint64(30), out=shifted)
    values ^= shifted
    values *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(values, np.uint64(27), out=shifted)
    values ^= shifted
    values *= np.uint64(0x94D049BB133111EB)
    np.right_shift(values, np.uint64(31), out=shifted)
    values ^= shifted
