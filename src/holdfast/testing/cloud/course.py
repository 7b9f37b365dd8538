"""The cloud itself: what its API does, and what happens by itself as time passes. Every change is an entry in the log before it has
any effect outside, so that a cloud that was killed goes on where it was.

`Machines` are processes and `Notices` metadata endpoints in the real cloud; both are small enough to be left out where only
money and lists are looked at.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from holdfast.core.launches import Pool
from holdfast.provider.local.wire import AllowedPool, CreateRequest
from holdfast.testing.cloud.admission import choose, drawn, read_request
from holdfast.testing.cloud.book import Book
from holdfast.testing.cloud.config import CloudConfig
from holdfast.testing.cloud.faults import Faults
from holdfast.testing.cloud.life import Accepted, EndedBy, Entry, Life, Lives
from holdfast.testing.cloud.market import CloudTime, Market
from holdfast.testing.cloud.plan import Doom, dooms, horizon_real_s
from holdfast.testing.cloud.refusals import Refused

__all__ = ["Course", "Machines", "Notices"]

_GONE: dict[str, Literal["shutdown", "terminated", "preempted"]] = {
    "itself": "shutdown",
    "owner": "terminated",
    "provider": "preempted",
}


class Machines(Protocol):
    """Processes. None of these waits."""

    def boot(self, life: Life) -> None: ...

    def end(self, id: str) -> None:
        """Ask it to end, and see to it that it does."""
        ...

    def unplug(self, id: str) -> None: ...


class Notices(Protocol):
    """The metadata endpoints."""

    def open(self, life: Life) -> int:
        """Its port."""
        ...

    def tell(self, id: str, what: Literal["preempt", "rebalance", "withdraw"], lead_s: float) -> None: ...

    def close(self, id: str) -> None: ...


class Course:
    """Thread safety: every method. `real_s` is this machine's CLOCK_MONOTONIC."""

    def __init__(
        self, config: CloudConfig, folder: Path, time: CloudTime, book: Book, machines: Machines, notices: Notices
    ) -> None:
        self.config, self.time, self.lives = config, time, Lives()
        self.market, self.faults = Market.of(config, folder), Faults(config.faults, config.seed)
        self._book, self._machines, self._notices = book, machines, notices
        self.lock = threading.RLock()

    def note(self, real_s: float, event: str, *, t: int | None = None, **fields: Any) -> None:
        """Write down what happens at second `t`, else now; then it has happened."""
        second = math.floor(self.time.unix_s(real_s)) if t is None else t
        entry: Entry = {"event": event, "t": second, "real_s": real_s, **fields}
        self._book.append(entry)
        self.lives.apply(entry)

    def recall(self, entries: Iterable[Entry]) -> None:
        """What an earlier process of this cloud has written."""
        with self.lock:
            for entry in entries:
                self.lives.apply(entry)
            for entry in self.lives.market:
                self._change_market(entry)

    def _change_market(self, entry: Entry) -> None:
        second = entry["t"] - self.time.start_unix_s
        self.market.change(entry["pool"], second, capacity=entry["capacity"], microusd_h=entry["microusd_h"])

    def step(self, real_s: float) -> float:
        """Let everything happen that is due; when the next thing is."""
        with self.lock:
            self._note_prices(real_s)
            for accepted in list(self.lives.accepted.values()):
                if accepted.due_real_s is not None and accepted.due_real_s <= real_s:
                    self._late_birth(accepted, real_s)
            for name in self.market.capacity:
                if Pool.named(name).market == "spot":
                    self._plan(name, real_s)
            for life in self.lives.there():
                self._live(life, real_s)
            return self._next_real_s(real_s)

    def ended(self, id: str, cause: str, code: int | None, real_s: float) -> None:
        """A machine's processes are gone."""
        with self.lock:
            life = self.lives.by_id[id]
            by_itself = life.ending is None and cause in ("script", "shutdown")
            if by_itself and not self.config.shutdown_terminates:
                self.note(real_s, "idle", machine=id, cause=cause, code=code)
                return
            usual: EndedBy = "itself" if cause in ("script", "shutdown") else "provider"
            self._death(life, life.ending or usual, cause, code, real_s)

    def _plan(self, name: str, real_s: float) -> None:
        there = [life for life in self.lives.there() if life.pool.name == name and life.ending is None]
        capacity = self.market.capacity[name]
        if any(life.spared for life in there) and capacity.at(self._second(real_s)) >= len(there):
            for life in there:
                if life.spared:
                    self.note(real_s, "counted", machine=life.id)
        config = self.config
        for doom in dooms(there, capacity, self.market.microusd_h[name], self.time, real_s, config.notice, config.seed):
            self._doom(doom, real_s)

    def _doom(self, doom: Doom, real_s: float) -> None:
        life = self.lives.by_id[doom.machine]
        self.note(
            real_s,
            "doomed",
            machine=doom.machine,
            deadline_real_s=doom.deadline_real_s,
            notice_real_s=doom.notice_real_s,
            withdraw_real_s=doom.withdraw_real_s,
        )
        if doom.advice:
            self._advise(life, real_s)
        self._live(life, real_s)

    def _live(self, life: Life, real_s: float) -> None:
        if life.advice_real_s is not None and life.advice_real_s <= real_s and life.booted:
            self._advise(life, real_s)
        if life.notice_real_s is not None and life.notice_real_s <= real_s and life.deadline_real_s is not None:
            self.note(real_s, "notice", machine=life.id, deadline_real_s=life.deadline_real_s)
            self._notices.tell(life.id, "preempt", max(0.0, life.deadline_real_s - real_s))
        if life.withdraw_real_s is not None and life.withdraw_real_s <= real_s:
            self._withdraw(life, real_s)
        if life.deadline_real_s is not None and life.deadline_real_s <= real_s and life.ending is None:
            self._take(life, real_s)
        if life.ends_real_s is not None and life.ends_real_s <= real_s and life.ending is None:
            self._end(life, "owner", real_s)
        if not life.booted and life.boots_real_s <= real_s and life.ending is None:
            port = self._notices.open(life)
            self.note(real_s, "boot", machine=life.id, metadata_port=port)
            if life.told and life.deadline_real_s is not None:
                self._notices.tell(life.id, "preempt", max(0.0, life.deadline_real_s - real_s))
            self._machines.boot(life)

    def _advise(self, life: Life, real_s: float) -> None:
        self.note(real_s, "rebalance", machine=life.id)
        self._notices.tell(life.id, "rebalance", 0.0)

    def _withdraw(self, life: Life, real_s: float) -> None:
        self.note(real_s, "withdrawn", machine=life.id)
        self._notices.tell(life.id, "withdraw", 0.0)

    def _take(self, life: Life, real_s: float, *, by: EndedBy = "provider") -> None:
        """The deadline: everything in it is killed."""
        if life.ending is None:
            self.note(real_s, "ending", machine=life.id, by=by)
        if life.idle or not life.booted:
            self._death(life, life.ending or by, "unplugged", None, real_s)
        else:
            self._machines.unplug(life.id)

    def _end(self, life: Life, by: EndedBy, real_s: float) -> None:
        self.note(real_s, "ending", machine=life.id, by=by)
        if life.idle or not life.booted:
            self._death(life, by, "terminated", None, real_s)
        else:
            self._machines.end(life.id)

    def _death(self, life: Life, by: EndedBy, cause: str, code: int | None, real_s: float) -> None:
        second, left = self._ceiled(real_s), self.config.leftovers
        for extra in self.lives.extras_of(life.id):
            if not (_GONE[by] in left.after and extra.kind in left.kinds):
                self.note(real_s, "removed", t=second, id=extra.id)
        self.note(real_s, "death", t=second, machine=life.id, by=by, cause=cause, code=code)
        self._notices.close(life.id)

    def _late_birth(self, accepted: Accepted, real_s: float) -> None:
        request = read_request(accepted.request)
        try:
            chosen = choose(request, self.lives.there(), self.market, self.config, self._second(real_s))
        except Refused as refused:
            self.note(real_s, "refused", machine=accepted.machine, said=str(refused))
            return
        self._birth(accepted.machine, request, chosen, real_s)

    def _birth(self, id: str, request: CreateRequest, chosen: AllowedPool, real_s: float) -> None:
        config, draw = self.config, random.Random(f"{self.config.seed}/{id}")
        boots_real_s = real_s + drawn(config.boot_s, draw)
        skew_s, idle = drawn(config.clock_skew_s, draw), draw.random() < config.notice.idle_rebalance
        self.note(
            real_s,
            "birth",
            machine=id,
            pool=chosen.pool,
            ceiling_microusd_h=chosen.ceiling_microusd_h,
            tags=request.tags,
            boots_real_s=boots_real_s,
            skew_s=skew_s,
            ends_real_s=boots_real_s + request.lifetime_s if config.enforces_lifetime else None,
            advice_real_s=boots_real_s + config.notice.idle_after_s if idle else None,
        )
        self.note(real_s, "volume", id=f"vol-{id[2:]}", machine=id, gib=request.disk_gib)
        if request.network.get("address"):
            self.note(real_s, "address", id=f"ip-{id[2:]}", machine=id, gib=0)

    def _note_prices(self, real_s: float) -> None:
        """Every change since the newest in the log, each at its own second."""
        now_s, start = self._second(real_s), self.time.start_unix_s
        for name, steps in self.market.microusd_h.items():
            if name not in self.lives.priced:
                self.note(real_s, "price", t=start, pool=name, microusd_h=steps.at(0))
            for second, price in list(steps.changes(self.lives.priced[name][0] - start, now_s)):
                self.note(real_s, "price", t=start + second, pool=name, microusd_h=price)
            if self.lives.priced[name][1] != steps.at(now_s):  # set anew within the second of the newest
                self.note(real_s, "price", t=start + math.floor(now_s), pool=name, microusd_h=steps.at(now_s))

    def _next_real_s(self, real_s: float) -> float:
        now_s, ahead_s = self._second(real_s), horizon_real_s(self.config.notice)
        changes = (self.market.next_change(now_s), self.market.next_change(now_s + ahead_s * self.time.speed))
        due = [self.time.real_s(self.time.start_unix_s + changes[0])]
        due.append(self.time.real_s(self.time.start_unix_s + changes[1]) - ahead_s)
        due += [each.due_real_s for each in self.lives.accepted.values() if each.due_real_s is not None]
        for life in self.lives.there():
            due += [at for at in (life.notice_real_s, life.withdraw_real_s) if at is not None]
            if life.ending is None:
                due += [at for at in (life.deadline_real_s, life.ends_real_s) if at is not None]
                due += [] if life.booted else [life.boots_real_s]
            if life.booted and life.advice_real_s is not None:
                due.append(life.advice_real_s)
        return min(due)

    def _second(self, real_s: float) -> float:
        return self.time.unix_s(real_s) - self.time.start_unix_s

    def _ceiled(self, real_s: float) -> int:
        return math.ceil(self.time.unix_s(real_s))

    def _price(self, pool: str, real_s: float) -> int:
        return self.market.microusd_h[pool].at(self._second(real_s))
