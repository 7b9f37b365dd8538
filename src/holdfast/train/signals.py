"""SIGTERM and Ctrl-C, turned into flags that the loop looks at when it is safe.

SIGTERM: finish the step, save, leave with the preempted exit code. Ctrl-C: the same with the interrupted code; a second Ctrl-C leaves
at once. Inside a region that may be abandoned (an evaluation, which is done again after resume) the signal ends it immediately.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from holdfast.core.contract import EXIT_INTERRUPTED, EXIT_PREEMPTED

__all__ = ["Signals"]


class Signals:
    """Installed while a run is open, in the main thread only; the handlers found before are put back."""

    def __init__(self, abandon: Callable[[int], None]) -> None:
        self.leaving: int | None = None
        self._abandon = abandon
        self._before: dict[signal.Signals, Any] = {}
        self._interrupts = 0

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in ((signal.SIGTERM, self._on_terminate), (signal.SIGINT, self._on_interrupt)):
            self._before[number] = signal.signal(number, handler)

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self.leaving is None:
            self.leaving = EXIT_PREEMPTED
        self._abandon(self.leaving)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self.leaving is None:
            self.leaving = EXIT_INTERRUPTED
        self._abandon(self.leaving)
