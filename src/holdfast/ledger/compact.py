"""Many small segments of events become few larger ones, while they may be read and written.

A run that trains for weeks closes a segment every few seconds. Of an attempt that is over, all neighbours are merged; of the
writer's own, `_FAN_IN` neighbours of one size class at a time, so that an event is rewritten a few times at most. Every step can be
the last: a merged segment is durable before what it replaces is deleted, and what a crash left behind is deleted by the next
compaction. Several at the same time do no harm: names never come back with other contents, and only what a durable, larger segment
covers is deleted. Segments are merged only with their neighbours: a number that is missing may still arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from holdfast.core.errors import NotFound
from holdfast.ledger.segments import (
    MAX_SEGMENT_BYTES,
    Segment,
    by_writer,
    list_segments,
    merged_key,
    pieces_of,
    with_marker,
)
from holdfast.store.base import Store

__all__ = ["Compacted", "Merge", "compact", "plan_compaction"]

_FAN_IN = 32
_FULL_BYTES = 32 << 20
"""Where a merged segment stops growing: large enough to be few, small enough to be read in one piece."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Neighbours, in order, and the name of what replaces them."""

    sources: tuple[Segment, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did, in objects."""

    written: int
    deleted: int


def compact(store: Store, *, live_attempt: int, stopping: Callable[[], bool] = lambda: False) -> Compacted:
    """Merge what `live_attempt` and the attempts before it have written. `stopping` is asked before every request.

    Raises what the store raises; the events are whole all the same. Later attempts' segments are left alone.
    """
    segments = [segment for segment in list_segments(store) if segment.attempt <= live_attempt]
    written = deleted = 0
    for merge in plan_compaction(segments, live_attempt=live_attempt):
        body = _merged(store, merge, stopping)
        if body is None or stopping():
            continue
        store.put(merge.key, body)
        written += 1
        first, last = merge.sources[0].first, max(source.last for source in merge.sources)
        target = Segment(merge.key, *merge.sources[0].writer, first, last, sum(map(len, body)))
        segments.append(target)
    for segment in list(_covered(segments)):
        if stopping():
            break
        store.delete(segment.key)
        deleted += 1
    return Compacted(written, deleted)


def plan_compaction(segments: Iterable[Segment], *, live_attempt: int) -> list[Merge]:
    """What to merge. Pure."""
    present = list(segments)
    covered = {segment.key for segment in _covered(present)}
    merges = []
    for (attempt, node), mine in by_writer(segment for segment in present if segment.key not in covered).items():
        for group in _neighbours(mine):
            for sources in _whole(group) if attempt < live_attempt else _tiers(group):
                last = max(source.last for source in sources)
                merges.append(Merge(tuple(sources), merged_key(attempt, node, sources[0].first, last)))
    return merges


def _covered(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Those of which a larger one holds everything."""
    for mine in by_writer(segments).values():
        largest: Segment | None = None
        for segment in mine:
            if largest is not None and largest.covers(segment):
                yield segment
            elif largest is None or segment.last > largest.last:
                largest = segment


def _neighbours(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Runs without a gap between their numbers. Overlaps, which two compactions at a time can leave, are no gap."""
    group: list[Segment] = []
    for segment in segments:
        if group and segment.first > group[-1].last + 1:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _whole(group: list[Segment]) -> Iterator[list[Segment]]:
    """Of an attempt that is over: as much in one as may be."""
    sources: list[Segment] = []
    for segment in group:
        if sources and sum(source.size_bytes for source in sources) + segment.size_bytes > _FULL_BYTES:
            if len(sources) > 1:
                yield sources
            sources = []
        sources.append(segment)
    if len(sources) > 1:
        yield sources


def _tiers(group: list[Segment]) -> Iterator[list[Segment]]:
    """Of a writer that is at work: `_FAN_IN` neighbours of one size class, so that what is large is not rewritten for little."""
    sources: list[Segment] = []
    for segment in group:
        if segment.size_bytes > _FULL_BYTES // 2:
            sources = []
            continue
        if sources and _tier(segment) != _tier(sources[-1]):
            sources = []
        sources.append(segment)
        if len(sources) == _FAN_IN:
            yield from _whole(sources)
            sources = []


def _tier(segment: Segment) -> int:
    tier, count = 0, segment.last - segment.first + 1
    while count >= _FAN_IN:
        tier, count = tier + 1, count // _FAN_IN
    return tier


def _merged(store: Store, merge: Merge, stopping: Callable[[], bool]) -> list[bytes] | None:
    """The merged segment's bytes; None when somebody else has replaced a source meanwhile."""
    parts: list[bytes] = []
    done = -1
    for source in merge.sources:
        if stopping():
            return None
        try:
            body = store.get(source.key, max_bytes=MAX_SEGMENT_BYTES)
        except NotFound:
            return None
        for piece in pieces_of(source, body):
            if piece.number > done:
                done = piece.number
                parts.append(with_marker(piece))
    return parts
