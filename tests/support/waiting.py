"""For what other processes do: they cannot be waited for, only looked at."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["eventually"]


def eventually(
    condition: Callable[[], object],
    what: Callable[[], str] = lambda: "it never came to be",
    *,
    give_up_s: float = 60.0,
    every_s: float = 0.005,
) -> None:
    """`give_up_s` only ends a broken test; `what` is then said."""
    until_s = time.monotonic() + give_up_s
    while not condition():
        assert time.monotonic() < until_s, what()
        time.sleep(every_s)
