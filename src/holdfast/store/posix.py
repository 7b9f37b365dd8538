"""The system calls under the local store: walking folders without following links, writing whole files durably, errors.

Bytes flow from the caller's buffers through `write_all` into a file that has no name yet; `link_unnamed` gives it one.
Every failure of the operating system becomes one of our errors in `translated`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from holdfast.core.errors import HoldfastError, IntegrityError, NotFound, PermissionDenied, StoreFull, StoreUnavailable
from holdfast.store.base import PAGE_BYTES

__all__ = [
    "NotPlain",
    "exists",
    "flush_names_above",
    "fsync_folder",
    "link_unnamed",
    "make_folder",
    "open_folder",
    "open_plain_file",
    "opened",
    "read_exactly",
    "remove_quietly",
    "translated",
    "was_removed",
    "write_all",
]

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody put in an object's place must not wait for a writer.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_DIRECT_FROM_BYTES = 1 << 20
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only; elsewhere the flag changes nothing

_IOV_MAX = max(16, os.sysconf("SC_IOV_MAX"))

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class NotPlain(Exception):
    """A link, a pipe or a device stands where a plain file or folder should be. Becomes IntegrityError."""


@contextmanager
def translated(doing: str, key: str, root: str, absent: type[HoldfastError] = NotFound) -> Iterator[None]:
    """Turn what the operating system says into our errors; `absent` is what ENOENT means to the caller."""
    where = f"{doing} {key!r} in {root}"
    try:
        yield
    except NotPlain as error:
        raise IntegrityError(f"{where}: {error}; holdfast follows no links and reads plain files only") from None
    except OSError as error:
        raise _as_ours(error, where, absent) from error


def _as_ours(error: OSError, where: str, absent: type[HoldfastError]) -> HoldfastError:
    said = f"{where}: {error.strerror or error}"
    if error.errno in _FULL:
        return StoreFull(f"{said}; free some space or raise the quota")
    if error.errno in _DENIED:
        return PermissionDenied(f"{said}; check the owner and the mode of the folder and its mount options")
    if error.errno == errno.ENOENT:
        return absent(said)
    return StoreUnavailable(said)


@contextmanager
def opened(descriptor: int) -> Iterator[int]:
    """Close the descriptor when the block is left."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_folder(name: str, parent: int | None = None) -> int:
    """Open a folder. Below the root (with `parent`) a symbolic link is refused; the root itself is the user's choice.

    Raises FileNotFoundError when the name is free or a plain file, NotPlain when anything else stands there.
    """
    if parent is None:
        return os.open(name, _FOLDER_FLAGS)
    try:
        return os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        if stat.S_ISREG(os.lstat(name, dir_fd=parent).st_mode):
            raise FileNotFoundError(errno.ENOENT, "an object stands where a folder would be", name) from None
        raise NotPlain(f"{name!r} is not a folder") from None


def open_plain_file(name: str, folder: int) -> tuple[int, int]:
    """Open a plain file for reading: its descriptor and its size in bytes. Never blocks, never follows a link."""
    try:
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
            raise NotPlain(f"{name!r} is a link, a socket or a device") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise NotPlain(f"{name!r} is not a plain file")
    return descriptor, status.st_size


def read_exactly(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from the file; the number of bytes read is smaller only where the file ends."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_all(descriptor: int, buffers: Sequence[memoryview]) -> None:
    """Write every byte, whatever the kernel's limits on one call, then flush file and metadata to the disk.

    Where the leading buffers are large and lie on page boundaries they go past the page cache: that takes half the time and
    hardly any of the CPUs that are training meanwhile, and leaves the cache to the training data.
    """
    waiting = [buffer for buffer in reversed(buffers) if len(buffer)]
    _write_past_cache(descriptor, waiting)
    while waiting:
        _write_some(descriptor, waiting, len(waiting))
    os.fsync(descriptor)


def _write_some(descriptor: int, waiting: list[memoryview], most: int) -> None:
    """One call: some bytes of the last `most` buffers of `waiting`, which is in reverse order and loses what was written."""
    batch = waiting[-min(most, _IOV_MAX) :][::-1]
    count = os.writev(descriptor, batch)
    while count:
        first = waiting.pop()
        if count < len(first):
            waiting.append(first[count:])
            break
        count -= len(first)


def _write_past_cache(descriptor: int, waiting: list[memoryview]) -> None:
    """Write the leading buffers that the disk can take from memory directly. What it does not take stays in `waiting`."""
    leading = 0
    for buffer in reversed(waiting):
        if not _is_on_pages(buffer):
            break
        leading += 1
    if sum(len(buffer) for buffer in waiting[len(waiting) - leading :]) < _DIRECT_FROM_BYTES:
        return
    others = len(waiting) - leading
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT)
    except OSError:
        return  # this file system keeps everything in memory, or knows no other way
    try:
        while len(waiting) > others and _is_on_pages(waiting[-1]):
            _write_some(descriptor, waiting, len(waiting) - others)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system with stricter rules; the usual way takes over where this one has stopped.
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _is_on_pages(buffer: memoryview) -> bool:
    if len(buffer) % PAGE_BYTES or not len(buffer):
        return False
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % PAGE_BYTES == 0


def fsync_folder(descriptor: int) -> None:
    """Make the names in a folder durable. EINVAL: this file system cannot flush folders, and needs no flush."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def flush_names_above(folder: Path) -> None:
    """Make the name of `folder`, and of those above it on its file system, durable: who made them may have been killed first."""
    device = folder.stat().st_dev
    for above in folder.parents:
        try:
            descriptor = open_folder(str(above))
        except PermissionError:
            return  # It belongs to somebody else, who made what is in it before this process began.
        with opened(descriptor):
            if os.fstat(descriptor).st_dev != device:
                return
            fsync_folder(descriptor)


def make_folder(folder: Path) -> None:
    """Make a durable folder where there is none yet. After a failed flush it is gone again, so that a retry makes it anew."""
    if folder.exists():
        return
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    with opened(open_folder(str(folder.parent))) as parent:
        try:
            fsync_folder(parent)
        except OSError:
            remove_quietly(os.rmdir, folder.name, parent)
            raise


def exists(folder: int, name: str) -> bool:
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def remove_quietly(remove: Callable[..., None], name: str, folder: int) -> None:
    """What cannot be removed stays: there is nothing better to do, or a more important error under way."""
    try:
        remove(name, dir_fd=folder)
    except OSError:
        pass


def link_unnamed(descriptor: int, name: str, folder: int) -> None:
    """Give a file opened with O_TMPFILE its name; FileExistsError when the name is taken."""
    os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)


def was_removed(folder: int) -> bool:
    """True when the opened folder has been removed meanwhile, so that nothing can be created in it any more."""
    return os.fstat(folder).st_nlink == 0
