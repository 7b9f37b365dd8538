"""What a fresh machine needs and cannot find there: working folder and holdfast itself, packed once, by content, into the store.

    workdir, less what is ignored → deterministic tar → code/<BLAKE3>.tar
    holdfast as it is installed here → wheel → code/<BLAKE3>/holdfast-….whl

The same content is the same object: a second launch uploads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from pathlib import Path

from holdfast.core.bootstrap import Piece
from holdfast.core.config import format_bytes
from holdfast.core.errors import NotFound, UsageError
from holdfast.core.job_record import GitCode, PackedCode, archive_key
from holdfast.core.sealed import digest
from holdfast.store.base import Store

__all__ = ["IGNORE_FILE", "code_of", "own_wheel", "pack", "pack_file"]

IGNORE_FILE = ".holdfastignore"
"""Beside the code: patterns as a shell knows them, one a line; a `/` at the end names folders only, one at the start the top."""
_ALWAYS = (
    ".git/",
    "__pycache__/",
    "*.pyc",
    ".venv/",
    "venv/",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
    "node_modules/",
)
MOST_BYTES = 100 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)


def code_of(workdir: str | None, store: Store, base: Path) -> PackedCode | GitCode | None:
    """The code that a job file's `workdir` names: a folder (relative to the job file), or `URL@commit`."""
    if workdir is None:
        return None
    found = re.fullmatch(r"((?:https://|ssh://|git@).+)@([0-9a-f]{40}|[0-9a-f]{64})", workdir)
    if found is not None:
        try:
            return GitCode(url=found[1], commit=found[2])
        except ValueError as error:
            raise UsageError(f"workdir: {error}") from None
    folder = (base / workdir).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"workdir: {str(folder)!r} is no folder; a commit is written like https://host/repo.git@<40 hex digits>"
        )
    body = pack(folder)
    packed = PackedCode(digest=digest(body), size_bytes=len(body))
    store.put_new(archive_key(packed.digest), body)
    return packed


def pack(folder: Path, what: str | None = None) -> bytes:
    """A tar archive of the folder, the same for the same content, whoever packs it and when. UsageError above the limit; `what` is
    the folder in its words."""
    out, total = io.BytesIO(), 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in _wanted(folder):
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.mtime = 0
            if path.is_symlink():
                member.type, member.linkname = tarfile.SYMTYPE, str(path.readlink())
                archive.addfile(member)
                continue
            total = _add(archive, member, path, total, what or f"workdir {str(folder)!r}")
    return out.getvalue()


def pack_file(path: Path, what: str) -> bytes:
    """An archive with this one file in it, under its name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(path.name)
        member.mtime = 0
        _add(archive, member, path, 0, what)
    return out.getvalue()


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, total: int, what: str) -> int:
    """The bytes in the archive so far."""
    total += path.stat().st_size
    if total > MOST_BYTES:
        raise UsageError(
            f"{what} holds more than {format_bytes(MOST_BYTES)}: name what is not needed in {IGNORE_FILE}, and bring data by its "
            "own URL, in `file_mounts:` or from the program"
        )
    body = path.read_bytes()
    member.size, member.mode = len(body), 0o755 if path.stat().st_mode & 0o111 else 0o644
    archive.addfile(member, io.BytesIO(body))
    return total


def _wanted(folder: Path) -> Iterator[Path]:
    patterns = list(_ALWAYS)
    with_own = folder / IGNORE_FILE
    if with_own.is_file():
        lines = (line.strip() for line in with_own.read_text(encoding="utf-8").splitlines())
        patterns += [line for line in lines if line and not line.startswith("#")]

    def walk(place: Path) -> Iterator[Path]:
        for path in sorted(place.iterdir()):
            name = path.relative_to(folder).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if any(_ignores(pattern, name, is_folder) for pattern in patterns):
                continue
            if is_folder:
                yield from walk(path)
            elif path.is_file() or path.is_symlink():
                yield path

    return walk(folder)


def _ignores(pattern: str, name: str, is_folder: bool) -> bool:
    if pattern.endswith("/"):
        pattern = pattern[:-1]
        if not is_folder:
            return False
    if "/" in pattern:
        return fnmatchcase(name, pattern.lstrip("/"))
    return fnmatchcase(name.rsplit("/", 1)[-1], pattern)


def own_wheel(store: Store) -> Piece:
    """Holdfast as it runs here, as a wheel in the store, also where it runs from its sources."""
    name = f"holdfast-{metadata.version('holdfast')}-py3-none-any.whl"
    body = _wheel(Path(__file__).parents[1])
    key = f"code/{digest(body)}/{name}"
    try:
        # It is a megabyte, and there after the first time: one byte of it says so.
        store.read_into(key, 0, memoryview(bytearray(1)))
    except NotFound:
        store.put_new(key, body)
    source = f"{store.url}/{key}"
    return Piece(source=source.removeprefix("file://"), name=name, sha256=hashlib.sha256(body).hexdigest())


@cache
def _wheel(package: Path) -> bytes:
    """The binary distribution format, version 1.0: packaging.python.org/specifications/binary-distribution-format."""
    own = metadata.distribution("holdfast")
    info = f"holdfast-{own.version}.dist-info"
    files: dict[str, bytes] = {}
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            files[f"holdfast/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    files[f"{info}/METADATA"] = (own.read_text("METADATA") or "").encode()
    files[f"{info}/entry_points.txt"] = (own.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: holdfast\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_hash(body)},{len(body)}\n" for name, body in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, body in files.items():
            wheel.writestr(zipfile.ZipInfo(name, _EPOCH), body, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _hash(body: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
