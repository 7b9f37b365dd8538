"""One training as a child process: what it prints, how it stands, how it is killed and how it is stopped.

    train.py ─ standard output ─┐
    holdfast run ─ its messages ┴→ reading thread → queue → the demo's loop → `Training.take`
    holdfast run ─ --report FILE → `Training.pid`: which process trains at this moment

A training has a process group of its own, so that a Ctrl-C at the terminal reaches only the demo, which then stops everything in
order.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Line", "Point", "Training"]

_FIGURE = re.compile(r"step (\d+) loss (\S+)")
_STOP_WITHIN_S = 60.0
_READ_WITHIN_S = 5.0


class Point(NamedTuple):
    """One step as it was computed; a step that was lost and computed again gives two."""

    start: int
    """Which start of the command computed it, from 1."""
    step: int
    """Completed steps, this one included."""
    loss: float
    at_s: float
    """Since the training was started."""


class Line(NamedTuple):
    """What one training printed; `text` is None at the end of its output."""

    training: Training
    text: str | None


class Training:
    """A command that trains. Everything but `_read` runs in the demo's thread."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, lines: queue.Queue[Line]) -> None:
        self.name = name
        self.url = str(folder / name)
        self.points: list[Point] = []
        self.done = False
        self._report = folder / f"{name}.report.jsonl"
        self.log_path = folder / f"{name}.log"
        self._lines = lines
        self._started_s = time.monotonic()
        self._process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output, self.log_path.open("wb", buffering=0) as log:
            for line in output:
                log.write(line)
                self._lines.put(Line(self, line.decode(errors="replace").rstrip()))
        self._lines.put(Line(self, None))

    def take(self, line: str) -> Point | None:
        """The point in a line, if it has one; kept."""
        match = _FIGURE.match(line)
        if match is None:
            return None
        at_s = time.monotonic() - self._started_s
        self.points.append(
            Point(max(1, len(self.reported("attempt.started"))), int(match[1]) + 1, float(match[2]), at_s)
        )
        return self.points[-1]

    @property
    def step(self) -> int:
        return self.points[-1].step if self.points else 0

    @property
    def step_s(self) -> float:
        """How long the newest steps took, each."""
        newest = [point for point in self.points[-9:] if point.start == self.points[-1].start]
        return (newest[-1].at_s - newest[0].at_s) / (len(newest) - 1) if len(newest) > 1 else 0.0

    def reported(self, name: str) -> list[dict[str, Any]]:
        """The fields of the agent's events of this name, oldest first; none where no agent watches."""
        if not self._report.exists():
            return []
        # The last line may be half written.
        whole = self._report.read_bytes().rpartition(b"\n")[0]
        return [event["fields"] for event in map(json.loads, whole.splitlines()) if event["name"] == name]

    def kill(self) -> int | None:
        """SIGKILL the process that trains. Its number, or None when there is none at this moment."""
        started = self.reported("attempt.started")
        if len(started) == len(self.reported("attempt.ended")):
            return None
        pid = int(started[-1]["pid"])
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            return None
        finally:
            os.close(handle)
        return pid

    def wait(self) -> int:
        """The exit code, once the output has ended."""
        self.done = True
        # What is left of the output comes at once; a stray process that holds it open is not waited for.
        self._reader.join(_READ_WITHIN_S)
        return self._process.wait()

    def stop(self) -> None:
        """End it, with everything that it started, if it still runs. Asks first, so that what is trained is saved."""
        if self.done:
            return
        try:
            self._process.terminate()
            self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also when a second Ctrl-C ends the wait.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self.wait()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what another holdfast around this demo has set for its own child."""
    return {name: value for name, value in environ.items() if not name.startswith("HOLDFAST_")}
