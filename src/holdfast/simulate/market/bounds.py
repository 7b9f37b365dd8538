"""The least cost of many windows: `policy.optimum` once per window, in this process or in several.

A window is sent to a worker as its own piece of the trace, so nothing is shared and nothing has to be kept alive.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeAlias

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Bools, Ints
from holdfast.policy.market.facts import Job
from holdfast.policy.optimum import Optimum, offline_optimum
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

__all__ = ["Bounds", "bounds_here", "bounds_on"]

Bounds: TypeAlias = Callable[[Trace, Workload, Ints, Callable[[], None]], list[Optimum]]
"""The optimum of each window that starts at one of these ticks; calls back after each. Work that preemptions take back is left
out, which can only make the bound lower."""

_Piece: TypeAlias = tuple[Job, int, Bools, Ints, int]


def bounds_here(trace: Trace, workload: Workload, starts: Ints, one_done: Callable[[], None]) -> list[Optimum]:
    """One after the other, in this process."""
    found: list[Optimum] = []
    for piece in _pieces(trace, workload, starts):
        found.append(offline_optimum(*piece))
        one_done()
    return found


@contextmanager
def bounds_on(processes: int) -> Iterator[Bounds]:
    """Side by side in so many processes, which live until the end of the block. Ctrl-C reaches the caller only."""
    if processes < 1:
        raise UsageError(f"the optimum is computed by one process or more, not by {processes}")
    if processes == 1:
        yield bounds_here
        return
    # Not forked: the caller may have threads (a progress bar).
    executor = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))

    def bounds(trace: Trace, workload: Workload, starts: Ints, one_done: Callable[[], None]) -> list[Optimum]:
        with _undisturbed():
            futures: list[Future[Optimum]] = [
                executor.submit(offline_optimum, *piece) for piece in _pieces(trace, workload, starts)
            ]
        found: list[Optimum] = []
        for future in futures:
            found.append(future.result())
            one_done()
        return found

    try:
        yield bounds
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and processes that are started in it never hear it.

    They inherit the blocked signal. For the caller that is not enough: another of its threads may take the signal in its place.
    """
    heard: list[int] = []
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _pieces(trace: Trace, workload: Workload, starts: Ints) -> Iterator[_Piece]:
    ticks = -(-workload.job.deadline_s // trace.tick_s)
    available, microusd_h = trace.available(workload.gang), trace.microusd_h * workload.gang
    for start in starts.tolist():
        window = slice(start, start + ticks)
        yield (
            workload.job,
            trace.tick_s,
            available[:, window],
            microusd_h[:, window],
            trace.on_demand_microusd_h * workload.gang,
        )
