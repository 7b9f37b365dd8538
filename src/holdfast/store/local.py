"""A folder as a store: each object is a file that appears whole, under its name, after its bytes are on the disk.

A body is written to a file without a name (O_TMPFILE), fsynced, linked under its key, and then the folder is fsynced.
A process killed at any point leaves either the whole object or nothing at all. File systems without unnamed files or
without /proc (some network and overlay ones) get a named file in `<root>/.tmp/`, which is never listed; what a kill
leaves there is removed a day later by another writer.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from urllib.parse import quote

from holdfast.core.errors import FormatError, IntegrityError, StoreUnavailable, StoreUnsafe
from holdfast.core.ids import TokenSource, random_token
from holdfast.store import posix
from holdfast.store.base import Body, Entry, check_key, check_prefix, flat_buffers, is_key

__all__ = ["LocalStore"]

_TEMPORARY = ".tmp"
_STALE_S = 24 * 3600.0
"""A named temporary file this much older than one written now belongs to a writer that was killed."""

_NO_UNNAMED = frozenset(
    {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.ELOOP}
)
"""What opening or linking an unnamed file says where the file system or a missing /proc does not allow it."""
_MAYBE_NO_UNNAMED = frozenset({errno.EPERM, errno.EACCES})
"""The same, or simply a folder that we may not write to: the named way is tried, and says which."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

_VANISHED_TRIES = 100
"""How often a write starts over because a concurrent delete removed the emptied folder under it."""

_FOLDERS_KNOWN = 128
"""Folders whose own names are known to be durable; each costs one descriptor."""


class _FolderVanished(Exception):
    """A concurrent delete removed the folder between opening it and creating a name in it."""


class LocalStore:
    """Objects in a POSIX folder.

    Thread safety: every method, from any thread and process; safe across fork.
    Durability: `put` and `put_new` return after the file and every folder up to the root have been fsynced. `delete` is
    not flushed: after a power cut a deleted object may be back, which holdfast never takes as news.
    Trust: links below the root lead nobody out of it; whoever may write there can still spoil bytes, which hashes find.
    """

    def __init__(self, root: Path | str, *, tokens: TokenSource = random_token) -> None:
        self.root = Path(os.path.abspath(root))
        self._tokens = tokens
        self._unnamed_files = True
        self._lock = Lock()
        # Folder path below the root → a descriptor of it. While it is open, its inode number cannot be given to another
        # folder, so that equal numbers mean: the very folder whose name was made durable.
        self._durable: OrderedDict[str, int] = OrderedDict()
        # A process that drops its stores unclosed, trial after trial, would run out of descriptors.
        weakref.finalize(self, _close_all, self._durable).atexit = False

    @property
    def url(self) -> str:
        return "file://" + quote(str(self.root))

    @property
    def is_near(self) -> bool:
        return True

    def put(self, key: str, body: Body) -> None:
        buffers = flat_buffers(body)
        self._write(key, lambda folder, name: self._replace(folder, name, buffers))

    def put_new(self, key: str, body: bytes) -> bool:
        buffers = flat_buffers(body)
        return self._write(key, lambda folder, name: self._create(folder, name, buffers))

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._plain_file(key) as (descriptor, size_bytes):
            if size_bytes > max_bytes:
                raise FormatError(f"{key!r} in {self.root} has {size_bytes} bytes, more than the {max_bytes} expected")
            body = bytearray(size_bytes)
            self._fill(key, descriptor, 0, memoryview(body))
            return bytes(body)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self._plain_file(key) as (descriptor, size_bytes):
            flat = buffer.cast("B")
            if offset + len(flat) > size_bytes:
                raise IntegrityError(
                    f"{key!r} in {self.root} has {size_bytes} bytes, too short for [{offset}, {offset + len(flat)})"
                )
            self._fill(key, descriptor, offset, flat)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found: list[Entry] = []
        parts = check_prefix(prefix).split("/")[:-1]
        with posix.translated("listing", prefix, str(self.root)):
            try:
                with self._folder(parts) as folder:
                    _collect(folder, prefix, found)
            except FileNotFoundError:
                pass
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        *parents, name = check_key(key).split("/")
        with posix.translated("deleting", key, str(self.root)):
            try:
                with self._folder(parents) as folder:
                    if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                        raise posix.NotPlain(f"{name!r} is a folder")
                    os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                return
            self._remove_emptied(parents)

    def close(self) -> None:
        with self._lock:
            _close_all(self._durable)

    # Reading

    @contextmanager
    def _plain_file(self, key: str) -> Iterator[tuple[int, int]]:
        *parents, name = check_key(key).split("/")
        with posix.translated("reading", key, str(self.root)), self._folder(parents) as folder:
            descriptor, size_bytes = posix.open_plain_file(name, folder)
            with posix.opened(descriptor):
                yield descriptor, size_bytes

    def _fill(self, key: str, descriptor: int, offset: int, buffer: memoryview) -> None:
        count = posix.read_exactly(descriptor, offset, buffer)
        if count < len(buffer):
            raise IntegrityError(f"{key!r} in {self.root} shrank while it was read: {offset + count} bytes are left")

    @contextmanager
    def _folder(self, parts: Sequence[str]) -> Iterator[int]:
        """The folder that `parts` lead to, opened one component after the other so that no link is followed."""
        folder = posix.open_folder(str(self.root))
        try:
            for part in parts:
                below = posix.open_folder(part, folder)
                os.close(folder)
                folder = below
            yield folder
        finally:
            os.close(folder)

    # Writing

    def _write(self, key: str, make: Callable[[int, str], bool]) -> bool:
        """`make` says whether it has given the name to a new file; so does this, once that is durable."""
        *parents, name = check_key(key).split("/")
        with posix.translated("writing", key, str(self.root), absent=StoreUnavailable):
            for _ in range(_VANISHED_TRIES):
                try:
                    with self._durable_folder(parents) as folder:
                        made = make(folder, name)
                        try:
                            posix.fsync_folder(folder)
                        except OSError:
                            # Who reads a visible name takes it for written, and after a failed flush the next one may
                            # succeed without having written anything: the name goes, so that it is made and flushed anew.
                            if made:
                                posix.remove_quietly(os.unlink, name, folder)
                            raise
                        return made
                except _FolderVanished:
                    continue
        raise StoreUnavailable(f"writing {key!r} in {self.root}: another process keeps removing its folder")

    def _create(self, folder: int, name: str, buffers: Sequence[memoryview]) -> bool:
        """True: the name was free and now holds the bytes. The condition is link(2)'s, atomic on every POSIX folder."""
        try:
            os.lstat(name, dir_fd=folder)
            return False
        except FileNotFoundError:
            pass
        linked = self._link_new(folder, name, buffers)
        if linked is not None:
            return linked
        with self._temporary(buffers) as (temporary, temporaries):
            try:
                os.link(temporary, name, src_dir_fd=temporaries, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as error:
                _raise_if_vanished(error, folder)
                if error.errno in _NO_LINKS:
                    raise StoreUnsafe(
                        f"the file system of {self.root} has no hard links, so two writers cannot be fenced there"
                    ) from error
                raise
        return True

    def _replace(self, folder: int, name: str, buffers: Sequence[memoryview]) -> bool:
        """The usual case is a free name: a link (True). A name that is taken is replaced by rename, which is atomic too."""
        if not posix.exists(folder, name) and self._link_new(folder, name, buffers):
            return True
        with self._temporary(buffers) as (temporary, temporaries):
            try:
                os.rename(temporary, name, src_dir_fd=temporaries, dst_dir_fd=folder)
            except IsADirectoryError:
                raise posix.NotPlain(f"{name!r} is a folder") from None
            except OSError as error:
                _raise_if_vanished(error, folder)
                raise
        return False

    def _link_new(self, folder: int, name: str, buffers: Sequence[memoryview]) -> bool | None:
        """Write an unnamed file and link it. True: linked. False: the name is taken. None: not possible here."""
        if not self._unnamed_files:
            return None
        try:
            with posix.opened(
                os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=folder)
            ) as descriptor:
                posix.write_all(descriptor, buffers)
                posix.link_unnamed(descriptor, name, folder)
        except FileExistsError:
            return False
        except OSError as error:
            _raise_if_vanished(error, folder)
            if error.errno in _NO_UNNAMED:
                self._unnamed_files = False
            elif error.errno not in _MAYBE_NO_UNNAMED:
                raise
            return None
        return True

    @contextmanager
    def _temporary(self, buffers: Sequence[memoryview]) -> Iterator[tuple[str, int]]:
        """A durable file in `<root>/.tmp`, as its name and that folder; removed at the end if it is still there.

        One that cannot be removed is no reason to fail: it goes a day later.
        """
        with self._folder([]) as root:
            try:
                os.mkdir(_TEMPORARY, dir_fd=root)
            except FileExistsError:
                pass
            temporaries = posix.open_folder(_TEMPORARY, root)
        with posix.opened(temporaries):
            name = self._tokens()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with posix.opened(os.open(name, flags, 0o666, dir_fd=temporaries)) as descriptor:
                    posix.write_all(descriptor, buffers)
                    _remove_stale(temporaries, now_s=os.fstat(descriptor).st_mtime)
                yield name, temporaries
            finally:
                posix.remove_quietly(os.unlink, name, temporaries)

    # Folders

    @contextmanager
    def _durable_folder(self, parts: Sequence[str]) -> Iterator[int]:
        """Like `_folder`, but creates what is missing and returns only folders whose names survive a power cut.

        A folder that another process has just made may not have been flushed by it yet: this one flushes it as well.
        """
        folder = self._durable_root()
        try:
            for depth, part in enumerate(parts, start=1):
                try:
                    below = posix.open_folder(part, folder)
                except FileNotFoundError:
                    below = _make_folder(part, folder)
                parent, folder = folder, below
                with posix.opened(parent):
                    try:
                        self._flush_name("/".join(parts[:depth]), folder, parent)
                    except OSError:
                        # Made anew by the next try, if it is empty: see `_write`.
                        posix.remove_quietly(os.rmdir, part, parent)
                        raise
            yield folder
        finally:
            os.close(folder)

    def _durable_root(self) -> int:
        try:
            root = posix.open_folder(str(self.root))
        except FileNotFoundError:
            for folder in reversed([self.root, *self.root.parents]):
                posix.make_folder(folder)
            root = posix.open_folder(str(self.root))
        try:
            with posix.opened(posix.open_folder(str(self.root.parent))) as parent:
                if "" not in self._durable:
                    posix.flush_names_above(self.root.parent)
                self._flush_name("", root, parent)
        except PermissionError:
            pass  # The parent belongs to somebody else, who made the root before this process began.
        except BaseException:
            os.close(root)
            raise
        return root

    def _flush_name(self, path: str, folder: int, parent: int) -> None:
        with self._lock:
            known = self._durable.get(path)
            if known is not None and os.path.sameopenfile(known, folder):
                self._durable.move_to_end(path)
                return
        posix.fsync_folder(parent)
        with self._lock:
            replaced = self._durable.pop(path, None)
            self._durable[path] = os.dup(folder)
            if replaced is None and len(self._durable) > _FOLDERS_KNOWN:
                _, replaced = self._durable.popitem(last=False)
            if replaced is not None:
                os.close(replaced)

    def _remove_emptied(self, parts: Sequence[str]) -> None:
        """Remove the folders that a delete has emptied; a writer whose folder goes away starts over."""
        for depth in range(len(parts), 0, -1):
            try:
                with self._folder(parts[: depth - 1]) as parent:
                    os.rmdir(parts[depth - 1], dir_fd=parent)
            except (OSError, posix.NotPlain):
                return


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _make_folder(name: str, parent: int) -> int:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise _FolderVanished from None
    try:
        return posix.open_folder(name, parent)
    except FileNotFoundError:
        if posix.exists(parent, name):
            raise posix.NotPlain(f"{name!r} is an object, not a folder") from None
        raise _FolderVanished from None


def _raise_if_vanished(error: OSError, folder: int) -> None:
    if error.errno == errno.ENOENT and posix.was_removed(folder):
        raise _FolderVanished from None


def _collect(folder: int, prefix: str, found: list[Entry]) -> None:
    """Add every object below `folder`. What vanishes meanwhile is left out; links, pipes and foreign names too."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False) and is_key(entry.name):
                    with posix.opened(posix.open_folder(entry.name, folder)) as below:
                        _collect(below, f"{prefix}{entry.name}/", found)
                elif entry.is_file(follow_symlinks=False) and is_key(entry.name):
                    found.append(Entry(prefix + entry.name, entry.stat(follow_symlinks=False).st_size))
            except (FileNotFoundError, posix.NotPlain):
                continue


def _remove_stale(temporaries: int, *, now_s: float) -> None:
    """`now_s` is the modification time of a file written just now: the file system's clock, not this machine's."""
    with os.scandir(temporaries) as entries:
        for entry in entries:
            try:
                if now_s - entry.stat(follow_symlinks=False).st_mtime > _STALE_S:
                    os.unlink(entry.name, dir_fd=temporaries)
            except OSError:
                continue
