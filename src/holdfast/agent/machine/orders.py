"""What the controller has said to this machine so far: grants, commands, the answer of its launch, its end.

    every few seconds: is there a next grant, a next command?    two small reads, on a far store the cheapest requests there are
    every twelfth time: what lies in control/<launch>/?          a list, for numbers that came out of order; and: has it ended?

Every part stands by itself: a record that cannot be read hides no other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from holdfast.agent.machine.grants import longer
from holdfast.agent.machine.records import TROUBLE, Records
from holdfast.core.launches import (
    Answer,
    Command,
    Ended,
    GrantRecord,
    answer_key,
    command_key,
    ended_key,
    grant_key,
)

__all__ = ["Orders"]

_LIST_EVERY = 12


class Orders:
    """Thread safety: one thread looks; what is known may be read from any."""

    def __init__(self, records: Records, launch: int) -> None:
        self._records, self._launch = records, launch
        self._looks = 0
        self._read: dict[str, set[int]] = {"grant": set(), "command": set()}
        self.grant: GrantRecord | None = None
        """The longest one."""
        self.answer: Answer | None = None
        self.stop: tuple[str, ...] | None = None
        """Reasons; empty where none were given. None: nobody has said so."""
        self.home: tuple[str, ...] | None = None
        self.over: str | None = None
        """Why nobody waits for this machine any more."""
        self.trouble: Exception | None = None
        """What kept the newest look from being whole; None: it was."""

    def look(self) -> None:
        """One round of questions. Raises nothing: what did not get through is asked again."""
        self.trouble = None
        thorough = self._records.is_near or self._looks % _LIST_EVERY == 0
        self._looks += 1
        if thorough:
            self._try(self._list)
            self._try(self._ended)
        else:
            for kind in ("grant", "command"):
                self._try(partial(self._next, kind))
        if self.answer is None:
            self._try(self._answered)

    def _try(self, ask: Callable[[], object]) -> None:
        try:
            ask()
        except TROUBLE as error:
            self.trouble = error

    def _list(self) -> None:
        for kind, launch, part, _ in self._records.parts(f"control/{self._launch:08d}/"):
            if launch == self._launch and kind in self._read and part not in self._read[kind]:
                self._try(partial(self._take, kind, part))

    def _next(self, kind: str) -> None:
        while self._take(kind, max(self._read[kind], default=-1) + 1):
            pass

    def _take(self, kind: str, part: int) -> bool:
        """Whether there is such a part."""
        if kind == "grant":
            grant = self._records.read(grant_key(self._launch, part), GrantRecord)
            if grant is None:
                return False
            if grant.launch == self._launch:
                self.grant = longer(self.grant, grant)
        else:
            command = self._records.read(command_key(self._launch, part), Command)
            if command is None:
                return False
            if command.launch == self._launch and command.kind == "stop":
                self.stop = self.stop or command.reasons
            elif command.launch == self._launch:
                self.home = self.home or command.reasons
        self._read[kind].add(part)
        return True

    def _answered(self) -> None:
        answer = self._records.read(answer_key(self._launch), Answer)
        if answer is not None and answer.outcome != "machine":
            self.over = self.over or f"launch {self._launch} was given up ({answer.outcome})"
        self.answer = answer

    def _ended(self) -> None:
        ended = self._records.read(ended_key(self._launch), Ended)
        if ended is not None:
            self.over = self.over or f"launch {self._launch} is over ({ended.why})"
