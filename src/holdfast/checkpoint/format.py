"""The bytes of everything under a run's URL that is not tensor data. docs/checkpoint-format.md says the same in words.

Records (run, head, root, pin) are sealed JSON (`core.sealed`). A part (one rank's index) is a magic line and MessagePack; its hash
stands in the root, and the root's hash in the head. Every size and name is checked before it is used: a folder may be hostile.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from holdfast.checkpoint.arrays import DTYPE_BYTES, ArraySpec
from holdfast.core.errors import FormatError, UsageError
from holdfast.core.sealed import FORMAT_VERSION
from holdfast.store.base import check_key

__all__ = [
    "BLOCK_BYTES",
    "CHUNK_BYTES",
    "HASH_BYTES",
    "MAX_PART_BYTES",
    "OBJECT_BYTES",
    "ArrayEntry",
    "CheckpointRef",
    "Chunk",
    "Head",
    "ObjectRef",
    "Part",
    "PartRef",
    "Pin",
    "PinnedBy",
    "Root",
    "RunRecord",
    "StagedRecord",
    "decode_part",
    "encode_part",
    "head_key",
]

BLOCK_BYTES = 1 << 20
"""A hash covers at most this many bytes, so a resharding read verifies the ranges it takes without reading whole objects."""
CHUNK_BYTES = 16 << 20
"""What is deduplicated as a unit: at most this many consecutive bytes of one array."""
OBJECT_BYTES = 64 << 20
"""No data object is larger, so that every one is a single PUT."""
HASH_BYTES = 32
MAX_PART_BYTES = 1 << 30
_PART_MAGIC = b"HOLDFAST-PART-1\n"
_MAX_DIMENSIONS = 64
_MAX_ARRAY_BYTES = 1 << 61


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`: what the run is, created once."""

    format: int
    run_id: str
    created_unix_s: float
    name: str


class CheckpointRef(msgspec.Struct, frozen=True, kw_only=True):
    """A retained checkpoint as a head names it. `home` is the URL of another run whose checkpoint this one refers to (a fork);
    `figure` the value of the metric that retention goes by, as it was last logged."""

    name: str
    root_blake3: str
    step: int
    epoch: int
    generation: int
    attempt: int
    unix_s: float
    total_bytes: int
    home: str | None = None
    figure: float | None = None


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A reference that this run holds into another run: the pin object `pins/<name>` in the run at `home`."""

    name: str
    home: str


class PinnedBy(msgspec.Struct, frozen=True, kw_only=True):
    """`pins/<name>` in the source of a fork: who refers to which checkpoint, which must not be swept while the target says so."""

    format: int
    target: str
    checkpoint: CheckpointRef


class StagedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`staged/<name>.json`, on a machine's own disk only: a checkpoint that lies there whole and that no head names yet (tier.py).

    `built_on` are the checkpoints of which one must still be the run's newest for this one to continue it (an empty text: there was
    none); `head_number` is the newest head when it was staged; `sent_objects` are the data objects that only the disk has;
    `segments` what was logged until then and was not known to be in the ledger, by key.
    """

    format: int
    run_id: str
    checkpoint: CheckpointRef
    generation: int
    head_number: int
    built_on: list[str]
    sent_objects: list[str]
    segments: dict[str, str] = {}


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """`heads/<number>.json`: one state of the run. The highest number is the truth."""

    format: int
    run_id: str
    number: int
    nonce: str
    parent: str
    owner: str
    attempt: int
    kind: str
    generation: int
    unix_s: float
    identity: str
    checkpoints: list[CheckpointRef]
    condemned: list[str]
    pins: list[Pin]
    finished: bool
    removed: bool


class PartRef(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part as the root names it."""

    key: str
    size_bytes: int
    blake3: str


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """`checkpoints/<name>/root.json`: metadata and the hash of every part. `objects` are the run's own data objects that the parts
    refer to; `homes` the other runs that they refer to."""

    format: int
    run_id: str
    name: str
    world_size: int
    parts: list[PartRef]
    objects: list[str]
    homes: list[str]
    metadata: dict[str, Any]


class ObjectRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A data object: `home` indexes Part.homes (0 is the run itself)."""

    home: int
    key: str
    size_bytes: int


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Consecutive bytes of an array: `length` bytes at `offset` of object number `object`; one hash per block of them."""

    object: int
    offset: int
    length: int
    hashes: bytes


class ArrayEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One array (or this rank's part of it) and where its bytes are, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    library: str
    chunks: list[Chunk]

    def spec(self) -> ArraySpec:
        return ArraySpec(self.name, self.dtype, self.shape, self.global_shape, self.offsets, self.library)


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One rank's index: the state document and every array of it."""

    version: int
    rank: int
    homes: list[str]
    objects: list[ObjectRef]
    arrays: list[ArrayEntry]
    document: bytes


def head_key(number: int) -> str:
    return f"heads/{number:08d}.json"


def encode_part(part: Part) -> bytes:
    """A part as bytes. Raises UsageError when it is too large to be read back."""
    data = _PART_MAGIC + msgspec.msgpack.encode(part)
    if len(data) > MAX_PART_BYTES:
        raise UsageError(
            f"the state's index has {len(data)} bytes, more than the {MAX_PART_BYTES} that one rank may have"
        )
    return data


def decode_part(data: bytes, *, what: str) -> Part:
    """Decode and validate every number and name in it. Raises FormatError."""
    if not data.startswith(_PART_MAGIC):
        raise FormatError(f"{what}: not a holdfast part")
    try:
        part = msgspec.msgpack.decode(memoryview(data)[len(_PART_MAGIC) :], type=Part)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: not a valid part: {error}") from error
    if part.version != FORMAT_VERSION:
        raise FormatError(f"{what}: written in format {part.version}; this holdfast reads format {FORMAT_VERSION}")
    for reference in part.objects:
        _check_object(reference, len(part.homes), what)
    names = set()
    for entry in part.arrays:
        if entry.name in names:
            raise FormatError(f"{what}: the array {entry.name!r} is listed twice")
        names.add(entry.name)
        _check_entry(entry, part.objects, what)
    return part


def _check_object(reference: ObjectRef, homes: int, what: str) -> None:
    try:
        check_key(reference.key)
    except UsageError as error:
        raise FormatError(f"{what}: {error}") from error
    if not reference.key.startswith("data/"):
        raise FormatError(f"{what}: {reference.key!r} is not a data object")
    if not 0 <= reference.home <= homes or not 0 <= reference.size_bytes <= OBJECT_BYTES:
        raise FormatError(f"{what}: the object {reference.key!r} has an impossible home or size")


def _check_entry(entry: ArrayEntry, objects: list[ObjectRef], what: str) -> None:
    problem = _shape_problem(entry) or _chunk_problem(entry, objects)
    if problem:
        raise FormatError(f"{what}: array {entry.name!r} {problem}")


def _shape_problem(entry: ArrayEntry) -> str | None:
    dimensions = len(entry.shape)
    if entry.dtype not in DTYPE_BYTES:
        return f"has the unknown dtype {entry.dtype!r}"
    if dimensions > _MAX_DIMENSIONS or len(entry.global_shape) != dimensions or len(entry.offsets) != dimensions:
        return "has shapes of different length"
    for size, whole, offset in zip(entry.shape, entry.global_shape, entry.offsets, strict=True):
        if size < 0 or offset < 0 or offset + size > whole:
            return "lies outside its global shape"
    if math.prod([max(1, size) for size in entry.global_shape]) * DTYPE_BYTES[entry.dtype] > _MAX_ARRAY_BYTES:
        return "is larger than any memory"
    return None


def _chunk_problem(entry: ArrayEntry, objects: list[ObjectRef]) -> str | None:
    item_bytes = DTYPE_BYTES[entry.dtype]
    expected, found = math.prod(entry.shape) * item_bytes, 0
    for chunk in entry.chunks:
        length, offset = chunk.length, chunk.offset
        found += length
        if not 0 <= chunk.object < len(objects) or not 0 < length <= CHUNK_BYTES or offset < 0:
            return "has an impossible chunk"
        if offset + length > objects[chunk.object].size_bytes:
            return "has a chunk beyond the end of its object"
        if len(chunk.hashes) != HASH_BYTES * -(-length // BLOCK_BYTES):
            return "has a chunk with missing block hashes"
        if length % item_bytes:
            return "has a chunk that ends within an element"
    return None if found == expected else f"should have {expected} bytes, its chunks have others"
