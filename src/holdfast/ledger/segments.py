"""How events lie under a run's URL: small immutable segments as their writer closed them, and larger ones that replace them.

    events/<attempt>-<node>-<n>.jsonl               segment n of one writer: one event per line
    events/<attempt>-<node>-<last>_<count>.jsonl    the `count` segments up to `last`, each behind a line with its number

A merged segment is durable before what it replaces is deleted, so for a while both are there: readers take every number of a
writer once. Its name sorts after all that it replaces, so a listing in order of names that has passed its place before it was there
has seen what it replaces.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from holdfast.core.errors import NotFound, StoreUnavailable
from holdfast.store.base import Store

__all__ = [
    "MAX_SEGMENT_BYTES",
    "PREFIX",
    "Piece",
    "Segment",
    "by_writer",
    "list_segments",
    "merged_key",
    "pieces_of",
    "read_pieces",
    "segment_key",
    "with_marker",
]

PREFIX = "events/"
MAX_SEGMENT_BYTES = 256 << 20
_NAME = re.compile(r"events/(\d+)-([A-Za-z0-9_.-]+)-(\d+)(?:_(\d+))?\.jsonl")
_ROUNDS = 8
"""How often a reader looks again because a compaction was under way; each needs another one to have happened meanwhile."""

Writer = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Segment:
    """One object. It holds the segments `first` to `last` of its writer."""

    key: str
    attempt: int
    node: str
    first: int
    last: int
    size_bytes: int

    @property
    def writer(self) -> Writer:
        return self.attempt, self.node

    def covers(self, other: Segment) -> bool:
        return self.writer == other.writer and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True, slots=True)
class Piece:
    """What one writer closed as segment `number`."""

    attempt: int
    node: str
    number: int
    body: bytes


class _Marker(msgspec.Struct, forbid_unknown_fields=True):
    segment: int


def segment_key(attempt: int, node: str, number: int) -> str:
    return f"{PREFIX}{attempt:06d}-{node}-{number:08d}.jsonl"


def merged_key(attempt: int, node: str, first: int, last: int) -> str:
    return f"{PREFIX}{attempt:06d}-{node}-{last:08d}_{last - first + 1:08d}.jsonl"


def list_segments(store: Store) -> list[Segment]:
    """All that is there, none missed: listed until two listings in a row agree.

    What the first of them missed because it was being replaced is, replaced, in the second.
    """
    before: list[Segment] | None = None
    for _ in range(_ROUNDS):
        found = [segment for entry in store.list(PREFIX) if (segment := _parsed(entry.key, entry.size_bytes))]
        if found == before:
            return found
        before = found
    # A writer that is this quick only appends; what it appended meanwhile is in the newest listing.
    return before or []


def _parsed(key: str, size_bytes: int) -> Segment | None:
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    last = int(match[3])
    return Segment(key, int(match[1]), match[2], last - int(match[4] or 1) + 1, last, size_bytes)


def by_writer(segments: Iterable[Segment]) -> dict[Writer, list[Segment]]:
    """Each writer's segments, those that begin earlier first, and of those the larger first."""
    writers: dict[Writer, list[Segment]] = defaultdict(list)
    for segment in sorted(segments, key=lambda one: (one.attempt, one.node, one.first, -one.last)):
        writers[segment.writer].append(segment)
    return dict(writers)


def read_pieces(store: Store) -> Iterator[Piece]:
    """Every segment of every writer once, by attempt, then in each writer's order, also while a compaction is under way.

    Raises what the store raises.
    """
    done: dict[Writer, int] = {}
    for _ in range(_ROUNDS):
        try:
            for writer, segments in by_writer(list_segments(store)).items():
                for segment in segments:
                    if segment.last > done.get(writer, -1):
                        for piece in pieces_of(segment, store.get(segment.key, max_bytes=MAX_SEGMENT_BYTES)):
                            if piece.number > done.get(writer, -1):
                                done[writer] = piece.number
                                yield piece
            return
        except NotFound:
            # Replaced since it was listed. What replaced it was there before it went.
            continue
    raise StoreUnavailable(
        f"{store.url}: the run's events were being rearranged {_ROUNDS} times while they were read; try again"
    )


def pieces_of(segment: Segment, body: bytes) -> list[Piece]:
    """The segments that an object holds, in order."""
    number: int | None = segment.first if segment.first == segment.last else None
    lines: list[bytes] = []
    found: list[Piece] = []

    def close() -> None:
        if number is not None:
            found.append(Piece(segment.attempt, segment.node, number, b"".join(lines)))
        lines.clear()

    for line in body.splitlines(keepends=True):
        marked = _marked(line)
        if marked is None:
            lines.append(line)
        else:
            if number is not None and number != marked:
                close()
            number = marked
    close()
    return found


def with_marker(piece: Piece) -> bytes:
    """A piece as part of a merged segment. Its own bytes stay, torn last line included; only the end of that line is added."""
    end = b"" if not piece.body or piece.body.endswith(b"\n") else b"\n"
    return msgspec.json.encode(_Marker(piece.number)) + b"\n" + piece.body + end


def _marked(line: bytes) -> int | None:
    if not line.startswith(b'{"segment":'):
        return None
    try:
        return msgspec.json.decode(line, type=_Marker).segment
    except msgspec.MsgspecError:
        return None
