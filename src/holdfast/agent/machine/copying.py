"""Many files from one source into one folder: several at once, in bounded memory, each appearing whole or not at all.

    files that are missing → ranges → threads: read, write into a file without its name yet → all ranges there → the name

What is there already, whole, is not read again: so a copy that was broken off goes on where it was. No link below the folder is
followed: whatever was put there meanwhile, nothing is written outside.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.core.config import format_bytes, format_duration
from holdfast.core.errors import HoldfastError, NotFound, StoreFull, UsageError
from holdfast.store import posix
from holdfast.store.foreign import Foreign, ForeignFile

__all__ = ["COMING", "Work", "beside", "copy", "missing"]

COMING = ".holdfast-coming"
"""A folder in the target: files that are not whole yet."""
RANGE_BYTES = 8 << 20
_NEAR_THREADS, _FAR_THREADS = 2, 16
"""Times RANGE_BYTES is the memory that a copy takes."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
_LOOK_S = 0.2
_SAY_S = 15.0
_JOIN_S = 5.0


@dataclass(slots=True)
class Work:
    """One source and the folder that it becomes. A single file is the one file of its folder."""

    source: Foreign
    root: Path
    files: Sequence[ForeignFile]
    """What is missing; names below `root`."""
    read_as: Callable[[str], str]
    """A file's name at the source."""
    stamp_ns: int
    """The time of change that each file gets: one that has another is not as it came."""
    coming: str
    """The name of the folder for what is not whole yet."""


@dataclass(slots=True)
class _File:
    number: int
    about: ForeignFile
    ranges_left: int
    version: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def missing(root: Path, files: Sequence[ForeignFile], stamp_ns: int) -> list[ForeignFile]:
    """Those that are not there, or not as they came."""

    def is_whole(each: ForeignFile) -> bool:
        try:
            found = os.lstat(root / each.name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (each.size_bytes, stamp_ns)

    return [each for each in files if not is_whole(each)]


def beside(act: Callable[[], object], tick: Callable[[], None]) -> None:
    """Carry it out in a thread, and call `tick` meanwhile; raises what either raises. A thread that is left goes on to its end."""
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="holdfast-mount", daemon=True).start()
    while not done.wait(_LOOK_S):
        tick()
    if failures:
        raise failures[0]


def copy(work: Work, tick: Callable[[], None], say: Callable[[str], None]) -> None:
    """Make the files that are missing. `tick` is called every moment, and raises when nobody wants them any more.

    Raises StoreFull when the disk is full, UsageError where something else stands in a file's place, and what the store raises
    after several tries.
    """
    _clear(work)
    copying = _Copying(work)
    threads = [
        threading.Thread(target=copying.run, name=f"holdfast-mount-{number}", daemon=True)
        for number in range(min(_NEAR_THREADS if work.source.is_near else _FAR_THREADS, max(1, len(work.files))))
    ]
    for thread in threads:
        thread.start()
    try:
        _watch(copying, threads, tick, say)
    finally:
        copying.stop.set()
        until_s = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
    if copying.failure is not None:
        raise copying.failure
    _clear(work)


def _clear(work: Work) -> None:
    """Parts of an earlier copy may be of other bytes."""
    with _opened_root(work.root) as root:
        shutil.rmtree(work.coming, ignore_errors=True, dir_fd=root)


def _watch(
    copying: _Copying, threads: Sequence[threading.Thread], tick: Callable[[], None], say: Callable[[str], None]
) -> None:
    total = sum(each.size_bytes for each in copying.work.files)
    began_s = said_s = time.monotonic()
    while any(thread.is_alive() for thread in threads) and copying.failure is None:
        tick()
        copying.stop.wait(_LOOK_S)
        now_s = time.monotonic()
        if now_s - said_s >= _SAY_S:
            said_s = now_s
            rate = copying.done_bytes / (now_s - began_s)
            left = f", {format_duration(int((total - copying.done_bytes) / rate))} left" if rate else ""
            say(
                f"{copying.work.root}: {format_bytes(copying.done_bytes)} of {format_bytes(total)}, {copying.done_files} of "
                f"{len(copying.work.files)} files, {format_bytes(int(rate))}/s{left}"
            )


class _Copying:
    """The threads' common ground."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self.done_bytes = self.done_files = 0
        self._pieces = self._cut()
        self._lock = threading.Lock()

    def run(self) -> None:
        buffer = memoryview(bytearray(RANGE_BYTES))
        while not self.stop.is_set():
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            try:
                self._bring(*piece, buffer)
            except BaseException as error:
                with self._lock:
                    self.failure = self.failure or _plain(error, piece[0].about.name)
                self.stop.set()
                return

    def _cut(self) -> Iterator[tuple[_File, int, int]]:
        """File, offset, length. Lazily: there may be millions."""
        for number, about in enumerate(self.work.files):
            count = max(1, -(-about.size_bytes // RANGE_BYTES))
            file = _File(number, about, count)
            for index in range(count):
                offset = index * RANGE_BYTES
                yield file, offset, min(RANGE_BYTES, about.size_bytes - offset)

    def _bring(self, file: _File, offset: int, length: int, buffer: memoryview) -> None:
        view = buffer[:length]
        try:
            version = self._read(file, offset, view)
        except NotFound:
            if file.about.size_bytes:
                raise
            # An empty object that stands for an empty folder.
            self._make_folder(file.about.name)
            return
        with file.lock:
            if file.version not in ("", version):
                raise HoldfastError(f"{file.about.name} has changed at its source while it was copied")
            file.version = version
        with _opened_root(self.work.root) as root, _made_folder(self.work.coming, root) as coming:
            with posix.opened(_open_part(str(file.number), coming)) as descriptor:
                _write_at(descriptor, offset, view)
                with file.lock:
                    file.ranges_left -= 1
                    is_whole = file.ranges_left == 0
                if is_whole:
                    os.utime(descriptor, ns=(self.work.stamp_ns, self.work.stamp_ns))
            if is_whole:
                self._name(file, root, coming)
        with self._lock:
            self.done_bytes += length
            self.done_files += is_whole

    def _read(self, file: _File, offset: int, view: memoryview) -> str:
        """Networks fail, and so do services: asked again a few times, on top of what the store's client does."""
        name = self.work.read_as(file.about.name)
        for pause_s in _PAUSES_S:
            try:
                return self.work.source.read_into(name, offset, view)
            except NotFound:
                raise
            except HoldfastError:
                if self.stop.wait(pause_s):
                    raise
        return self.work.source.read_into(name, offset, view)

    def _name(self, file: _File, root: int, coming: int) -> None:
        *parents, name = file.about.name.split("/")
        with _opened_below(parents, root) as folder:
            os.rename(str(file.number), name, src_dir_fd=coming, dst_dir_fd=folder)

    def _make_folder(self, name: str) -> None:
        with _opened_root(self.work.root) as root, _opened_below(name.split("/"), root), self._lock:
            self.done_files += 1


def _plain(error: BaseException, name: str) -> BaseException:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"the disk is full at {name}")
    if isinstance(error, posix.NotPlain | IsADirectoryError | NotADirectoryError | FileExistsError):
        return UsageError(f"{name}: something else stands in its place: {error}")
    return error


@contextmanager
def _opened_root(root: Path) -> Iterator[int]:
    with posix.opened(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        yield descriptor


@contextmanager
def _made_folder(name: str, parent: int) -> Iterator[int]:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        pass
    with posix.opened(posix.open_folder(name, parent)) as descriptor:
        yield descriptor


@contextmanager
def _opened_below(parts: Sequence[str], root: int) -> Iterator[int]:
    """That folder, made where it is missing, one component after the other: no link is followed."""
    folder = os.dup(root)
    try:
        for part in parts:
            with _made_folder(part, folder) as below:
                os.close(folder)
                folder = os.dup(below)
        yield folder
    finally:
        os.close(folder)


def _open_part(name: str, folder: int) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)


def _write_at(descriptor: int, offset: int, view: memoryview) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
