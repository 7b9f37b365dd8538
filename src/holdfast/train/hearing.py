"""Where this process hears of notices: from the agent that watches over it, else from the machine's providers itself.

    agent → control socket ┐
    providers → listener ──┴→ Emergency.heard        Emergency.left → acknowledge → agent, or the provider that waits for it

Nothing here raises into the training: what cannot be heard is recorded.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.checkpoint.format import Head
from holdfast.checkpoint.handover import Inherited, Legacy, inherited
from holdfast.checkpoint.staging import Slot
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import (
    CONTROL_SOCKET,
    ENV_CONTROL,
    ENV_NOTICE,
    MOST_WORD_BYTES,
    InheritedWord,
    InheritWord,
    NoticeWord,
    ReadyWord,
    SlotsWord,
    control_address,
    decode_words,
    encode_word,
)
from holdfast.core.errors import UsageError
from holdfast.core.events import Event, Sink
from holdfast.notice.base import Notice
from holdfast.notice.words import as_notice

if TYPE_CHECKING:
    from holdfast.notice.listen import Listener

__all__ = ["Hearing"]

_INHERIT_S = 5.0
_NOBODY = -1
"""As a rank: what it announces makes void only what those have left that are gone."""
_MOST_DESCRIPTORS = 16


class Hearing:
    """Thread safety: `acknowledge` may be called from any thread, the rest belongs to the loop's."""

    def __init__(self, spec: str | None, clock: Clock, emit: Callable[..., None], say: Callable[[str], None]) -> None:
        self._spec, self._clock, self._emit, self._say = spec, clock, emit, say
        self._agent: _Agent | None = None
        self._listener: Listener | None = None
        self._listens = False

    def join_silently(self, environ: Mapping[str, str]) -> None:
        """Another process of this machine listens for this one; only its memory is known to the agent."""
        self._meet_agent(environ, lambda notice: None)

    def _meet_agent(self, environ: Mapping[str, str], heard: Callable[[Notice], None]) -> None:
        folder = environ.get(ENV_CONTROL)
        if folder and (Path(folder) / CONTROL_SOCKET).exists():
            with suppress(OSError):
                self._agent = _Agent(Path(folder), heard)

    def start(self, environ: Mapping[str, str], heard: Callable[[Notice], None]) -> None:
        """Begin to listen; returns at once. `heard` is called from a thread of its own.

        Raises UsageError for a `notice` that is wrongly written.
        """
        self._meet_agent(environ, heard)
        # An agent listens for both; a script that names a source of its own hears that as well.
        spec = self._spec or ("none" if self._agent is not None else environ.get(ENV_NOTICE) or "auto")
        self._listens = True
        if spec == "none":
            return
        listen = _load_listening()

        def tell(notice: Notice) -> None:
            left_s = notice.left_s(self._clock.unix_s())
            when = "" if left_s is None else f", {format_duration(left_s)} are left"
            self._say(f"notice from {notice.source}: {notice.kind.value}{when}")
            heard(notice)

        self._listener = listen(spec, clock=self._clock, sink=_Forwarding(self._emit), on_notice=tell)

    def received(self, number: int) -> None:
        """This process got a signal, which may be a notice. Called inside the handler. An agent knows it already."""
        if self._listener is not None and self._listener.heeds(number):
            self._listener.received(number)

    def acknowledge(self, notice: Notice) -> None:
        """The checkpoint is durable: whoever waits for that word gets it."""
        if self._agent is not None and self._listens:
            self._agent.say(ReadyWord(notice_id=notice.id))
        if self._listener is not None:
            self._listener.acknowledge(notice)

    def legacy(self, url: str, head: Head, rank: int, unsent: Callable[[], dict[str, bytes]]) -> Legacy | None:
        """Where an agent watches: what it gets to commit, should this process die first. `head`: any of this claim."""
        return None if self._agent is None else Legacy(self._agent.folder, self._agent, url, head, rank, unsent)

    def inherited(self) -> list[Inherited]:
        """What trainers of this machine that are gone have left in memory, and an agent has kept. The caller closes the slots."""
        if self._agent is None:
            return []
        slots = {slot.memory_id: slot for slot in self._agent.inherit()}
        found = inherited(self._agent.folder, slots)
        described = {one.left.memory for one in found}
        for memory_id, slot in slots.items():
            if memory_id not in described:
                slot.close()
        return found

    def forget_inherited(self) -> None:
        """Nobody on this machine needs it any more: it must not lie beside what this attempt stages."""
        if self._agent is not None:
            self._agent.take_slots([], _NOBODY)

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()
        if self._listener is not None:
            self._listener.close()
        self._agent = self._listener = None


def _load_listening() -> Callable[..., Listener]:
    """Import all that listening needs now, in the loop's thread, with the global generator as it was.

    Among what the HTTP client imports is code that draws from it; in the listener's thread that would happen in the middle of
    training. So what it loads as late as at its first request is loaded here as well.
    """
    state = random.getstate()
    try:
        import anyio._backends._asyncio  # noqa: F401
        import httpcore  # noqa: F401
        import httpx  # noqa: F401

        from holdfast.notice.listen import listen
    finally:
        random.setstate(state)
    return listen


class _Forwarding(Sink):
    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit

    def emit(self, event: Event) -> None:
        self._emit(event.name, **event.fields)


class _Agent:
    """The agent's words, read by a thread of their own; and the heir of this process's memory.

    Raises OSError when nobody listens at the socket.
    """

    def __init__(self, folder: Path, heard: Callable[[Notice], None]) -> None:
        self._heard = heard
        self.folder = folder
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(control_address(folder, opened))
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(opened)
        self._sending = threading.Lock()
        self._inherited: list[Slot] = []
        self._that_was_all = threading.Event()
        threading.Thread(target=self._read, name="holdfast-control", daemon=True).start()

    def say(self, word: ReadyWord) -> None:
        # An agent that is gone does not need the word.
        with self._sending, suppress(OSError):
            self._socket.sendall(encode_word(word))

    def inherit(self) -> list[Slot]:
        """The memory of those that are gone; the caller closes it. What does not come in time is not waited for."""
        with self._sending, suppress(OSError):
            self._socket.sendall(encode_word(InheritWord()))
            self._that_was_all.wait(_INHERIT_S)
        found, self._inherited = self._inherited, []
        return found

    def take_slots(self, slots: Sequence[Slot], rank: int) -> None:
        word = encode_word(SlotsWord(sizes_bytes=[slot.size_bytes for slot in slots], rank=rank))
        with self._sending, suppress(OSError):
            if slots:
                socket.send_fds(self._socket, [word], [slot.descriptor for slot in slots])
            else:
                self._socket.sendall(word)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        rest, descriptors = b"", []
        with suppress(OSError):
            while True:
                data, received, _, _ = socket.recv_fds(self._socket, 65536, _MOST_DESCRIPTORS)
                descriptors += received
                if not data:
                    break
                words, rest = decode_words(rest + data)
                rest = rest if len(rest) <= MOST_WORD_BYTES else b""
                for word in words:
                    if isinstance(word, NoticeWord):
                        self._heard(as_notice(word))
                    elif isinstance(word, SlotsWord):
                        mine, descriptors = descriptors[: len(word.sizes_bytes)], descriptors[len(word.sizes_bytes) :]
                        for size_bytes, descriptor in zip(word.sizes_bytes, mine, strict=False):
                            # Memory that cannot be mapped is memory that cannot be used.
                            with suppress(OSError, ValueError, OverflowError, UsageError):
                                self._inherited.append(Slot(size_bytes, descriptor))
                    elif isinstance(word, InheritedWord):
                        self._that_was_all.set()
        for descriptor in descriptors:
            os.close(descriptor)
