"""`run.log`: figures of the training, kept in the ledger and passed on to whoever listens, without ever making the GPU wait.

A figure on the CPU is read at once. One on a GPU is copied to pinned memory on the stream that computed it, and read when the copy
is known to be done: at a later call, or by the saver's thread before a commit.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.core.clock import Clock
from holdfast.core.errors import UsageError
from holdfast.core.events import Event, Sink

__all__ = ["Logger", "Metrics"]

_REMEMBERED = 10_000
Logger = Callable[[int, Mapping[str, float]], None]
"""Called with the step and its figures, in order, in the training thread."""


@dataclass(slots=True)
class _Row:
    step: int
    epoch: int
    unix_s: float
    values: dict[str, Any]
    ready: torch.cuda.Event | None


class Metrics:
    """Thread safety: `log` and `tell` belong to the loop's thread, `settle` to any."""

    def __init__(self, sink: Sink, loggers: Sequence[Logger], clock: Clock) -> None:
        self._sink, self._loggers, self._clock = sink, tuple(loggers), clock
        self._rows: deque[_Row] = deque()
        self._told: deque[tuple[int, dict[str, float]]] = deque()
        self._lock = threading.Lock()
        self.watched: str | None = None
        """A figure whose values are remembered for `watched_at`."""
        self._seen: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)

    def watched_at(self, step: int) -> float | None:
        """The watched figure as it was last logged up to `step`, among those that have settled."""
        with self._lock:
            return next((value for logged, value in reversed(self._seen) if logged <= step), None)

    def log(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Record figures of a step: numbers, or tensors and arrays of one element. Raises UsageError for anything else."""
        taken: dict[str, Any] = {}
        ready = None
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                taken[name], ready = _copy_later(name, value)
            else:
                taken[name] = _number(name, value)
        with self._lock:
            self._rows.append(_Row(step, epoch, self._clock.unix_s(), taken, ready))
        self.settle(wait=False)
        if self._loggers:
            self.tell()

    def settle(self, *, wait: bool) -> None:
        """Emit every row whose figures have arrived; with `wait`, all of them."""
        with self._lock:
            while self._rows:
                row = self._rows[0]
                if row.ready is not None:
                    if wait:
                        row.ready.synchronize()
                    elif not row.ready.query():
                        return
                self._rows.popleft()
                values = {name: float(value) for name, value in row.values.items()}
                fields = {"step": row.step, "epoch": row.epoch, "values": {k: _json(v) for k, v in values.items()}}
                self._sink.emit(Event("metrics", row.unix_s, fields))
                if self.watched in values:
                    self._seen.append((row.step, values[self.watched]))
                if self._loggers:
                    self._told.append((row.step, values))

    def tell(self) -> None:
        """Pass settled rows on to the loggers."""
        while self._told:
            step, values = self._told.popleft()
            for logger in self._loggers:
                logger(step, values)


def _copy_later(name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    if value.numel() != 1:
        raise UsageError(f"log({name}=…): a figure has one element, this tensor has {value.numel()}; reduce it first")
    target = torch.empty((), dtype=value.dtype, pin_memory=True)
    target.copy_(value.detach().reshape(()), non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(value.device))
    return target, ready


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor | np.ndarray):
        if math.prod(value.shape) != 1:
            raise UsageError(
                f"log({name}=…): a figure has one element, this has the shape {tuple(value.shape)}; reduce it first"
            )
        value = value.item()
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"log({name}=…): a {type(value).__qualname__} is not a figure; pass a number") from error


def _json(value: float) -> float | str:
    """JSON has no nan and no inf."""
    return value if math.isfinite(value) else str(value)
