"""Time comes in through here, so that tests and the simulator decide what time it is.

`monotonic_s` is for durations and never goes backwards; `unix_s` is for records that people read. Only the outermost shell
(a command, the default of a public constructor) makes a `SystemClock`.
"""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Thread safety: every method may be called from any thread."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary origin; for durations."""
        ...

    def unix_s(self) -> float:
        """Seconds since 1970-01-01 UTC; for records."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
