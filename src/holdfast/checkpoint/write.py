"""From a snapshot to durable objects: chunks, block hashes, deduplication, objects of up to 64 MiB, part, root.

Nothing written here counts until a head names it (saver.py), and nothing is ever overwritten. Hashes are computed from the
snapshot's memory before it is sent. A chunk whose content a retained checkpoint already holds is referred to instead of sent,
unless that would keep a mostly dead object alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from blake3 import blake3

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    FORMAT_VERSION,
    OBJECT_BYTES,
    ArrayEntry,
    Chunk,
    ObjectRef,
    Part,
    PartRef,
    Root,
    digest,
    encode_part,
    seal,
)
from holdfast.checkpoint.retain import root_key
from holdfast.checkpoint.snapshot import PAGED_FROM_BYTES, Snapshot
from holdfast.core.ids import TokenSource
from holdfast.store.base import PAGE_BYTES, Store

__all__ = ["KnownChunks", "Written", "block_hashes", "write_checkpoint"]

_MIN_LIVE_SHARE = 0.25
"""An old object is referred to only if at least this share of it is still wanted: storage stays within four times what is live."""
_MIN_HOME_SHARE = 0.05
"""Of the state. Another run keeps its whole checkpoint for us, however little of it we use: what we share with it is referred to,
object by object or not, if it is worth that."""


_BATCH_BYTES = 4 << 20
_MANY = 64
"""Pieces in a batch from which on the interpreter, which only one thread can use, takes longer than the hashing."""


class _Location(NamedTuple):
    """Where a chunk already is. `home` is None for the run itself."""

    home: str | None
    key: str
    object_bytes: int
    offset: int
    length: int


class KnownChunks:
    """Chunks that retained checkpoints hold, by their block hashes. One index per checkpoint, dropped with it; and those of a base,
    another run whose checkpoint this one has pinned, dropped with the pin.

    Thread safety: one thread changes it; others may look at the same time.
    """

    def __init__(self) -> None:
        self._by_checkpoint: dict[str, dict[bytes, _Location]] = {}
        self._of_base: dict[bytes, _Location] = {}

    @collector_paused()
    def add(self, checkpoint: str, part: Part, home: str | None = None) -> None:
        """Remember every chunk of `part`. `home` is where the checkpoint itself lies when it is another run's."""
        homes = [home, *part.homes]
        index: dict[bytes, _Location] = {}
        for entry in part.arrays:
            for chunk in entry.chunks:
                target = part.objects[chunk.object]
                index[chunk.hashes] = _Location(
                    homes[target.home], target.key, target.size_bytes, chunk.offset, chunk.length
                )
        self._by_checkpoint = {**self._by_checkpoint, checkpoint: index}

    @collector_paused()
    def add_base(self, part: Part, home: str, pinned: Mapping[str, Set[str]]) -> None:
        """Remember the chunks of a base's `part` that lie in objects which are pinned: their keys by the run they lie in. `home`
        is the run that the part lies in."""
        homes = [home, *part.homes]
        allowed = [target.key in pinned.get(homes[target.home], ()) for target in part.objects]
        self._of_base = {
            chunk.hashes: _Location(
                homes[part.objects[chunk.object].home], part.objects[chunk.object].key,
                part.objects[chunk.object].size_bytes, chunk.offset, chunk.length,
            )
            for entry in part.arrays for chunk in entry.chunks if allowed[chunk.object]
        }  # fmt: skip

    def retain(self, checkpoints: set[str], homes: set[str]) -> None:
        """Forget checkpoints that the head no longer retains, and what lies in runs where it names no pin any more: what only they
        held may be deleted at any time."""
        self._by_checkpoint = {name: index for name, index in self._by_checkpoint.items() if name in checkpoints}
        if any(location.home not in homes for location in self._of_base.values()):
            self._of_base = {key: location for key, location in self._of_base.items() if location.home in homes}

    def find(self, hashes: bytes) -> _Location | None:
        for index in reversed(self._by_checkpoint.values()):
            location = index.get(hashes)
            if location is not None:
                return location
        return self._of_base.get(hashes)


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint whose every byte is durable, but which no head names yet."""

    root: Root
    root_blake3: str
    part: Part
    total_bytes: int
    sent_bytes: int
    deduplicated_bytes: int
    sent_objects: frozenset[str]


class _Piece(NamedTuple):
    """One chunk of one array, before it has a place. Pieces are known by their number, in the order of the arrays."""

    array: int
    start: int
    length: int


def block_hashes(data: memoryview) -> bytes:
    """BLAKE3-256 of every 1 MiB block of `data`, one after the other."""
    if len(data) <= BLOCK_BYTES:
        return blake3(data).digest() if len(data) else b""
    return b"".join(blake3(data[start : start + BLOCK_BYTES]).digest() for start in range(0, len(data), BLOCK_BYTES))


@collector_paused()
def _pieces(snapshot: Snapshot) -> list[_Piece]:
    pieces = []
    for index, spec in enumerate(snapshot.layout.specs):
        nbytes = spec.nbytes
        if nbytes <= CHUNK_BYTES:
            if nbytes:
                pieces.append(_Piece(index, 0, nbytes))
            continue
        for start in range(0, nbytes, CHUNK_BYTES):
            pieces.append(_Piece(index, start, min(CHUNK_BYTES, nbytes - start)))
    return pieces


class _Objects:
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

    def add(self, piece: _Piece) -> tuple[int, int]:
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

    def _put(self, key: str, pieces: list[_Piece]) -> None:
        self._store.put(key, [self._snapshot.read(*piece) for piece in pieces])


@dataclass(slots=True)
class _OpenObject:
    """An object that is still being filled."""

    number: int
    key: str
    pieces: list[_Piece] = field(default_factory=list)
    size_bytes: int = 0


def write_checkpoint(
    snapshot: Snapshot,
    store: Store,
    *,
    run_id: str,
    attempt: int,
    sequence: int,
    known: KnownChunks,
    tokens: TokenSource,
    hashing: Executor,
    sending: Executor,
    uploaded: set[str],
) -> Written:
    """Make a snapshot durable. Raises what the store raises.

    `uploaded` collects the name of every object before it is sent, so that the caller knows what a failed write may have left.

    `sequence` is the number of the head that will name it; together with a nonce it makes the checkpoint's name unique.
    """
    snapshot.complete()
    objects = _Objects(snapshot, store, attempt, tokens, sending, uploaded)
    try:
        part = _arrange(snapshot, objects, known, hashing)
        for put in objects.puts:
            put.result()
    except BaseException:
        for put in objects.puts:
            put.cancel()
        # What is still being sent reads the snapshot's memory, which the caller fills anew.
        wait(objects.puts)
        raise
    name = f"checkpoints/{sequence:08d}-{attempt}-{tokens()}"
    uploaded |= {root_key(name), f"{name}/part-0"}
    root, root_blake3 = _put_index(snapshot, store, part, run_id, name)
    sent_bytes = sum(ref.size_bytes for ref in objects.refs)
    total_bytes = sum(spec.nbytes for spec in snapshot.layout.specs)
    sent_objects = frozenset(ref.key for ref in objects.refs)
    return Written(root, root_blake3, part, total_bytes, sent_bytes, total_bytes - sent_bytes, sent_objects)


def _arrange(snapshot: Snapshot, objects: _Objects, known: KnownChunks, hashing: Executor) -> Part:
    """Decide for every piece where its bytes are, and start sending those that are nowhere yet."""
    pieces = _pieces(snapshot)
    hashes: list[bytes] = []
    places: list[tuple[int, int]] = []
    first: dict[bytes, int] = {}
    repeats: list[tuple[int, int]] = []
    matched: list[tuple[int, _Location]] = []
    nowhere = (-1, -1)
    for number, (piece, piece_hashes) in enumerate(zip(pieces, _hashed(snapshot, pieces, hashing), strict=True)):
        hashes.append(piece_hashes)
        original = first.setdefault(piece_hashes, number)
        if original != number:
            repeats.append((number, original))
            places.append(nowhere)
            continue
        location = known.find(piece_hashes)
        if location is None:
            places.append(objects.add(piece))
        else:
            matched.append((number, location))
            places.append(nowhere)
    live_bytes: dict[str, int] = {}
    home_bytes: dict[str, int] = {}
    for number, location in matched:
        live_bytes[location.key] = live_bytes.get(location.key, 0) + pieces[number].length
        if location.home is not None:
            home_bytes[location.home] = home_bytes.get(location.home, 0) + pieces[number].length
    worth_bytes = _MIN_HOME_SHARE * sum(piece.length for piece in pieces)
    relied_on = {home for home, shared_bytes in home_bytes.items() if shared_bytes >= worth_bytes}
    referred: list[tuple[int, _Location]] = []
    for number, location in matched:
        if location.home in relied_on or live_bytes[location.key] >= _MIN_LIVE_SHARE * location.object_bytes:
            referred.append((number, location))
        else:
            places[number] = objects.add(pieces[number])
    objects.flush()
    homes, refs = _refer(referred, objects.refs, places)
    for number, original in repeats:
        places[number] = places[original]
    return Part(FORMAT_VERSION, 0, homes, refs, _entries(snapshot, pieces, places, hashes), snapshot.document)


def _hashed(snapshot: Snapshot, pieces: list[_Piece], hashing: Executor) -> Iterator[bytes]:
    """The block hashes of every piece, in order. Small ones are hashed together: a task costs more than hashing a bias does."""
    batches: list[list[_Piece]] = [[]]
    batch_bytes = 0
    for piece in pieces:
        if batch_bytes + piece.length > _BATCH_BYTES:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(piece)
        batch_bytes += piece.length

    def hash_batch(batch: list[_Piece]) -> list[bytes]:
        return [snapshot.hashes(*piece) or block_hashes(snapshot.read(*piece)) for piece in batch]

    tasks = [hashing.submit(hash_batch, batch) if len(batch) < _MANY else None for batch in batches]
    for batch, task in zip(batches, tasks, strict=True):
        yield from hash_batch(batch) if task is None else task.result()


def _refer(
    referred: list[tuple[int, _Location]], sent: list[ObjectRef], places: list[tuple[int, int]]
) -> tuple[list[str], list[ObjectRef]]:
    """Give the pieces that are not sent their places. Returns the other runs and all objects that the checkpoint needs."""
    homes: list[str] = []
    refs = list(sent)
    numbers: dict[str, int] = {}
    for piece_number, location in referred:
        if location.key not in numbers:
            if location.home is not None and location.home not in homes:
                homes.append(location.home)
            home = 0 if location.home is None else 1 + homes.index(location.home)
            numbers[location.key] = len(refs)
            refs.append(ObjectRef(home, location.key, location.object_bytes))
        places[piece_number] = (numbers[location.key], location.offset)
    return homes, refs


@collector_paused()
def _entries(
    snapshot: Snapshot, pieces: list[_Piece], places: list[tuple[int, int]], hashes: list[bytes]
) -> list[ArrayEntry]:
    chunks: list[list[Chunk]] = [[] for _ in snapshot.layout.specs]
    for piece, (object_number, offset), piece_hashes in zip(pieces, places, hashes, strict=True):
        chunks[piece.array].append(Chunk(object_number, offset, piece.length, piece_hashes))
    return [
        ArrayEntry(spec.name, spec.dtype, spec.shape, spec.global_shape, spec.offsets, spec.library, of_array)
        for spec, of_array in zip(snapshot.layout.specs, chunks, strict=True)
    ]


def _put_index(snapshot: Snapshot, store: Store, part: Part, run_id: str, name: str) -> tuple[Root, str]:
    part_data = encode_part(part)
    part_key = f"{name}/part-0"
    root = Root(
        format=FORMAT_VERSION,
        run_id=run_id,
        name=name,
        world_size=1,
        parts=[PartRef(key=part_key, size_bytes=len(part_data), blake3=digest(part_data))],
        objects=sorted({ref.key for ref in part.objects if ref.home == 0}),
        homes=part.homes,
        metadata=snapshot.metadata,
    )
    root_data = seal(root)
    store.put(part_key, part_data)
    store.put(root_key(name), root_data)
    return root, digest(root_data)
