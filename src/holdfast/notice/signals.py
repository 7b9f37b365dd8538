"""Signals: whoever owns the handlers passes the numbers on, and they become notices with a deadline.

A signal says only that time is running; how much there is, is the sender's custom (`grace_s`). The first of each number counts: the
sender's clock does not start again because it signals twice.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from holdfast.core.clock import Clock
from holdfast.notice.base import Lookout, Notice, NoticeKind

__all__ = ["SignalWatcher"]


class SignalWatcher:
    """Hears the signals that `received` is told about. See `Watcher`.

    `received` may be called from any thread and from inside a signal handler: it takes no lock.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        name: str = "signal",
        grace_s: Mapping[signal.Signals, float],
        latest_unix_s: float | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        """`grace_s`: the signals that are notices, and the seconds that each leaves. `latest_unix_s`: no deadline is later."""
        self.name = name
        self._clock = clock
        self._grace_s, self._latest_unix_s, self._evidence = dict(grace_s), latest_unix_s, dict(evidence or {})
        self._received: deque[tuple[int, float]] = deque()
        self._wake: Callable[[], None] = _nobody
        self._heard: set[int] = set()

    def received(self, number: int) -> None:
        """A signal has arrived just now."""
        self._received.append((number, self._clock.unix_s()))
        self._wake()

    @property
    def numbers(self) -> frozenset[int]:
        """The signals that are notices."""
        return frozenset(self._grace_s)

    async def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        loop, awake = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # The loop may have ended while the signal arrived.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(awake.set)

        self._wake = wake
        try:
            while True:
                while self._received:
                    number, at_unix_s = self._received.popleft()
                    if number in self._grace_s and number not in self._heard:
                        self._heard.add(number)
                        yield self._notice(signal.Signals(number), at_unix_s)
                await awake.wait()
                awake.clear()
        finally:
            self._wake = _nobody

    def _notice(self, number: signal.Signals, at_unix_s: float) -> Notice:
        deadline = at_unix_s + self._grace_s[number]
        if self._latest_unix_s is not None:
            deadline = min(deadline, max(self._latest_unix_s, at_unix_s))
        return Notice(
            kind=NoticeKind.TERMINATION,
            deadline_unix_s=deadline,
            source=f"{self.name}:{number.name}",
            id=number.name,
            heard_unix_s=at_unix_s,
            assumed=True,
            evidence={"signal": number.name, "grace_s": self._grace_s[number], **self._evidence},
        )


def _nobody() -> None:
    """Nobody watches; what has been received waits."""
