"""`holdfast logs URL`: what a run's command has written, on whatever machines it ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from holdfast.cli.terminal import Url, opened_stores

if TYPE_CHECKING:
    from holdfast.agent.logs import LogSegment
    from holdfast.core.clock import Clock
    from holdfast.store.base import Store

__all__ = ["follow", "logs", "segments", "write_segments"]

_MAX_SEGMENT_BYTES = 256 << 20
_POLL_S = 2.0
_LIST_EVERY = 5
"""Polls of the newest series between two listings, which find a new attempt and cost more."""


def logs(
    url: Url,
    follow_on: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what is written from now on, until Ctrl-C.")
    ] = False,
    attempt: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only this attempt.")] = None,
) -> None:
    """Print what a run's command has written, in order, and what the agent said about it.

    Needs `holdfast run --run URL -- CMD`. New output appears after a few seconds. Where bytes are missing, because the store was
    too slow, a line says so.

    \b
    Examples:
      holdfast logs s3://bucket/runs/gpt -f
      holdfast logs ./runs/train --attempt 3 | less
    """
    from holdfast.core.clock import SystemClock
    from holdfast.core.errors import NotFound

    with opened_stores() as open_home:
        store = open_home(url)
        try:
            last = write_segments(store, segments(store, attempt), sys.stdout.buffer, after=None)
            if follow_on:
                follow(store, attempt, sys.stdout.buffer, last, SystemClock())
            elif last is None:
                which = "" if attempt is None else f" of attempt {attempt}"
                raise NotFound(f"{store.url}: no output{which} is kept there; `holdfast run --run URL -- CMD` keeps it")
        except KeyboardInterrupt:
            return
        except BrokenPipeError:
            # Whoever read the output has seen enough. What the interpreter still flushes at its end goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def segments(store: Store, attempt: int | None) -> list[LogSegment]:
    """All that is there, as it was written."""
    from holdfast.agent.logs import PREFIX, parse_log_key

    prefix = PREFIX if attempt is None else f"{PREFIX}{attempt:06d}/"
    found = (parse_log_key(entry.key) for entry in store.list(prefix))
    return sorted(segment for segment in found if segment is not None)


def write_segments(store: Store, found: list[LogSegment], out: BinaryIO, after: LogSegment | None) -> LogSegment | None:
    """Copy what comes behind `after`; returns the last that was copied, or `after`."""
    from holdfast.core.errors import NotFound

    for segment in found:
        if after is not None and segment <= after:
            continue
        try:
            out.write(store.get(segment.key, max_bytes=_MAX_SEGMENT_BYTES))
        except NotFound:
            # Removed since it was listed.
            continue
        after = segment
    out.flush()
    return after


def follow(store: Store, attempt: int | None, out: BinaryIO, last: LogSegment | None, clock: Clock) -> None:
    """Until somebody interrupts it."""
    for listing_is_due in _turns():
        clock.sleep(_POLL_S)
        if last is None or listing_is_due:
            last = write_segments(store, segments(store, attempt), out, last)
        else:
            last = _next_ones(store, out, last)


def _turns() -> Iterator[bool]:
    while True:
        for turn in range(_LIST_EVERY):
            yield turn == _LIST_EVERY - 1


def _next_ones(store: Store, out: BinaryIO, last: LogSegment) -> LogSegment:
    """A series has no holes, so its next segment can be asked for by name."""
    from dataclasses import replace

    while True:
        coming = replace(last, number=last.number + 1)
        if write_segments(store, [coming], out, last) == last:
            return last
        last = coming
