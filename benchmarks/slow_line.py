"""A network that is as slow as one wants: a TCP relay on 127.0.0.1 that passes on so many bytes a second, in each direction."""

# mypy: ignore-errors
from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Line", "slow_line"]


class Line:
    """Passes on what comes to `port` to another port of 127.0.0.1. All connections share the rate."""

    def __init__(self, target: int, bytes_per_s: float) -> None:
        self._target, self._bytes_per_s = target, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._free_at_s = {"up": 0.0, "down": 0.0}
        self._lock = threading.Lock()
        self.passed_bytes = {"up": 0, "down": 0}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                for one, other, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pass, args=(one, other, way), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, way: str) -> None:
        with suppress(OSError):
            while piece := one.recv(256 << 10):
                with self._lock:
                    now_s = time.monotonic()
                    self._free_at_s[way] = max(now_s, self._free_at_s[way]) + len(piece) / self._bytes_per_s
                    rest_s = self._free_at_s[way] - now_s
                    self.passed_bytes[way] += len(piece)
                if rest_s > 0.001:
                    time.sleep(rest_s)
                other.sendall(piece)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@contextmanager
def slow_line(endpoint: str, bytes_per_s: float) -> Iterator[Line]:
    """`endpoint`: `http://127.0.0.1:<port>` of the server behind it."""
    line = Line(int(endpoint.rpartition(":")[2]), bytes_per_s)
    try:
        yield line
    finally:
        line.close()
