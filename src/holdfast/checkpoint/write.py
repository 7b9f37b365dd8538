"""From a snapshot to durable objects: chunks, block hashes, deduplication, objects of up to 64 MiB, part, root.

Nothing written here counts until a head names it (saver.py), and nothing is ever overwritten. Hashes are computed from the
snapshot's memory before it is sent. A chunk whose content a retained checkpoint already holds is referred to instead of sent,
unless that would keep a mostly dead object alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

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
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["KnownChunks", "Written", "block_hashes", "write_checkpoint"]

_MIN_LIVE_SHARE = 0.25
"""An old object is referred to only if at least this share of it is still wanted: storage stays within four times what is live."""


_BATCH_BYTES = 4 << 20
_Place = tuple[int, int]
"""A chunk of the snapshot: the number of its array, and its own number there."""


class _Location(NamedTuple):
    """Where a chunk already is. `home` is None for the run itself."""

    home: str | None
    key: str
    object_bytes: int
    offset: int
    length: int


class KnownChunks:
    """Chunks that retained checkpoints hold, by their block hashes. One index per checkpoint, dropped with it.

    Thread safety: none; belongs to the saver's thread.
    """

    def __init__(self) -> None:
        self._by_checkpoint: dict[str, dict[bytes, _Location]] = {}

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
        self._by_checkpoint[checkpoint] = index

    def retain(self, checkpoints: set[str]) -> None:
        """Forget checkpoints that the head no longer retains: what only they held may be deleted at any time."""
        self._by_checkpoint = {name: index for name, index in self._by_checkpoint.items() if name in checkpoints}

    def find(self, hashes: bytes) -> _Location | None:
        for index in reversed(self._by_checkpoint.values()):
            location = index.get(hashes)
            if location is not None:
                return location
        return None


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
    """One chunk of one array, before it has a place."""

    array: int
    number: int
    start: int
    length: int


def block_hashes(data: memoryview) -> bytes:
    """BLAKE3-256 of every 1 MiB block of `data`, one after the other."""
    return b"".join(blake3(data[start : start + BLOCK_BYTES]).digest() for start in range(0, len(data), BLOCK_BYTES))


def _pieces(snapshot: Snapshot) -> Iterator[_Piece]:
    for index, spec in enumerate(snapshot.layout.specs):
        for number, start in enumerate(range(0, spec.nbytes, CHUNK_BYTES)):
            yield _Piece(index, number, start, min(CHUNK_BYTES, spec.nbytes - start))


class _Objects:
    """Packs new chunks into objects and puts each as soon as it is full."""

    def __init__(
        self, snapshot: Snapshot, store: Store, attempt: int, tokens: TokenSource, pool: Executor, uploaded: set[str]
    ) -> None:
        self._uploaded = uploaded
        self._snapshot = snapshot
        self._store = store
        self._attempt = attempt
        self._tokens = tokens
        self._pool = pool
        self._open: list[_Piece] = []
        self._open_bytes = 0
        self.placed: dict[_Place, tuple[int, int]] = {}
        self.refs: list[ObjectRef] = []
        self.puts: list[Future[None]] = []

    def add(self, piece: _Piece) -> None:
        if self._open_bytes + piece.length > OBJECT_BYTES:
            self.flush()
        self.placed[piece.array, piece.number] = (len(self.refs), self._open_bytes)
        self._open.append(piece)
        self._open_bytes += piece.length

    def flush(self) -> None:
        if not self._open:
            return
        key = f"data/{self._attempt}/{self._tokens()}"
        self.refs.append(ObjectRef(0, key, self._open_bytes))
        self._uploaded.add(key)
        self.puts.append(self._pool.submit(self._put, key, self._open))
        self._open, self._open_bytes = [], 0

    def _put(self, key: str, pieces: list[_Piece]) -> None:
        self._store.put(key, [self._snapshot.read(p.array, p.start, p.length) for p in pieces])


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
    """Decide for every chunk where its bytes are, and start sending those that are nowhere yet."""
    hashes: dict[_Place, bytes] = {}
    first: dict[bytes, _Place] = {}
    repeats: dict[_Place, _Place] = {}
    matched: list[tuple[_Piece, _Location]] = []
    for piece, piece_hashes in _hashed(snapshot, hashing):
        place = (piece.array, piece.number)
        hashes[place] = piece_hashes
        original = first.setdefault(piece_hashes, place)
        if original is not place:
            repeats[place] = original
            continue
        location = known.find(piece_hashes)
        if location is None:
            objects.add(piece)
        else:
            matched.append((piece, location))
    referred = _worth_referring(matched)
    for piece, location in matched:
        if location.key not in referred:
            objects.add(piece)
    objects.flush()
    return _index(snapshot, objects, hashes, repeats, [match for match in matched if match[1].key in referred])


def _hashed(snapshot: Snapshot, hashing: Executor) -> Iterator[tuple[_Piece, bytes]]:
    """Every piece with its block hashes, in order. Small ones are hashed together: a task costs more than hashing a bias does."""
    batches: list[list[_Piece]] = [[]]
    batch_bytes = 0
    for piece in _pieces(snapshot):
        if batch_bytes + piece.length > _BATCH_BYTES:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(piece)
        batch_bytes += piece.length

    def hash_batch(batch: list[_Piece]) -> list[bytes]:
        return [block_hashes(snapshot.read(piece.array, piece.start, piece.length)) for piece in batch]

    for batch, batch_hashes in zip(batches, hashing.map(hash_batch, batches), strict=True):
        yield from zip(batch, batch_hashes, strict=True)


def _worth_referring(matched: list[tuple[_Piece, _Location]]) -> set[str]:
    wanted: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for piece, location in matched:
        wanted[location.key] = wanted.get(location.key, 0) + piece.length
        sizes[location.key] = location.object_bytes
    return {key for key, live in wanted.items() if live >= _MIN_LIVE_SHARE * sizes[key]}


def _index(
    snapshot: Snapshot,
    objects: _Objects,
    hashes: dict[_Place, bytes],
    repeats: dict[_Place, _Place],
    matched: list[tuple[_Piece, _Location]],
) -> Part:
    homes: list[str] = []
    refs = list(objects.refs)
    numbers: dict[str, int] = {}
    for _, location in matched:
        if location.key not in numbers:
            if location.home is not None and location.home not in homes:
                homes.append(location.home)
            home = 0 if location.home is None else 1 + homes.index(location.home)
            numbers[location.key] = len(refs)
            refs.append(ObjectRef(home, location.key, location.object_bytes))
    placed = dict(objects.placed)
    placed |= {(piece.array, piece.number): (numbers[at.key], at.offset) for piece, at in matched}
    placed |= {place: placed[original] for place, original in repeats.items()}
    arrays = []
    for index, spec in enumerate(snapshot.layout.specs):
        chunks = []
        for number, start in enumerate(range(0, spec.nbytes, CHUNK_BYTES)):
            object_number, offset = placed[index, number]
            length = min(CHUNK_BYTES, spec.nbytes - start)
            chunks.append(Chunk(object_number, offset, length, hashes[index, number]))
        arrays.append(
            ArrayEntry(spec.name, spec.dtype, spec.shape, spec.global_shape, spec.offsets, spec.library, chunks)
        )
    return Part(FORMAT_VERSION, 0, homes, refs, arrays, snapshot.document)


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
