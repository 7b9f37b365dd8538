"""New pieces packed into objects, each put as soon as it is full."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.checkpoint.format import OBJECT_BYTES, ObjectRef
from holdfast.checkpoint.snapshot import PAGED_FROM_BYTES, Snapshot
from holdfast.core.ids import TokenSource
from holdfast.store.base import PAGE_BYTES, Store

__all__ = ["NewObjects", "Piece"]


class Piece(NamedTuple):
    """One chunk of one array, before it has a place. Pieces are known by their number, in the order of the arrays."""

    array: int
    start: int
    length: int


class NewObjects:
    """Packs new pieces into objects and puts each as soon as it is full.

    Whole pages are kept apart from the rest, so that in their object every piece begins on a page: see posix.write_all.
    """

    def __init__(
        self, snapshot: Snapshot, store: Store, attempt: int, tokens: TokenSource, pool: Executor, uploaded: set[str]
    ) -> None:
        self._uploaded = uploaded
        self._snapshot = snapshot
        self._store = store
        self._attempt = attempt
        self._tokens = tokens
        self._pool = pool
        self._paged: _OpenObject | None = None
        self._other: _OpenObject | None = None
        self.refs: list[ObjectRef] = []
        self.puts: list[Future[None]] = []

    def add(self, piece: Piece) -> tuple[int, int]:
        """The number of the object that the piece will be in, and its offset there."""
        paged = piece.length >= PAGED_FROM_BYTES and piece.length % PAGE_BYTES == 0
        opened = self._paged if paged else self._other
        if opened is None or opened.size_bytes + piece.length > OBJECT_BYTES:
            if opened is not None:
                self._close(opened)
            opened = self._open()
            if paged:
                self._paged = opened
            else:
                self._other = opened
        place = (opened.number, opened.size_bytes)
        opened.pieces.append(piece)
        opened.size_bytes += piece.length
        return place

    def flush(self) -> None:
        for opened in (self._paged, self._other):
            if opened is not None:
                self._close(opened)
        self._paged = self._other = None

    def _open(self) -> _OpenObject:
        key = f"data/{self._attempt}/{self._tokens()}"
        self.refs.append(ObjectRef(0, key, 0))
        return _OpenObject(len(self.refs) - 1, key)

    def _close(self, opened: _OpenObject) -> None:
        self.refs[opened.number] = ObjectRef(0, opened.key, opened.size_bytes)
        self._uploaded.add(opened.key)
        self.puts.append(self._pool.submit(self._put, opened.key, opened.pieces))

    def _put(self, key: str, pieces: list[Piece]) -> None:
        self._store.put(key, [self._snapshot.read(*piece) for piece in pieces])


@dataclass(slots=True)
class _OpenObject:
    """An object that is still being filled."""

    number: int
    key: str
    pieces: list[Piece] = field(default_factory=list)
    size_bytes: int = 0
