"""What a source currently says, and how that differs from what it said before: a poll goes in, changes come out.

An event that is missing from one answer is not gone yet: a provider's answer can be one bad replica's. It counts as withdrawn when
two answers in a row lack it; too late a withdrawal costs a poll, too early a one costs a save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from holdfast.notice.base import Notice, NoticeKind

__all__ = ["Board"]

_ABSENCES = 2


class Board:
    """Thread safety: none; a watcher uses its own on one event loop."""

    def __init__(self) -> None:
        self._standing: dict[tuple[str, str], Notice] = {}
        self._absences: dict[tuple[str, str], int] = {}

    def said(self, source: str, notices: Iterable[Notice], now_unix_s: float) -> list[Notice]:
        """`source` says all of `notices` and nothing else; returns what is new, changed or withdrawn."""
        changes: list[Notice] = []
        said = {(source, notice.id): notice for notice in notices}
        for key, notice in said.items():
            self._absences.pop(key, None)
            before = self._standing.get(key)
            if before is None:
                self._standing[key] = notice
                changes.append(notice)
            elif _differs(before, notice):
                moved = replace(notice, heard_unix_s=before.heard_unix_s)
                self._standing[key] = moved
                changes.append(moved)
        for key in [key for key in self._standing if key[0] == source and key not in said]:
            self._absences[key] = self._absences.get(key, 0) + 1
            if self._absences[key] >= _ABSENCES:
                del self._absences[key]
                gone = self._standing.pop(key)
                changes.append(
                    replace(
                        gone, kind=NoticeKind.WITHDRAWN, deadline_unix_s=None, assumed=False, heard_unix_s=now_unix_s
                    )
                )
        return changes

    def standing(self, source: str, id: str) -> Notice | None:
        """What was said last about an event that is not withdrawn."""
        return self._standing.get((source, id))


def _differs(before: Notice, after: Notice) -> bool:
    if before.kind != after.kind or (before.deadline_unix_s is None) != (after.deadline_unix_s is None):
        return True
    # A deadline that is assumed counts from when the event was first heard: hearing it again moves nothing.
    return not after.assumed and before.deadline_unix_s != after.deadline_unix_s
