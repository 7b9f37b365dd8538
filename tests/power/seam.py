"""The operating system as the local store sees it, with every call that changes the disk counted, recorded, failed or fatal.

`store/local.py` and `store/posix.py` reach the system through their name `os` alone; while a `Seam` is installed, that name is the
seam. Calls go on to the real file system, and a model of the disk follows where a test wants one. Only flushes do not go on: a kill
loses nothing that the kernel has, and what a power cut loses is the model's to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from disk import File, Folder, Node, Tree

from holdfast.store import local, posix

__all__ = ["HALF", "Plan", "Seam"]

_T = TypeVar("_T")
HALF = "half"
"""A plan's answer to a write: only half of the bytes are taken, as a disk that fills up does."""
Plan = Callable[[int, str], str | None]
"""Called before every change with its number and the call's name. May raise, end the process, or answer HALF."""


def _no_plan(number: int, call: str) -> None:
    return None


class Seam:
    """Stands where `os` stood. Thread-safe. With `base`, everything below that folder is followed in `self.disk`."""

    def __init__(self, base: Path | None = None, *, plan: Plan = _no_plan, after: Callable[[], None] = lambda: None):
        self.plan, self.after = plan, after
        self.calls: list[str] = []
        self.disk = Folder()
        self.flush_files = self.flush_folders = True
        self._base = base
        self._nodes: dict[int, Node] = {}
        self._lock = RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @contextmanager
    def installed(self) -> Iterator[Seam]:
        try:
            self.install()
            yield self
        finally:
            for module in (local, posix):
                vars(module)["os"] = os

    def adopt(self, tree: Tree) -> None:
        """The base holds this, all of it durable."""
        for path, data in sorted(tree.items()):
            folder, name = self._place(self._base / path if self._base else path, None)
            assert folder is not None
            folder.bind(name, Folder() if data is None else File(data))
            folder.flushed()

    def install(self) -> None:
        for module in (local, posix):
            vars(module)["os"] = self

    # Calls that change the disk

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        def model() -> None:
            self._bind(path, dir_fd, Folder())

        self._change("mkdir", lambda: os.mkdir(path, mode, dir_fd=dir_fd), model)

    def writev(self, descriptor: int, buffers: Sequence[memoryview]) -> int:
        data = b"".join(buffers)
        with self._lock:
            taken = data[: len(data) // 2] if self._plan("writev") == HALF and len(data) > 1 else data
            offset = os.lseek(descriptor, 0, os.SEEK_CUR)
            count = os.write(descriptor, taken)
            node = self._nodes.get(descriptor)
            if isinstance(node, File):
                node.write(offset, taken[:count])
            self.after()
            return count

    def fsync(self, descriptor: int) -> None:
        node = self._nodes.get(descriptor)
        if self._base is not None and (node is None or not self._flushes(node)):
            return

        def model() -> None:
            if node is not None:
                node.flushed()

        try:
            self._change("fsync", lambda: None, model)
        except OSError:
            if node is not None:
                node.flush_failed()
            raise

    def link(
        self, source: str, name: str, *, src_dir_fd: int | None = None, dst_dir_fd: int, follow_symlinks: bool
    ) -> None:
        def real() -> None:
            os.link(source, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)

        def model() -> None:
            unnamed = source.startswith("/proc/self/fd/")
            node = self._nodes[int(source.rsplit("/", 1)[1])] if unnamed else self._find(source, src_dir_fd)
            self._bind(name, dst_dir_fd, node)

        self._change("link", real, model)

    def rename(self, source: str, name: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        def model() -> None:
            self._bind(name, dst_dir_fd, self._find(source, src_dir_fd))
            self._bind(source, src_dir_fd, None)

        self._change("rename", lambda: os.rename(source, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd), model)

    def unlink(self, path: str, *, dir_fd: int) -> None:
        self._change("unlink", lambda: os.unlink(path, dir_fd=dir_fd), lambda: self._bind(path, dir_fd, None))

    def rmdir(self, path: str, *, dir_fd: int) -> None:
        self._change("rmdir", lambda: os.rmdir(path, dir_fd=dir_fd), lambda: self._bind(path, dir_fd, None))

    # Descriptors, so that the model knows what they lead to

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        unnamed = flags & os.O_TMPFILE == os.O_TMPFILE
        if not unnamed and not flags & os.O_CREAT:
            with self._lock:
                return self._opened(os.open(path, flags, mode, dir_fd=dir_fd), self._find(path, dir_fd))
        made = File()

        def model() -> None:
            if not unnamed:
                self._bind(path, dir_fd, made)

        with self._lock:
            return self._opened(self._change("create", lambda: os.open(path, flags, mode, dir_fd=dir_fd), model), made)

    def dup(self, descriptor: int) -> int:
        with self._lock:
            return self._opened(os.dup(descriptor), self._nodes.get(descriptor))

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._nodes.pop(descriptor, None)
            os.close(descriptor)

    # The rest

    def _plan(self, call: str) -> str | None:
        number = len(self.calls)
        self.calls.append(call)
        return self.plan(number, call)

    def _change(self, call: str, real: Callable[[], _T], model: Callable[[], None]) -> _T:
        with self._lock:
            self._plan(call)
            result = real()
            if self._base is not None:
                model()
            self.after()
            return result

    def _flushes(self, node: Node) -> bool:
        return self.flush_files if isinstance(node, File) else self.flush_folders

    def _opened(self, descriptor: int, node: Node | None) -> int:
        if node is not None:
            self._nodes[descriptor] = node
        return descriptor

    def _place(self, path: Any, dir_fd: int | None) -> tuple[Folder | None, str]:
        """The folder in the model that holds the last component of `path`; None for what is not below the base."""
        if dir_fd is not None:
            folder = self._nodes.get(dir_fd)
            return (folder if isinstance(folder, Folder) else None), str(path)
        node: Node | None = self.disk
        path = Path(path)
        if self._base is None or not path.is_relative_to(self._base):
            return None, ""
        parts = path.relative_to(self._base).parts
        for part in parts[:-1]:
            node = node.now.get(part) if isinstance(node, Folder) else None
        return (node if isinstance(node, Folder) else None), parts[-1] if parts else "."

    def _find(self, path: Any, dir_fd: int | None) -> Node | None:
        folder, name = self._place(path, dir_fd)
        return folder if folder is None or name == "." else folder.now.get(name)

    def _bind(self, path: Any, dir_fd: int | None, node: Node | None) -> None:
        folder, name = self._place(path, dir_fd)
        assert folder is not None, f"{path} is made or removed outside the base"
        folder.bind(name, node)
