"""The machine's own disk as the first of two tiers: a checkpoint lies there before it is in the store, and is read from there.

    snapshot → write → data, part and root on the disk → a sealed record that names them: *staged*
    staged → read back, verified → the same names in the store → a head names it: *committed* (commit.py, promote.py)
    restore → the newest staged checkpoint that continues the truth, else the store's; every block from the disk if it verifies

What is staged is not committed: the disk usually goes with the machine. It is a continuation of the truth, and may be resumed from,
as long as the newest checkpoint that the heads retain is one that it was built on, and nobody has changed the run by hand since.

Under the folder: `<run id>/lock`, and in `<run id>/objects/` the layout of a run's URL, without heads, plus `staged/<name>.json`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar

from holdfast.checkpoint.format import CheckpointRef, Head, StagedRecord
from holdfast.checkpoint.heads import head_numbers, read_head
from holdfast.checkpoint.near import NearDisk
from holdfast.checkpoint.read import CheckpointReader, Fallback, open_checkpoint
from holdfast.checkpoint.retain import StoreOpener, checkpoint_keys
from holdfast.checkpoint.write import Written
from holdfast.core.config import Bytes, format_bytes, parse_bytes
from holdfast.core.errors import (
    HoldfastError,
    IntegrityError,
    NotFound,
    StoreFull,
    StoreUnavailable,
    UsageError,
)
from holdfast.core.sealed import FORMAT_VERSION, MAX_RECORD_BYTES, seal, unseal
from holdfast.store.base import Store, is_key
from holdfast.store.local import LocalStore

__all__ = ["LocalTier", "Staged", "Tier", "keys_of", "load_staged"]

Result = TypeVar("Result")

_MOST_SEGMENT_BYTES = 1 << 20
_RESERVED_SHARE = 0.05
"""Of the disk, left free for others where no cap was given."""
_BY_HAND = frozenset({"rollback", "drop", "import", "fork", "remove", "base"})
"""Kinds of heads after which what an attempt had staged before is no continuation any more."""
_LOCK_TRIES = 10
"""How often a lock is taken anew because its owner removed it, with the folder, in the moment before."""

_held_here: set[tuple[int, str]] = set()
"""Folders that this process holds: a POSIX lock does not keep a process from itself. With the process's number, as a fork copies
this set and not the lock."""
_held_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class LocalTier:
    """Where and how much. `holdfast.Run(url, local=LocalTier("/mnt/nvme", cap="200 GiB"))`; a plain path is the same with defaults.

    folder: on a disk of this machine; shared by many runs.
    cap: the most bytes that this run may keep there; None: all but 5 % of the disk.
    outlives: the disk is still there when the machine comes back (a stopped VM's own disk, a volume that is attached again).
        Then a checkpoint counts as saved once it is on the disk, and a notice of two minutes is enough for states that the network
        could not carry in that time.
    """

    folder: str | os.PathLike[str]
    cap: Bytes | None = None
    outlives: bool = False

    def __post_init__(self) -> None:
        if self.cap is not None and parse_bytes(self.cap) <= 0:
            raise UsageError(f"LocalTier: the cap must be positive, not {self.cap!r}")


@dataclass(frozen=True, slots=True)
class Staged:
    """A checkpoint that is whole on the disk. `may_commit`: none of its names has been condemned since, which they are when another
    attempt clears away what it takes for left-overs. It can then be resumed from, but a condemned name is never referred to again.
    """

    record: StagedRecord
    written: Written
    may_commit: bool = True

    @property
    def ref(self) -> CheckpointRef:
        return self.record.checkpoint


class Tier:
    """One run's part of the disk, held by one process at a time.

    Thread safety: `store` is; the rest belongs to the saver's thread.
    Failure contract: StoreError of any kind means that this disk cannot be relied on now; nothing that is committed depends on it.
    """

    def __init__(self, options: LocalTier, run_id: str) -> None:
        if not is_key(run_id) or "/" in run_id:
            raise IntegrityError(f"the run's id, {run_id!r}, is none that holdfast makes: no folder is named after it")
        self.outlives = options.outlives
        self._cap_bytes = None if options.cap is None else parse_bytes(options.cap)
        self.folder = Path(options.folder).expanduser() / run_id
        self.store: Store = LocalStore(self.folder / "objects")
        self._run_id = run_id
        self._lock: IO[bytes] | None = None
        self._held: tuple[int, str] | None = None

    # ---- one process at a time

    def hold(self) -> bool:
        """Keep others away until `close`, or until this process dies. False when somebody is here already.

        Raises OSError when the disk does not work.
        """
        for _ in range(_LOCK_TRIES):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = (os.getpid(), os.path.realpath(self.folder))
            with _held_lock:
                if held in _held_here:
                    return False
                try:
                    lock = open(self.folder / "lock", "wb")  # noqa: SIM115 - held as long as the tier is
                except FileNotFoundError:
                    continue
                try:
                    # A POSIX lock: forked loader workers, which may outlive their parent for a moment, do not inherit it.
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    lock.close()
                    if isinstance(error, BlockingIOError | PermissionError):
                        return False
                    raise
                self._lock = lock
                if self._is_in_place():
                    _held_here.add(held)
                    self._held = held
                    return True
                self._lock = None
                lock.close()
        return False

    def _is_in_place(self) -> bool:
        """Whether the folder and the lock in it are still the ones that this process holds."""
        try:
            return self._lock is not None and os.path.samestat(
                os.stat(self.folder / "lock"), os.fstat(self._lock.fileno())
            )
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let others in. Of an empty tier nothing stays on the disk."""
        self.store.close()
        if self._lock is None:
            return
        with _held_lock:
            if self._is_in_place():
                with suppress(OSError):
                    self._remove_empty()
            if self._held is not None:
                _held_here.discard(self._held)
            self._lock.close()
            self._lock = self._held = None

    def _remove_empty(self) -> None:
        objects = self.folder / "objects"
        if objects.exists():
            for below in objects.iterdir():
                below.rmdir()
            objects.rmdir()
        (self.folder / "lock").unlink()
        self.folder.rmdir()

    # ---- writing

    def check_in_place(self) -> None:
        """Before anything is written: a folder that was removed or unmounted must not come into being again, without its lock.

        Raises StoreUnavailable.
        """
        if not self._is_in_place():
            raise StoreUnavailable(f"{self.folder} has been removed or unmounted while it was in use")

    def make_room(self, needed_bytes: int, keep: Iterable[str] = ()) -> None:
        """See that `needed_bytes` may be written. Copies of what is in the store go first: all but the objects named in `keep`.

        Raises StoreFull when the cap or the disk does not allow it.
        """
        if not self._fits(needed_bytes):
            self.keep_only(keep)
            if not self._fits(needed_bytes):
                usage = shutil.disk_usage(self.folder)
                cap = "" if self._cap_bytes is None else f", with a cap of {format_bytes(self._cap_bytes)}"
                raise StoreFull(
                    f"{self.folder}: no room for {format_bytes(needed_bytes)} ({format_bytes(usage.free)} of "
                    f"{format_bytes(usage.total)} are free{cap})"
                )

    def _fits(self, needed_bytes: int) -> bool:
        if self._cap_bytes is not None:
            return sum(entry.size_bytes for entry in self.store.list()) + needed_bytes <= self._cap_bytes
        usage = shutil.disk_usage(self.folder)
        return usage.free - needed_bytes >= _RESERVED_SHARE * usage.total

    def record(
        self,
        written: Written,
        checkpoint: CheckpointRef,
        head: Head,
        built_on: Iterable[str],
        segments: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Staged:
        """Name what was written; from here on it can be resumed from, whatever happens to this process."""
        fitting = sum(map(len, segments.values())) <= _MOST_SEGMENT_BYTES
        record = StagedRecord(
            format=FORMAT_VERSION, run_id=self._run_id, checkpoint=checkpoint, generation=head.generation,
            head_number=head.number, built_on=sorted(built_on), sent_objects=sorted(written.sent_objects),
            segments={key: body.decode() for key, body in segments.items()} if fitting else {},
        )  # fmt: skip
        self.store.put(_record_key(checkpoint.name), seal(record))
        return Staged(record, written)

    # ---- reading

    def candidates(self, store: Store, head: Head) -> Iterator[Staged]:
        """The staged checkpoints that continue the truth as `head` tells it, the newest first. The index of each is whole; its data
        is not looked at.

        Raises what `store` raises; what is wrong on the disk only makes candidates fewer.
        """
        found = [record for record in self._records() if self._continues(record, head)]
        since = _Since(store, head)
        for record in sorted(found, key=lambda record: _age(record.checkpoint), reverse=True):
            staged = self._opened(record)
            if staged is not None and not since.changed_by_hand(record):
                condemned = since.condemned(record)
                needed = checkpoint_keys(staged.ref, staged.written.root)
                yield Staged(record, staged.written, may_commit=not needed & condemned)

    def newest(self, store: Store, head: Head) -> Staged | None:
        """The first of `candidates`."""
        return next(self.candidates(store, head), None)

    def _records(self) -> list[StagedRecord]:
        found = []
        with suppress(HoldfastError):
            for entry in self.store.list("staged/"):
                with suppress(HoldfastError):
                    data = self.store.get(entry.key, max_bytes=MAX_RECORD_BYTES)
                    record = unseal(data, StagedRecord, what=f"{self.store.url}/{entry.key}")
                    if record.run_id == self._run_id and entry.key == _record_key(record.checkpoint.name):
                        found.append(record)
        return found

    def _continues(self, record: StagedRecord, head: Head) -> bool:
        if head.finished or head.removed or record.generation != head.generation:
            return False
        current = [ref for ref in head.checkpoints if ref.generation == head.generation]
        newest = current[-1].name if current else ""
        return newest in record.built_on and record.checkpoint.name != newest

    def _opened(self, record: StagedRecord) -> Staged | None:
        ref = record.checkpoint
        try:
            opened = open_checkpoint(self.store, ref, lambda home: self.store)
        except HoldfastError:
            return None
        sent = frozenset(record.sent_objects)
        if len(opened.parts) != 1:
            return None
        part = opened.parts[0]
        sent_bytes = sum(reference.size_bytes for reference in part.objects if reference.key in sent)
        total_bytes = ref.total_bytes
        return Staged(
            record,
            Written(opened.root, ref.root_blake3, part, total_bytes, sent_bytes, total_bytes - sent_bytes, sent),
        )

    # ---- tidying

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove everything on the disk but these objects. What cannot be removed stays for the next time."""
        kept = set(names)
        # Records first: one must never name what is gone.
        for entry in sorted(self.store.list(), key=lambda entry: not entry.key.startswith("staged/")):
            if entry.key not in kept:
                self.store.delete(entry.key)


def load_staged(
    tier: Tier,
    store: Store,
    head: Head,
    open_home: StoreOpener,
    load: Callable[[CheckpointReader], Result],
    *,
    fell_back: Callable[[Fallback], None],
) -> tuple[Staged, Result] | None:
    """Load the newest checkpoint on the disk that continues the truth and verifies; None where there is none.

    `load` raises IntegrityError or NotFound to say that the checkpoint is unusable; `fell_back` is told of each such one. Raises
    what `store` raises otherwise.
    """
    for staged in tier.candidates(store, head):
        written = staged.written
        try:
            reader = CheckpointReader(
                store, staged.ref, written.root, [written.part], open_home, [NearDisk(tier.store)]
            )
            return staged, load(reader)
        except (IntegrityError, NotFound) as error:
            fell_back(Fallback(staged.ref, f"on the local disk: {error}"))
    return None


def keys_of(staged: Staged) -> set[str]:
    """Every object on the disk that a staged checkpoint needs, its record included."""
    return {_record_key(staged.ref.name), *checkpoint_keys(staged.ref, staged.written.root)}


def _record_key(name: str) -> str:
    return f"staged/{name.removeprefix('checkpoints/')}.json"


def _age(ref: CheckpointRef) -> tuple[int, float]:
    """By steps, and among those of one step (the last of a loop, and the one that finishes the run) by the clock."""
    return ref.step, ref.unix_s


class _Since:
    """What has happened to the run after a record was made, as the heads up to `head` tell it; each is read once."""

    def __init__(self, store: Store, head: Head) -> None:
        self._store, self._head = store, head
        self._numbers: list[int] | None = None
        self._known: dict[int, Head] = {}

    def changed_by_hand(self, record: StagedRecord) -> bool:
        """Whether somebody has rolled the run back or the like. Unknown counts as yes."""
        later = self._later(record)
        if len(later) != self._head.number - record.head_number:
            return True  # some of them have been pruned
        try:
            return any(self._read(number).kind in _BY_HAND for number in later)
        except (NotFound, IntegrityError):
            return True

    def condemned(self, record: StagedRecord) -> set[str]:
        """Every name that a head has condemned since. Only where `changed_by_hand` says no."""
        return {key for number in self._later(record) for key in self._read(number).condemned}

    def _later(self, record: StagedRecord) -> list[int]:
        if self._numbers is None:
            self._numbers = head_numbers(self._store)
        return [number for number in self._numbers if record.head_number < number <= self._head.number]

    def _read(self, number: int) -> Head:
        if number not in self._known:
            self._known[number] = read_head(self._store, number, self._head.run_id)
        return self._known[number]
