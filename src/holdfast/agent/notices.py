"""What the machine is told, passed on to the command; and when a command must be ended so that it ends before the machine does.

providers → listener → control socket → a trainer that knows holdfast: it decides by itself what to save, and when to leave
                     → (nobody is connected) SIGTERM early enough for the grace period
`holdfast notify` → callers → listener: one more provider, which is told what becomes of it
any command → SIGKILL before the deadline, so that what is left in memory, logs and the acknowledgement still get through
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast.agent.callers import Callers
from holdfast.agent.child import EndNow
from holdfast.agent.control import ControlSocket
from holdfast.agent.registry import Registration
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import KeptWord, Progress, ReadyWord
from holdfast.core.events import Event, Sink
from holdfast.notice.base import Notice, NoticeKind
from holdfast.notice.listen import listen
from holdfast.notice.words import as_notice, as_word
from holdfast.policy.reserves import reserves

__all__ = ["NoticeDesk"]

_SOON_S = 300.0
"""A machine that goes later than this is still a place for another attempt; maintenance is announced days ahead."""
_MOST_NEEDS = 0.5
"""The share of a notice that the agent's own work may take; the rest is the command's."""
_LEAST_GRACE_S = 0.5
"""From SIGTERM to SIGKILL, however late it is: a machine that should be gone and is still there costs nobody anything."""


class NoticeDesk:
    """Thread safety: `look`, `going` and `close` belong to the main thread; notices come in a thread of their own."""

    def __init__(
        self,
        spec: str,
        folder: Path,
        *,
        url: str | None,
        progress: Callable[[], Progress | None],
        grace_s: float,
        environment: Mapping[str, str],
        clock: Clock,
        sink: Sink,
        say: Callable[[str], None],
        told: Callable[[Notice], None] = lambda notice: None,
    ) -> None:
        """`told` hears what the machine hears as well, in the listener's thread."""
        self._progress, self._grace_s = progress, grace_s
        self._clock, self._sink, self._say = clock, sink, say
        self._lock = threading.Lock()
        self._standing: dict[str, Notice] = {}
        self._has_ended = self._is_aware = False
        self.needs_s: Callable[[], float] = lambda: 0.0
        """What the agent itself has to do after the command's end takes; asked at every look while a notice stands."""
        self.control = ControlSocket(folder, self._ready)
        self._callers = Callers(folder, lambda word: self._listener.say(as_notice(word)))

        def heard(notice: Notice) -> None:
            self._heard(notice)
            told(notice)

        self._listener = listen(spec, clock=clock, sink=sink, on_notice=heard, environ=environment, grace_s=grace_s)
        # Last, because nobody calls before.
        self._registration = Registration(folder, run=url, environ=environment)
        if self._registration.trouble is not None:
            say(f"holdfast: `holdfast notify` cannot find this agent: {self._registration.trouble}")

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
        self.control.tell(as_word(notice), stands=stands)

    def order(self, source: str, within_s: float) -> None:
        """Who is above this agent wants the command to end, as if the machine went then: for a trainer that hears notices."""
        now_unix_s = self._clock.unix_s()
        self._heard(
            Notice(
                kind=NoticeKind.TERMINATION, deadline_unix_s=now_unix_s + within_s, source=source, id="order",
                heard_unix_s=now_unix_s,
            )
        )  # fmt: skip

    def received(self, number: int) -> bool:
        """The agent got a signal. True: it is a notice, and heard as one."""
        if not self._listener.heeds(number):
            return False
        self._listener.received(number)
        return True

    def _ready(self, notice_id: str) -> None:
        with self._lock:
            notice = self._standing.get(notice_id)
        if notice is not None:
            # The provider hears it when the command has ended and its last lines are kept as well.
            self._sink.emit(Event("notice.ready", self._clock.unix_s(), {"source": notice.source, "id": notice.id}))
            progress = self._progress()
            self._callers.ready(ReadyWord(notice_id=notice_id, step=None if progress is None else progress.kept_step))

    def _most_urgent(self) -> Notice | None:
        with self._lock:
            known = [notice for notice in self._standing.values() if notice.deadline_unix_s is not None]
        return min(known, key=lambda notice: notice.deadline_unix_s or 0.0, default=None)

    def begin(self) -> None:
        """Before an attempt."""
        self._has_ended = self._is_aware = False
        self._callers.begin()

    @property
    def going(self) -> str | None:
        """Why this machine is no place for another attempt; None when nothing stands against it."""
        notice = self._most_urgent()
        if notice is None or (self.left_s() or 0.0) > _SOON_S:
            return None
        return f"{notice.source} takes the machine ({notice.kind.value})"

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
        notice = self._most_urgent()
        if notice is None or self._has_ended:
            return None
        lead_s = notice.left_s(notice.heard_unix_s) or 0.0
        kept = reserves(lead_s)
        needs_s = min(self.needs_s(), _MOST_NEEDS * lead_s)
        usable_s = (notice.left_s(self._clock.unix_s()) or 0.0) - kept.agent_s - needs_s
        grace_s = kept.told_s if self._is_aware else self._grace_s
        if usable_s > grace_s:
            return None
        self._has_ended = True
        return EndNow(max(_LEAST_GRACE_S, usable_s), stop=True)

    def acknowledge(self) -> None:
        """The command has ended and everything that could be kept is kept: whatever is going to happen soon may happen."""
        if self.going is None:
            return
        with self._lock:
            standing = list(self._standing.values())
        for notice in standing:
            self._listener.acknowledge(notice)

    def close(self, kept: KeptWord) -> None:
        """`kept`: what comes of it all, for who has called."""
        self._registration.close()
        self._listener.close()
        self.control.close()
        self._callers.close(kept)
