"""A file that somebody touches, or writes a deadline into: for shutdown scripts, for providers that signal so, for rehearsals.

There: a notice. Empty: `grace_s` from now on. Holding a time (`2026-05-01T12:00:00Z`, Unix seconds) or a duration (`30s`, counted
from when it was written): that deadline. Removed: withdrawn. Looked at every second, which works on every file system.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.config import parse_duration_s
from holdfast.core.errors import UsageError
from holdfast.notice.base import Lookout, Notice, NoticeKind
from holdfast.notice.board import Board
from holdfast.notice.times import parse_time_unix_s

__all__ = ["FileWatcher"]

_POLL_S = 1.0
_READ_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Look:
    text: str
    modified_unix_s: float


class FileWatcher:
    """One path on a local disk. See `Watcher`."""

    def __init__(self, path: Path, *, grace_s: float, poll_s: float = _POLL_S) -> None:
        self.name = f"file:{path}"
        self._path, self._grace_s, self._poll_s = path, grace_s, poll_s
        self._board = Board()
        self._before: _Look | None = None
        self._base_unix_s = 0.0
        self._looked_unix_s: float | None = None

    async def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        while True:
            now_s = lookout.clock.unix_s()
            try:
                look = _look(self._path)
            except OSError as error:
                lookout.trouble(self.name, f"cannot be read: {error.strerror}")
            else:
                said = [] if look is None else [self._notice(look, now_s, lookout)]
                if look is None:
                    lookout.well(self.name)
                self._before, self._looked_unix_s = look, now_s
                for notice in self._board.said(self.name, said, now_s):
                    yield notice
            await lookout.sleep(self._poll_s)

    def _notice(self, look: _Look, now_unix_s: float, lookout: Lookout) -> Notice:
        if look != self._before:
            # A file that was not there at the last look was written since, whatever its date says (`cp -p`, a wrong clock).
            since = look.modified_unix_s if self._looked_unix_s is None else self._looked_unix_s
            self._base_unix_s = min(max(look.modified_unix_s, since), now_unix_s)
        deadline, assumed = self._deadline(look.text, lookout)
        return Notice(
            kind=NoticeKind.TERMINATION,
            deadline_unix_s=deadline,
            source=self.name,
            id=str(self._path),
            heard_unix_s=now_unix_s,
            assumed=assumed,
            evidence={"text": look.text[:200]},
        )

    def _deadline(self, text: str, lookout: Lookout) -> tuple[float, bool]:
        stripped = text.strip()
        if stripped:
            moment = parse_time_unix_s(stripped)
            if moment is not None:
                lookout.well(self.name)
                return moment, False
            try:
                seconds = parse_duration_s(stripped)
            except UsageError:
                lookout.trouble(
                    self.name, f"neither a time nor a duration: {stripped[:80]!r}; taken as a notice all the same"
                )
                return self._base_unix_s + self._grace_s, True
            lookout.well(self.name)
            return self._base_unix_s + seconds, False
        lookout.well(self.name)
        return self._base_unix_s + self._grace_s, True


def _look(path: Path) -> _Look | None:
    """What is there, or None. Never waits for a pipe's other end; raises OSError."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return _Look("", found.st_mtime)
        with open(path, "rb") as file:
            return _Look(file.read(_READ_BYTES).decode("utf-8", "replace"), found.st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        return None
