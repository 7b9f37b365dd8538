"""A new run that begins with a checkpoint of another one: by reference (nothing is copied, the source keeps the bytes) or by copy.

    the target claims, its head naming its pins → pins are put (pins.py) → the source still retains the checkpoint?
    → the target's head names it

A copy takes the same way, so that retention cannot take the source's bytes away under it; its last head just names no pins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import msgspec

from holdfast.checkpoint.format import (
    OBJECT_BYTES,
    ArrayEntry,
    CheckpointRef,
    Chunk,
    Head,
    ObjectRef,
    Part,
    PartRef,
    Pin,
    Root,
    encode_part,
)
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.record import open_record
from holdfast.checkpoint.retain import StoreOpener, root_key
from holdfast.checkpoint.runs.begin import check_empty
from holdfast.checkpoint.runs.inspect import find_checkpoint, read_run
from holdfast.checkpoint.runs.pins import (
    Origin,
    are_out_of_reach,
    confirm,
    open_origin,
    put_pin,
    remove_pins,
    withdraw,
)
from holdfast.checkpoint.runs.verify import Progress, Range, live_ranges, read_ranges
from holdfast.checkpoint.write import checkpoint_name, part_key
from holdfast.core.clock import Clock
from holdfast.core.errors import (
    FormatError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    RunRemoved,
    UsageError,
)
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import FORMAT_VERSION, digest, seal
from holdfast.store.base import Store

__all__ = ["Forked", "Mode", "fork"]

Mode = Literal["reference", "copy"]
_COPY_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """A fork that has been committed. `homes` are the runs that it refers to (none for a copy); `copied_bytes` went to the
    target."""

    source: str
    target: str
    mode: Mode
    checkpoint: CheckpointRef
    homes: tuple[str, ...]
    copied_bytes: int


def fork(
    source_url: str,
    target_url: str,
    step: str | int = "latest",
    mode: Mode = "reference",
    *,
    open_home: StoreOpener,
    clock: Clock,
    tokens: TokenSource,
    progress: Progress = lambda done, total: None,
) -> Forked:
    """Make the run at `target_url` begin with a checkpoint of the one at `source_url` (`step` as in `find_checkpoint`).

    The target must be empty. By reference, the target's checkpoint and what its later saves have in common with it stay in the
    source, which spares them from its sweeps as long as the target needs them. A copy is read verified, with bounded memory, and
    refers to nothing outside. Raises UsageError for URLs that do not go together, RunConflict when the target is not empty or
    retention dropped the checkpoint meanwhile (nothing stays behind then), Fenced when somebody else claimed the target,
    IntegrityError when bytes do not verify, and what the stores raise.
    """
    source, target = open_home(source_url), open_home(target_url)
    _check_urls(source.url, target.url, mode)
    origin = _origin(source, step, open_home)
    check_empty(read_truth(target).head, target.url)
    pins = {home: Pin(name=tokens(), home=home) for home in origin.protect}
    lineage = _claim(target, origin, list(pins.values()), clock, tokens)
    try:
        for home, pin in pins.items():
            _put_pin(open_home(home), pin, target.url, origin.protect[home], mode)
        confirm(source, origin.head, origin.ref)
        if mode == "copy":
            ref, copied_bytes = _copy(origin, target, lineage.head, open_home, tokens, progress)
        else:
            ref, copied_bytes = msgspec.structs.replace(origin.ref, home=origin.ref.home or source.url), 0
    except NotFound:
        withdraw(lineage, pins.values(), open_home)
        confirm(source, origin.head, origin.ref)
        raise
    except BaseException:
        withdraw(lineage, pins.values(), open_home)
        raise
    kept = [] if mode == "copy" else list(pins.values())

    def name_it(current: Head) -> Head:
        following = msgspec.structs.replace(ref, generation=current.generation)
        return msgspec.structs.replace(current, checkpoints=[following], pins=kept)

    head = lineage.advance("fork", name_it)
    if mode == "copy":
        remove_pins(pins.values(), open_home)
    return Forked(
        source=source.url, target=target.url, mode=mode, checkpoint=head.checkpoints[0],
        homes=tuple(pin.home for pin in kept), copied_bytes=copied_bytes,
    )  # fmt: skip


def _check_urls(source: str, target: str, mode: Mode) -> None:
    if source == target:
        raise UsageError(f"{source}: a run cannot be forked onto itself; name another URL")
    if mode == "reference" and are_out_of_reach(source, target):
        raise UsageError(
            f"{target} cannot refer to {source}: one of them is a folder that other machines do not see, and the source must be "
            "able to ask the fork what it still needs. Fork with a copy (--copy)"
        )


def _origin(source: Store, step: str | int, open_home: StoreOpener) -> Origin:
    head = read_run(source).head
    if head.removed:
        raise RunRemoved(f"{source.url}: this run has been removed; there is nothing to fork")
    return open_origin(source, head, find_checkpoint(head, step, url=source.url), open_home)


def _claim(target: Store, origin: Origin, pins: list[Pin], clock: Clock, tokens: TokenSource) -> Lineage:
    """Own the target; its head names the pins before they exist."""

    def begin(body: Head) -> Head:
        check_empty(body, target.url)
        return msgspec.structs.replace(body, identity=origin.head.identity, pins=pins)

    lineage = Lineage(target, open_record(target, clock=clock, tokens=tokens).run_id, clock=clock, tokens=tokens)
    lineage.claim(begin)
    return lineage


def _put_pin(home: Store, pin: Pin, target: str, checkpoint: CheckpointRef, mode: Mode) -> None:
    try:
        put_pin(home, pin, target=target, checkpoint=checkpoint)
    except PermissionDenied as error:
        # A source that may only be read: a copy works without protection, and notices when retention is faster.
        if mode == "reference":
            raise PermissionDenied(
                f"{home.url}: a fork by reference must write a pin there, so that its bytes are kept, and may not ({error}). "
                "Fork with a copy (--copy)"
            ) from error


# ---- copying


def _copy(
    origin: Origin, target: Store, head: Head, open_home: StoreOpener, tokens: TokenSource, progress: Progress
) -> tuple[CheckpointRef, int]:
    """The checkpoint under new names in the target, durable but not yet named by a head; and the bytes written."""
    reader = open_checkpoint(origin.store, origin.ref, open_home)
    where = origin.store if origin.ref.home is None else open_home(origin.ref.home)
    ranges: dict[_Place, set[Range]] = {}
    for part in reader.parts:
        for number, wanted in live_ranges(part).items():
            ranges.setdefault(_place(part, number), set()).update(wanted)
    total = sum(item.length for wanted in ranges.values() for item in wanted)
    moved: dict[_Place, tuple[ObjectRef, dict[Range, int]]] = {}
    done = 0
    progress(0, total)

    def copy_object(place: _Place) -> tuple[_Place, str, list[Range]]:
        home, source_key = place
        key = f"data/{head.attempt}/{tokens()}"
        store = where if home is None else open_home(home)
        return place, key, _copy_object(store, source_key, ranges[place], target, key)

    for place, key, copied in _bounded(copy_object, list(ranges)):
        position, offsets = 0, {}
        for item in copied:
            offsets[item] = position
            position += item.length
        moved[place] = ObjectRef(0, key, position), offsets
        done += position
        progress(done, total)
    parts = [_moved_part(part, moved) for part in reader.parts]
    return _put_index(parts, reader.root, origin.ref, target, head, tokens), done


_Place = tuple[str | None, str]
"""Where an object lies: the URL of another run than the checkpoint's own (else None), and its key."""


def _place(part: Part, number: int) -> _Place:
    target = part.objects[number]
    return (part.homes[target.home - 1] if target.home else None), target.key


def _copy_object(source: Store, source_key: str, wanted: set[Range], target: Store, key: str) -> list[Range]:
    """The live ranges of one object, verified, one after the other as a new object. What the checkpoint does not need stays
    behind."""
    if sum(item.length for item in wanted) > OBJECT_BYTES:
        raise FormatError(f"{source.url}/{source_key}: is said to hold more than an object can")
    ranges: list[Range] = []
    pieces: list[memoryview] = []
    for item, data in read_ranges(source, source_key, wanted):
        if data is None:
            raise IntegrityError(
                f"{source.url}/{source_key}: bytes do not match their hash; the object has been altered or torn"
            )
        ranges.append(item)
        pieces.append(data)
    target.put(key, pieces)
    return ranges


def _bounded(
    work: Callable[[_Place], tuple[_Place, str, list[Range]]], places: list[_Place]
) -> Iterator[tuple[_Place, str, list[Range]]]:
    """Results in order; at most `_COPY_THREADS` objects are in memory."""
    pool = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="holdfast-copy")
    try:
        waiting = iter(places)
        running: list[Future[tuple[_Place, str, list[Range]]]] = [
            pool.submit(work, place) for place in islice(waiting, _COPY_THREADS)
        ]
        while running:
            result = running.pop(0).result()
            running.extend(pool.submit(work, place) for place in islice(waiting, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _moved_part(part: Part, moved: dict[_Place, tuple[ObjectRef, dict[Range, int]]]) -> Part:
    """The part with its chunks where they are now. It lists the objects that it needs."""
    objects: list[ObjectRef] = []
    numbers: dict[int, int] = {}
    for number in live_ranges(part):
        numbers[number] = len(objects)
        objects.append(moved[_place(part, number)][0])

    def moved_chunk(chunk: Chunk) -> Chunk:
        offset = moved[_place(part, chunk.object)][1][Range(chunk.offset, chunk.length, chunk.hashes)]
        return Chunk(numbers[chunk.object], offset, chunk.length, chunk.hashes)

    arrays = [
        ArrayEntry(
            entry.name, entry.dtype, entry.shape, entry.global_shape, entry.offsets, entry.library,
            [moved_chunk(chunk) for chunk in entry.chunks],
        )
        for entry in part.arrays
    ]  # fmt: skip
    return Part(FORMAT_VERSION, part.rank, [], objects, arrays, part.document)


def _put_index(
    parts: list[Part], source_root: Root, source_ref: CheckpointRef, target: Store, head: Head, tokens: TokenSource
) -> CheckpointRef:
    name = checkpoint_name(head.number + 1, head.attempt, tokens)
    encoded = {part_key(name, part.rank): encode_part(part) for part in parts}
    root = msgspec.structs.replace(
        source_root,
        run_id=head.run_id,
        name=name,
        parts=[PartRef(key=key, size_bytes=len(data), blake3=digest(data)) for key, data in encoded.items()],
        objects=sorted({ref.key for part in parts for ref in part.objects}),
        homes=[],
    )
    root_data = seal(root)
    for key, data in encoded.items():
        target.put(key, data)
    target.put(root_key(name), root_data)
    return msgspec.structs.replace(
        source_ref,
        name=name,
        root_blake3=digest(root_data),
        attempt=head.attempt,
        generation=head.generation,
        home=None,
    )
