"""Seeds for everything that is random, derived from one run seed instead of drawn from a stream.

A stream has a position that dies with its process; a derived seed can be computed again by anyone who knows where it belongs, so
the augmentation of sample 7 of epoch 3 is the same before and after a kill, in any worker. The functions are on the path of each
sample: one `fold_in` costs well below a microsecond.

The derivation is part of a run's meaning and never changes. All arithmetic is modulo 2^64:

    gamma        = 0x9E3779B97F4A7C15
    mix64(z)     : z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31
    fold(s, n)   = mix64(s + (n + 1) * gamma)                       n: an integer in [0, 2^64)
    fold(s, t)   = fold(s ^ 0x7465787400000000, h)                  t: text; h: the 8-byte BLAKE2b digest of its UTF-8 bytes,
                                                                    read as a little-endian integer
    derive_seed(seed, a, b, ...) = fold(fold(mix64(seed + gamma), a), b) ...

`fold(s, n)` is output n of the SplitMix64 generator started in state s, hence the name of the parts.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from holdfast.core.errors import UsageError

__all__ = ["GAMMA", "MASK64", "derive_seed", "fold_in", "mix64"]

GAMMA = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1
_TEXT = 0x7465787400000000


def mix64(value: int) -> int:
    """The SplitMix64 finalizer: a bijection of [0, 2^64) in which every input bit reaches every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def _digest64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def fold_in(state: int, part: int | str) -> int:
    """The seed one level below `state`. Integers are taken modulo 2^64; callers on the sample path pass them in range."""
    if isinstance(part, str):
        state, part = state ^ _TEXT, _digest64(part)
    return mix64((state + (part + 1) * GAMMA) & MASK64)


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 64-bit seed that depends on `seed` and on every part, their order included. `"3"` and `3` are different parts."""
    for value in (seed, *parts):
        if not isinstance(value, str) and not 0 <= value <= MASK64:
            raise UsageError(f"a seed and its parts must be integers from 0 to 2**64 - 1 or text, got {value!r}")
    state = mix64((seed + GAMMA) & MASK64)
    for part in parts:
        state = fold_in(state, part)
    return state
