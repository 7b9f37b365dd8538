"""Starts a server as a process of its own on a free port of 127.0.0.1, waits until it listens, and stops it by its process id.

What the server writes goes to a file without a name and into the error when it does not start.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from holdfast.core.clock import Clock
from holdfast.core.errors import StoreUnavailable

__all__ = ["Start", "serving", "start"]

Start = Callable[[int, IO[bytes]], "subprocess.Popen[bytes]"]
"""Starts the server on a port, with a file for what it writes."""

_START_S = 30.0
_STOP_S = 5.0
_POLL_S = 0.02
_STARTS = 3
"""A free port may be taken by somebody else before the server binds it; then another one is tried."""


def start(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextmanager
def serving(begin: Start, clock: Clock) -> Iterator[tuple[int, str]]:
    """The server's process id and endpoint while the block runs. Raises StoreUnavailable when it does not come up."""
    with tempfile.TemporaryFile() as log:
        for _ in range(_STARTS):
            port = _free_port()
            process = begin(port, log)
            try:
                if _listens(process, port, clock):
                    yield process.pid, f"http://127.0.0.1:{port}"
                    return
            finally:
                _stop(process)
        log.seek(0)
        said = log.read().decode(errors="replace")[-2000:]
    raise StoreUnavailable(f"the test server did not start; it said:\n{said}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(process: subprocess.Popen[bytes], port: int, clock: Clock) -> bool:
    give_up_s = clock.monotonic_s() + _START_S
    while process.poll() is None and clock.monotonic_s() < give_up_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        except OSError:
            clock.sleep(_POLL_S)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
