"""Virtual time for client and server together, and ways to let watchers run in it.

Everybody who takes part (a watcher, the stream's ticker, a request that waits at the server) is a party. When all parties sleep,
time jumps to the first that is due and wakes it: hours pass in milliseconds, in the same order on any machine.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.core.events import CollectingSink
from holdfast.notice.base import Lookout, Notice, Watcher
from holdfast.notice.stream import Stream

__all__ = ["START_UNIX_S", "Troubles", "VirtualClock", "hear", "one_poll"]

START_UNIX_S = 1_800_000_000.0
_PATIENCE_S = 300.0


class VirtualClock:
    """See above. Thread-safe."""

    def __init__(self, parties: int) -> None:
        self._parties = parties
        self._now_s = 0.0
        self._sleepers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._lock = threading.RLock()
        self._stopped = False

    def monotonic_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return START_UNIX_S + self._now_s

    def sleep(self, seconds: float) -> None:
        woken = threading.Event()
        self._enter(seconds, woken.set)
        woken.wait(_PATIENCE_S)

    async def pause(self, seconds: float) -> None:
        """`sleep` for coroutines."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not woken.done():
                woken.set_result(None)

        def wake() -> None:
            loop.call_soon_threadsafe(settle)

        ticket = self._enter(seconds, wake)
        try:
            await woken
        finally:
            with self._lock:
                self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[1] != ticket]
                heapq.heapify(self._sleepers)

    def stop(self) -> None:
        """Nobody sleeps any more."""
        with self._lock:
            self._stopped = True
            sleepers, self._sleepers = self._sleepers, []
        for _, _, wake in sleepers:
            wake()

    def _enter(self, seconds: float, wake: Callable[[], None]) -> int:
        with self._lock:
            ticket = next(self._count)
            if self._stopped:
                wake()
                return ticket
            heapq.heappush(self._sleepers, (self._now_s + seconds, ticket, wake))
            if len(self._sleepers) >= self._parties:
                due_s, _, first = heapq.heappop(self._sleepers)
                self._now_s = max(self._now_s, due_s)
                first()
            return ticket


async def hear(
    watchers: Sequence[Watcher], clock: VirtualClock, sink: CollectingSink, enough: Callable[[list[Notice]], bool]
) -> list[Notice]:
    """What a consumer of the watchers is told, until that is `enough`."""
    told: list[Notice] = []
    notices: Any = Stream(watchers, clock=clock, sink=sink, sleep=clock.pause).notices()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            async for notice in notices:
                told.append(notice)
                if enough(told):
                    return told
    finally:
        await notices.aclose()
    raise AssertionError("the stream has ended")


class Troubles(list[tuple[str, str]]):
    """What watchers complained of."""


async def one_poll(watcher: Watcher, clock: Any, *, until_trouble: bool = False) -> tuple[list[Notice], Troubles]:
    """What a watcher says until it sleeps for the first time, or until it complains."""
    troubles = Troubles()
    told: list[Notice] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        if not until_trouble:
            enough.set()
            await asyncio.Event().wait()

    def trouble(source: str, what: str) -> None:
        troubles.append((source, what))
        if until_trouble:
            enough.set()

    lookout = Lookout(clock, sleep, trouble, lambda source: None)

    async def run() -> None:
        async for notice in watcher.watch(lookout):
            told.append(notice)

    running, waiting = asyncio.ensure_future(run()), asyncio.ensure_future(enough.wait())
    try:
        await asyncio.wait({running, waiting}, timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        assert enough.is_set()
    finally:
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
    return told, troubles
