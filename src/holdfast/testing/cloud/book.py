"""The cloud's log: everything that happened, one JSON object a line, appended and never changed.

The cloud comes back from it after kill -9, and the bill is computed from it by a program that shares no code with the cloud. A
line that was being written when the cloud was killed has not happened.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from holdfast.core.errors import FormatError

__all__ = ["LOG", "Book"]

LOG = "log.jsonl"


class Book:
    """Thread safety: none; the cloud writes under its lock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def read(self) -> list[dict[str, Any]]:
        """Everything so far; the torn end, if there is one, is cut off. FormatError for what no cloud has written."""
        written = self._path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if len(whole) < len(written):
            os.ftruncate(self._descriptor, len(whole))
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise FormatError(f"{self._path}, line {number} is not JSON: {error}") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
                raise FormatError(f"{self._path}, line {number} is no entry of a log")
            entries.append(entry)
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        """In the kernel's hands when this returns: it outlives this process, and not a power cut."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def close(self) -> None:
        os.close(self._descriptor)
