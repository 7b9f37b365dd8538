"""The rehearsal cloud's clock, computed from this machine's: it runs faster by the cloud's speed."""

from __future__ import annotations

from holdfast.core.clock import Clock

__all__ = ["CloudClock"]


class CloudClock:
    """Implements `core.clock.Clock` in the cloud's seconds. Thread safety: every method."""

    def __init__(self, origin_real_s: float, start_unix_s: float, speed: float, clock: Clock) -> None:
        """`clock` is this machine's; the cloud began at its `origin_real_s`."""
        self._origin_real_s, self._start_unix_s, self._clock, self.speed = origin_real_s, start_unix_s, clock, speed

    def monotonic_s(self) -> float:
        return (self._clock.monotonic_s() - self._origin_real_s) * self.speed

    def unix_s(self) -> float:
        return self._start_unix_s + self.monotonic_s()

    def sleep(self, seconds: float) -> None:
        self._clock.sleep(seconds / self.speed)
