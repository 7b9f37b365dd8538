"""A clock that stands still until somebody moves it."""

from __future__ import annotations

import threading

__all__ = ["ManualClock"]


class ManualClock:
    """Implements `holdfast.core.clock.Clock`. Sleeping moves it, and returns at once.

    Thread safety: every method.
    """

    def __init__(self, unix_s: float = 1_700_000_000.0, monotonic_s: float = 1000.0) -> None:
        self._unix_s, self._monotonic_s = unix_s, monotonic_s
        self._lock = threading.Lock()
        self.slept_s: list[float] = []

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def unix_s(self) -> float:
        return self._unix_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass; not backwards."""
        if seconds < 0:
            raise ValueError("time does not run backwards; use jump for a clock that is set")
        with self._lock:
            self._unix_s += seconds
            self._monotonic_s += seconds

    def jump(self, seconds: float) -> None:
        """Somebody sets the machine's clock: the time of day changes, durations do not."""
        with self._lock:
            self._unix_s += seconds
