"""Reading every byte of checkpoints and checking every hash, without loading them.

    roots and parts → the ranges of every object that they name → each object once, however many checkpoints share it → verdicts

Memory stays bounded (a few groups of at most 16 MiB), and a store that fails to answer is never mistaken for lost bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.checkpoint.format import CHUNK_BYTES, CheckpointRef, Part
from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.read import open_checkpoint, read_part, read_threads
from holdfast.checkpoint.retain import StoreOpener, read_root, root_key
from holdfast.checkpoint.runs.inspect import find_checkpoint, read_run
from holdfast.checkpoint.tree import decode_document
from holdfast.checkpoint.write import block_hashes
from holdfast.core.errors import IntegrityError, NotFound
from holdfast.store.base import Store

__all__ = ["CheckpointVerdict", "Problem", "Progress", "Range", "VerifyReport", "live_ranges", "read_ranges", "verify"]

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all), from the caller's thread."""


class Range(NamedTuple):
    """Bytes of an object that a checkpoint needs, with the hash of each block of them."""

    offset: int
    length: int
    hashes: bytes


@dataclass(frozen=True, slots=True)
class Problem:
    """An object that is not what was committed. `kind` is "missing" or "altered"; `home` is None for the run's own objects."""

    kind: str
    key: str
    home: str | None
    detail: str
    arrays: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointVerdict:
    """`status` is "ok", "missing" (objects are gone), "altered" (bytes differ; also when others are gone), or "dropped": retention
    removed it while it was being verified, which is no fault."""

    name: str
    step: int
    generation: int
    status: str
    problems: tuple[Problem, ...]

    @property
    def good(self) -> bool:
        return self.status in ("ok", "dropped")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found. `altered` names the run's own records (heads, run.json) that do not verify."""

    url: str
    head: int
    checkpoints: tuple[CheckpointVerdict, ...]
    altered: tuple[str, ...]
    read_bytes: int
    good: bool


@dataclass(slots=True)
class _Object:
    """One data object, the ranges of it that are needed, and what was found."""

    store: Store
    ranges: set[Range] = field(default_factory=set)
    kind: str = ""
    detail: str = ""
    bad: set[Range] = field(default_factory=set)


_Place = tuple[str | None, str]


def live_ranges(part: Part) -> dict[int, set[Range]]:
    """By object number: the ranges that the part's arrays are made of."""
    ranges: dict[int, set[Range]] = {}
    for entry in part.arrays:
        for chunk in entry.chunks:
            ranges.setdefault(chunk.object, set()).add(Range(chunk.offset, chunk.length, chunk.hashes))
    return ranges


def read_ranges(store: Store, key: str, ranges: Iterable[Range]) -> Iterator[tuple[Range, memoryview | None]]:
    """The ranges of one object, ascending, each with its bytes, or with None where they do not match their hashes.

    Small neighbours are read together. Raises NotFound, and IntegrityError when the object is too short.
    """
    for group in _groups(sorted(ranges)):
        start = group[0].offset
        data = memoryview(bytearray(max(item.offset + item.length for item in group) - start))
        store.read_into(key, start, data)
        for item in group:
            piece = data[item.offset - start :][: item.length]
            yield item, piece if block_hashes(piece) == item.hashes else None


def _groups(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    group: list[Range] = []
    for item in ranges:
        if group and item.offset + item.length - group[0].offset > CHUNK_BYTES:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def verify(
    store: Store,
    which: str | int | None = None,
    *,
    open_home: StoreOpener,
    progress: Progress = lambda done, total: None,
) -> VerifyReport:
    """Read and check one checkpoint (`which` as in `find_checkpoint`), or with None every retained one.

    Raises UsageError when there is no such run or checkpoint, StoreUnavailable or PermissionDenied when the store does not answer:
    nothing is then said about the bytes.
    """
    state = read_run(store)
    refs = state.head.checkpoints if which is None else [find_checkpoint(state.head, which, url=store.url)]
    problems: dict[str, list[Problem]] = {ref.name: [] for ref in refs}
    objects: dict[_Place, _Object] = {}
    parts: dict[str, tuple[CheckpointRef, tuple[Part, ...]]] = {}
    for ref in refs:
        opened = _open(store, ref, open_home, problems[ref.name])
        parts[ref.name] = ref, opened
        for part in opened:
            for place, ranges in _needed(ref, part).items():
                home = store if place[0] is None else open_home(place[0])
                objects.setdefault(place, _Object(home)).ranges.update(ranges)
    read_bytes = _check_all(objects, read_threads(store), progress)
    for name, (ref, opened) in parts.items():
        problems[name] += _problems(ref, opened, objects)
    retained = _still_retained(store, any(problems.values()))
    verdicts = tuple(
        CheckpointVerdict(ref.name, ref.step, ref.generation, _status(ref, problems[ref.name], retained), tuple(problems[ref.name]))
        for ref in refs
    )  # fmt: skip
    good = all(verdict.good for verdict in verdicts) and not state.altered
    return VerifyReport(store.url, state.head.number, verdicts, state.altered, read_bytes, good)


def _open(store: Store, ref: CheckpointRef, open_home: StoreOpener, problems: list[Problem]) -> tuple[Part, ...]:
    """The verified parts of `ref`; none if they are not all good, and why in `problems`."""
    try:
        parts = open_checkpoint(store, ref, open_home).parts
        for part in parts:
            decode_document(part.document)
        return parts
    except (IntegrityError, NotFound) as error:
        kind = "missing" if isinstance(error, NotFound) else "altered"
        key = _bad_record(store if ref.home is None else open_home(ref.home), ref)
        problems.append(Problem(kind, key, ref.home, str(error)))
        return ()


def _bad_record(where: Store, ref: CheckpointRef) -> str:
    """The key of the root or the part that is the reason; that of the first part where each is good by itself."""
    key = root_key(ref.name)
    with suppress(IntegrityError, NotFound):
        root = read_root(where, ref)
        for rank, part in enumerate(root.parts):
            key = part.key
            decode_document(read_part(where, root, rank).document)
        key = root.parts[0].key if root.parts else key
    return key


def _needed(ref: CheckpointRef, part: Part) -> dict[_Place, set[Range]]:
    """The ranges by place: which run the object lies in (None: this one), and its key."""
    homes = [ref.home, *part.homes]
    needed: dict[_Place, set[Range]] = {}
    for number, ranges in live_ranges(part).items():
        target = part.objects[number]
        needed.setdefault((homes[target.home], target.key), set()).update(ranges)
    return needed


def _check_all(objects: dict[_Place, _Object], threads: int, progress: Progress) -> int:
    """Fill in what was found, object by object. Returns the bytes checked."""
    total = sum(item.length for wanted in objects.values() for item in wanted.ranges)
    done = 0
    progress(done, total)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="holdfast-verify")
    try:
        futures = {pool.submit(_check, key, wanted): wanted for (_, key), wanted in objects.items()}
        for future in as_completed(futures):
            future.result()
            done += sum(item.length for item in futures[future].ranges)
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return total


def _check(key: str, wanted: _Object) -> None:
    unread = set(wanted.ranges)
    try:
        for item, data in read_ranges(wanted.store, key, wanted.ranges):
            unread.discard(item)
            if data is None:
                wanted.kind, wanted.detail = "altered", "bytes do not match their hash"
                wanted.bad.add(item)
    except NotFound:
        wanted.kind, wanted.detail, wanted.bad = "missing", "the object is gone", set(wanted.ranges)
    except IntegrityError as error:
        wanted.kind, wanted.detail = "altered", str(error)
        wanted.bad |= unread


def _problems(ref: CheckpointRef, parts: Sequence[Part], objects: dict[_Place, _Object]) -> list[Problem]:
    arrays: dict[_Place, list[str]] = {}
    for part in parts:
        homes = [ref.home, *part.homes]
        for entry in part.arrays:
            for chunk in entry.chunks:
                target = part.objects[chunk.object]
                place = homes[target.home], target.key
                names = arrays.setdefault(place, [])
                if Range(chunk.offset, chunk.length, chunk.hashes) in objects[place].bad and entry.name not in names:
                    names.append(entry.name)
    return [
        Problem(objects[place].kind, place[1], place[0], objects[place].detail, tuple(names))
        for place, names in arrays.items()
        if names
    ]


def _still_retained(store: Store, in_doubt: bool) -> set[str] | None:
    """Before a checkpoint is called bad the truth is read again: retention may have removed it meanwhile."""
    if not in_doubt:
        return None
    head = read_truth(store).head
    return {ref.name for ref in head.checkpoints} if head else set()


def _status(ref: CheckpointRef, problems: list[Problem], retained: set[str] | None) -> str:
    if not problems:
        return "ok"
    if retained is not None and ref.name not in retained:
        return "dropped"
    return "altered" if any(problem.kind == "altered" for problem in problems) else "missing"
