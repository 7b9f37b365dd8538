"""Up to thousands of ranks in one process: the real protocol, with fakes for tensors' sizes and for the network.

    ranks: a Together each, committers each, readers each          fake: the wires between them, one store in memory for all

A word is encoded, counted and decoded again, and heard in the sender's thread. What would wait for others in a process of its own
gets a thread, and these run one after the other: the next begins when the one before has said its word (`World.in_turn`). So
counts and sizes are the same in every run, and what rank 0 computes can be told from what the others do (`Meter`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from holdfast.store.base import Body, Entry
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.words import Hello, Word, decode_word, encode_word

__all__ = ["FRAME_BYTES", "GIVE_UP_S", "CountingStore", "Inline", "Meter", "Requests", "Traffic", "World"]

FRAME_BYTES = 4
"""In front of every word on a connection."""
GIVE_UP_S = 600.0
_NEVER_S = 1e6
"""Nobody waits so long: a simulation that ends has waited for no deadline."""
_STACK_BYTES = 512 << 10
_HANDS_OVER = ("Say", "Ready", "Cannot")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Meter:
    """CPU seconds of rank 0's code, in whatever thread it runs. Thread-safe."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._lock = threading.Lock()
        self.chair_s = 0.0

    @contextmanager
    def of(self, *, chair: bool) -> Iterator[None]:
        """What runs inside is rank 0's, or is not."""
        before = getattr(self._mine, "chair", False)
        self._switch(chair)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, chair: bool) -> None:
        now_s = time.thread_time()
        if getattr(self._mine, "chair", False):
            with self._lock:
                self.chair_s += now_s - self._mine.since_s
        self._mine.chair, self._mine.since_s = chair, now_s


@dataclass(slots=True)
class Traffic:
    """Words to rank 0 (`arriving`) and from it (`leaving`), by their kind; and what rank 0 has computed meanwhile."""

    arriving: Counter[str] = field(default_factory=Counter)
    leaving: Counter[str] = field(default_factory=Counter)
    arriving_bytes: int = 0
    leaving_bytes: int = 0
    cpu_s: float = 0.0

    @property
    def words(self) -> int:
        return self.arriving.total() + self.leaving.total()


class World:
    """All ranks of a job and the wires between rank 0 and the others."""

    def __init__(self, size: int) -> None:
        self.size, self.clock, self.meter = size, ManualClock(), Meter()
        self.ranks = [Together(rank, size, self.clock, commit_timeout_s=_NEVER_S) for rank in range(size)]
        self._traffic = Traffic()
        self._lock = threading.Lock()
        self._cut: set[int] = set()
        self._held: list[tuple[int, bytes, str]] | None = None
        self._turn_over = [threading.Event() for _ in range(size)]
        for rank, together in enumerate(self.ranks):
            together.connect(_Wire(self, rank), lambda notice: None)

    @property
    def everybody(self) -> tuple[int, ...]:
        return tuple(range(self.size))

    def join(self) -> None:
        """Each member says who it is, with a secret as long as the real one."""
        for rank in range(1, self.size):
            self.to_chair(rank, Hello(rank, "0" * 64))
        with self.meter.of(chair=True):
            self.ranks[0].wait_for_all(0.0)

    # ---- words

    def to_chair(self, rank: int, word: Word) -> None:
        if rank in self._cut:
            return
        data = encode_word(word)
        with self._lock:
            self._traffic.arriving[type(word).__name__] += 1
            self._traffic.arriving_bytes += FRAME_BYTES + len(data)
        with self.meter.of(chair=True):
            self.ranks[0].heard(rank, decode_word(data))
        if type(word).__name__ in _HANDS_OVER:
            self._turn_over[rank].set()

    def to_member(self, rank: int, data: bytes, kind: str) -> None:
        if rank in self._cut:
            return
        with self._lock:
            if self._held is not None:
                self._held.append((rank, data, kind))
                return
            self._traffic.leaving[kind] += 1
            self._traffic.leaving_bytes += FRAME_BYTES + len(data)
        with self.meter.of(chair=False):
            self.ranks[rank].heard(0, decode_word(data))

    @contextmanager
    def words_from_chair_held(self) -> Iterator[None]:
        """They arrive when the block ends."""
        self._held = []
        yield
        held, self._held = self._held, None
        for word in held:
            self.to_member(*word)

    def lose(self, rank: int) -> None:
        """Its process has died: rank 0's connection to it breaks."""
        self._cut.add(rank)
        with self.meter.of(chair=True):
            self.ranks[0].lost(rank)

    @contextmanager
    def measured(self) -> Iterator[Traffic]:
        """What goes over the wires, and what rank 0 computes, inside the block."""
        traffic = self._traffic = Traffic()
        before_s = self.meter.chair_s
        yield traffic
        traffic.cpu_s = self.meter.chair_s - before_s
        self._traffic = Traffic()

    # ---- what waits

    def in_turn(self, work: Callable[[int], Result]) -> dict[int, Result | Exception]:
        """`work` of rank 0, and of one member after the other: each begins when the one before has handed in its word, or has
        ended. Returns what became of each."""
        ended: dict[int, Future[Result]] = {rank: Future() for rank in range(self.size)}
        threads: list[threading.Thread] = []

        def run(rank: int) -> None:
            try:
                with self.meter.of(chair=rank == 0):
                    result = work(rank)
            except BaseException as error:
                ended[rank].set_exception(error)
            else:
                ended[rank].set_result(result)
            finally:
                self._turn_over[rank].set()

        before_bytes = threading.stack_size(_STACK_BYTES)
        try:
            for rank in range(self.size):
                self._turn_over[rank].clear()
                threads.append(threading.Thread(target=run, args=(rank,), daemon=True))
                threads[-1].start()
                if rank and not self._turn_over[rank].wait(GIVE_UP_S):
                    raise TimeoutError(f"rank {rank} neither hands in its word nor ends")
        finally:
            threading.stack_size(before_bytes)
        for thread in threads:
            thread.join(GIVE_UP_S)
        outcomes: dict[int, Result | Exception] = {}
        for rank, future in ended.items():
            try:
                outcomes[rank] = future.result(timeout=0)
            except Exception as error:
                outcomes[rank] = error
        return outcomes


class _Wire:
    """The connections of one rank."""

    def __init__(self, world: World, rank: int) -> None:
        self._world, self._rank = world, rank

    def send(self, rank: int, word: Word) -> None:
        if self._rank == 0:
            self._world.to_member(rank, encode_word(word), type(word).__name__)
        else:
            self._world.to_chair(self._rank, word)

    def send_all(self, word: Word) -> None:
        data = encode_word(word)
        for rank in range(1, self._world.size):
            self._world.to_member(rank, data, type(word).__name__)

    def close(self) -> None:
        """Nothing is open."""


class Inline(Executor):
    """Does what it is given at once, in the caller's thread."""

    def submit(self, fn: Callable[Arguments, Any], /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@dataclass(slots=True)
class Requests:
    """Requests to a store by their kind, bytes read by what was read, and how many names were listed."""

    counts: Counter[str] = field(default_factory=Counter)
    read_bytes: Counter[str] = field(default_factory=Counter)
    listed: int = 0

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def index_bytes(self) -> int:
        """Of heads, roots and parts."""
        return self.read_bytes.total() - self.read_bytes["data"]


class CountingStore:
    """One rank's way to the store that all share. `requests` is counted from the last `take` on."""

    def __init__(self, objects: MemoryStore) -> None:
        self._objects = objects
        self._requests = Requests()
        self._lock = threading.Lock()

    def take(self) -> Requests:
        """What was asked for since the last time."""
        taken, self._requests = self._requests, Requests()
        return taken

    @property
    def url(self) -> str:
        return self._objects.url

    @property
    def is_near(self) -> bool:
        return self._objects.is_near

    def put(self, key: str, body: Body) -> None:
        self._count("put")
        self._objects.put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        self._count("put_new")
        return self._objects.put_new(key, body)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = self._objects.get(key, max_bytes=max_bytes)
        self._count("get", key, len(data))
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._count("read_into", key, len(buffer))
        self._objects.read_into(key, offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found = list(self._objects.list(prefix))
        self._count("list")
        self._requests.listed += len(found)
        return iter(found)

    def delete(self, key: str) -> None:
        self._count("delete")
        self._objects.delete(key)

    def close(self) -> None:
        """The objects are all ranks'."""

    def _count(self, kind: str, key: str = "", read_bytes: int = 0) -> None:
        with self._lock:
            self._requests.counts[kind] += 1
            if key:
                self._requests.read_bytes[_what(key)] += read_bytes


def _what(key: str) -> str:
    if key.startswith("data/"):
        return "data"
    return "root" if key.endswith("/root.json") else "part" if "/part-" in key else "head"
