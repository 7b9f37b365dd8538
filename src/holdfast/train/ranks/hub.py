"""The connections between rank 0 and the others: one TCP connection for each member, frames of a length and a word.

    Hub (rank 0): one thread for all connections        Spoke (member): one thread
    heard(rank, word), lost(rank) ← they call           heard(word), lost() ← they call

A connection breaks at once when a process dies, and within half a minute when its machine does.
"""

from __future__ import annotations

import hmac
import os
import resource
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from holdfast.core.errors import UsageError
from holdfast.train.ranks.words import Hello, Word, decode_word, encode_word

__all__ = ["Hub", "Spoke"]

_LENGTH = struct.Struct("<I")
_MOST_BYTES = 256 << 20
_RECEIVE_BYTES = 1 << 20
_SEND_S = 30.0
_SPARE_DESCRIPTORS = 256
"""For what the training opens besides: data, a store, loader workers."""
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 25_000),
)


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.settimeout(_SEND_S)


def _allow_descriptors(connections: int) -> None:
    """Many machines let a process open 1,024 files unless it asks for more: too few for as many ranks.

    Raises UsageError when it may not have enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + connections
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UsageError(
            f"rank 0 needs a connection to each of {connections} ranks, and may open {hard} files only: start the job with a "
            "higher limit (ulimit -n)"
        )
    wanted = needed + _SPARE_DESCRIPTORS
    if soft not in (resource.RLIM_INFINITY, hard) and soft < wanted:
        enough = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _frame(word: Word) -> bytes:
    body = encode_word(word)
    return _LENGTH.pack(len(body)) + body


def _words(buffer: bytearray) -> list[Word]:
    """Takes the whole words out of `buffer`. Raises ValueError for what cannot be one."""
    words: list[Word] = []
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        if length > _MOST_BYTES:
            raise ValueError(f"a word of {length} bytes")
        if len(buffer) < _LENGTH.size + length:
            break
        words.append(decode_word(bytes(buffer[_LENGTH.size : _LENGTH.size + length])))
        del buffer[: _LENGTH.size + length]
    return words


@dataclass(eq=False, slots=True)
class _Member:
    """One connection. `rank` is None until it has said who it is."""

    socket: socket.socket
    rank: int | None = None
    buffer: bytearray = field(default_factory=bytearray)
    sending: threading.Lock = field(default_factory=threading.Lock)


class Hub:
    """Rank 0's side. Thread safety: `send` may be called from any thread. `heard` and `lost` are called from the hub's own.

    Who does not know `secret`, says nonsense, or takes a rank that is taken, is cut off and never heard of. Raises UsageError where
    this process may not open so many connections.
    """

    def __init__(
        self, host: str, size: int, secret: str, heard: Callable[[int, Word], None], lost: Callable[[int], None]
    ) -> None:
        _allow_descriptors(size)
        self._size, self._secret, self._heard, self._lost = size, secret, heard, lost
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=size)
        self._members: dict[int, _Member] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._stop_reader, self._stop_writer = os.pipe()
        self._selector.register(self._stop_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="holdfast-hub", daemon=True)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def send(self, rank: int, word: Word) -> None:
        """To a member that is connected; what cannot be sent is lost with its connection, and `lost` says so."""
        self._send(rank, _frame(word))

    def send_all(self, word: Word) -> None:
        frame = _frame(word)
        with self._lock:
            ranks = sorted(self._members)
        for rank in ranks:
            self._send(rank, frame)

    def _send(self, rank: int, frame: bytes) -> None:
        with self._lock:
            member = self._members.get(rank)
        if member is None:
            return
        try:
            with member.sending:
                member.socket.sendall(frame)
        except OSError:
            with suppress(OSError):
                member.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._thread.is_alive():
            os.write(self._stop_writer, b"x")
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _serve(self) -> None:
        connected: set[_Member] = set()
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj == self._stop_reader:
                        return
                    if key.fileobj is self._listener:
                        connected |= self._accept()
                    elif not self._receive(key.data):
                        connected.discard(key.data)
                        self._let_go(key.data)
        finally:
            for member in connected:
                member.socket.close()
            self._listener.close()
            self._selector.close()
            os.close(self._stop_reader)
            os.close(self._stop_writer)

    def _accept(self) -> set[_Member]:
        try:
            connection, _ = self._listener.accept()
            _prepare(connection)
        except OSError:
            return set()
        member = _Member(connection)
        self._selector.register(connection, selectors.EVENT_READ, member)
        return {member}

    def _receive(self, member: _Member) -> bool:
        """False: the connection is over."""
        try:
            data = member.socket.recv(_RECEIVE_BYTES)
            if not data:
                return False
            member.buffer += data
            for word in _words(member.buffer):
                if member.rank is not None:
                    self._heard(member.rank, word)
                elif not self._welcome(member, word):
                    return False
        except (OSError, ValueError, msgspec.MsgspecError):
            return False
        return True

    def _welcome(self, member: _Member, word: Word) -> bool:
        if not isinstance(word, Hello) or not hmac.compare_digest(word.secret.encode(), self._secret.encode()):
            return False
        with self._lock:
            if not 0 < word.rank < self._size or word.rank in self._members:
                return False
            member.rank = word.rank
            self._members[word.rank] = member
        self._heard(word.rank, word)
        return True

    def _let_go(self, member: _Member) -> None:
        self._selector.unregister(member.socket)
        member.socket.close()
        if member.rank is not None:
            with self._lock:
                del self._members[member.rank]
            self._lost(member.rank)


class Spoke:
    """A member's side. It has one connection, so whatever is sent goes to rank 0. Thread safety: `send` may be called from any
    thread. `heard` and `lost` are called from its own.

    Raises OSError when nobody answers at the address.
    """

    def __init__(
        self, host: str, port: int, rank: int, secret: str, heard: Callable[[Word], None], lost: Callable[[], None]
    ) -> None:
        self._heard, self._lost = heard, lost
        self._socket = socket.create_connection((host, port), timeout=_SEND_S)
        _prepare(self._socket)
        self._sending = threading.Lock()
        self._closed = False
        self.send(0, Hello(rank, secret))
        self._thread = threading.Thread(target=self._read, name="holdfast-hub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send_all(self, word: Word) -> None:
        self.send(0, word)

    def send(self, rank: int, word: Word) -> None:
        """What cannot be sent is lost with the connection, and `lost` says so."""
        try:
            with self._sending:
                self._socket.sendall(_frame(word))
        except OSError:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        buffer = bytearray()
        with suppress(OSError, ValueError, msgspec.MsgspecError):
            while True:
                try:
                    data = self._socket.recv(_RECEIVE_BYTES)
                except TimeoutError:
                    continue
                if not data:
                    break
                buffer += data
                for word in _words(buffer):
                    self._heard(word)
        if not self._closed:
            self._lost()
