"""Are the machine's GPUs there, and do they stay? The asking is done by gpu_probe.py; here its answers become evidence.

    gpu_probe (a process) ── one line per look ──→ Gpus.trouble(): why the machine, not the command, is to blame

What counts as the machine's failure: a GPU that was there and is not any more or answers with an error, a driver that does not
answer, and Xids that NVIDIA's documentation calls hardware or driver errors. Xids that a faulty program causes (13, 31, 43, 45)
do not.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.agent import gpu_probe
from holdfast.core.clock import Clock
from holdfast.core.config import format_bytes, format_duration

__all__ = ["MACHINE_XIDS", "GpuReport", "Gpus", "driver_present"]

MACHINE_XIDS: Mapping[int, str] = {
    46: "GPU stopped processing",
    48: "double-bit memory error",
    62: "internal micro-controller halt",
    64: "memory row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    119: "GSP does not answer",
    120: "GSP error",
    140: "unrecovered memory error",
}
"""Xids after which another start on the same GPU is not the program's to make succeed."""

_INTERVAL_S = 5.0
_SILENT_S = 180.0
"""A probe that says nothing for this long: the driver does not answer. Loading NVML on a machine with many GPUs takes seconds."""
_FRESH_S = 3.0
_MAX_LINE_BYTES = 1 << 20


def driver_present() -> bool:
    """Whether this machine has NVIDIA GPUs that somebody has set up."""
    return Path("/dev/nvidiactl").exists()


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One look. `gpus` maps each GPU's id to its error, None for a healthy one."""

    gpus: Mapping[str, str | None]
    names: tuple[str, ...]
    error: str | None
    xids: tuple[int, ...] = ()

    @property
    def is_ready(self) -> bool:
        return self.error is None and bool(self.gpus) and not any(self.gpus.values())

    def why_not_ready(self) -> str:
        if self.error is not None:
            return self.error
        lost = [f"{gpu}: {error}" for gpu, error in self.gpus.items() if error]
        return "; ".join(lost) or "the driver works, but there is no GPU"


@dataclass(slots=True)
class _Seen:
    known: set[str] = field(default_factory=set)
    xids: set[int] = field(default_factory=set)
    last: GpuReport | None = None
    last_s: float = 0.0


class Gpus:
    """Owned by the agent's main thread. `visible` is CUDA_VISIBLE_DEVICES: other people's GPUs are not looked at."""

    def __init__(self, clock: Clock, *, environment: Mapping[str, str], interval_s: float = _INTERVAL_S) -> None:
        self._clock = clock
        self._environment = dict(environment)
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._interval_s = interval_s
        self._seen = _Seen()
        self._text = b""
        self._process = self._begin()

    def wait_until_ready(self, limit_s: float, pause: Callable[[float], bool]) -> str | None:
        """None when every GPU is there and healthy within `limit_s`; else why not. `pause` lets time pass; False ends the wait."""
        give_up_s = self._clock.monotonic_s() + limit_s
        self._ask()
        while True:
            self.look()
            report = self._seen.last
            if report is not None and report.is_ready:
                self._seen.xids.clear()
                return None
            left_s = give_up_s - self._clock.monotonic_s()
            if left_s <= 0 or not pause(min(left_s, 0.2)):
                why = "the driver does not answer" if report is None else report.why_not_ready()
                return f"no usable GPU within {format_duration(limit_s)}: {why}"

    def attempt_starts(self) -> None:
        """What has been seen up to here is not this attempt's trouble; what is there now must stay."""
        self.look()
        self._seen.xids.clear()
        if self._seen.last is not None:
            self._seen.known = {gpu for gpu, error in self._seen.last.gpus.items() if error is None}

    def trouble(self, *, fresh: bool = False) -> str | None:
        """What has failed in the machine since the attempt started. `fresh` waits shortly for a new look."""
        self.look(ask_s=_FRESH_S if fresh else 0.0)
        seen = self._seen
        for xid in sorted(seen.xids & MACHINE_XIDS.keys()):
            return f"Xid {xid} ({MACHINE_XIDS[xid]})"
        if not seen.known:
            return None
        silent_s = self._clock.monotonic_s() - seen.last_s
        if silent_s >= _SILENT_S:
            return f"the GPU driver has not answered for {format_duration(silent_s)}"
        if seen.last is None:
            return None
        if seen.last.error is not None:
            return f"the GPU driver fails: {seen.last.error}"
        for gpu in sorted(seen.known):
            error = seen.last.gpus.get(gpu, "")
            if error is not None:
                # One that cannot even say its id is listed by its number, with its error.
                unnamed = (other for other in seen.last.gpus.values() if other)
                error = error or next(unnamed, "it is not listed any more")
                return f"GPU {gpu} is lost: {error}"
        return None

    def describe(self) -> str:
        """For the startup report."""
        report = self._seen.last
        if report is None:
            return "not known yet"
        if not report.gpus:
            return f"none ({report.error})" if report.error else "none"
        kinds = sorted(set(report.names))
        return ", ".join(f"{report.names.count(kind)} x {kind}" for kind in kinds)

    def look(self, ask_s: float = 0.0) -> None:
        """Take in what the probe has said. With `ask_s`, ask it to look now, and wait that long for the answer."""
        if ask_s:
            self._ask()
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        asked = bool(ask_s)
        while select.select([descriptor], [], [], ask_s if asked else 0.0)[0]:
            data = os.read(descriptor, 1 << 16)
            if not data:
                self._begin_again()
                return
            asked = not self._take(data) and asked

    def _ask(self) -> None:
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(b"?")

    def close(self) -> None:
        """A probe that sits in the driver may not die before the driver lets go of it; nobody waits for that."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def _begin(self) -> subprocess.Popen[bytes]:
        self._text = b""
        command = [sys.executable, "-I", "-S", str(Path(gpu_probe.__file__)), str(self._interval_s)]
        self._seen.last_s = self._clock.monotonic_s()
        return subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    def _begin_again(self) -> None:
        """The probe has died, of a driver that crashes it or of somebody's hand."""
        last_s = self._seen.last_s
        self.close()
        self._process = self._begin()
        self._seen.last_s = last_s

    def _take(self, data: bytes) -> bool:
        """Whether a whole line was among it."""
        *lines, self._text = (self._text + data).split(b"\n")
        self._text = self._text[-_MAX_LINE_BYTES:]
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                self._seen.last = report = _parse(json.loads(line), self._visible)
                self._seen.last_s = self._clock.monotonic_s()
                self._seen.xids.update(report.xids)
        return bool(lines)


def _parse(line: dict[str, Any], visible: str | None) -> GpuReport:
    listed = [gpu for gpu in line["gpus"] if _is_visible(gpu, visible, line["gpus"])]
    gpus = {str(gpu["uuid"] or gpu["index"]): gpu["error"] for gpu in listed}
    names = tuple(_name(gpu) for gpu in listed)
    # An Xid does not always say whose GPU it was: where others share the machine, it says nothing about this command.
    xids = line["xids"] if len(listed) == len(line["gpus"]) else ()
    return GpuReport(gpus, names, line["error"], tuple(int(xid) for xid in xids))


def _name(gpu: dict[str, Any]) -> str:
    memory = f" {format_bytes(gpu['memory_bytes'])}" if gpu["memory_bytes"] else ""
    return f"{gpu['name'] or 'GPU'}{memory}"


def _is_visible(gpu: dict[str, Any], visible: str | None, gpus: list[dict[str, Any]]) -> bool:
    """By number only where numbers mean the same to CUDA and to the driver: CUDA sorts GPUs of different kinds by speed."""
    if not visible:
        return True
    wanted = [entry.strip() for entry in visible.split(",")]
    if all(entry.isdigit() for entry in wanted):
        return len({other["name"] for other in gpus}) > 1 or str(gpu["index"]) in wanted
    if all(entry.startswith("GPU-") for entry in wanted):
        return any(str(gpu["uuid"] or "").startswith(entry) for entry in wanted)
    return True
