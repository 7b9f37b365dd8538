"""The control socket: the agent's words to trainers that know holdfast, and theirs back.

notice → tell → every trainer that is connected, and each that connects later, while the notice stands
trainer: ready → `ready` (what could be made durable is durable)
trainer: slots and descriptors → the memory of its snapshots, which stays when the trainer dies (heir.py)
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.checkpoint.staging import Slot
from holdfast.core.contract import CONTROL_SOCKET, NoticeWord, ReadyWord, SlotsWord, decode_words, encode_word
from holdfast.core.errors import UsageError

__all__ = ["ControlSocket"]

_MOST_SLOTS = 16


class ControlSocket:
    """Listens in the control folder, which the trainer finds through its environment.

    Thread safety: every method. `ready` is called from a reader's thread. Nothing raises once it listens: a trainer that does not
    read its words, or dies, is let go.
    """

    def __init__(self, folder: Path, ready: Callable[[str], None]) -> None:
        self._ready = ready
        self._standing: dict[str, NoticeWord] = {}
        self._trainers: set[socket.socket] = set()
        self._slots: dict[int, Slot] = {}
        self._lock = threading.Lock()
        self._path = folder / CONTROL_SOCKET
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(os.fspath(self._path))
        os.chmod(self._path, 0o600)
        self._listener.listen()
        threading.Thread(target=self._accept, name="holdfast-control", daemon=True).start()

    @property
    def connected(self) -> bool:
        """Whether a trainer that understands notices is there."""
        with self._lock:
            return bool(self._trainers)

    def tell(self, word: NoticeWord, *, stands: bool) -> None:
        """Pass on what was heard. `stands`: later trainers must know it as well; not when it is withdrawn."""
        with self._lock:
            if stands:
                self._standing[word.id] = word
            else:
                self._standing.pop(word.id, None)
            trainers = list(self._trainers)
        for trainer in trainers:
            self._send(trainer, word)

    def take_slots(self) -> dict[int, Slot]:
        """The staging memory of the last trainer that announced any, by number; the caller closes it."""
        with self._lock:
            slots, self._slots = self._slots, {}
        return slots

    def close(self) -> None:
        for slot in self.take_slots().values():
            slot.close()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            trainers, self._trainers = self._trainers, set()
        for trainer in trainers:
            with suppress(OSError):
                trainer.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._path.unlink()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                trainer, _ = self._listener.accept()
                # A trainer that never reads must not hold up the agent.
                trainer.settimeout(1.0)
                with self._lock:
                    self._trainers.add(trainer)
                    standing = list(self._standing.values())
                for word in standing:
                    self._send(trainer, word)
                threading.Thread(target=self._read, args=(trainer,), name="holdfast-control", daemon=True).start()

    def _send(self, trainer: socket.socket, word: NoticeWord) -> None:
        try:
            trainer.sendall(encode_word(word))
        except OSError:
            self._let_go(trainer)

    def _read(self, trainer: socket.socket) -> None:
        rest = b""
        descriptors: list[int] = []
        with suppress(OSError):
            while True:
                try:
                    data, received, _, _ = socket.recv_fds(trainer, 65536, _MOST_SLOTS)
                except TimeoutError:
                    continue
                if not data:
                    break
                descriptors += received
                words, rest = decode_words(rest + data)
                for word in words:
                    if isinstance(word, ReadyWord):
                        self._ready(word.notice_id)
                    elif isinstance(word, SlotsWord):
                        mine, descriptors = descriptors[: len(word.sizes_bytes)], descriptors[len(word.sizes_bytes) :]
                        self._hold(word, mine)
        for descriptor in descriptors:
            os.close(descriptor)
        self._let_go(trainer)

    def _hold(self, word: SlotsWord, descriptors: list[int]) -> None:
        slots = {}
        for number, (size_bytes, descriptor) in enumerate(zip(word.sizes_bytes, descriptors, strict=False)):
            # Memory that cannot be mapped is memory that cannot be rescued.
            with suppress(OSError, ValueError, UsageError):
                slots[number] = Slot(size_bytes, descriptor)
        with self._lock:
            before, self._slots = self._slots, slots
        for slot in before.values():
            slot.close()

    def _let_go(self, trainer: socket.socket) -> None:
        with self._lock:
            self._trainers.discard(trainer)
        trainer.close()
