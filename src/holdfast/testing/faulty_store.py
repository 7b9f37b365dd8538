"""A store that misbehaves on purpose, in ways that real ones do, and always in the same way for the same plan.

`FaultyStore` asks its plan what shall happen to each operation; `KillSwitch` calls back (`os._exit`, say) at the k-th one,
so that a test can end a process before and after every single request that it makes. What happens below the client, on the
wire, is played by `holdfast.testing.http_faults`; here it is played as the client reports it:

| in the field | here |
|---|---|
| throttled (503 SlowDown, 429), 5xx, no route, a reset before anything was applied, EIO | UNAVAILABLE_BEFORE |
| an answer lost after success; 500, 503 or 409 although the write was stored | UNAVAILABLE_AFTER |
| 409 because two conditional writes met, and nothing was stored | UNAVAILABLE_BEFORE |
| a request that the client gave up and the service still carries out | LATE |
| a retry inside the client that met its own first try | TAKEN_BY_ITSELF |
| a request timeout; latency | TIMED_OUT; SLOW |
| a reset, or EIO, in the middle of a body that is read | BROKEN_OFF |
| an object cut short; a bit that has turned | TRUNCATED; FLIPPED |
| a list from a cache (network file systems, some services behind S3's protocol) | STALE |
| credentials that expire after n operations | `since(n, Fault.DENIED)` |
| no permission to list, or to delete | `always(Fault.DENIED, "list")`, `always(Fault.DENIED, "delete")` |
| a full disk, a quota (ENOSPC, EDQUOT, 507) | FULL |
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from threading import Lock
from typing import TypeVar

from holdfast.core.clock import Clock
from holdfast.core.errors import IntegrityError, PermissionDenied, StoreFull, StoreUnavailable, UsageError
from holdfast.store.base import Body, Entry, Store, flat_buffers

__all__ = [
    "METHODS",
    "WRITES",
    "Fault",
    "FaultyStore",
    "KillSwitch",
    "LogEntry",
    "Operation",
    "Plan",
    "always",
    "at",
    "no_faults",
    "seeded",
    "since",
]

_T = TypeVar("_T")

METHODS = frozenset({"put", "put_new", "get", "read_into", "list", "delete"})
WRITES = frozenset({"put", "put_new", "delete"})


class Fault(Enum):
    """What may happen to one operation. Each suits some methods only; the plan is refused where it does not."""

    UNAVAILABLE_BEFORE = "fails, and was not applied"
    UNAVAILABLE_AFTER = "was applied, and the answer was lost"
    LATE = "fails, and is applied when the test says so: `land`"
    TAKEN_BY_ITSELF = "put_new was applied, and answers False because the client tried twice"
    TIMED_OUT = "fails after `slow_s` on the injected clock, and was not applied"
    BROKEN_OFF = "fails when half of what was asked for has been read, and the caller's buffer holds that half"
    STALE = "list answers what it answered for this prefix the last time; the first time, nothing"
    TRUNCATED = "the object turns out too short: IntegrityError"
    FLIPPED = "one bit of what was read is wrong, and nobody says so"
    SLOW = "takes `slow_s` on the injected clock, and then works"
    DENIED = "PermissionDenied, and was not applied"
    FULL = "StoreFull, and was not applied"


_FITS: Mapping[Fault, frozenset[str]] = {
    Fault.UNAVAILABLE_BEFORE: METHODS,
    Fault.UNAVAILABLE_AFTER: METHODS,
    Fault.LATE: WRITES,
    Fault.TAKEN_BY_ITSELF: frozenset({"put_new"}),
    Fault.TIMED_OUT: METHODS,
    Fault.BROKEN_OFF: frozenset({"get", "read_into"}),
    Fault.STALE: frozenset({"list"}),
    Fault.TRUNCATED: frozenset({"get", "read_into"}),
    Fault.FLIPPED: frozenset({"get", "read_into"}),
    Fault.SLOW: METHODS,
    Fault.DENIED: METHODS,
    Fault.FULL: frozenset({"put", "put_new"}),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: its number from 0 in order of arrival, its method and key, and how often that pair had been called before."""

    number: int
    method: str
    key: str
    repeat: int


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What became of an operation: the result, or the name of the error's type."""

    operation: Operation
    fault: Fault | None
    outcome: str


Plan = Callable[[Operation], Fault | None]


def no_faults(operation: Operation) -> Fault | None:
    """Everything works."""
    return None


def at(faults: Mapping[int, Fault]) -> Plan:
    """Faults at operations of given numbers."""
    return lambda operation: faults.get(operation.number)


def always(fault: Fault, *methods: str) -> Plan:
    """The fault at every operation of these methods; without methods, of all that it suits."""
    return since(0, fault, *methods)


def since(number: int, fault: Fault, *methods: str) -> Plan:
    """As `always`, from the operation of that number on: credentials expire, a disk is full from now on."""
    suffering = frozenset(methods) or _FITS[fault]
    return lambda operation: fault if operation.number >= number and operation.method in suffering else None


def seeded(seed: int, rate: float, faults: Sequence[Fault] = tuple(Fault)) -> Plan:
    """Each operation suffers one of `faults` with probability `rate`. What happens depends on the seed, the method, the key
    and the repeat, and not on the order in which threads arrive."""

    def plan(operation: Operation) -> Fault | None:
        name = f"{seed}\0{operation.method}\0{operation.key}\0{operation.repeat}".encode()
        drawn = int.from_bytes(hashlib.sha256(name).digest()[:16], "big")
        fitting = [fault for fault in faults if operation.method in _FITS[fault]]
        if not fitting or (drawn >> 64) / 2**64 >= rate:
            return None
        return fitting[drawn % len(fitting)]

    return plan


class FaultyStore:
    """`inner` with the faults that `plan` asks for, and a log of everything.

    Thread safety: as `inner`; numbers are given in order of arrival, so plans by number suit one thread.
    """

    def __init__(
        self, inner: Store, plan: Plan = no_faults, *, clock: Clock | None = None, slow_s: float = 1.0
    ) -> None:
        self.plan = plan
        self.log: list[LogEntry] = []
        self._inner = inner
        self._clock = clock
        self._slow_s = slow_s
        self._pending: list[tuple[Operation, Callable[[], object]]] = []
        self._listed: dict[str, tuple[Entry, ...]] = {}
        self._seen: Counter[tuple[str, str]] = Counter()
        self._arrived = 0
        self._lock = Lock()

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def is_near(self) -> bool:
        return self._inner.is_near

    @property
    def pending(self) -> Sequence[Operation]:
        """Writes that have failed for the caller and may still land, oldest first."""
        return [operation for operation, _ in self._pending]

    def land(self, index: int = 0) -> Operation:
        """Apply the pending write at `index` now, as a delayed packet would. A late put_new finds its name taken or free."""
        operation, apply = self._pending.pop(index)
        apply()
        return operation

    def put(self, key: str, body: Body) -> None:
        copied = b"".join(flat_buffers(body))
        self._do("put", key, lambda: self._inner.put(key, copied))

    def put_new(self, key: str, body: bytes) -> bool:
        copied = bytes(body)
        return self._do("put_new", key, lambda: self._inner.put_new(key, copied), altered=lambda created: False)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._do("get", key, lambda: self._inner.get(key, max_bytes=max_bytes), altered=_flipped)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        def flip(nothing: None) -> None:
            flat = buffer.cast("B")
            flat[:] = _flipped(bytes(flat))

        def half() -> None:
            self._inner.read_into(key, offset, buffer.cast("B")[: buffer.nbytes // 2])

        self._do("read_into", key, lambda: self._inner.read_into(key, offset, buffer), altered=flip, broken_off=half)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        def fresh() -> tuple[Entry, ...]:
            self._listed[prefix] = tuple(self._inner.list(prefix))
            return self._listed[prefix]

        before = self._listed.get(prefix, ())
        return iter(self._do("list", prefix, fresh, altered=lambda _: before))

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self._inner.delete(key))

    def close(self) -> None:
        self._inner.close()

    def _do(
        self,
        method: str,
        key: str,
        apply: Callable[[], _T],
        *,
        altered: Callable[[_T], _T] | None = None,
        broken_off: Callable[[], None] | None = None,
    ) -> _T:
        with self._lock:
            repeat = self._seen[method, key]
            self._seen[method, key] += 1
            operation = Operation(self._arrived, method, key, repeat)
            self._arrived += 1
        fault = self.plan(operation)
        if fault is not None and method not in _FITS[fault]:
            raise UsageError(f"{fault.name} does not suit {method}")
        outcome = "ok"
        try:
            if fault is Fault.BROKEN_OFF and broken_off is not None:
                broken_off()
            result = self._suffer(operation, fault, apply, altered)
            outcome = repr(result) if method == "put_new" else "ok"
            return result
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            with self._lock:
                self.log.append(LogEntry(operation, fault, outcome))

    def _suffer(
        self, operation: Operation, fault: Fault | None, apply: Callable[[], _T], altered: Callable[[_T], _T] | None
    ) -> _T:
        where = f"{operation.method} {operation.key!r} in {self.url} (operation {operation.number}, injected)"
        match fault:
            case Fault.UNAVAILABLE_BEFORE | Fault.BROKEN_OFF:
                raise StoreUnavailable(where)
            case Fault.DENIED:
                raise PermissionDenied(where)
            case Fault.FULL:
                raise StoreFull(where)
            case Fault.LATE:
                with self._lock:
                    self._pending.append((operation, apply))
                raise StoreUnavailable(where)
            case Fault.SLOW | Fault.TIMED_OUT if self._clock is not None:
                self._clock.sleep(self._slow_s)
        if fault is Fault.TIMED_OUT:
            raise StoreUnavailable(where)
        result = apply()
        match fault:
            case Fault.UNAVAILABLE_AFTER:
                raise StoreUnavailable(where)
            case Fault.TRUNCATED:
                raise IntegrityError(where)
            case Fault.FLIPPED | Fault.TAKEN_BY_ITSELF | Fault.STALE if altered is not None:
                return altered(result)
        return result


class KillSwitch:
    """`inner`, until operation `at_number` (from 0) among `methods` arrives: then `action` is called before or after it.

    `counted` tells, after a run with `at_number=None`, how many points there are to try. `action` usually ends
    the process; when it returns, work goes on as if nothing had happened. Thread safety: as `inner`.
    """

    def __init__(
        self,
        inner: Store,
        action: Callable[[], object],
        *,
        at_number: int | None = None,
        after: bool = False,
        methods: Collection[str] = METHODS,
    ) -> None:
        self.counted = 0
        self._inner = inner
        self._action = action
        self._at_number = at_number
        self._after = after
        self._methods = frozenset(methods)
        self._lock = Lock()

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def is_near(self) -> bool:
        return self._inner.is_near

    def put(self, key: str, body: Body) -> None:
        self._around("put", lambda: self._inner.put(key, body))

    def put_new(self, key: str, body: bytes) -> bool:
        return self._around("put_new", lambda: self._inner.put_new(key, body))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._around("get", lambda: self._inner.get(key, max_bytes=max_bytes))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._around("read_into", lambda: self._inner.read_into(key, offset, buffer))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._around("list", lambda: self._inner.list(prefix))

    def delete(self, key: str) -> None:
        self._around("delete", lambda: self._inner.delete(key))

    def close(self) -> None:
        self._inner.close()

    def _around(self, method: str, apply: Callable[[], _T]) -> _T:
        here = False
        if method in self._methods:
            with self._lock:
                here = self.counted == self._at_number
                self.counted += 1
        if here and not self._after:
            self._action()
        result = apply()
        if here and self._after:
            self._action()
        return result


def _flipped(body: bytes) -> bytes:
    """One bit wrong, at a place that the content decides, so that the same bytes always go wrong in the same way."""
    if not body:
        return body
    spoilt = bytearray(body)
    place = int.from_bytes(hashlib.sha256(body).digest()[:8], "big") % (8 * len(body))
    spoilt[place // 8] ^= 1 << (place % 8)
    return bytes(spoilt)
