"""What a run tells the world: events and figures to the ledger, progress to the agent, a few lines and warnings to the person.

Everything works before the run is open, when there is no ledger yet, and for a finished run, which has none: what nobody keeps is
dropped.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.contract import ENV_CONTROL, Phase, ProgressPage
from holdfast.core.errors import HoldfastWarning
from holdfast.core.events import Event, Sink
from holdfast.core.stacks import offer_stacks
from holdfast.ledger.append import Ledger
from holdfast.store.base import Store
from holdfast.train.display import Display, display_for
from holdfast.train.machine import describe_machine
from holdfast.train.metrics import Logger, Metrics
from holdfast.train.stopwatch import Stopwatch, attempt_age_s

__all__ = ["Record", "warn_user"]

_PROGRESS_EVERY_S = 30.0
"""Between two records of where the time went: what an attempt that dies without a word leaves unknown."""
_NOT_THE_USER = ("holdfast.", "contextlib", "torch.utils.data", "torchdata.")


class Record:
    """Thread safety: `emit`, `committed` and `flush` may be called from any thread, the rest belongs to the loop's thread."""

    def __init__(self, clock: Clock, loggers: Sequence[Logger], display: Display) -> None:
        self._clock, self._loggers, self.display = clock, tuple(loggers), display
        self._page: ProgressPage | None = None
        self._is_mute = False
        self._metrics: Metrics | None = None
        self._warned: set[str] = set()
        self._told_s = clock.monotonic_s()
        self.stopwatch = Stopwatch(clock, attempt_age_s(clock))
        self.ledger: Ledger | None = None

    def meet_agent(self, environ: Mapping[str, str]) -> None:
        """Open the progress page where an agent watches this process."""
        if environ.get(ENV_CONTROL):
            self._page = ProgressPage(Path(environ[ENV_CONTROL]))
            offer_stacks(Path(environ[ENV_CONTROL]))

    def mute(self) -> None:
        """Another rank speaks for all: nothing is said and nothing kept by this one, except for its agent."""
        self._is_mute = True
        self.display = display_for(False, self._clock, {})

    def open(self, store: Store, attempt: int, generation: int) -> Sink:
        """Begin the record of a claimed attempt."""
        if self._page is not None:
            self._page.claimed(attempt)
        self._told_s = self._clock.monotonic_s()
        if self._is_mute:
            return _Nowhere()
        self.ledger = Ledger(store, attempt=attempt, node="0", clock=self._clock, pulse=self._pulse)
        machine, totals = describe_machine(os.environ), self.stopwatch.totals()
        self.emit("attempt.claimed", generation=generation, monotonic_s=self._told_s, **machine, **totals)
        self._metrics = Metrics(self.ledger, self._loggers, self._clock)
        return self.ledger

    def emit(self, name: str, **fields: Any) -> None:
        if self.ledger is not None:
            self.ledger.emit(Event(name, self._clock.unix_s(), fields))
            if name.startswith("attempt."):
                # An attempt that dies soon is to be seen as well.
                self.ledger.nudge()

    def progress(self, *, snapshot: bool) -> None:
        """Record where the time went so far. `snapshot`: a copy of the state is being taken right now."""
        self._told_s = self._clock.monotonic_s()
        self.emit("progress", snapshot=snapshot, **self.stopwatch.totals())

    def _pulse(self) -> None:
        if self._clock.monotonic_s() - self._told_s >= _PROGRESS_EVERY_S:
            self.progress(snapshot=False)

    def say(self, message: str) -> None:
        if self._is_mute:
            return
        self.display.above()
        print(f"holdfast: {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """A warning that points at the user's own line. The same words are said once per run."""
        if message not in self._warned:
            self._warned.add(message)
            self.emit("warning", message=message)
            self.display.above()
            warn_user(message)

    def entered(self, phase: Phase) -> None:
        if self._page is not None:
            self._page.entered(phase)

    def restored(self, step: int) -> None:
        self.stopwatch.begin_at(step)
        if self._page is not None:
            self._page.restored(step)

    def stepped(self, step: int) -> None:
        self.stopwatch.stepped(step)
        if self._page is not None:
            self._page.stepped(step)

    def committed(self, step: int) -> None:
        self.display.committed(step)
        if self._page is not None:
            self._page.committed(step)
        if self.ledger is not None:
            self.ledger.nudge()

    def log(self, step: int, epoch: int, figures: Mapping[str, Any]) -> None:
        self.display.logged(figures)
        if self._metrics is not None:
            self._metrics.log(step, epoch, figures)

    def watch(self, figure: str | None) -> Callable[[int], float | None]:
        """The value of a figure as it was last logged up to a step; None where it never was, or none is watched."""
        metrics = self._metrics
        if figure is None or metrics is None:
            return lambda step: None
        metrics.watched = figure
        return metrics.watched_at

    def flush(self) -> None:
        """Before a commit: what was logged up to a step is durable once that step is."""
        if self._metrics is not None and self.ledger is not None:
            self._metrics.settle(wait=True)
            self.ledger.flush()

    def unsent(self) -> dict[str, bytes]:
        """What a flush would make durable, as segments: for a state that another process may have to commit."""
        if self._metrics is None or self.ledger is None:
            return {}
        self._metrics.settle(wait=True)
        return self.ledger.unsent()

    def close(self, *, wait: bool) -> None:
        """Let go. With `wait`, figures that are still on their way are taken along. Nothing is kept afterwards."""
        self.display.close()
        metrics, self._metrics = self._metrics, None
        ledger, self.ledger = self.ledger, None
        page, self._page = self._page, None
        try:
            if metrics is not None and wait:
                metrics.settle(wait=True)
                metrics.tell()
        finally:
            if ledger is not None:
                ledger.close()
            if page is not None:
                page.close()


class _Nowhere(Sink):
    def emit(self, event: Event) -> None:
        return None


def warn_user(message: str) -> None:
    """Warn at the innermost line that is neither holdfast's nor that of the machinery between it and the user."""
    depth, frame = 1, sys._getframe(0)
    while _is_machinery(frame) and frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, HoldfastWarning, stacklevel=depth)


def _is_machinery(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_NOT_THE_USER)
