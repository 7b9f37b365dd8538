"""SIGTERM and Ctrl-C, turned into a wish to leave that the loop grants when it is safe.

SIGTERM: finish the step, save, leave with the preempted exit code. Ctrl-C: the same with the interrupted code; a second Ctrl-C
leaves at once. Where the code that runs can be given up (an evaluation, which is done again after resume; waiting for a batch), the
wish is raised as `LeaveNow` and whoever opened that region catches it. The handler itself does nothing else but pass the
number on to whoever listens for notices: what it interrupts may hold locks.

SIGUSR1 is Slurm's word ahead of the end, where the script has not taken it for itself. It is only passed on; by default it kills.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Literal

from holdfast.core.clock import Clock
from holdfast.core.contract import EXIT_INTERRUPTED, EXIT_PREEMPTED
from holdfast.train.sample_seeds import IsolatedRandomness

__all__ = ["LeaveNow", "Region", "Signals"]

_SWAPPING_GENERATORS = (IsolatedRandomness.__enter__.__code__, IsolatedRandomness.__exit__.__code__)


class LeaveNow(BaseException):
    """Raised by the signal handler inside a region that can be given up. Never leaves holdfast."""


Region = Literal["evaluating", "waiting"]
"""Code that can be given up: an evaluation, whose state was held before it; waiting for a batch, whose state is the live one."""


class Signals:
    """Installed while a run is open, in the main thread only; the handlers found before are put back.

    `may_copy`: whether the live state is at a boundary.
    """

    def __init__(self, may_copy: Callable[[], bool], clock: Clock) -> None:
        self.leaving: int | None = None
        self._leaving_s: float | None = None
        self._now_s = clock.monotonic_s
        self.region: Region | None = None
        self._may_copy = may_copy
        self._before: dict[signal.Signals, Any] = {}
        self._interrupts = 0
        self._sent = False
        """The next SIGTERM is `interrupt`'s own."""
        self._early: list[int] = []
        self._heard: Callable[[int], None] = self._early.append

    def install(self, environ: Mapping[str, str]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in ((signal.SIGTERM, self._on_terminate), (signal.SIGINT, self._on_interrupt)):
            self._before[number] = signal.signal(number, handler)
        if environ.get("SLURM_JOB_ID") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_warning)

    def tell(self, heard: Callable[[int], None]) -> None:
        """From now on `heard` gets SIGTERM and SIGUSR1, what has come before included. It is called inside the handler."""
        self._heard = heard
        while self._early:
            heard(self._early.pop(0))

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def leave(self, code: int) -> None:
        """Wish to leave at the next boundary."""
        if self.leaving is None:
            self._leaving_s = self._now_s()
            self.leaving = code

    def interrupt(self) -> None:
        """From any thread: leave now what can be given up. Only the loop's own thread can, so it gets a signal."""
        self.leave(EXIT_PREEMPTED)
        main = threading.main_thread().ident
        if self._before and self.region is not None and main is not None:
            self._sent = True
            signal.pthread_kill(main, signal.SIGTERM)

    def since_s(self) -> float | None:
        """How long ago the wish to leave came; None when there is none."""
        return None if self._leaving_s is None else self._now_s() - self._leaving_s

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self._sent:
            self._sent = False
        else:
            self._heard(number)
        self._leave(EXIT_PREEMPTED, frame)

    def _on_warning(self, number: int, frame: FrameType | None) -> None:
        self._heard(number)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self.leaving is None:
            _tell("holdfast: finishing the step and saving; Ctrl-C again leaves at once")
        self._leave(EXIT_INTERRUPTED, frame)

    def _leave(self, code: int, frame: FrameType | None) -> None:
        self.leave(code)
        if self.region == "evaluating" or (self.region == "waiting" and self._may_stop_waiting(frame)):
            # Whoever catches it saves: a second signal must not break that off.
            self.region = None
            raise LeaveNow

    def _may_stop_waiting(self, frame: FrameType | None) -> bool:
        while frame is not None:
            # The generators are half swapped: what would be saved is neither what was before nor what comes after.
            if frame.f_code in _SWAPPING_GENERATORS:
                return False
            frame = frame.f_back
        return self._may_copy()


def _tell(line: str) -> None:
    """Past Python's buffers: the handler may have interrupted a print, which must not be entered again."""
    try:
        os.write(2, line.encode() + b"\n")
    except OSError:
        return
