"""The control socket: the agent's words to trainers that know holdfast, and theirs back.

notice → tell → every trainer that is connected, and each that connects later, while the notice stands
trainer: ready → `ready` (what could be made durable is durable)
trainer: slots and descriptors → the memory of its snapshots, which stays when the trainer dies (heir.py)
trainer: inherit → the memory that those before it have left, until one of them makes room of its own
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from holdfast.checkpoint.staging import Slot
from holdfast.core.contract import (
    CONTROL_SOCKET,
    MOST_WORD_BYTES,
    InheritedWord,
    InheritWord,
    NoticeWord,
    ReadyWord,
    SlotsWord,
    Word,
    control_address,
    decode_words,
    encode_word,
)
from holdfast.core.errors import UsageError

__all__ = ["ControlSocket"]

_MOST_SLOTS = 16
_SETTLE_S = 5.0


class _Memory(NamedTuple):
    """The slots of one rank, and the connection that it announced them on."""

    trainer: socket.socket
    slots: list[Slot]


class ControlSocket:
    """Listens in the control folder, which the trainer finds through its environment.

    Thread safety: every method. `ready` is called from a reader's thread. Nothing raises once it listens: a trainer that does not
    read its words, or dies, is let go.
    """

    def __init__(self, folder: Path, ready: Callable[[str], None]) -> None:
        self._ready = ready
        self._standing: dict[str, NoticeWord] = {}
        self._trainers: set[socket.socket] = set()
        self._memory: dict[int, _Memory] = {}
        """By rank."""
        self._readers: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        """Held while words go out: who connects must not be greeted with what is withdrawn at that moment."""
        self._path = folder / CONTROL_SOCKET
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listener.bind(control_address(folder, opened))
        finally:
            os.close(opened)
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
        with self._telling:
            with self._lock:
                if stands:
                    self._standing[word.id] = word
                else:
                    self._standing.pop(word.id, None)
                trainers = list(self._trainers)
            for trainer in trainers:
                self._send(trainer, word)

    def slots(self) -> dict[int, Slot]:
        """The staging memory that trainers have announced, by `memory_id`; it stays this socket's.

        For after their death: waits until everything that they have said is understood.
        """
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.join(_SETTLE_S)
        with self._lock:
            return {slot.memory_id: slot for memory in self._memory.values() for slot in memory.slots}

    def forget_slots(self) -> None:
        """Nobody needs them any more."""
        with self._lock:
            memory, self._memory = self._memory, {}
        for held in memory.values():
            _close(held.slots)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            trainers, self._trainers = self._trainers, set()
        for trainer in trainers:
            with suppress(OSError):
                trainer.shutdown(socket.SHUT_RDWR)
        self.slots()
        self.forget_slots()
        with suppress(OSError):
            self._path.unlink()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                trainer, _ = self._listener.accept()
                # A trainer that never reads must not hold up the agent.
                trainer.settimeout(1.0)
                reader = threading.Thread(target=self._listen_to, args=(trainer,), name="holdfast-control", daemon=True)
                with self._telling:
                    with self._lock:
                        self._trainers.add(trainer)
                        self._readers.add(reader)
                        standing = list(self._standing.values())
                    for word in standing:
                        self._send(trainer, word)
                reader.start()

    def _send(self, trainer: socket.socket, word: Word, slots: list[Slot] | None = None) -> None:
        try:
            if slots:
                socket.send_fds(trainer, [encode_word(word)], [slot.descriptor for slot in slots])
            else:
                trainer.sendall(encode_word(word))
        except OSError:
            # Half a word may have gone out; its reader sees the end, and closes.
            with suppress(OSError):
                trainer.shutdown(socket.SHUT_RDWR)

    def _listen_to(self, trainer: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            with suppress(OSError):
                self._read(trainer, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            with self._lock:
                self._trainers.discard(trainer)
                self._readers.discard(threading.current_thread())
            trainer.close()

    def _read(self, trainer: socket.socket, descriptors: list[int]) -> None:
        rest = b""
        while True:
            try:
                data, received, _, _ = socket.recv_fds(trainer, 65536, _MOST_SLOTS)
            except TimeoutError:
                continue
            descriptors += received
            if not data:
                return
            words, rest = decode_words(rest + data)
            if len(rest) > MOST_WORD_BYTES or len(descriptors) > _MOST_SLOTS:
                return
            for word in words:
                if isinstance(word, ReadyWord):
                    self._ready(word.notice_id)
                elif isinstance(word, SlotsWord):
                    mine = descriptors[: len(word.sizes_bytes)]
                    del descriptors[: len(word.sizes_bytes)]
                    self._hold(trainer, word, mine)
                elif isinstance(word, InheritWord):
                    self._hand_down(trainer)

    def _hand_down(self, heir: socket.socket) -> None:
        """What those before it have left. It stays here as well: others may ask, and the heir may die."""
        with self._telling:
            with self._lock:
                dead = {rank: held for rank, held in self._memory.items() if held.trainer not in self._trainers}
                for rank, held in sorted(dead.items()):
                    sizes_bytes = [slot.size_bytes for slot in held.slots]
                    self._send(heir, SlotsWord(sizes_bytes=sizes_bytes, rank=rank), held.slots)
            self._send(heir, InheritedWord())

    def _hold(self, trainer: socket.socket, word: SlotsWord, descriptors: list[int]) -> None:
        slots = []
        for size_bytes, descriptor in zip(word.sizes_bytes, descriptors, strict=False):
            if size_bytes <= 0:
                os.close(descriptor)
                continue
            # Memory that cannot be mapped is memory that cannot be rescued.
            with suppress(OSError, ValueError, OverflowError, UsageError):
                slots.append(Slot(size_bytes, descriptor))
        with self._lock:
            # Whoever makes room of its own has no use any more for what others have left, and the machine not for both.
            void = [
                rank for rank, held in self._memory.items() if rank == word.rank or held.trainer not in self._trainers
            ]
            before = [self._memory.pop(rank) for rank in void]
            if slots:
                self._memory[word.rank] = _Memory(trainer, slots)
        for held in before:
            _close(held.slots)


def _close(slots: list[Slot]) -> None:
    for slot in slots:
        slot.close()
