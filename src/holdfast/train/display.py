"""How the run is doing, for whoever watches: one line that is written anew on a terminal, else a line now and then.

    step 1,240 of 6,000 · epoch 2 · loss 1.23 · 12.4 steps/s · 6 min left · saved: step 1,200, 8 s ago · $0.12

Written without a library: those that draw bars import code that draws from the global random generators in the middle of a step.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from holdfast.core.clock import Clock
from holdfast.core.config import Duration, format_duration, parse_duration_s
from holdfast.core.contract import ENV_PRICE
from holdfast.core.errors import UsageError

__all__ = ["Display", "display_for"]

_TERMINAL_EVERY_S = 0.5
_LINE_EVERY_S = 60.0
_CLEAR = "\r\x1b[K"
_MOST_FIGURES = 4


def display_for(
    progress: bool | Duration | None, clock: Clock, environ: Mapping[str, str], stream: TextIO | None = None
) -> Display:
    """`progress`: False for nothing, a duration between lines, True or None for what suits where the output goes.

    Raises UsageError for a duration that is none.
    """
    stream = sys.stderr if stream is None else stream
    is_terminal = stream.isatty() and environ.get("TERM") != "dumb"
    if progress is False or environ.get("HOLDFAST_PROGRESS") == "0":
        every_s = None
    elif progress is None or progress is True:
        every_s = _TERMINAL_EVERY_S if is_terminal else _LINE_EVERY_S
    else:
        every_s = parse_duration_s(progress)
        if every_s <= 0:
            raise UsageError(f"progress={progress!r}: give the time between two lines, or False for none")
    return Display(stream, clock, every_s, in_place=is_terminal, price_per_hour=_price(environ))


def _price(environ: Mapping[str, str]) -> float | None:
    try:
        return float(environ[ENV_PRICE])
    except (KeyError, ValueError):
        return None


class Display:
    """`step` belongs to the loop's thread; `committed`, `above` and `close` may be called from any.

    every_s: None shows nothing. in_place: the line is written over itself.
    """

    def __init__(
        self, stream: TextIO, clock: Clock, every_s: float | None, *, in_place: bool, price_per_hour: float | None
    ) -> None:
        self._stream, self._clock, self._every_s = stream, clock, every_s
        self._in_place, self._price_per_hour = in_place, price_per_hour
        self._lock = threading.Lock()
        self._is_shown = False
        self._began_s = self._next_s = self._mark_s = clock.monotonic_s()
        if every_s is not None and not in_place:
            self._next_s += every_s
        self._mark_step: int | None = None
        self._pace: float | None = None
        self._figures: Mapping[str, Any] = {}
        self._saved: tuple[int, float] | None = None

    def logged(self, figures: Mapping[str, Any]) -> None:
        """Shown from now on. Nothing is computed here: a figure may still be on its way from a device."""
        if self._every_s is not None:
            # Without the graph that a loss hangs on, which would stay in memory until the next figure.
            self._figures = {
                name: value.detach() if hasattr(value, "detach") else value
                for name, value in list(figures.items())[:_MOST_FIGURES]
            }

    def committed(self, step: int) -> None:
        self._saved = (step, self._clock.monotonic_s())

    def step(self, step: int, epoch: int, total: Callable[[], int | None]) -> None:
        """A step is complete. One look at the clock, most of the time."""
        if self._every_s is None:
            return
        now_s = self._clock.monotonic_s()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._every_s
        if self._mark_step is not None and step > self._mark_step:
            self._pace = (step - self._mark_step) / max(1e-9, now_s - self._mark_s)
        self._mark_step, self._mark_s = step, now_s
        self._show(" · ".join(self._parts(step, epoch, total(), now_s)))

    def _parts(self, step: int, epoch: int, total: int | None, now_s: float) -> list[str]:
        parts = [f"step {step:,}" + (f" of {total:,}" if total else ""), f"epoch {epoch}"]
        parts += [f"{name} {_short(value)}" for name, value in self._figures.items()]
        if self._pace:
            parts.append(f"{self._pace:.3g} steps/s")
            if total and total > step:
                parts.append(f"{format_duration((total - step) / self._pace)} left")
        if self._saved is not None:
            parts.append(f"saved: step {self._saved[0]:,}, {format_duration(now_s - self._saved[1])} ago")
        if self._price_per_hour is not None:
            parts.append(f"${self._price_per_hour * (now_s - self._began_s) / 3600:.2f}")
        return parts

    def _show(self, line: str) -> None:
        with self._lock:
            if self._in_place:
                width = shutil.get_terminal_size().columns
                self._write(_CLEAR + line[: max(1, width - 1)])
                self._is_shown = True
            else:
                self._write(f"holdfast: {line}\n")

    def above(self) -> None:
        """Something else is about to be written: the line makes room, and comes back with the next step."""
        with self._lock:
            if self._is_shown:
                self._write(_CLEAR)
                self._is_shown = False

    def close(self) -> None:
        self.above()
        self._every_s = None

    def _write(self, text: str) -> None:
        # A terminal that has gone away must not end the training.
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._every_s = None


def _short(value: Any) -> str:
    """A figure in a few characters. What would have to be fetched from a device first is not waited for."""
    if getattr(getattr(value, "device", None), "type", "cpu") not in ("cpu",):
        return "…"
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)[:20]
