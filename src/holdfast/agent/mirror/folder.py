"""What lies in the mirrored folder, what belongs together there, and what has come to rest.

    scan ─→ Scan (files, links, folders) ─→ Watch.observe ─→ units that have not changed for the settle time

A unit is what is taken and restored as a whole: a folder that a training framework writes as one checkpoint, otherwise a single
file. Nothing outside the folder is ever looked at: symbolic links are not followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

__all__ = ["OWN_PREFIX", "Names", "Scan", "Signature", "Watch", "is_inside", "open_for_writing", "scan", "signature_of"]

OWN_PREFIX = ".holdfast"
"""Names that begin like this are holdfast's own, and are never mirrored."""
_FOLDER_UNITS = (
    "checkpoint-*", "checkpoint_*", "*.ckpt", "ckpt-*", "ckpt_*", "global_step*", "epoch_*", "epoch-*", "step_*", "step-*",
)  # fmt: skip
_TEMPORARY = (
    "tmp-*",
    "tmp_*",
    ".tmp*",
    "*.tmp",
    "*.tmp.*",
    "*.part",
    "*.partial",
    "*.incomplete",
    "*~",
    ".nfs*",
    "*.lock",
)
_APPENDED = ("*.log", "*.jsonl", "events.out.tfevents.*")


class Signature(NamedTuple):
    """Changes whenever the content may have: an in-place write moves the times, a rename brings another inode."""

    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


def signature_of(status: os.stat_result) -> Signature:
    return Signature(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Names:
    """Which names are mirrored and what they mean. `include`: the user's patterns; empty for everything.

    A pattern without `/` is compared with every part of a path, one with `/` with the path from the mirrored folder on. A folder
    that a pattern of the user's matches is a unit, like those of the training frameworks.
    """

    include: tuple[str, ...] = ()

    def unit_of(self, path: str) -> str | None:
        """The unit that a file belongs to: the topmost folder that is one, else the file; None when it is not mirrored."""
        unit, wanted = None, not self.include
        for prefix, name in _prefixes(path):
            if name.startswith(OWN_PREFIX) or _matches(_TEMPORARY, prefix, name):
                return None
            mine = _matches(self.include, prefix, name)
            wanted = wanted or mine
            if unit is None and (mine or _matches(_FOLDER_UNITS, prefix, name)):
                unit = prefix
        return (unit or path) if wanted else None

    def is_appended(self, path: str) -> bool:
        """Whether the file grows at its end, so that every state of it is a good one, also while it is open."""
        return self.unit_of(path) == path and _matches(_APPENDED, path, path.rpartition("/")[2])


def _prefixes(path: str) -> Iterator[tuple[str, str]]:
    parts = path.split("/")
    return (("/".join(parts[: count + 1]), parts[count]) for count in range(len(parts)))


def _matches(patterns: Sequence[str], path: str, name: str) -> bool:
    return any(fnmatchcase(path if "/" in pattern.rstrip("/") else name, pattern.rstrip("/")) for pattern in patterns)


@dataclass(slots=True)
class Scan:
    """One look. Paths are relative, `/`-separated; modes are permission bits without setuid and its like."""

    files: dict[str, tuple[Signature, int]] = field(default_factory=dict)
    links: dict[str, tuple[Signature, str]] = field(default_factory=dict)
    """With their targets, which lie inside the folder."""
    folders: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    """Links that lead outside, sockets, devices."""
    units: dict[str, dict[str, Signature]] = field(default_factory=dict)
    """The members of every unit."""

    def is_empty(self) -> bool:
        return not (self.files or self.links or self.folders or self.refused)


def scan(root: Path, names: Names) -> Scan:
    """What lies in `root` now. What vanishes meanwhile is not there."""
    found = Scan()
    _scan(root, "", names, found)
    for path, (signature, _) in (*found.files.items(), *found.links.items()):
        unit = names.unit_of(path)
        if unit is not None:
            found.units.setdefault(unit, {})[path] = signature
    return found


def _scan(folder: Path, prefix: str, names: Names, found: Scan) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            if entry.name.startswith(OWN_PREFIX):
                continue
            path = prefix + entry.name
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    found.folders[path] = status.st_mode & 0o777
                    _scan(Path(entry.path), path + "/", names, found)
                elif stat.S_ISREG(status.st_mode):
                    found.files[path] = signature_of(status), status.st_mode & 0o777
                elif stat.S_ISLNK(status.st_mode) and is_inside(path, target := os.readlink(entry.path)):
                    found.links[path] = signature_of(status), target
                else:
                    found.refused.add(path)


def is_inside(link: str, target: str) -> bool:
    """Whether a link at `link` to `target` stays within the folder, by its words alone."""
    if not target or target.startswith("/") or "\0" in target:
        return False
    depth = link.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return False
    return True


@dataclass(slots=True)
class _Resting:
    members: Mapping[str, Signature]
    since_s: float


class Watch:
    """Since when each unit has been as it is. Thread safety: none."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._units: dict[str, _Resting] = {}
        self._absent_since_s: dict[str, float] = {}

    def observe(self, found: Scan, now_s: float) -> None:
        for unit, members in found.units.items():
            resting = self._units.get(unit)
            if resting is None or resting.members != members:
                self._units[unit] = _Resting(members, now_s)
            self._absent_since_s.pop(unit, None)
        for unit in self._units.keys() - found.units.keys():
            del self._units[unit]

    def disturbed(self, unit: str, now_s: float) -> None:
        """Something else than its times says that the unit is being written."""
        if unit in self._units:
            self._units[unit].since_s = now_s

    def is_settled(self, unit: str, now_s: float) -> bool:
        resting = self._units.get(unit)
        return resting is not None and now_s - resting.since_s >= self._settle_s

    def absent_for_s(self, unit: str, now_s: float) -> float:
        """For how long a unit that was there has been missing."""
        return now_s - self._absent_since_s.setdefault(unit, now_s)


def open_for_writing(root: Path) -> set[str]:
    """Files below `root` that a process of this machine has open for writing, as far as this user may see; empty without /proc."""
    start = str(root) + "/"
    paths: set[str] = set()
    for process in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            for descriptor in os.listdir(process):
                with suppress(OSError):
                    target = os.readlink(process / descriptor)
                    if target.startswith(start) and _writes(process.parent / "fdinfo" / descriptor):
                        paths.add(target.removeprefix(start))
    return paths


def _writes(fdinfo: Path) -> bool:
    for line in fdinfo.read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False
