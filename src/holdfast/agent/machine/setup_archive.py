"""What a set-up has made, as an archive: packed from its trees, and put back over the same trees on another machine.

    changes → tar, `<tree>/<name>` → pieces of 64 MiB, each named by its BLAKE3, searched for secrets
    pieces, verified → every member looked at → unpacked beside the trees → removed, renamed into place

Nothing is written through a link: members lie below plain folders only, in the archive and on this machine, and links come last. A
link may lead out of its tree (an environment's `python` does), but then to something that is here.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

import msgspec
from blake3 import blake3

from holdfast.agent.machine.changes import Changes
from holdfast.agent.machine.secrets import patterns_of
from holdfast.core.config import format_bytes
from holdfast.core.errors import FormatError, HoldfastError

__all__ = ["MOST_BYTES", "PIECE_BYTES", "Piece", "Uncacheable", "Unpacked", "pack", "put_in_place", "unpack"]

PIECE_BYTES = 64 << 20
MOST_BYTES = 4 << 30


class Uncacheable(HoldfastError):
    """Why this set-up is not kept."""


class Piece(msgspec.Struct, frozen=True):
    """Consecutive bytes of the archive."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive holds, as `<tree>/<name>`: files and links, which lie below `folder`, and folders with their modes."""

    folder: Path
    files: frozenset[PurePosixPath]
    modes: Mapping[PurePosixPath, int]


def pack(
    trees: Mapping[str, Path],
    found: Mapping[str, Changes],
    to: Path,
    secrets: Mapping[str, str],
    tick: Callable[[], None],
) -> list[Piece]:
    """Write the archive. Raises Uncacheable, and OSError."""
    with to.open("wb") as file:
        pieces = _Pieces(file, secrets, tick)
        with tarfile.open(fileobj=pieces, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive:  # type: ignore[call-overload]
            for label, tree in trees.items():
                for name, entry in found[label].new:
                    if entry.kind == "?":
                        raise Uncacheable(f"it has made {tree / name}, which is no plain file, folder or link")
                    member = archive.gettarinfo(tree / name, f"{label}/{name}")
                    if member.islnk():
                        # A second name of a file: packed as a file of its own.
                        member.type, member.linkname, member.size = tarfile.REGTYPE, "", entry.size_bytes
                    member.uid = member.gid = 0
                    member.uname = member.gname = ""
                    if not member.isreg():
                        archive.addfile(member)
                        continue
                    with (tree / name).open("rb") as body:
                        archive.addfile(member, body)
        return pieces.end()


class _Pieces:
    """Where the archive's bytes go."""

    def __init__(self, file: BinaryIO, secrets: Mapping[str, str], tick: Callable[[], None]) -> None:
        self._file, self._tick = file, tick
        self._secrets = {name: _forms(value) for name, value in secrets.items()}
        self._overlap = max((len(form) for forms in self._secrets.values() for form in forms), default=1) - 1
        self._tail = b""
        self._hash, self._in_piece, self._total = blake3(), 0, 0
        self._done: list[Piece] = []

    def write(self, data: bytes) -> int:
        self._tick()
        self._search(data)
        self._total += len(data)
        if self._total > MOST_BYTES:
            raise Uncacheable(
                f"it has made more than {format_bytes(MOST_BYTES)}: what is so large belongs into the image"
            )
        rest = memoryview(data)
        while rest:
            part, rest = rest[: PIECE_BYTES - self._in_piece], rest[PIECE_BYTES - self._in_piece :]
            self._hash.update(part)
            self._file.write(part)
            self._in_piece += len(part)
            if self._in_piece == PIECE_BYTES:
                self._close_piece()
        return len(data)

    def _search(self, data: bytes) -> None:
        """A secret that lies across two writes, too."""
        together = self._tail + bytes(data)
        for name, forms in self._secrets.items():
            if any(form in together for form in forms):
                raise Uncacheable(f"the value of secret {name} stands in what it has made")
        self._tail = together[-self._overlap :] if self._overlap else b""

    def _close_piece(self) -> None:
        self._done.append(Piece(self._hash.hexdigest(), self._in_piece))
        self._hash, self._in_piece = blake3(), 0

    def end(self) -> list[Piece]:
        if self._in_piece:
            self._close_piece()
        return self._done


def _forms(value: str) -> set[bytes]:
    """As it is, its longer lines, and as programs write such things into their files."""
    texts = {
        form
        for each in patterns_of({"": value})
        for form in (each, quote(each, safe=""), msgspec.json.encode(each)[1:-1].decode())
    }
    return {text.encode() for text in texts} | {b64encode(value.encode())}


def unpack(
    archive: Path, trees: Mapping[str, Path], gone: Mapping[str, Collection[str]], to: Path, tick: Callable[[], None]
) -> Unpacked:
    """Into the folder `to`, which is made; nothing in the trees is touched.

    Raises FormatError for what could not be put in place then, and OSError.
    """
    try:
        with tarfile.open(archive, mode="r:") as tar:
            members = [(_placed(member.name, trees), member) for member in tar]
            _check(members)
            for path, member in members:
                _check_here(path, member, trees, gone)
            for label in trees:
                (to / label).mkdir(parents=True)
            for path, member in members:
                if member.isdir():
                    (to / path).mkdir(parents=True, exist_ok=True)
            for path, member in members:
                tick()
                if member.isreg():
                    (to / path).parent.mkdir(parents=True, exist_ok=True)
                    _write(tar, member, to / path)
            links = [(path, member) for path, member in members if member.issym()]
            for path, member in links:
                (to / path).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(member.linkname, to / path)
            return Unpacked(
                to,
                frozenset(path for path, member in members if not member.isdir()),
                {path: member.mode & 0o777 | 0o700 for path, member in members if member.isdir()},
            )
    except (tarfile.TarError, ValueError, UnicodeError) as error:
        raise FormatError(f"the archive of a set-up cannot be unpacked: {error}") from error


def _placed(name: str, trees: Mapping[str, Path]) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or len(path.parts) < 2 or path.parts[0] not in trees:
        raise FormatError(f"the archive of a set-up holds a name that leads out of its trees: {name!r}")
    return path


def _check(members: Sequence[tuple[PurePosixPath, tarfile.TarInfo]]) -> None:
    folders: dict[PurePosixPath, bool] = {}
    for path, member in members:
        if not (member.isreg() or member.isdir() or member.issym()) or path in folders:
            raise FormatError(
                f"the archive of a set-up holds {member.name!r} twice, or it is no plain file, folder or link"
            )
        folders[path] = member.isdir()
    for path in folders:
        if any(folders.get(parent) is False for parent in path.parents):
            raise FormatError(f"the archive of a set-up holds {str(path)!r} below something that is no folder")


def _check_here(
    path: PurePosixPath, member: tarfile.TarInfo, trees: Mapping[str, Path], gone: Mapping[str, Collection[str]]
) -> None:
    """What this machine has in its place, and above it."""
    label, *parts = path.parts
    place = trees[label]
    for depth, part in enumerate(parts, start=1):
        place = place / part
        if "/".join(parts[:depth]) in gone.get(label, ()):
            break
        try:
            is_folder = stat.S_ISDIR(os.lstat(place).st_mode)
        except FileNotFoundError:
            break
        if is_folder != (depth < len(parts) or member.isdir()):
            raise FormatError(f"the archive of a set-up holds {str(path)!r}, and {place} is something else here")
    if member.issym():
        target = Path(os.path.normpath(trees[label].joinpath(*parts).parent / member.linkname))
        if not any(target.is_relative_to(tree) for tree in trees.values()) and not target.exists():
            raise FormatError(f"the archive of a set-up holds a link to {target}, which is not here")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise FormatError(f"the archive of a set-up holds no bytes of {member.name!r}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with source, os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        os.fchmod(file.fileno(), member.mode & 0o777)
    # Compiled Python names the time of its source.
    os.utime(path, (member.mtime, member.mtime))


def put_in_place(unpacked: Unpacked, trees: Mapping[str, Path], gone: Mapping[str, Collection[str]]) -> None:
    """Make the trees what they were after the set-up. Raises OSError, and FormatError, with the trees in any state between."""
    for label, tree in trees.items():
        for name in sorted(gone.get(label, ()), reverse=True):
            _remove(tree, PurePosixPath(name))
        _move(unpacked.folder / label, tree)
    for path, mode in unpacked.modes.items():
        label, *parts = path.parts
        os.chmod(trees[label].joinpath(*parts), mode)


def _remove(tree: Path, name: PurePosixPath) -> None:
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise FormatError(f"a set-up is said to have removed {str(name)!r}, which is not in its trees")
    for parent in reversed(name.parents[:-1]):
        if not _is_folder(tree / parent):
            return
    if _is_folder(tree / name):
        # Not empty: what is in it was not there on the first machine.
        with suppress(OSError):
            (tree / name).rmdir()
    else:
        (tree / name).unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    for entry in list(os.scandir(source)):
        place = target / entry.name
        if not entry.is_dir(follow_symlinks=False):
            os.replace(entry.path, place)
            continue
        if not os.path.lexists(place):
            place.mkdir(mode=0o755)
        elif not _is_folder(place):
            raise FormatError(f"{place} is no folder any more")
        _move(Path(entry.path), place)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
