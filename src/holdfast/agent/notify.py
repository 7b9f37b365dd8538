"""The caller's side of `holdfast notify`: every agent on this machine is told the same, and what becomes of each is listened to.

registry → connections → the notice → heard, ready, kept … → one `Fate` for each agent, at the deadline at the latest
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum

from holdfast.agent.registry import Registered, open_owned_folder
from holdfast.core.clock import Clock
from holdfast.core.contract import (
    EXIT_DONE,
    EXIT_INFRASTRUCTURE,
    MOST_WORD_BYTES,
    NOTIFY_SOCKET,
    KeptWord,
    NoticeWord,
    ReadyWord,
    Word,
    control_address,
    decode_words,
    encode_word,
)
from holdfast.notice.base import NoticeKind

__all__ = ["EXIT_NOT_KEPT", "Fate", "Outcome", "exit_code", "notify_agents"]

EXIT_NOT_KEPT = 1
_ANSWER_S = 10.0
"""An agent answers in milliseconds; one that is stopped, or swapped out, may never."""
_LEAST_ANSWER_S = 1.0
"""However late it is: this much costs nobody anything."""
_CONNECT_S = 1.0
_CREDENTIALS = struct.Struct("3i")


class Outcome(StrEnum):
    """How far it has come with one agent."""

    UNREACHABLE = "unreachable"
    """It lives, and cannot be told or does not answer."""
    HEARD = "heard"
    READY = "ready"
    """What could be made durable because of the notice is durable; the agent is still closing."""
    KEPT = "kept"
    """The command has ended, everything is durable, and the agent has ended."""
    LOST = "lost"
    """It has ended, and something could not be kept."""
    WITHDRAWN = "withdrawn"
    """Somebody has taken the notice back."""
    ENDED = "ended"
    """It had come to its end before it could be told."""


_LAST = frozenset({Outcome.UNREACHABLE, Outcome.KEPT, Outcome.LOST, Outcome.WITHDRAWN, Outcome.ENDED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What has become of one agent."""

    agent: Registered
    outcome: Outcome | None = None
    """None: it has not answered yet; never in what `notify_agents` returns."""
    step: int | None = None
    """The newest step that is durable, as far as the agent knows."""
    lost: tuple[str, ...] = ()
    """What could not be kept, or why the agent could not be told; for people."""


def exit_code(fates: Sequence[Fate], *, waited: bool) -> int:
    """For a shutdown script: 0 when nobody needs the machine any more, or when it was enough that all have heard."""
    outcomes = {fate.outcome for fate in fates}
    if Outcome.UNREACHABLE in outcomes:
        return EXIT_INFRASTRUCTURE
    if Outcome.LOST in outcomes or (waited and outcomes & {Outcome.HEARD, Outcome.READY}):
        return EXIT_NOT_KEPT
    return EXIT_DONE


def notify_agents(
    agents: Sequence[Registered],
    word: NoticeWord,
    *,
    wait: bool,
    clock: Clock,
    still_there: Callable[[Registered], bool],
    changed: Callable[[Fate], None],
) -> list[Fate]:
    """Tell all of them, and follow them until each has ended (`wait`) or has heard it. Returns at the deadline at the latest, but
    gives every agent a moment to answer. `still_there` asks the registry again. Never raises for what an agent does.
    """
    left_s = 0.0 if word.deadline_unix_s is None else word.deadline_unix_s - clock.unix_s()
    now_s = clock.monotonic_s()
    answer_until_s = now_s + max(_LEAST_ANSWER_S, min(_ANSWER_S, left_s or _ANSWER_S))
    give_up_s = max(answer_until_s, now_s + left_s) if wait else answer_until_s
    calls = [_Call(agent, still_there, changed) for agent in agents]
    try:
        for call in calls:
            call.begin(word)
        _follow(calls, wait=wait, clock=clock, answer_until_s=answer_until_s, give_up_s=give_up_s)
    finally:
        for call in calls:
            call.close()
    return [call.fate for call in calls]


def _follow(calls: Sequence[_Call], *, wait: bool, clock: Clock, answer_until_s: float, give_up_s: float) -> None:
    while followed := [call for call in calls if not call.is_over and (wait or call.fate.outcome is None)]:
        now_s = clock.monotonic_s()
        if now_s >= answer_until_s:
            for call in followed:
                call.must_have_answered()
        if now_s >= give_up_s:
            return
        until_s = give_up_s if now_s >= answer_until_s else min(answer_until_s, give_up_s)
        with selectors.DefaultSelector() as selector:
            for call in followed:
                selector.register(call.socket, selectors.EVENT_READ, call)
            for key, _ in selector.select(until_s - now_s):
                key.data.read()


class _Call:
    """One agent's connection, and what came over it."""

    def __init__(
        self, agent: Registered, still_there: Callable[[Registered], bool], changed: Callable[[Fate], None]
    ) -> None:
        self._still_there, self._changed = still_there, changed
        self._rest, self._kind = b"", ""
        self.fate = Fate(agent=agent)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    @property
    def is_over(self) -> bool:
        return self.fate.outcome in _LAST

    def begin(self, word: NoticeWord) -> None:
        agent, self._kind = self.fate.agent, word.kind
        try:
            self.socket.settimeout(_CONNECT_S)
            # Where a user has made a link, root must not follow it, nor speak to somebody else's socket behind it.
            folder = open_owned_folder(agent.folder, agent.uid)
            try:
                self.socket.connect(control_address(agent.folder, folder, NOTIFY_SOCKET))
            finally:
                os.close(folder)
            peer = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(peer)[1] != agent.uid:
                raise PermissionError(0, "another user listens at its socket")
            self.socket.sendall(encode_word(word))
        except OSError as error:
            self._missed(error.strerror or str(error))

    def read(self) -> None:
        data = b""
        with suppress(OSError):
            data = self.socket.recv(65536)
        words, self._rest = decode_words(self._rest + data)
        for word in words:
            self._take(word)
        if self.is_over:
            return
        if not data and self.fate.outcome is None:
            self._missed("it has hung up")
        elif not data:
            self._become(Outcome.LOST, lost=("the agent died before it could keep everything",))
        elif len(self._rest) > MOST_WORD_BYTES:
            self._become(Outcome.UNREACHABLE, lost=("it talks nonsense",))

    def must_have_answered(self) -> None:
        if self.fate.outcome is None:
            self._become(Outcome.UNREACHABLE, lost=("it does not answer",))

    def close(self) -> None:
        self.socket.close()

    def _take(self, word: Word) -> None:
        if self.is_over:
            return
        if isinstance(word, KeptWord):
            self._become(Outcome.LOST if word.lost else Outcome.KEPT, step=word.step, lost=tuple(word.lost))
        elif isinstance(word, ReadyWord):
            self._become(Outcome.READY, step=word.step)
        elif isinstance(word, NoticeWord) and word.kind == NoticeKind.WITHDRAWN != self._kind:
            self._become(Outcome.WITHDRAWN)
        elif isinstance(word, NoticeWord) and self.fate.outcome is None:
            self._become(Outcome.HEARD)

    def _missed(self, why: str) -> None:
        if self._still_there(self.fate.agent):
            self._become(Outcome.UNREACHABLE, lost=(why,))
        else:
            self._become(Outcome.ENDED)

    def _become(self, outcome: Outcome, *, step: int | None = None, lost: tuple[str, ...] = ()) -> None:
        self.fate = replace(self.fate, outcome=outcome, step=self.fate.step if step is None else step, lost=lost)
        self._changed(self.fate)
