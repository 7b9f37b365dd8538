"""The same cloud without processes and without a network, on a clock that somebody moves: for tests that try thousands of courses.

    table = Tabletop(folder, config, ManualClock())
    machine = table.cloud.create(request)      # the real client, the real rules, faults and log; no machine does any work
    table.pass_time(90)                        # everything that is due happens, each at its moment
    table.finish(machine.id)                   # its script has come to its end
    table = table.killed()                     # kill -9 of the cloud: the next one has the log, and the machines

Machines are a set of names here: those whose processes would be there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import httpx

from holdfast.provider.local import LocalCloud
from holdfast.testing.clock import ManualClock
from holdfast.testing.cloud.api import Api, billing_rules
from holdfast.testing.cloud.book import Book
from holdfast.testing.cloud.config import CloudConfig
from holdfast.testing.cloud.hosts import Isolation
from holdfast.testing.cloud.life import Life
from holdfast.testing.cloud.market import CloudTime
from holdfast.testing.cloud.refusals import Lost
from holdfast.testing.cloud.world import World

__all__ = ["Tabletop"]

_SECRET = "of a cloud without a network"


class Tabletop:
    """Thread safety: none."""

    def __init__(self, folder: Path, config: CloudConfig, clock: ManualClock) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.clock, self._config = folder, clock, config
        self.running: dict[str, str] = {}
        """Machine → `runs`, or the cause of the end that is on its way."""
        self.told: list[tuple[str, str, float]] = []
        """(machine, what, lead in seconds), as their metadata endpoints said it."""
        self._book = Book(folder)
        entries = self._book.read()
        opened = [entry["clock"] for entry in entries if entry["event"] == "opened"]
        real_s = clock.monotonic_s()
        start_unix_s = int(clock.unix_s()) if config.start_unix_s is None else config.start_unix_s
        time = CloudTime(real_s, start_unix_s, config.speed)
        if opened:
            time = CloudTime(opened[0]["origin_real_s"], opened[0]["start_unix_s"], config.speed)
        self.world = World(config, folder, time, self._book, _Names(self), _Told(self))
        self.world.recall(entries)
        if not opened:
            rules = billing_rules(config.billing)
            self.world.note(
                real_s, "opened", clock={"origin_real_s": time.origin_real_s, "start_unix_s": time.start_unix_s}
            )
            self.world.note(real_s, "rules", rules={name: getattr(rules, name) for name in rules.__struct_fields__})
        self.api = Api(self.world, clock, _SECRET)
        address = self.api.address(folder, "http://tabletop", "", Isolation(False, False, False))
        self.cloud = LocalCloud(address, folder, transport=httpx.MockTransport(self._answer), clock=clock)
        self._settle()

    def pass_time(self, seconds: float) -> None:
        """Of this machine's time; what is due on the way happens when it is due."""
        until_s = self.clock.monotonic_s() + seconds
        while True:
            due_s = max(self._settle(), self.clock.monotonic_s())
            if due_s > until_s:
                break
            self.clock.advance(due_s - self.clock.monotonic_s())
        self.clock.advance(until_s - self.clock.monotonic_s())
        self._settle()

    def finish(self, id: str, cause: Literal["script", "shutdown"] = "script") -> None:
        """It ends by itself now."""
        self.running[id] = cause
        self._settle()

    def killed(self) -> Tabletop:
        """The cloud after kill -9 and a new start; this one is of no use any more."""
        self._book.close()
        self.cloud.close()
        after = Tabletop(self.folder, self._config, self.clock)
        for life in after.world.lives.there():
            if life.booted and not life.idle:
                # What was asked for once more, in case it did not get through, as the real cloud does.
                asked = "terminated" if life.ending is not None else "runs"
                after.running[life.id] = asked if self.running.get(life.id, "runs") == "runs" else self.running[life.id]
        after._settle()
        return after

    def close(self) -> None:
        self._book.close()
        self.cloud.close()

    def _settle(self) -> float:
        """Let everything happen that is due now; when the next thing is."""
        while True:
            due_s = self.world.step(self.clock.monotonic_s())
            ended = {id: cause for id, cause in self.running.items() if cause != "runs"}
            for id, cause in ended.items():
                del self.running[id]
                self.world.ended(id, cause, None, self.clock.monotonic_s())
            if not ended and due_s > self.clock.monotonic_s():
                return due_s

    def _answer(self, request: httpx.Request) -> httpx.Response:
        try:
            target = request.url.raw_path.decode()
            answer = self.api.answer(request.method, target, request.content, request.headers["Authorization"])
        except Lost:
            raise httpx.ReadError("the answer is lost", request=request) from None
        finally:
            self._settle()
        return httpx.Response(answer.status, content=answer.body)


class _Names:
    """Implements `course.Machines`."""

    def __init__(self, table: Tabletop) -> None:
        self._table = table

    def boot(self, life: Life) -> None:
        self._table.running[life.id] = "runs"

    def end(self, id: str) -> None:
        self._table.running[id] = "terminated"

    def unplug(self, id: str) -> None:
        self._table.running[id] = "unplugged"


class _Told:
    """Implements `course.Notices`."""

    def __init__(self, table: Tabletop) -> None:
        self._table = table

    def open(self, life: Life) -> int:
        return 1

    def tell(self, id: str, what: Literal["preempt", "rebalance", "withdraw"], lead_s: float) -> None:
        self._table.told.append((id, what, lead_s))

    def close(self, id: str) -> None:
        return None
