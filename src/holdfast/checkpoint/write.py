"""From a snapshot to durable objects: chunks, block hashes, deduplication, objects of up to 64 MiB, part, root.

    each rank: snapshot → objects → part          rank 0, once it knows of all parts: root

Nothing written here counts until a head names it (saver.py), and nothing is ever overwritten. Hashes are computed from the
snapshot's memory before it is sent. A chunk whose content a retained checkpoint already holds is referred to instead of sent,
unless that would keep a mostly dead object alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from holdfast.checkpoint.collector import collector_paused
from holdfast.checkpoint.format import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    ArrayEntry,
    Chunk,
    ObjectRef,
    Part,
    PartRef,
    Root,
    encode_part,
)
from holdfast.checkpoint.known import KnownChunks, Location
from holdfast.checkpoint.pack import NewObjects, Piece
from holdfast.checkpoint.retain import root_key
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.core.errors import UsageError
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import FORMAT_VERSION, digest, seal
from holdfast.store.base import Store

__all__ = [
    "KnownChunks",
    "Written",
    "WrittenPart",
    "block_hashes",
    "checkpoint_name",
    "part_key",
    "put_root",
    "write_checkpoint",
    "write_part",
]

_MIN_LIVE_SHARE = 0.25
"""An old object is referred to only if at least this share of it is still wanted: storage stays within four times what is live."""
_MIN_HOME_SHARE = 0.05
"""Of the state. Another run keeps its whole checkpoint for us, however little of it we use: what we share with it is referred to,
object by object or not, if it is worth that."""


_BATCH_BYTES = 4 << 20
_MANY = 64
"""Pieces in a batch from which on the interpreter, which only one thread can use, takes longer than the hashing."""


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


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """One rank's part whose every byte is durable, in words that can be sent to the rank that writes the root. `objects` are the
    run's own data objects that the part refers to, `sent_objects` those of them that are new, `homes` the other runs."""

    key: str
    size_bytes: int
    blake3: str
    objects: tuple[str, ...]
    homes: tuple[str, ...]
    total_bytes: int
    sent_bytes: int
    sent_objects: tuple[str, ...]


def block_hashes(data: memoryview) -> bytes:
    """BLAKE3-256 of every 1 MiB block of `data`, one after the other."""
    if len(data) <= BLOCK_BYTES:
        return blake3(data).digest() if len(data) else b""
    return b"".join(blake3(data[start : start + BLOCK_BYTES]).digest() for start in range(0, len(data), BLOCK_BYTES))


@collector_paused()
def _pieces(snapshot: Snapshot) -> list[Piece]:
    pieces = []
    for index, spec in enumerate(snapshot.layout.specs):
        nbytes = spec.nbytes
        if nbytes <= CHUNK_BYTES:
            if nbytes:
                pieces.append(Piece(index, 0, nbytes))
            continue
        for start in range(0, nbytes, CHUNK_BYTES):
            pieces.append(Piece(index, start, min(CHUNK_BYTES, nbytes - start)))
    return pieces


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
    part, sent = _write_objects(
        snapshot, store, rank=0, attempt=attempt, known=known, tokens=tokens, hashing=hashing, sending=sending,
        uploaded=uploaded,
    )  # fmt: skip
    name = checkpoint_name(sequence, attempt, tokens)
    uploaded |= {root_key(name), part_key(name, 0)}
    written = _put_part(snapshot, store, part, sent, name)
    root, root_blake3 = put_root(store, run_id, name, [written], snapshot.metadata)
    total_bytes, sent_bytes = written.total_bytes, written.sent_bytes
    return Written(
        root, root_blake3, part, total_bytes, sent_bytes, total_bytes - sent_bytes, frozenset(written.sent_objects)
    )


def checkpoint_name(sequence: int, attempt: int, tokens: TokenSource) -> str:
    """A new name. `sequence` is the number of the head that will name the checkpoint."""
    return f"checkpoints/{sequence:08d}-{attempt}-{tokens()}"


def part_key(name: str, rank: int) -> str:
    return f"{name}/part-{rank}"


def write_part(
    snapshot: Snapshot,
    store: Store,
    *,
    name: str,
    rank: int,
    attempt: int,
    known: KnownChunks,
    tokens: TokenSource,
    hashing: Executor,
    sending: Executor,
    uploaded: set[str],
) -> tuple[WrittenPart, Part]:
    """Make one rank's part of the checkpoint called `name` durable: its objects, and its index. Otherwise as `write_checkpoint`."""
    part, sent = _write_objects(
        snapshot, store, rank=rank, attempt=attempt, known=known, tokens=tokens, hashing=hashing, sending=sending,
        uploaded=uploaded,
    )  # fmt: skip
    uploaded.add(part_key(name, rank))
    return _put_part(snapshot, store, part, sent, name), part


def put_root(
    store: Store, run_id: str, name: str, parts: Sequence[WrittenPart], metadata: dict[str, Any]
) -> tuple[Root, str]:
    """Put the root of a checkpoint whose parts, by rank, are durable. Returns it and its hash. Raises what the store raises."""
    for rank, part in enumerate(parts):
        if part.key != part_key(name, rank):
            raise UsageError(f"{part.key} is not the part of rank {rank} of {name}")
    root = Root(
        format=FORMAT_VERSION,
        run_id=run_id,
        name=name,
        world_size=len(parts),
        parts=[PartRef(key=part.key, size_bytes=part.size_bytes, blake3=part.blake3) for part in parts],
        objects=sorted({key for part in parts for key in part.objects}),
        homes=list(dict.fromkeys(home for part in parts for home in part.homes)),
        metadata=metadata,
    )
    root_data = seal(root)
    store.put(root_key(name), root_data)
    return root, digest(root_data)


def _put_part(snapshot: Snapshot, store: Store, part: Part, sent: Sequence[ObjectRef], name: str) -> WrittenPart:
    data = encode_part(part)
    key = part_key(name, part.rank)
    store.put(key, data)
    return WrittenPart(
        key=key,
        size_bytes=len(data),
        blake3=digest(data),
        objects=tuple(sorted({ref.key for ref in part.objects if ref.home == 0})),
        homes=tuple(part.homes),
        total_bytes=sum(spec.nbytes for spec in snapshot.layout.specs),
        sent_bytes=sum(ref.size_bytes for ref in sent),
        sent_objects=tuple(ref.key for ref in sent),
    )


def _write_objects(
    snapshot: Snapshot,
    store: Store,
    *,
    rank: int,
    attempt: int,
    known: KnownChunks,
    tokens: TokenSource,
    hashing: Executor,
    sending: Executor,
    uploaded: set[str],
) -> tuple[Part, list[ObjectRef]]:
    """Make the snapshot's bytes durable. Returns the index of them, which is not written yet, and the new objects."""
    snapshot.complete()
    objects = NewObjects(snapshot, store, attempt, tokens, sending, uploaded)
    try:
        part = _arrange(snapshot, rank, objects, known, hashing)
        for put in objects.puts:
            put.result()
    except BaseException:
        for put in objects.puts:
            put.cancel()
        # What is still being sent reads the snapshot's memory, which the caller fills anew.
        wait(objects.puts)
        raise
    return part, objects.refs


def _arrange(snapshot: Snapshot, rank: int, objects: NewObjects, known: KnownChunks, hashing: Executor) -> Part:
    """Decide for every piece where its bytes are, and start sending those that are nowhere yet."""
    pieces = _pieces(snapshot)
    hashes: list[bytes] = []
    places: list[tuple[int, int]] = []
    first: dict[bytes, int] = {}
    repeats: list[tuple[int, int]] = []
    matched: list[tuple[int, Location]] = []
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
    referred: list[tuple[int, Location]] = []
    for number, location in matched:
        if location.home in relied_on or live_bytes[location.key] >= _MIN_LIVE_SHARE * location.object_bytes:
            referred.append((number, location))
        else:
            places[number] = objects.add(pieces[number])
    objects.flush()
    homes, refs = _refer(referred, objects.refs, places)
    for number, original in repeats:
        places[number] = places[original]
    return Part(FORMAT_VERSION, rank, homes, refs, _entries(snapshot, pieces, places, hashes), snapshot.document)


def _hashed(snapshot: Snapshot, pieces: list[Piece], hashing: Executor) -> Iterator[bytes]:
    """The block hashes of every piece, in order. Small ones are hashed together: a task costs more than hashing a bias does."""
    batches: list[list[Piece]] = [[]]
    batch_bytes = 0
    for piece in pieces:
        if batch_bytes + piece.length > _BATCH_BYTES:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(piece)
        batch_bytes += piece.length

    def hash_batch(batch: list[Piece]) -> list[bytes]:
        return [snapshot.hashes(*piece) or block_hashes(snapshot.read(*piece)) for piece in batch]

    tasks = [hashing.submit(hash_batch, batch) if len(batch) < _MANY else None for batch in batches]
    for batch, task in zip(batches, tasks, strict=True):
        yield from hash_batch(batch) if task is None else task.result()


def _refer(
    referred: list[tuple[int, Location]], sent: list[ObjectRef], places: list[tuple[int, int]]
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
    snapshot: Snapshot, pieces: list[Piece], places: list[tuple[int, int]], hashes: list[bytes]
) -> list[ArrayEntry]:
    chunks: list[list[Chunk]] = [[] for _ in snapshot.layout.specs]
    for piece, (object_number, offset), piece_hashes in zip(pieces, places, hashes, strict=True):
        chunks[piece.array].append(Chunk(object_number, offset, piece.length, piece_hashes))
    return [
        ArrayEntry(spec.name, spec.dtype, spec.shape, spec.global_shape, spec.offsets, spec.library, of_array)
        for spec, of_array in zip(snapshot.layout.specs, chunks, strict=True)
    ]
