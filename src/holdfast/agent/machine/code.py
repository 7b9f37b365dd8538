"""The working folder of a job on this machine: from the archive in the store, or from a commit. Nothing in it leads out of it.

code/<digest>.tar → BLAKE3 of all bytes → every member looked at → folders, then files, then links → the folder gets its name
git URL, commit → fetch of that commit → its hash once more → the same
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from holdfast.core.errors import FormatError, HoldfastError, IntegrityError
from holdfast.core.job_record import GitCode, PackedCode, archive_key
from holdfast.core.sealed import digest
from holdfast.store.base import Store

__all__ = ["fetch_code", "unpack"]

_GIT_S = 900.0
_GIT = (
    "git", "-c", "protocol.ext.allow=never", "-c", "core.hooksPath=/dev/null", "-c", "core.symlinks=true",
    "-c", "advice.detachedHead=false",
)  # fmt: skip


def fetch_code(code: PackedCode | GitCode | None, store: Store, folder: Path, environment: Mapping[str, str]) -> None:
    """Make `folder` hold exactly this code. It gets its name when it is whole. Raises what stores raise, IntegrityError for bytes
    that are not the ones named, HoldfastError for a git that fails."""
    new = folder.with_name(folder.name + ".new")
    for stale in (new, folder):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    if isinstance(code, PackedCode):
        data = store.get(archive_key(code.digest), max_bytes=code.size_bytes)
        if digest(data) != code.digest:
            raise IntegrityError(f"{store.url}/{archive_key(code.digest)} does not hold the bytes that it is named by")
        unpack(data, new)
    elif isinstance(code, GitCode):
        _check_out(code, new, environment)
    new.replace(folder)


def unpack(data: bytes, folder: Path) -> None:
    """An uncompressed tar archive into an empty folder. FormatError for all but plain files, folders and links that stay inside.

    Links are made last, and no name is used twice or lies below one that is no folder: so nothing is ever written through a link.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = [(_inside(member.name), member) for member in archive]
            _check(members)
            for path, member in sorted(members, key=lambda each: len(each[0].parts)):
                if member.isdir():
                    (folder / path).mkdir(exist_ok=True, parents=True)
            for path, member in members:
                if member.isreg():
                    (folder / path).parent.mkdir(exist_ok=True, parents=True)
                    _write(archive, member, folder / path)
            for path, member in members:
                if member.issym():
                    (folder / path).parent.mkdir(exist_ok=True, parents=True)
                    os.symlink(member.linkname, folder / path)
            for path, member in members:
                if member.issym():
                    _check_link(folder, path, member.linkname)
    except (tarfile.TarError, OSError, ValueError, UnicodeError) as error:
        raise FormatError(f"the archive of the working folder cannot be unpacked: {error}") from error


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > 4000:
        raise FormatError(f"the archive of the working folder holds a name that leads out of it: {name!r}")
    return path


def _check(members: list[tuple[PurePosixPath, tarfile.TarInfo]]) -> None:
    kinds: dict[PurePosixPath, bool] = {}
    for path, member in members:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE):
            raise FormatError(
                f"the archive of the working folder holds {member.name!r}, which is no plain file, folder or link"
            )
        if path in kinds and not (member.isdir() and kinds[path]):
            raise FormatError(f"the archive of the working folder holds {member.name!r} twice")
        kinds[path] = member.isdir()
    for path in kinds:
        if any(kinds.get(parent) is False for parent in path.parents):
            raise FormatError(
                f"the archive of the working folder holds {str(path)!r} below something that is no folder"
            )


def _check_link(folder: Path, path: PurePosixPath, target: str) -> None:
    """Asked of the file system when all links are there: each may lead over others."""
    if target.startswith("/") or not Path(os.path.realpath(folder / path)).is_relative_to(os.path.realpath(folder)):
        raise FormatError(f"the archive of the working folder holds a link that leads out of it: {str(path)!r}")


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise FormatError(f"the archive of the working folder holds no bytes of {member.name!r}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with source, os.fdopen(os.open(path, flags, 0o755 if member.mode & 0o100 else 0o644), "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _check_out(code: GitCode, folder: Path, environment: Mapping[str, str]) -> None:
    quiet = dict(environment) | {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "GIT_LFS_SKIP_SMUDGE": "0"}
    run = _git(folder, quiet)
    run("init", "--quiet")
    try:
        run("fetch", "--quiet", "--depth", "1", "--", code.url, code.commit)
    except HoldfastError:
        # Not every server gives away a commit by its hash.
        run("fetch", "--quiet", "--tags", "--", code.url, "+refs/heads/*:refs/remotes/origin/*")
    run("checkout", "--quiet", "--detach", code.commit)
    found = run("rev-parse", "HEAD").strip()
    if found != code.commit:
        raise IntegrityError(f"{code.url} has given commit {found} instead of {code.commit}")


def _git(folder: Path, environment: Mapping[str, str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        try:
            done = subprocess.run(
                [*_GIT, *arguments], cwd=folder, env=dict(environment), capture_output=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, timeout=_GIT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HoldfastError(f"git {arguments[0]}: {error}") from None
        if done.returncode:
            raise HoldfastError(f"git {arguments[0]} has failed: {' '.join(done.stderr.split())[-500:]}")
        return done.stdout

    return run
