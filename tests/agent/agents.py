"""Agents as processes of their own, for tests that kill them, look at their terminal or at what they leave behind."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import waiting

from holdfast.cli.logs import segments
from holdfast.store.local import LocalStore

__all__ = ["GIVE_UP_S", "eventually", "kept_output", "lives", "python", "read_until", "started"]

GIVE_UP_S = 90.0
"""Only ends a broken test."""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", "import os, signal, sys\n" + code]


@contextmanager
def started(*arguments: str, **popen: object) -> Iterator[subprocess.Popen[bytes]]:
    """`holdfast run` with these arguments."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    command = [sys.executable, "-m", "holdfast", "run", *arguments]
    agent: subprocess.Popen[bytes] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    timer = threading.Timer(GIVE_UP_S, agent.kill)
    timer.start()
    try:
        with agent:
            try:
                yield agent
            finally:
                agent.kill()
    finally:
        timer.cancel()


def read_until(descriptor: int, wanted: bytes) -> bytes:
    """Byte by byte, so that nothing behind it is swallowed."""
    text = b""
    while not text.endswith(wanted):
        assert select.select([descriptor], [], [], GIVE_UP_S)[0], f"nothing came after {text!r}"
        byte = os.read(descriptor, 1)
        assert byte, f"the output ended after {text!r}"
        text += byte
    return text


eventually = partial(waiting.eventually, give_up_s=GIVE_UP_S, every_s=0.01)


def lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def kept_output(run: Path) -> bytes:
    store = LocalStore(run)
    return b"".join(store.get(segment.key, max_bytes=1 << 30) for segment in segments(store, None))
