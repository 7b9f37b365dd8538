"""What the machine is told, passed on to the command; and when a command must be ended so that it ends before the machine does.

providers → listener → control socket → a trainer that knows holdfast: it decides by itself what to save, and when to leave
                     → (nobody is connected) SIGTERM early enough for the grace period
any command → SIGKILL before the deadline, so that what is left in memory, logs and the acknowledgement still get through
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast.agent.child import EndNow
from holdfast.agent.control import ControlSocket
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import NoticeWord
from holdfast.core.events import Sink
from holdfast.notice.base import Notice, NoticeKind
from holdfast.notice.listen import listen

__all__ = ["NoticeDesk"]

_RESERVE_S = 3.0
"""Kept for the agent's own last words: a snapshot in memory, logs, the acknowledgement."""
_AWARE_GRACE_S = 1.0
"""What a trainer that has known all along gets after the SIGTERM."""


class NoticeDesk:
    """Thread safety: `look`, `going` and `close` belong to the main thread; notices come in a thread of their own."""

    def __init__(
        self,
        spec: str,
        folder: Path,
        *,
        grace_s: float,
        environment: Mapping[str, str],
        clock: Clock,
        sink: Sink,
        say: Callable[[str], None],
    ) -> None:
        self._grace_s, self._clock, self._say = grace_s, clock, say
        self._lock = threading.Lock()
        self._standing: dict[str, Notice] = {}
        self._has_ended = self._is_aware = False
        self.control = ControlSocket(folder, self._ready)
        self._listener = listen(
            spec, clock=clock, sink=sink, on_notice=self._heard, environ=environment, grace_s=grace_s
        )

    def _heard(self, notice: Notice) -> None:
        stands = notice.kind is not NoticeKind.WITHDRAWN
        with self._lock:
            if stands:
                self._standing[notice.id] = notice
            else:
                self._standing.pop(notice.id, None)
        left_s = notice.left_s(self._clock.unix_s())
        when = "" if left_s is None else f", {format_duration(left_s)} are left"
        self._say(f"holdfast: notice from {notice.source}: {notice.kind.value}{when}")
        word = NoticeWord(
            kind=notice.kind.value, deadline_unix_s=notice.deadline_unix_s, source=notice.source, id=notice.id,
            heard_unix_s=notice.heard_unix_s, assumed=notice.assumed, evidence=notice.evidence,
        )  # fmt: skip
        self.control.tell(word, stands=stands)

    def _ready(self, notice_id: str) -> None:
        with self._lock:
            notice = self._standing.get(notice_id)
        if notice is not None:
            self._listener.acknowledge(notice)

    def _most_urgent(self) -> Notice | None:
        with self._lock:
            known = [notice for notice in self._standing.values() if notice.deadline_unix_s is not None]
        return min(known, key=lambda notice: notice.deadline_unix_s or 0.0, default=None)

    def begin(self) -> None:
        """Before an attempt."""
        self._has_ended = self._is_aware = False

    @property
    def going(self) -> str | None:
        """Why this machine is no place for another attempt; None when nothing stands against it."""
        notice = self._most_urgent()
        return None if notice is None else f"{notice.source} takes the machine ({notice.kind.value})"

    def left_s(self) -> float | None:
        """Until the machine goes; None when nobody has said so."""
        notice = self._most_urgent()
        return None if notice is None else notice.left_s(self._clock.unix_s())

    @property
    def every_s(self) -> float:
        """Until the next look that matters."""
        left_s = self.left_s()
        return 1.0 if left_s is None else 0.2

    def look(self) -> EndNow | None:
        """Whether the command must be ended now. It is asked once for each attempt."""
        # A trainer lets go of the socket when it is done, and may have a few things to do after that.
        self._is_aware = self._is_aware or self.control.connected
        left_s = self.left_s()
        if left_s is None or self._has_ended:
            return None
        usable_s = left_s - _RESERVE_S
        grace_s = _AWARE_GRACE_S if self._is_aware else self._grace_s
        if usable_s > grace_s:
            return None
        self._has_ended = True
        return EndNow(max(0.0, usable_s), stop=True)

    def acknowledge(self) -> None:
        """The command has ended and everything that could be kept is kept: the machine may go."""
        with self._lock:
            standing = list(self._standing.values())
        for notice in standing:
            self._listener.acknowledge(notice)

    def close(self) -> None:
        self._listener.close()
        self.control.close()
