"""Many watchers, one stream: runs each watcher as a task, keeps it running, and passes everything through `merging`.

What comes out are the notices for the consumer; what changes on the way is recorded in the sink. Nothing that a watcher does comes
out as an exception.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from holdfast.core.clock import Clock
from holdfast.core.events import Event, Sink
from holdfast.notice.base import Acknowledges, Lookout, Notice, NoticeKind, Watcher
from holdfast.notice.merging import Heard, Merging, Recovered, Said, Tick, Told, Troubled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["Stream"]

_TICK_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
"""Between two starts of a watcher that fails: never longer, because nothing is heard meanwhile."""


class Stream:
    """The notices of all watchers.

    Thread safety: for one event loop; only `open_notices` may be called from any thread.
    Ownership: the watchers belong to the stream. Failure contract: `notices` never raises, and ends only when it is closed.
    """

    def __init__(
        self,
        watchers: Sequence[Watcher],
        *,
        clock: Clock,
        sink: Sink,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._watchers, self._clock, self._sink, self._sleep = tuple(watchers), clock, sink, sleep
        self._merging = Merging()
        self._said: asyncio.Queue[Said] = asyncio.Queue()
        self._tasks: list[asyncio.Future[None]] = []
        self._open: tuple[Notice, ...] = ()
        self._heard_by: dict[tuple[str, str], Watcher] = {}
        self._lookout = Lookout(
            clock,
            sleep,
            trouble=lambda source, what: self._said.put_nowait(Troubled(source, what)),
            well=lambda source: self._said.put_nowait(Recovered(source)),
        )

    async def notices(self) -> AsyncIterator[Notice]:
        """What the consumer is to know, in order, until the iterator is closed."""
        self._tasks = [asyncio.ensure_future(self._tick())]
        for watcher in self._watchers:
            self.add(watcher)
        try:
            while True:
                for notice in self._take(await self._said.get()):
                    yield notice
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def add(self, watcher: Watcher) -> None:
        """Watch this too, from now on; while `notices` runs."""
        self._tasks.append(asyncio.ensure_future(self._attend(watcher)))

    def open_notices(self) -> tuple[Notice, ...]:
        """Everything that stands, the most urgent first."""
        return self._open

    def say(self, notice: Notice) -> None:
        """Put in a notice that no watcher heard."""
        self._said.put_nowait(Heard(notice))

    async def acknowledge(self, notice: Notice) -> bool:
        """Tell every provider that waits for it that this event may begin. True: at least one was told."""
        told = False
        for sighting in self._merging.sightings(notice.id):
            watcher = self._heard_by.get((sighting.source, sighting.id))
            if not isinstance(watcher, Acknowledges):
                continue
            try:
                if await watcher.acknowledge(sighting, self._lookout):
                    told = True
                    fields = {"source": sighting.source, "id": sighting.id, "incident": notice.id}
                    self._record(Event("notice.acknowledged", self._clock.unix_s(), fields))
            except Exception as error:  # A flaw of one watcher is recorded, never raised.
                self._lookout.trouble(sighting.source, f"acknowledge failed: {type(error).__name__}: {error}")
        return told

    async def _attend(self, watcher: Watcher) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                heard = cast("AsyncGenerator[Notice, Any]", watcher.watch(self._lookout))
                async with aclosing(heard):
                    async for notice in heard:
                        pause_s = _FIRST_PAUSE_S
                        self._heard_by[(notice.source, notice.id)] = watcher
                        self._said.put_nowait(Heard(notice))
                return
            except Exception as error:  # A flaw of one watcher must not deafen the others.
                self._lookout.trouble(watcher.name, f"the watcher failed: {type(error).__name__}: {error}")
            await self._sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _tick(self) -> None:
        while True:
            await self._sleep(_TICK_S)
            self._said.put_nowait(Tick())

    def _take(self, said: Said) -> tuple[Notice, ...]:
        now_s = self._clock.unix_s()
        try:
            told = self._merging.take(_checked(said), now_s)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"not a notice: {repr(said)[:200]} ({error})"
            told = self._merging.take(Troubled("stream", what), now_s)
        self._open = tuple(self._merging.open())
        return self._tell(told)

    def _tell(self, told: Told) -> tuple[Notice, ...]:
        for event in told.events:
            self._record(event)
        return told.notices

    def _record(self, event: Event) -> None:
        try:
            self._sink.emit(event)
        except Exception:  # Sinks do not raise; if one does, it must not cost a notice.
            return


def _checked(said: Said) -> Said:
    """What a watcher of somebody else's may get wrong is found before the state changes."""
    if isinstance(said, Heard):
        notice = said.notice
        if notice.deadline_unix_s is not None:
            math.isfinite(notice.deadline_unix_s)
        math.isfinite(notice.heard_unix_s)
        NoticeKind(notice.kind)
        if (
            not isinstance(notice.evidence, dict)
            or not isinstance(notice.source, str)
            or not isinstance(notice.id, str)
        ):
            raise TypeError("source and id are text, evidence is a dict")
    return said
