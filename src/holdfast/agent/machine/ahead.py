"""Restore ahead: while a standby waits at the gate, what the newest checkpoint needs is brought onto this machine's disk.

    heads → newest checkpoint → root → parts → their objects, less what lies here already → staged/data/… under their names
    data/<attempt>/ → what no head names yet: the save that is being made, which the next head will name
    gate opens → one more look → the command starts, and reads from there (HOLDFAST_STAGED); what is missing it fetches itself
    the command has claimed → nothing more is fetched; it has a checkpoint of its own → the folder goes

It works in threads of its own; the gate is looked at, and the claim made, as if it were not there. Objects never change and get
their names here when they are whole. Nothing is believed: whoever restores verifies every byte, and takes what is missing or
altered from the store. So a failure here costs time at most, and is said. From a store on this disk nothing is copied.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast.agent.machine.records import TROUBLE
from holdfast.checkpoint.format import CheckpointRef, Head
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import read_parts
from holdfast.checkpoint.retain import Roots
from holdfast.checkpoint.threads import DaemonPool
from holdfast.core.clock import Clock
from holdfast.core.config import format_bytes
from holdfast.core.contract import ENV_STAGED, Progress
from holdfast.core.errors import HoldfastError, IntegrityError, NotFound
from holdfast.store.base import Store
from holdfast.store.local import LocalStore

__all__ = ["Ahead"]

_AT_ONCE = 3
"""Objects under way, each up to 64 MiB in memory: the store has others to serve, and there is time."""
_PIECE_BYTES = 8 << 20
"""Of one request; between two of them it can be told to stop."""
_PAUSES_S = (2.0, 5.0, 15.0, 30.0)
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the newest checkpoint needs of the run's own objects: sizes by key."""

    ref: CheckpointRef
    sizes_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes_bytes.values())


class Ahead:
    """One standby's. Thread safety: the methods belong to one thread, which they never keep waiting, `close` excepted."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        clock: Clock,
        say: Callable[[str], None],
        look_s: float,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        """`folder` is this one's alone, and is removed in the end. `look_s`: between two looks at the run's heads."""
        self._folder = folder
        self._stager = _Stager(store, folder, clock, say, look_s, free_bytes)
        self._thread: threading.Thread | None = None

    @contextmanager
    def beside_waiting(self) -> Iterator[None]:
        """Fetch while the block is waiting; leaving it is the opening of the gate, or the end where it raises."""
        self._begin()
        try:
            yield
        except BaseException:
            self._stager.tell(is_over=True)
            raise
        self._stager.tell(is_open=True)

    def _begin(self) -> None:
        if self._stager.store.is_near or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._stager.work, name="holdfast-ahead", daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What the command is to know of it."""
        return {} if self._thread is None else {ENV_STAGED: str(self._folder)}

    def look(self, progress: Progress | None) -> None:
        """How far the command is; called now and then while it runs."""
        if progress is not None and self._thread is not None:
            # It has claimed, and reads for itself: two readers would share what the network gives.
            self._stager.tell(is_enough=True, is_over=progress.committed_step >= 0)

    def close(self) -> None:
        """Remove the folder. A request that hangs does not hold up the end of the machine."""
        if self._thread is not None:
            self._stager.tell(is_over=True)
            self._thread.join(_CLOSE_S)


class _DiskFails(Exception):
    """Not the store's fault: to ask it again would not help."""


class _Stager:
    """The thread's own, but for `tell`, which any may call."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        clock: Clock,
        say: Callable[[str], None],
        look_s: float,
        free_bytes: Callable[[Path], int],
    ) -> None:
        self.store = store
        self._folder, self._disk = folder, LocalStore(folder)
        self._clock, self._say, self._look_s, self._free_bytes = clock, say, look_s, free_bytes
        self._news = threading.Event()
        self._is_open = self._is_enough = self._is_over = False
        self._here: dict[str, int] = {}
        """What lies on the disk: sizes by key."""
        self._plan: _Plan | None = None
        self._coming: dict[str, int] = {}
        """Sizes of what a save in progress has sent so far, by key."""
        self._old: set[str] | None = None
        """What no head named when this began: left by a save that failed, as far as anybody knows."""
        self._roots = Roots(store, _no_home)
        self._flying: dict[Future[bool], tuple[str, int]] = {}
        """Key and size of what is under way."""
        self._passed_by: set[str] = set()
        """Of the plan: what the store does not have, or the disk does not take."""
        self._look_at_s = self._fetch_at_s = clock.monotonic_s()
        self._failures = 0
        self._has_seen_open = self._has_looked_open = self._has_told = False

    def tell(self, *, is_open: bool = False, is_enough: bool = False, is_over: bool = False) -> None:
        """What has happened stays so."""
        self._is_open = self._is_open or is_open
        self._is_enough = self._is_enough or is_enough or is_over
        self._is_over = self._is_over or is_over
        self._news.set()

    def work(self) -> None:
        pool = DaemonPool(_AT_ONCE, "holdfast-ahead-get")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._here = {entry.key: entry.size_bytes for entry in self._disk.list("data/")}
            while not self._is_over:
                self._round(pool)
                self._news.wait(self._rest_s())
                self._news.clear()
        except Exception as error:
            self._say(f"holdfast: nothing more is restored ahead: {_words(error)}")
            while not self._is_over:
                self._news.wait()
                self._news.clear()
        finally:
            # What is under way stops at its next piece, and must not make the folder anew.
            pool.shutdown(wait=True)
            self._disk.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _round(self, pool: DaemonPool) -> None:
        self._collect()
        if self._is_enough:
            return
        self._look_if_due()
        if self._clock.monotonic_s() >= self._fetch_at_s:
            self._send_for_more(pool)
        self._tell_when_whole()

    def _rest_s(self) -> float | None:
        """Until something is to be done by itself; None: until there is news."""
        if self._is_enough or (self._has_looked_open and not self._missing()):
            return None
        due_s = self._fetch_at_s if self._missing() and not self._flying else float("inf")
        if not self._has_looked_open:
            due_s = min(due_s, self._look_at_s)
        return None if due_s == float("inf") else max(0.0, due_s - self._clock.monotonic_s())

    # ---- what is needed

    def _look_if_due(self) -> None:
        """After the gate has opened once more, for the last save of the machine before; then no more."""
        now_s = self._clock.monotonic_s()
        if self._is_open and not self._has_seen_open:
            self._has_seen_open, self._look_at_s = True, now_s
        if self._has_looked_open or now_s < self._look_at_s:
            return
        opened, self._look_at_s = self._has_seen_open, now_s + self._look_s
        try:
            self._look()
        except TROUBLE as error:
            self._failed("what is to be restored", error)
            return
        self._has_looked_open = opened

    def _look(self) -> None:
        head = read_truth(self.store).head
        if head is None or head.finished or head.removed:
            return
        current = [ref for ref in head.checkpoints if ref.generation == head.generation]
        # What a fork borrows lies in another run, and is read from there.
        if current and current[-1].home is None:
            self._take_up(current[-1])
        self._look_for_coming(head)
        wanted = self._wanted()
        for key in [key for key, size_bytes in self._here.items() if wanted.get(key) != size_bytes]:
            self._drop(key)

    def _take_up(self, ref: CheckpointRef) -> None:
        if self._plan is not None and self._plan.ref.name == ref.name:
            return
        root = self._roots.get(ref)
        parts = read_parts(self.store, root, range(len(root.parts)))
        sizes = {found.key: found.size_bytes for part in parts for found in part.objects if found.home == 0}
        self._plan, self._has_told = _Plan(ref, sizes), False
        self._passed_by.clear()

    def _look_for_coming(self, head: Head) -> None:
        """A dense state is sent anew with every save, so what comes between this list and the last head is all of it."""
        own = [ref for ref in head.checkpoints if ref.home is None]
        self._roots.forget_except(own)
        try:
            named = {key for ref in own for key in self._roots.get(ref).objects}.union(head.condemned)
        except (NotFound, IntegrityError):
            # What a damaged checkpoint has named would be taken for new.
            self._coming = {}
            return
        listed = {entry.key: entry.size_bytes for entry in self.store.list(f"data/{head.attempt}/")}
        if self._old is None:
            self._old = listed.keys() - named
        self._coming = {
            key: size_bytes for key, size_bytes in listed.items() if key not in named and key not in self._old
        }

    def _drop(self, key: str) -> None:
        with suppress(*TROUBLE):
            self._disk.delete(key)
            self._here.pop(key, None)

    def _wanted(self) -> dict[str, int]:
        """Sizes by key, what is certain first."""
        return {} if self._plan is None else self._plan.sizes_bytes | self._coming

    def _missing(self) -> dict[str, int]:
        away = self._here.keys() | self._passed_by | {key for key, _ in self._flying.values()}
        return {key: size_bytes for key, size_bytes in self._wanted().items() if key not in away}

    # ---- fetching it

    def _send_for_more(self, pool: DaemonPool) -> None:
        for key, size_bytes in self._missing().items():
            if len(self._flying) >= _AT_ONCE:
                return
            if not self._fits(size_bytes):
                self._pass_by_the_rest(f"half of the free disk of {self._folder} is used")
                return
            future = pool.submit(self._fetch, key, size_bytes)
            self._flying[future] = key, size_bytes
            future.add_done_callback(lambda done: self._news.set())

    def _fits(self, size_bytes: int) -> bool:
        """Invariant: at most half of what is free without us is ours, with what is under way."""
        here_bytes = sum(self._here.values())
        coming_bytes = size_bytes + sum(coming for _, coming in self._flying.values())
        try:
            return here_bytes + coming_bytes <= (self._free_bytes(self._folder) + here_bytes) // 2
        except OSError:
            return False

    def _pass_by_the_rest(self, why: str) -> None:
        rest = self._missing()
        self._passed_by.update(rest)
        left_bytes = sum(size_bytes for key, size_bytes in rest.items() if key not in self._coming)
        if self._plan is not None and left_bytes:
            self._say(
                f"holdfast: {format_bytes(left_bytes)} of step {self._plan.ref.step} are not restored ahead: {why}"
            )

    def _fetch(self, key: str, size_bytes: int) -> bool:
        """In a thread of the pool. Whether it is there; False: it was told to stop."""
        body = np.empty(size_bytes, np.uint8).data
        for start in range(0, size_bytes, _PIECE_BYTES):
            if self._is_enough:
                return False
            self.store.read_into(key, start, body[start : start + _PIECE_BYTES])
        try:
            self._disk.put(key, body)
        except HoldfastError as error:
            raise _DiskFails(_words(error)) from error
        return True

    def _collect(self) -> None:
        for future in [future for future in self._flying if future.done()]:
            key, size_bytes = self._flying.pop(future)
            try:
                if not future.result():
                    continue
                self._failures, self._here[key] = 0, size_bytes
                if key not in self._wanted():
                    self._drop(key)
            except _DiskFails as error:
                # Every try would fetch it again.
                self._passed_by.add(key)
                self._pass_by_the_rest(str(error))
            except (NotFound, IntegrityError):
                # Swept since the head was read, or damaged: the next head, or whoever restores, will know.
                self._passed_by.add(key)
                self._look_at_s = min(self._look_at_s, self._clock.monotonic_s() + 1.0)
            except TROUBLE as error:
                self._failed(key, error)

    def _failed(self, what: str, error: BaseException) -> None:
        """Say it once, and leave the store, or the disk, in peace for a while."""
        if self._failures == 0:
            self._say(f"holdfast: {what} cannot be fetched ahead now, and is tried again: {_words(error)}")
        pause_s = _PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)]
        self._failures += 1
        self._fetch_at_s = self._clock.monotonic_s() + pause_s
        self._look_at_s = max(self._look_at_s, self._fetch_at_s)

    def _tell_when_whole(self) -> None:
        if self._plan is None or self._has_told or not self._plan.sizes_bytes.keys() <= self._here.keys():
            return
        self._has_told = True
        self._say(
            f"holdfast: restored ahead: step {self._plan.ref.step}, {format_bytes(self._plan.total_bytes)} in "
            f"{len(self._plan.sizes_bytes)} objects, lies on this machine's disk"
        )


def _no_home(url: str) -> Store:
    raise NotFound(f"{url} is another run, from which nothing is fetched ahead")


def _words(error: BaseException) -> str:
    said = str(error) if isinstance(error, HoldfastError) else f"{type(error).__name__}: {error}"
    return " ".join(said.split())
