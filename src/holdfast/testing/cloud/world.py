"""What the cloud's API does: every call, with its faults. What happens by itself is `course.py`; both write the same log."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable

import msgspec

from holdfast.core.errors import UsageError
from holdfast.core.failures import Failure
from holdfast.provider.base import Leftover, Machine
from holdfast.provider.local.wire import TAG_FLEET, TAG_RUN, ExtraFacts, MachineFacts
from holdfast.testing.cloud.admission import choose, read_request
from holdfast.testing.cloud.config import FaultConfig
from holdfast.testing.cloud.course import Course
from holdfast.testing.cloud.faults import Call
from holdfast.testing.cloud.life import Entry
from holdfast.testing.cloud.market import micro_dollars
from holdfast.testing.cloud.plan import Doom
from holdfast.testing.cloud.refusals import Lost, Refused

__all__ = ["World"]


class World(Course):
    """Thread safety: every method. `real_s` is this machine's CLOCK_MONOTONIC."""

    def create(self, fields: Entry, real_s: float) -> Machine:
        """Raises Refused and Lost."""
        with self.lock:
            fault = self._fault("create")
            if fault == "no-capacity":
                raise Refused(
                    503, "InsufficientInstanceCapacity", "there is no capacity (a fault)", Failure.NO_CAPACITY
                )
            request = read_request(fields)
            digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
            known = self.lives.by_token.get(request.token)
            if known is not None and self.faults.config.tokens == "enforced":
                if known.digest != digest:
                    said = f"token {request.token} was used with another request"
                    raise Refused(400, "IdempotentParameterMismatch", said, Failure.BAD_REQUEST)
                if known.machine in self.lives.by_id:
                    return self._answered(known.machine, real_s, fault)
                if known.due_real_s is not None:
                    raise Refused(
                        409, "RequestInProgress", f"the request with token {request.token} is being carried out"
                    )
            chosen = choose(request, self.lives.there(), self.market, self.config, self._second(real_s))
            id = "m-" + hashlib.sha256(f"{self.config.seed}/{len(self.lives.accepted)}".encode()).hexdigest()[:12]
            due_real_s = real_s + self.faults.config.late_s if fault == "late" else None
            self.note(
                real_s,
                "accepted",
                token=request.token,
                digest=digest,
                machine=id,
                request=fields,
                due_real_s=due_real_s,
            )
            if due_real_s is not None:
                raise Refused(
                    500, "InternalError", "something went wrong (a fault); the machine will come all the same"
                )
            self._birth(id, request, chosen, real_s)
            return self._answered(id, real_s, fault)

    def machines(self, fleet: str, run_id: str | None, real_s: float) -> list[Machine]:
        with self.lock:
            self._lossy("list")
            seen_real_s, found = real_s - self.faults.config.list_delay_s, []
            for life in self.lives.by_id.values():
                tags = life.request.tags
                old = life.is_gone and life.moments[-1].real_s + self.config.gone_shown_s < seen_real_s
                if tags.get(TAG_FLEET) == fleet and run_id in (None, tags.get(TAG_RUN)) and not old:
                    machine = life.machine(seen_real_s, self._price(life.pool.name, real_s))
                    found += [] if machine is None else [machine]
            return found

    def terminate(self, ids: Iterable[str], real_s: float) -> None:
        with self.lock:
            fault = self._fault("terminate")
            for id in ids if fault != "ignored" else ():
                life = self.lives.by_id.get(id)
                if life is not None and not life.is_gone and life.ending is None:
                    self._end(life, "owner", real_s)
            if fault == "lost":
                raise Lost

    def extend(self, id: str, expires_unix_s: int, real_s: float) -> None:
        """Of its tags, and of what belongs to it."""
        with self.lock:
            if id not in self.lives.by_id:
                raise Refused(404, "NoSuchMachine", f"there has never been a machine {id}", Failure.BAD_REQUEST)
            self.note(real_s, "extended", machine=id, expires_unix_s=expires_unix_s)

    def leftovers(self, fleet: str) -> list[Leftover]:
        with self.lock:
            self._lossy("list")
            extras = self.lives.leftovers()
            ours = [each for each in extras if self.lives.by_id[each.machine].request.tags.get(TAG_FLEET) == fleet]
            return [self.lives.leftover(each, self._extra_microusd_h(each.kind, each.gib)) for each in ours]

    def remove(self, ids: Iterable[str], real_s: float) -> None:
        with self.lock:
            there = {each.id for each in self.lives.leftovers()}
            for id in there.intersection(ids):
                self.note(real_s, "removed", t=self._ceiled(real_s), id=id)

    def end_all(self, real_s: float) -> None:
        """Everything that is there is ended at once, at its owner's wish."""
        with self.lock:
            for life in self.lives.there():
                self._take(life, real_s, by="owner")

    def do(self, id: str, what: str, lead_s: float | None, real_s: float) -> None:
        """Let something happen to one machine now: `preempt`, `rebalance`, `withdraw`, `unplug`."""
        with self.lock:
            life = self.lives.by_id.get(id)
            if life is None or life.is_gone:
                raise Refused(404, "NoSuchMachine", f"there is no machine {id}", Failure.BAD_REQUEST)
            if what == "preempt":
                lead_s = self.config.notice.lead_s if lead_s is None else float(lead_s)
                self._doom(Doom(id, real_s + lead_s, real_s if lead_s else None, None, False), real_s)
            elif what == "rebalance":
                self._advise(life, real_s)
            elif what == "withdraw":
                self._withdraw(life, real_s)
            elif what == "unplug":
                self._take(life, real_s)
            else:
                raise Refused(400, "BadRequest", f"{what!r} cannot happen to a machine", Failure.BAD_REQUEST)

    def change(self, fields: Entry, real_s: float) -> None:
        """`faults`: from now on these; `pool` with `capacity` and `price`: from now on these, and no schedule."""
        with self.lock:
            if "faults" in fields:
                self.faults.configure(msgspec.convert(fields["faults"], FaultConfig))
            if "pool" in fields:
                if fields["pool"] not in self.market.capacity:
                    raise UsageError(f"there is no pool {fields['pool']!r}")
                price, capacity = fields.get("price"), fields.get("capacity")
                if not (capacity is None or (type(capacity) is int and capacity >= 0)):
                    raise UsageError(f"a capacity is a whole number of machines, not {capacity!r}")
                micro = None if price is None else micro_dollars(price)
                self.note(real_s, "market", pool=fields["pool"], capacity=capacity, microusd_h=micro)
                self._change_market(self.lives.market[-1])
                self._note_prices(real_s)

    def facts(self, id: str) -> MachineFacts:
        with self.lock:
            if id not in self.lives.by_id:
                raise UsageError(f"there has never been a machine {id}")
            extras = [
                ExtraFacts(
                    id=each.id,
                    kind=each.kind,
                    gib=each.gib,
                    since_unix_s=each.since_unix_s,
                    removed_unix_s=each.removed_unix_s,
                )
                for each in self.lives.extras_of(id)
            ]
            return MachineFacts(ceiling_microusd_h=self.lives.by_id[id].ceiling_microusd_h, extras=extras)

    def prices(self, pool: str, since_unix_s: float, until_unix_s: float) -> list[tuple[int, int]]:
        """(from which second, price); the first holds at `since_unix_s`."""
        with self.lock:
            steps, start = self.market.microusd_h.get(pool), self.time.start_unix_s
            if steps is None:
                raise UsageError(f"there is no pool {pool!r}")
            since_s, until_s = since_unix_s - start, until_unix_s - start
            first = (max(start, math.floor(since_unix_s)), steps.at(since_s))
            return [first, *((start + at, price) for at, price in steps.changes(since_s, until_s))]

    def _answered(self, id: str, real_s: float, fault: str) -> Machine:
        life = self.lives.by_id[id]
        machine = life.machine(real_s, self._price(life.pool.name, real_s))
        if fault == "lost" or machine is None:
            raise Lost
        return machine

    def _fault(self, call: Call) -> str:
        fault = self.faults.draw(call)
        if fault == "error":
            raise Refused(500, "InternalError", "something went wrong (a fault)")
        if fault == "throttle":
            after_s = self.faults.config.retry_after_s
            raise Refused(429, "RequestLimitExceeded", "too many requests (a fault)", Failure.THROTTLED, after_s)
        return fault

    def _lossy(self, call: Call) -> None:
        if self._fault(call) == "lost":
            raise Lost

    def _extra_microusd_h(self, kind: str, gib: int) -> int:
        billing = self.config.billing
        return (
            micro_dollars(billing.address_per_h) if kind == "address" else gib * micro_dollars(billing.disk_per_gib_h)
        )
