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

from holdfast.checkpoint.handover import Legacy
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.staging import Slot
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import (
    CONTROL_SOCKET,
    ENV_CONTROL,
    ENV_NOTICE,
    MOST_WORD_BYTES,
    NoticeWord,
    ReadyWord,
    SlotsWord,
    control_address,
    decode_words,
    encode_word,
)
from holdfast.core.events import Event, Sink
from holdfast.notice.base import Notice
from holdfast.notice.words import as_notice
from holdfast.store.base import Store

if TYPE_CHECKING:
    from holdfast.notice.listen import Listener

__all__ = ["Hearing"]


class Hearing:
    """Thread safety: `acknowledge` may be called from any thread, the rest belongs to the loop's."""

    def __init__(self, spec: str | None, clock: Clock, emit: Callable[..., None], say: Callable[[str], None]) -> None:
        self._spec, self._clock, self._emit, self._say = spec, clock, emit, say
        self._agent: _Agent | None = None
        self._listener: Listener | None = None

    def start(self, environ: Mapping[str, str], heard: Callable[[Notice], None]) -> None:
        """Begin to listen; returns at once. `heard` is called from a thread of its own.

        Raises UsageError for a `notice` that is wrongly written.
        """
        folder = environ.get(ENV_CONTROL)
        if folder and (Path(folder) / CONTROL_SOCKET).exists():
            with suppress(OSError):
                self._agent = _Agent(Path(folder), heard)
        # An agent listens for both; a script that names a source of its own hears that as well.
        spec = self._spec or ("none" if self._agent is not None else environ.get(ENV_NOTICE) or "auto")
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
        if self._agent is not None:
            self._agent.say(ReadyWord(notice_id=notice.id))
        if self._listener is not None:
            self._listener.acknowledge(notice)

    def legacy(self, store: Store, lineage: Lineage, unsent: Callable[[], dict[str, bytes]]) -> Legacy | None:
        """Where an agent watches: what it gets to commit, should this process die first."""
        return None if self._agent is None else Legacy(self._agent.folder, self._agent, store, lineage, unsent)

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
        threading.Thread(target=self._read, name="holdfast-control", daemon=True).start()

    def say(self, word: ReadyWord) -> None:
        # An agent that is gone does not need the word.
        with self._sending, suppress(OSError):
            self._socket.sendall(encode_word(word))

    def take_slots(self, slots: Sequence[Slot]) -> None:
        word = encode_word(SlotsWord(sizes_bytes=[slot.size_bytes for slot in slots]))
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
        rest = b""
        with suppress(OSError):
            while data := self._socket.recv(65536):
                words, rest = decode_words(rest + data)
                rest = rest if len(rest) <= MOST_WORD_BYTES else b""
                for word in words:
                    if isinstance(word, NoticeWord):
                        self._heard(as_notice(word))
