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

__all__ = ["Shown", "follow", "logs", "segments", "write_segments"]

Shown = dict[tuple[int, str], int]
"""By attempt and series: the newest segment that has been printed. Several series may grow at once: a machine that leaves, and one
that is made ready."""

_MAX_SEGMENT_BYTES = 256 << 20
_POLL_S = 2.0
_LIST_EVERY = 5
"""Polls of the newest series between two listings, which find a new attempt and cost more."""
_POLLED = 3
"""Of the newest series."""


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
            shown: Shown = {}
            write_segments(store, segments(store, attempt), sys.stdout.buffer, shown)
            if follow_on:
                follow(store, attempt, sys.stdout.buffer, shown, SystemClock())
            elif not shown:
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


def write_segments(store: Store, found: list[LogSegment], out: BinaryIO, shown: Shown) -> bool:
    """Copy what has not been shown yet; whether there was anything."""
    from holdfast.core.errors import NotFound

    any_new = False
    for segment in found:
        series = segment.attempt, segment.series
        if segment.number <= shown.get(series, -1):
            continue
        try:
            out.write(store.get(segment.key, max_bytes=_MAX_SEGMENT_BYTES))
        except NotFound:
            # Removed since it was listed.
            continue
        shown[series], any_new = segment.number, True
    out.flush()
    return any_new


def follow(store: Store, attempt: int | None, out: BinaryIO, shown: Shown, clock: Clock) -> None:
    """Until somebody interrupts it."""
    for listing_is_due in _turns():
        clock.sleep(_POLL_S)
        if not shown or listing_is_due:
            write_segments(store, segments(store, attempt), out, shown)
        else:
            _next_ones(store, out, shown)


def _turns() -> Iterator[bool]:
    while True:
        for turn in range(_LIST_EVERY):
            yield turn == _LIST_EVERY - 1


def _next_ones(store: Store, out: BinaryIO, shown: Shown) -> None:
    """A series has no holes, so its next segment can be asked for by name."""
    from holdfast.agent.logs import LogSegment

    for attempt, series in sorted(shown)[-_POLLED:]:
        while write_segments(store, [LogSegment(attempt, series, shown[attempt, series] + 1)], out, shown):
            pass
