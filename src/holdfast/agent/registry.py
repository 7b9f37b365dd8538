"""How agents are found on their machine: each keeps a small file in a folder of its user's, and a lock on it while it lives.

    agent → /tmp/holdfast-agents-<uid>/<token>.json (process, run, control folder) → `holdfast notify` → notify.py

A lock goes with its process, however that ends, so an entry without one is what a dead agent has left, whoever has its number
now. Other users can write beside these folders, and root reads what others wrote: a folder counts only if it is no link, belongs
to the right user and is closed to all others, and nothing in it is followed.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.core.contract import ENV_AGENTS
from holdfast.core.ids import random_token

__all__ = ["Registered", "Registration", "find_agents", "open_owned_folder"]

_TMP = Path("/tmp")
"""Not $TMPDIR, which differs from one process to the next."""
_FOLDER = "holdfast-agents-"
_NAME = re.compile(r"[0-9a-f]{24}\.json")
_MOST_BYTES = 65536
_TRIES = 100


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    """In the agent's own PID namespace; for people."""
    folder: str
    run: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """An agent that lives. `folder` is its control folder, `run` the URL that it was given."""

    pid: int
    uid: int
    folder: Path
    run: str | None


class Registration:
    """This agent's entry. Made when it can be spoken to; `close` before it cannot any more.

    Failure contract: nothing raises. `trouble` says why the agent cannot be found; None when it can.
    """

    def __init__(self, folder: Path, *, run: str | None, environ: Mapping[str, str]) -> None:
        self.trouble: str | None = None
        self._place = self._entry = -1
        self._name = ""
        path = Path(environ.get(ENV_AGENTS) or _TMP / f"{_FOLDER}{os.geteuid()}")
        try:
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            self._place = open_owned_folder(path, os.geteuid())
            # Folders and files with a lock are not cleared away as old: a training may outlast the age at which /tmp is swept.
            fcntl.flock(self._place, fcntl.LOCK_SH)
            body = msgspec.json.encode(_Entry(pid=os.getpid(), folder=os.fspath(folder.absolute()), run=run))
            for _ in range(_TRIES):
                if self._enter(body):
                    return
            raise OSError(0, "entries made there disappear at once")
        except OSError as error:
            self.close()
            self.trouble = f"{path}: {error.strerror or error}"

    def _enter(self, body: bytes) -> bool:
        """False: between its making and its lock the entry was taken for one that a dead agent has left, and removed."""
        self._name = f"{random_token()}.json"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        entry = os.open(self._name, flags, 0o600, dir_fd=self._place)
        try:
            os.write(entry, body)
            fcntl.flock(entry, fcntl.LOCK_EX)
            if os.fstat(entry).st_nlink:
                self._entry, entry = entry, -1
                return True
        finally:
            if entry >= 0:
                os.close(entry)
        return False

    def close(self) -> None:
        if self._entry >= 0:
            with suppress(OSError):
                os.unlink(self._name, dir_fd=self._place)
            os.close(self._entry)
        if self._place >= 0:
            os.close(self._place)
        self._entry = self._place = -1


def find_agents(environ: Mapping[str, str]) -> list[Registered]:
    """Every agent of this user that lives; for root, those of all users. What dead ones have left is removed on the way."""
    return [agent for path, uid in _places(environ) for agent in _agents_in(path, uid)]


def _places(environ: Mapping[str, str]) -> Iterator[tuple[Path, int]]:
    """Folders, and the user whom each belongs to by its name."""
    mine = os.geteuid()
    if environ.get(ENV_AGENTS):
        path = Path(environ[ENV_AGENTS])
        with suppress(OSError):
            yield path, path.lstat().st_uid if mine == 0 else mine
        return
    if mine != 0:
        yield _TMP / f"{_FOLDER}{mine}", mine
        return
    for path in sorted(_TMP.glob(f"{_FOLDER}*")):
        uid = path.name.removeprefix(_FOLDER)
        if uid.isdecimal():
            yield path, int(uid)


def _agents_in(path: Path, uid: int) -> Iterator[Registered]:
    # No such folder, or one that somebody else could have put there: no agents.
    with suppress(OSError), _closed_after(open_owned_folder(path, uid)) as place:
        for name in sorted(os.listdir(place)):
            if _NAME.fullmatch(name) is None:
                continue
            with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
                entry = _read(place, name)
                if entry is not None:
                    yield Registered(pid=entry.pid, uid=uid, folder=Path(entry.folder), run=entry.run)


def _read(place: int, name: str) -> _Entry | None:
    """None: nobody holds its lock any more, and it has been removed."""
    # Not to wait for a pipe that somebody has put there.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _closed_after(os.open(name, flags, dir_fd=place)) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(os.read(descriptor, _MOST_BYTES), type=_Entry)
        os.unlink(name, dir_fd=place)
        return None


def open_owned_folder(path: Path, uid: int) -> int:
    """A descriptor of a folder that is `uid`'s own and open to nobody else. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if status.st_uid != uid or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise PermissionError(0, f"it does not belong to user {uid} alone")
    return descriptor


@contextmanager
def _closed_after(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
