"""What this machine has to say: numbered words, in order, each until it is written; and its own notices as such words.

    say(kind, …) → number and moment are fixed → send() → put if absent, the very same bytes until there is an answer

The machine that holds the launch is the only one that writes here. Who finds another's word at its own number is not alone, and
stops.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

from holdfast.agent.machine.records import Records
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced
from holdfast.core.launches import MachineWord, word_key
from holdfast.core.sealed import FORMAT_VERSION
from holdfast.notice.base import Notice, NoticeKind

__all__ = ["NoticeBook", "Words"]

_SOON_S = 300.0
"""A machine that goes later than this is still a place to begin on; maintenance is announced days ahead."""

_Kind = Literal["ready", "claimed", "notice", "withdrawn", "released"]


class Words:
    """Thread safety: every method."""

    def __init__(
        self,
        records: Records,
        launch: int,
        machine: str,
        boot_s: float,
        clock: Clock,
        ring: Callable[[int], None] = lambda part: None,
    ) -> None:
        """`ring` is called with the number of each word once it is written; it returns at once."""
        self._records, self._launch, self._machine = records, launch, machine
        self._boot_s, self._clock, self._ring = boot_s, clock, ring
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._waiting: deque[MachineWord] = deque()
        self._next = 0
        self.are_waiting = threading.Event()
        """Set by each new word, for whoever sends them; and cleared by whoever waits for it."""

    def say(
        self,
        kind: _Kind,
        *,
        attempt: int | None = None,
        notice: str = "",
        deadline_s: int | None = None,
        exit_code: int | None = None,
        reasons: tuple[str, ...] = (),
    ) -> None:
        """It is sent by the next `send`."""
        with self._lock:
            word = MachineWord(
                format=FORMAT_VERSION, launch=self._launch, part=self._next, machine=self._machine, kind=kind,
                uptime_s=max(0, int(self._clock.monotonic_s() - self._boot_s)), at_unix_s=self._clock.unix_s(),
                attempt=attempt, notice=notice, deadline_s=deadline_s, exit_code=exit_code, reasons=reasons,
            )  # fmt: skip
            self._next += 1
            self._waiting.append(word)
        self.are_waiting.set()

    def send(self) -> None:
        """Until all is written. Raises what stores raise, and Fenced."""
        with self._sending:
            while True:
                with self._lock:
                    if not self._waiting:
                        return
                    word = self._waiting[0]
                if not self._records.put(word_key(self._launch, word.part), word):
                    raise Fenced(
                        f"another machine speaks for launch {self._launch}: word {word.part} is not this one's"
                    )
                self._ring(word.part)
                with self._lock:
                    self._waiting.popleft()


class NoticeBook:
    """What this machine has been told, as words: each says what stands then, the most urgent of it.

    Thread safety: every method.
    """

    def __init__(self, words: Words, clock: Clock) -> None:
        self._words, self._clock = words, clock
        self._lock = threading.Lock()
        self._standing: dict[str, Notice] = {}
        self._said: tuple[str, int | None] | None = None
        """Kind and deadline (Unix time) of what was said last; None: nothing stands."""

    def heard(self, notice: Notice) -> None:
        with self._lock:
            if notice.kind is NoticeKind.WITHDRAWN:
                self._standing.pop(notice.id, None)
            else:
                self._standing[notice.id] = notice
            urgent = self._urgent()
            stands = None if urgent is None else (urgent.kind.value, _whole(urgent.deadline_unix_s))
            if stands == self._said:
                return
            self._said = stands
            if urgent is None:
                self._words.say("withdrawn", reasons=(f"{notice.source} has taken it back",))
            else:
                left_s = urgent.left_s(self._clock.unix_s())
                self._words.say(
                    "notice", notice=urgent.kind.value, deadline_s=_whole(left_s), reasons=(f"{urgent.source}",)
                )

    def begin_anew(self) -> None:
        """Another listener takes over, which tells what stands once more, under names of its own."""
        with self._lock:
            self._standing.clear()

    @property
    def goes(self) -> str | None:
        """Why this machine will not be there much longer."""
        with self._lock:
            urgent = self._urgent()
        left_s = None if urgent is None else urgent.left_s(self._clock.unix_s())
        if urgent is None or left_s is None or left_s > _SOON_S:
            return None
        return f"{urgent.source} takes the machine ({urgent.kind.value})"

    def _urgent(self) -> Notice | None:
        far = float("inf")
        return min(
            self._standing.values(),
            key=lambda notice: (far if notice.deadline_unix_s is None else notice.deadline_unix_s, notice.id),
            default=None,
        )


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
