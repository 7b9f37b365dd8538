"""Asks the GPUs how they are, again and again, in a process of its own: a driver that hangs must not take the agent with it.

It is started by path (`python -I -S`), uses nothing but the standard library, and writes one JSON object per line:

    {"gpus": [{"index": 0, "uuid": "GPU-…", "name": "…", "memory_bytes": …, "error": null}], "error": null, "xids": []}

It asks NVML (libnvidia-ml.so.1) where that can be loaded, else `nvidia-smi`. `error` of the whole says that there is no driver or
that it does not work; `error` of a GPU, that this one is lost or must be reset. Xids, the driver's own error numbers, come from
NVML's events and from the kernel's log where it may be read. A line is written every `interval` seconds, and at once for each
byte on standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import subprocess
import sys
from contextlib import suppress
from typing import Any

__all__ = ["KernelLog", "Nvml", "NvmlError", "ask_nvidia_smi", "main", "xids_in"]

_SUCCESS, _NOT_FOUND, _UNINITIALISED, _TIMEOUT = 0, 6, 1, 10
_XID_EVENT = 0x8
_NAME_BYTES, _UUID_BYTES = 96, 96
_SMI_S = 60
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Event(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_void_p),
        ("type", ctypes.c_ulonglong),
        ("data", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class NvmlError(Exception):
    """NVML's own words."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Nvml:
    """The few calls that are needed. Raises OSError when the library cannot be loaded, NvmlError when it answers with an error."""

    def __init__(self, library: str = "libnvidia-ml.so.1") -> None:
        self._library = ctypes.CDLL(library)
        self._library.nvmlErrorString.restype = ctypes.c_char_p
        self._events: ctypes.c_void_p | None = None
        self._call("nvmlInit_v2")

    def gpus(self) -> list[dict[str, Any]]:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return [self._gpu(index) for index in range(count.value)]

    def xids(self) -> list[int]:
        """Those since the last call."""
        found: list[int] = []
        if self._events is None:
            self._events = self._register()
        event = _Event()
        while self._code("nvmlEventSetWait_v2", self._events, ctypes.byref(event), ctypes.c_uint(0)) == _SUCCESS:
            if event.type & _XID_EVENT:
                found.append(int(event.data))
        return found

    def _register(self) -> ctypes.c_void_p:
        events = ctypes.c_void_p()
        self._call("nvmlEventSetCreate", ctypes.byref(events))
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        for index in range(count.value):
            device = ctypes.c_void_p()
            # Not every GPU supports events; its losses are seen by asking it.
            if self._code("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device)) == _SUCCESS:
                self._code("nvmlDeviceRegisterEvents", device, ctypes.c_ulonglong(_XID_EVENT), events)
        return events

    def _gpu(self, index: int) -> dict[str, Any]:
        gpu: dict[str, Any] = {"index": index, "uuid": None, "name": None, "memory_bytes": None, "error": None}
        device, memory = ctypes.c_void_p(), _Memory()
        uuid, name = ctypes.create_string_buffer(_UUID_BYTES), ctypes.create_string_buffer(_NAME_BYTES)
        try:
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
            self._call("nvmlDeviceGetUUID", device, uuid, ctypes.c_uint(_UUID_BYTES))
            gpu["uuid"] = uuid.value.decode(errors="replace")
            self._call("nvmlDeviceGetName", device, name, ctypes.c_uint(_NAME_BYTES))
            gpu["name"] = name.value.decode(errors="replace")
            self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
            gpu["memory_bytes"] = int(memory.total)
        except NvmlError as error:
            gpu["error"] = str(error)
        return gpu

    def _code(self, function: str, *arguments: object) -> int:
        return int(getattr(self._library, function)(*arguments))

    def _call(self, function: str, *arguments: object) -> None:
        code = self._code(function, *arguments)
        if code != _SUCCESS:
            text = self._library.nvmlErrorString(ctypes.c_int(code)) or b""
            raise NvmlError(code, f"{function}: {text.decode(errors='replace') or 'unknown error'} ({code})")


def ask_nvidia_smi() -> tuple[list[dict[str, Any]], str | None]:
    """GPUs and error, as a line has them."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except FileNotFoundError:
        return [], "no NVIDIA driver: neither libnvidia-ml.so.1 nor nvidia-smi was found"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    gpus: list[dict[str, Any]] = []
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0].isdigit():
            index, uuid, name, mebibytes = fields
            memory_bytes = int(mebibytes) << 20 if mebibytes.isdigit() else None
            lost = None if uuid.startswith("GPU-") else f"nvidia-smi says {uuid}"
            gpus.append({"index": int(index), "uuid": uuid, "name": name, "memory_bytes": memory_bytes, "error": lost})
    words = " ".join((done.stderr + " " + done.stdout).split())[:300]
    return gpus, f"nvidia-smi failed with exit code {done.returncode}: {words}" if done.returncode else None


def xids_in(text: str) -> list[int]:
    """The Xids that lines of the kernel's log speak of."""
    return [int(match[2]) for match in _XID.finditer(text)]


class KernelLog:
    """What the kernel says from now on; nothing where its log may not be read."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def xids(self) -> list[int]:
        found: list[int] = []
        while self._descriptor >= 0:
            try:
                record = os.read(self._descriptor, 8192)
            except BrokenPipeError:
                # Records were overwritten before they were read; the next read goes on behind them.
                continue
            except OSError:
                break
            if not record:
                break
            found += xids_in(record.decode(errors="replace"))
        return found


class _Probe:
    def __init__(self) -> None:
        self._nvml: Nvml | None = None
        self._kernel = KernelLog()

    def look(self) -> dict[str, Any]:
        gpus, error, xids = self._ask()
        return {"gpus": gpus, "error": error, "xids": sorted({*xids, *self._kernel.xids()})}

    def _ask(self) -> tuple[list[dict[str, Any]], str | None, list[int]]:
        try:
            if self._nvml is None:
                self._nvml = Nvml()
            gpus = self._nvml.gpus()
        except NvmlError as error:
            # The driver may come, or come back: begin anew the next time.
            self._nvml = None
            return [], str(error), []
        except (OSError, AttributeError):
            return *ask_nvidia_smi(), []
        xids: list[int] = []
        with suppress(NvmlError, AttributeError):
            xids = self._nvml.xids()
        return gpus, None, xids


def main() -> None:
    """Ends with its standard input."""
    interval_s = float(sys.argv[1])
    probe = _Probe()
    while True:
        line = json.dumps(probe.look()) + "\n"
        try:
            os.write(1, line.encode())
        except OSError:
            return
        if select.select([0], [], [], interval_s)[0] and not os.read(0, 4096):
            return


if __name__ == "__main__":
    main()
