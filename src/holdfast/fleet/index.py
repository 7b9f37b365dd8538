"""A cache of records on this machine's disk, in SQLite: after a start, what was read before is not asked of the store again.

    list of a prefix (the store's, always) ──→ keys ──→ index ──→ sealed bytes, verified ──→ record
                                                          └─ not there ──→ store ──→ index

Records never change, and a run's id is never used again, so an entry that verifies is right however old the file is. Deleted,
rolled back or damaged it costs requests and nothing else. That something is *not* there is never decided by it: the store's list
says which keys there are.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from threading import Lock
from typing import TypeVar

from blake3 import blake3

__all__ = ["Index", "index_path"]

_SCHEMA = 1
_TABLE = """CREATE TABLE IF NOT EXISTS records (
  run_id TEXT NOT NULL, key TEXT NOT NULL, data BLOB NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (run_id, key)
) WITHOUT ROWID"""
_MOST_WAITING = 500
"""Entries that are written together: each commit waits for the disk."""
_BUSY_S = 2.0
_T = TypeVar("_T")


def index_path(home_url: str) -> Path:
    """Where the index of this home is, if nobody says otherwise."""
    name = blake3(home_url.encode()).hexdigest()[:24]
    return Path("~/.local/state/holdfast/fleets").expanduser() / f"{name}.sqlite"


class Index:
    """Thread safety: every method; several processes may share a file. Nothing is raised: a file that cannot be used is put
    aside and begun anew, and where that is not possible either, it goes on without one. `say` is told."""

    def __init__(self, path: Path, *, say: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._say = path, say
        self._lock = Lock()
        self._waiting: dict[tuple[str, str], bytes] = {}
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self.hits = self.misses = 0
        with self._lock:
            self._attempt(self._open)

    def get(self, run_id: str, key: str) -> bytes | None:
        """None: not known here."""
        with self._lock:
            found = self._waiting.get((run_id, key)) or self._attempt(lambda: self._select(run_id, key))
            self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
            return found

    def put(self, run_id: str, key: str, data: bytes) -> None:
        """What is known to stand in the store. It is on the disk after `flush`."""
        with self._lock:
            if self._closed:
                return
            self._waiting[run_id, key] = data
            if len(self._waiting) >= _MOST_WAITING:
                self._attempt(self._write)

    def drop(self, run_id: str, key: str) -> None:
        """It did not verify."""
        with self._lock:
            self._waiting.pop((run_id, key), None)
            self._attempt(lambda: self._execute("DELETE FROM records WHERE run_id = ? AND key = ?", (run_id, key)))

    def forget(self, run_id: str) -> None:
        """The run is over."""
        with self._lock:
            self._waiting = {each: data for each, data in self._waiting.items() if each[0] != run_id}
            self._attempt(lambda: self._execute("DELETE FROM records WHERE run_id = ?", (run_id,)))

    def flush(self) -> None:
        with self._lock:
            if self._waiting:
                self._attempt(self._write)

    def close(self) -> None:
        self.flush()
        with self._lock:
            self._closed = True
            self._disconnect()

    # ---- with the lock held

    def _attempt(self, act: Callable[[], _T | None]) -> _T | None:
        if self._closed:
            return None
        try:
            return act()
        except sqlite3.DatabaseError as error:
            if _is_busy(error):
                return None  # another process writes; what was not written is read from the store the next time
            self._begin_anew(f"{error}")
        except OSError as error:
            self._give_up(f"{error}")
        return None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA):
                raise sqlite3.DatabaseError(f"its schema is {version}, and this holdfast knows {_SCHEMA}")
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_SCHEMA}")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _select(self, run_id: str, key: str) -> bytes | None:
        if self._connection is None:
            return None
        question = "SELECT data, digest FROM records WHERE run_id = ? AND key = ?"
        with closing(self._connection.execute(question, (run_id, key))) as cursor:
            row = cursor.fetchone()
        if row is None:
            return None
        data, digest = row
        # A row under another key would be a record of its own, and verify: so its place is in the digest.
        return data if isinstance(data, bytes) and digest == _digest(run_id, key, data) else None

    def _write(self) -> None:
        rows = [(run_id, key, data, _digest(run_id, key, data)) for (run_id, key), data in self._waiting.items()]
        if self._connection is not None:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", rows)
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
        self._waiting.clear()

    def _execute(self, statement: str, values: tuple[str, ...]) -> None:
        if self._connection is not None:
            self._connection.execute(statement, values)

    def _begin_anew(self, why: str) -> None:
        self._disconnect()
        aside = self._path.with_name(f"{self._path.name}.damaged")
        try:
            for suffix in ("-wal", "-shm"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            if self._path.exists():
                os.replace(self._path, aside)
            self._open()
        except (OSError, sqlite3.DatabaseError) as error:
            self._give_up(f"{why}; and it cannot be begun anew: {error}")
            return
        self._say(f"the index {self._path} could not be used ({why}); it was put aside as {aside.name} and begun anew")

    def _give_up(self, why: str) -> None:
        self._disconnect()
        self._closed = True
        self._waiting.clear()
        self._say(f"no index: {self._path} cannot be used ({why}). Records are read from the store after each start")

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _is_busy(error: sqlite3.DatabaseError) -> bool:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _digest(run_id: str, key: str, data: bytes) -> bytes:
    return blake3(f"{run_id}\0{key}\0".encode() + data).digest()
