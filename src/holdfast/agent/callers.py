"""Who calls the agent from outside: `holdfast notify` says that the machine goes, and may wait until all is kept.

notify: notice → heard as any other notice (notices.py) → sent back: heard
a trainer is ready → every caller: ready          the agent has kept what it could → every caller: kept
notify --withdraw → whoever has said the same and waits: withdrawn
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.core.contract import (
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

__all__ = ["Callers"]

_MOST_CALLERS = 64
_SEND_S = 1.0
"""A caller that does not read must not hold up the agent."""


class Callers:
    """Listens in the control folder, for this user and root.

    Thread safety: every method. `heard` is called from a caller's thread, with one word after the other, and must not block.
    Nothing raises once it listens.
    """

    def __init__(self, folder: Path, heard: Callable[[NoticeWord], None]) -> None:
        self._heard = heard
        self._callers: dict[socket.socket, tuple[str, str] | None] = {}
        """What each has said that still stands, by source and id."""
        self._ready: ReadyWord | None = None
        self._lock = threading.Lock()
        self._path = folder / NOTIFY_SOCKET
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listener.bind(control_address(folder, opened, NOTIFY_SOCKET))
        finally:
            os.close(opened)
        os.chmod(self._path, 0o600)
        self._listener.listen()
        threading.Thread(target=self._accept, name="holdfast-callers", daemon=True).start()

    def begin(self) -> None:
        """Before an attempt: it has saved nothing yet."""
        with self._lock:
            self._ready = None

    def ready(self, word: ReadyWord) -> None:
        """For everybody who has called, and who calls later."""
        with self._lock:
            self._ready = word
        self._tell(word)

    def close(self, word: KeptWord) -> None:
        """The agent ends. Who calls from now on finds nobody."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._tell(word)
        with self._lock:
            callers, self._callers = self._callers, {}
        for caller in callers:
            _hang_up(caller)
        with suppress(OSError):
            self._path.unlink()

    def _tell(self, word: Word) -> None:
        with self._lock:
            callers = list(self._callers)
        for caller in callers:
            _send(caller, word)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                caller.settimeout(_SEND_S)
                with self._lock:
                    is_one_too_many = len(self._callers) >= _MOST_CALLERS
                    if not is_one_too_many:
                        self._callers[caller] = None
                if is_one_too_many:
                    caller.close()
                else:
                    threading.Thread(
                        target=self._listen_to, args=(caller,), name="holdfast-caller", daemon=True
                    ).start()

    def _listen_to(self, caller: socket.socket) -> None:
        try:
            with suppress(OSError):
                self._read(caller)
        finally:
            with self._lock:
                self._callers.pop(caller, None)
            caller.close()

    def _read(self, caller: socket.socket) -> None:
        rest = b""
        while True:
            try:
                data = caller.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            words, rest = decode_words(rest + data)
            if len(rest) > MOST_WORD_BYTES:
                return
            for word in words:
                if isinstance(word, NoticeWord):
                    self._take(caller, word)

    def _take(self, caller: socket.socket, word: NoticeWord) -> None:
        said, stands = (word.source, word.id), word.kind != NoticeKind.WITHDRAWN
        with self._lock:
            # In one order for all: whoever says it anew after a withdrawal must not be told of that one.
            self._heard(word)
            ready = self._ready
            freed = [] if stands else [other for other, its in self._callers.items() if its == said]
            self._callers.update(dict.fromkeys(freed))
            if stands and caller in self._callers:
                self._callers[caller] = said
        _send(caller, word)
        if ready is not None:
            _send(caller, ready)
        for other in freed:
            _send(other, word)


def _send(caller: socket.socket, word: Word) -> None:
    try:
        caller.sendall(encode_word(word))
    except OSError:
        # Half a word may have gone out; its reader sees the end, and closes.
        _hang_up(caller)


def _hang_up(caller: socket.socket) -> None:
    with suppress(OSError):
        caller.shutdown(socket.SHUT_RDWR)
