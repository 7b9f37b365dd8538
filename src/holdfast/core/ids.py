"""Names that are never used twice.

Everything under a run's URL that holds data is named once and never again (a DELETE cannot be fenced, so a reused name could
be removed by a stale sweeper). A `TokenSource` is injected so that tests can replay the same names.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

__all__ = ["TokenSource", "random_token", "seeded_tokens"]

TokenSource = Callable[[], str]
"""Returns a fresh name of 24 lower-case hexadecimal digits (96 bits) at every call. Thread-safe."""


def random_token() -> str:
    """A token from the operating system's entropy."""
    return secrets.token_hex(12)


def seeded_tokens(seed: int) -> TokenSource:
    """Tokens that are the same for the same seed: for tests and replays only."""
    rng = random.Random(seed)
    return lambda: f"{rng.getrandbits(96):024x}"
