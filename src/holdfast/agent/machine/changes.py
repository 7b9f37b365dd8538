"""What a set-up has changed: in the trees that are its own, file by file; and whether anything else of the machine.

    tree before, tree after → names that are new, changed or gone          (the working folder, the environment)
    surroundings before, after → why they are not the same, or None        (packages, /etc, /opt, /usr/local, the home folder)

The surroundings are only looked at in the places where set-ups usually write. Not seen: /tmp and other disks, caches of pip and uv,
services that were started, images of containers.
"""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Changes", "Entry", "Seen", "Surroundings", "changes", "list_tree", "usual_surroundings"]

_TICK_EVERY = 2000
_MOST_ENTRIES = 3_000_000
_PACKAGES = (
    "/var/lib/dpkg/status", "/var/lib/rpm/rpmdb.sqlite", "/var/lib/rpm/Packages", "/usr/lib/sysimage/rpm/rpmdb.sqlite",
    "/lib/apk/db/installed",
)  # fmt: skip
_FOLDERS = (
    "/", "/mnt", "/srv", "/usr", "/usr/bin", "/usr/include", "/usr/lib", "/usr/lib64", "/usr/sbin", "/usr/share", "/var/lib",
)  # fmt: skip
_VOLATILE = frozenset(
    {
        "/etc/.pwd.lock", "/etc/adjtime", "/etc/hostname", "/etc/hosts", "/etc/ld.so.cache", "/etc/machine-id", "/etc/motd",
        "/etc/mtab", "/etc/resolv.conf", "/etc/.updated",
    }
)  # fmt: skip
"""Written by the system itself, at any time."""
_HOME_CACHES = (
    ".cache/pip", ".cache/uv", ".bash_history", ".lesshst", ".python_history", ".rustup/settings.toml", ".viminfo", ".wget-hsts",
)  # fmt: skip
"""The one of rustup is written by pip, when it asks which compilers there are."""


class Entry(NamedTuple):
    """What tells whether a file is the same. Of folders only the kind and the mode count."""

    kind: str
    """`f`, `d`, `l`, or `?`."""
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    mode: int


@dataclass(frozen=True, slots=True)
class Changes:
    """Names relative to the tree: in order, so that a folder comes before what is in it."""

    new: tuple[tuple[str, Entry], ...]
    gone: tuple[str, ...]


def _entry(about: os.stat_result) -> Entry:
    mode = about.st_mode
    if stat.S_ISDIR(mode):
        return Entry("d", 0, 0, 0, stat.S_IMODE(mode))
    kind = "f" if stat.S_ISREG(mode) else "l" if stat.S_ISLNK(mode) else "?"
    return Entry(kind, about.st_size, about.st_mtime_ns, about.st_ctime_ns, stat.S_IMODE(mode))


def _walk(root: str, skip: Callable[[str], bool], tick: Callable[[], None]) -> Iterator[tuple[str, os.stat_result]]:
    """Every path below a folder on the same disk, no link followed. What vanishes meanwhile is left out."""
    seen = 0
    try:
        device = os.stat(root).st_dev
    except OSError:
        return
    folders = [root]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            continue
        for entry in entries:
            if skip(entry.path):
                continue
            seen += 1
            if seen % _TICK_EVERY == 0:
                tick()
            if seen > _MOST_ENTRIES:
                raise OSError(f"{root} holds more than {_MOST_ENTRIES} files")
            try:
                about = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(about.st_mode) and about.st_dev == device:
                folders.append(entry.path)
            yield entry.path, about


def list_tree(root: Path, tick: Callable[[], None]) -> dict[str, Entry]:
    """All that is in the tree, by name."""
    top = os.fspath(root)
    return {path[len(top) + 1 :]: _entry(about) for path, about in _walk(top, lambda path: False, tick)}


def changes(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Changes:
    """What leads from one listing to the other."""
    new = sorted((name, entry) for name, entry in after.items() if before.get(name) != entry)
    gone = sorted(name for name, entry in before.items() if name not in after or after[name].kind != entry.kind)
    return Changes(tuple(new), tuple(gone))


@dataclass(frozen=True, slots=True)
class Seen:
    """How a place looked: files in it, and the newest change of any of them."""

    count: int
    newest_ns: int
    newest: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a set-up may leave what is not in its own trees. `packages`: files that change with the system's packages; `folders`:
    of which only their own names count; `own`: not looked at."""

    packages: Sequence[Path]
    folders: Sequence[Path]
    trees: Sequence[Path]
    own: Sequence[Path]

    def look(self, tick: Callable[[], None]) -> dict[str, Seen]:
        """As it is now. Raises what `tick` raises, and OSError where there is too much to look at."""
        found = {str(path): _one(path) for path in (*self.packages, *self.folders)}
        own = frozenset(map(os.fspath, self.own)) | _VOLATILE
        for tree in self.trees:
            count, newest_ns, newest = 0, 0, ""
            for path, about in _walk(os.fspath(tree), lambda path: _is_own(path, own), tick):
                if not stat.S_ISDIR(about.st_mode):
                    count += 1
                    if about.st_ctime_ns > newest_ns:
                        newest_ns, newest = about.st_ctime_ns, path
            found[f"{tree}/"] = Seen(count, newest_ns, newest)
        return found

    def difference(self, before: Mapping[str, Seen], after: Mapping[str, Seen]) -> str | None:
        """What has been changed, in words."""
        for path in map(str, self.packages):
            if before[path] != after[path]:
                return f"it has changed the system's packages ({path})"
        for name, seen in after.items():
            if before[name] != seen:
                return (
                    f"it has changed {seen.newest or name}"
                    if seen.count >= before[name].count
                    else f"it has removed from {name}"
                )
        return None


def _is_own(path: str, own: frozenset[str]) -> bool:
    return path in own or path.endswith((".pyc", "/__pycache__"))


def _one(path: Path) -> Seen:
    try:
        about = os.stat(path)
    except OSError:
        return Seen(0, 0, "")
    # Packages' files are replaced or written; a folder's own time moves with the names in it.
    return Seen(1, about.st_mtime_ns, str(path))


def usual_surroundings(environment: Mapping[str, str], own: Sequence[Path]) -> Surroundings:
    """Of this machine. `own`: the machine's folder, and the trees that are listed file by file."""
    trees = ["/usr/local", "/opt", "/etc"]
    home = environment.get("HOME", "")
    if home.startswith("/") and home.strip("/"):
        trees.append(home)
    # Where `python` installs into when no environment of the machine's own is in use.
    for base in (sys.prefix, sys.base_prefix):
        trees.append(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))
    caches = [Path(home, name) for name in _HOME_CACHES] if home else []
    caches += [
        Path(environment[name]) for name in ("PIP_CACHE_DIR", "UV_CACHE_DIR", "XDG_CACHE_HOME") if environment.get(name)
    ]
    kept = [tree for tree in dict.fromkeys(trees) if not any(Path(tree).is_relative_to(each) for each in own)]
    return Surroundings(
        packages=[Path(name) for name in _PACKAGES], folders=[Path(name) for name in _FOLDERS],
        trees=[Path(tree) for tree in kept], own=[*own, *caches],
    )  # fmt: skip
