"""What the tests of `file_mounts` need: a machine's folder, sources that count and fail, a bucket that others fill."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

from holdfast.agent.machine import copying
from holdfast.agent.machine.code import fetch_code
from holdfast.agent.machine.mounts import bring, put_aside
from holdfast.core.bootstrap import ENV_MACHINE_KIND, LOCAL_KIND
from holdfast.core.errors import HoldfastError
from holdfast.core.job_record import archive_key
from holdfast.core.mounts import Mount
from holdfast.core.sealed import digest
from holdfast.store.foreign import Foreign, ForeignFile, open_foreign
from holdfast.store.memory import MemoryStore
from holdfast.testing.servers import ObjectServer

__all__ = ["MIB", "ODD", "Counting", "Here", "bytes_of", "filling", "source_folder", "tree"]

MIB = 1 << 20
ODD = ["a b/ü%20#?.txt", "plain", ".hidden", "empty", "deep/er/[x]*~^`{}|'<>.bin", "a+b&c=d;e:f@g,h!()"]


class Here:
    """A machine's folder, and what was said."""

    def __init__(self, root: Path) -> None:
        self.folder, self.home, self.store = root / "machine", root / "home", MemoryStore()
        (self.folder / "work").mkdir(parents=True)
        self.home.mkdir()
        self.said: list[str] = []
        self.sources: list[Counting] = []

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def bring(
        self, *wanted: Mount, kind: str = LOCAL_KIND, tick: Callable[[], None] = lambda: None, **more: Any
    ) -> None:
        def opened(url: str) -> Foreign:
            self.sources.append(Counting(more.get("source") or open_foreign(url)))
            return self.sources[-1]

        environment = {"HOME": str(self.home), ENV_MACHINE_KIND: kind}
        bring(wanted, self.store, self.folder, environment, tick, open_source=opened, say=self.said.append)

    def again(self) -> None:
        """A new start of the same machine: the working folder is made anew."""
        self.sources.clear()
        put_aside(self.folder)
        fetch_code(None, self.store, self.work, {})

    def packed(self, target: str, *, is_file: bool = False, **files: bytes) -> Mount:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, body in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
        data = out.getvalue()
        self.store.put(archive_key(digest(data)), data)
        return Mount(target=target, digest=digest(data), size_bytes=len(data), is_file=is_file)


class Counting:
    """A source that counts what is read from it, and fails when it is told to."""

    def __init__(self, inner: Foreign, fails: Callable[[int], HoldfastError | None] = lambda number: None) -> None:
        self.inner, self.fails, self.reads, self.lock = inner, fails, list[str](), threading.Lock()

    @property
    def is_near(self) -> bool:
        return self.inner.is_near

    def files(self) -> list[ForeignFile]:
        return self.inner.files()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> str:
        with self.lock:
            self.reads.append(name)
            error = self.fails(len(self.reads))
        if error is not None:
            raise error
        return self.inner.read_into(name, offset, buffer)

    def close(self) -> None:
        self.inner.close()


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def bytes_of(name: str, size: int = 0) -> bytes:
    return (name.encode() * (size // max(1, len(name.encode())) + 1))[: size or None]


def source_folder(root: Path) -> dict[str, bytes]:
    files = {name: b"" if name == "empty" else bytes_of(name) for name in ODD}
    files["large.bin"] = bytes_of("large", 2 * copying.RANGE_BYTES + 5)
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return files


@contextmanager
def filling(server: ObjectServer, name: str) -> Iterator[Callable[[str, bytes], None]]:
    """Puts objects into this new bucket, as others do."""
    server.make_bucket(name)
    keys = {
        "aws_access_key_id": server.options["access_key_id"],
        "aws_secret_access_key": server.options["secret_access_key"],
    }
    client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
    try:
        yield lambda key, body: client.put_object(Bucket=name, Key=key, Body=body)
    finally:
        client.close()
