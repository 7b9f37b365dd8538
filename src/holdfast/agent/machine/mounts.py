"""The files of a job beside its working folder, on this machine: looked at, weighed against the disk, copied, and not copied again.

    mounts → what is at the source, what is missing here → is there room? → archives unpacked, files copied → marks

A mark, in the machine's folder, says what was put where. So nothing is put over what somebody else has made; a copy that was broken
off XX outside of the working folder, whatever the record says.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.agent.machine.code import unpack
from holdfast.agent.machine.copying import COMING, Work, beside, copy, missing
from holdfast.agent.machine.unprepared import Unprepared
from holdfast.core.bootstrap import ENV_MACHINE_KIND, LOCAL_KIND
from holdfast.core.config import format_bytes, format_duration
from holdfast.core.contract import EXIT_USAGE
from holdfast.core.errors import HoldfastError, IntegrityError, StoreFull, UsageError
from holdfast.core.job_record import archive_key
from holdfast.core.mounts import Mount, check_apart, is_relative
from holdfast.core.sealed import digest
from holdfast.store.base import Store
from holdfast.store.foreign import Foreign, ForeignFile, open_foreign

__all__ = ["bring", "put_aside"]

_MARKS = "mounts"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SPARE = 0.02
"""Of the disk, left free."""
_BLOCK_BYTES = 4096
_STAMP_NS = 1_000_000
"""Finer than that, file systems may round."""


class _Mark(msgspec.Struct, kw_only=True):
    target: str
    source: str
    listing: str
    """A digest of names, sizes and versions at the source."""
    stamp_ns: int
    boot: str
    """What was written before a power cut may be there in part."""
    is_whole: bool = False


@dataclass(slots=True)
class _Plan:
    mount: Mount
    place: Path
    mark: Path
    source: Foreign | None
    found: _Mark
    """As it is to be."""
    root: Path
    names: Sequence[ForeignFile]
    read_as: Callable[[str], str]
    lacks_bytes: int

    @property
    def work(self) -> Work:
        assert self.source is not None
        files = missing(self.root, self.names, self.found.stamp_ns)
        return Work(self.source, self.root, files, self.read_as, self.found.stamp_ns, self.coming)

    @property
    def coming(self) -> str:
        return f"{COMING}-{self.mark.stem}"


def put_aside(folder: Path) -> None:
    """Before the working folder is made anew: what was brought into it earlier is kept, without being copied."""
    for path in sorted((folder / _MARKS).glob("*.json")):
        mark = _read_mark(path)
        aside = path.with_suffix("")
        if mark is None or not is_relative(mark.target) or aside.exists():
            continue
        place = Path(os.path.realpath(folder)) / "work" / mark.target
        # The job may have put a link there, that leads to files which are not ours to move.
        if Path(os.path.realpath(place)) == place:
            with suppress(OSError):
                place.rename(aside)


def bring(
    mounts: Sequence[Mount],
    store: Store,
    folder: Path,
    environment: Mapping[str, str],
    tick: Callable[[], None],
    *,
    say: Callable[[str], None],
    open_source: Callable[[str], Foreign] = open_foreign,
) -> None:
    """Every mount is in its place when this returns. `folder` is the machine's, with the working folder in it. `tick` is called
    every moment, and raises when the machine is no longer wanted. Raises Unprepared."""
    if not mounts:
        return
    sources: list[Foreign] = []

    def opened(url: str) -> Foreign:
        sources.append(open_source(url))
        return sources[-1]

    try:
        plans: list[_Plan] = []
        places = _places(mounts, folder, environment)
        for mount in mounts:
            beside(lambda mount=mount: plans.append(_plan(mount, places[mount.target], folder, opened)), tick)  # type: ignore[misc]
        _weigh(plans)
        for plan in plans:
            _carry_out(plan, store, tick, say)
    except Unprepared:
        raise
    except (UsageError, StoreFull) as error:
        raise Unprepared(f"file_mounts: {error}", EXIT_USAGE) from None
    except (HoldfastError, OSError) as error:
        raise Unprepared(f"file_mounts: {' '.join(str(error).split())}", 1) from None
    finally:
        for source in sources:
            source.close()


# ---- where


def _places(mounts: Sequence[Mount], folder: Path, environment: Mapping[str, str]) -> dict[str, Path]:
    """Targets and their places on this machine. Unprepared where files may not be put."""
    home = environment.get("HOME") or "/root"
    found = {
        mount.target: _place(mount.target, folder, home, environment.get(ENV_MACHINE_KIND) == LOCAL_KIND)
        for mount in mounts
    }
    try:
        check_apart(os.path.realpath(place) for place in found.values())
    except ValueError as error:
        raise Unprepared(f"file_mounts: {error}", EXIT_USAGE) from None
    return found


def _place(target: str, folder: Path, home: str, is_rehearsal: bool) -> Path:
    own = Path(os.path.realpath(folder))
    if is_relative(target):
        work = own / "work"
        place = work / target
        if Path(os.path.realpath(place)) != place:
            raise Unprepared(f"file_mounts: {target}: a link in the working folder leads elsewhere", EXIT_USAGE)
        return place
    if is_rehearsal:
        raise Unprepared(
            f"file_mounts: {target}: this machine of the rehearsal cloud is a folder on somebody's computer, and nothing is "
            "written outside of it: use a relative target, which lies in the working folder",
            EXIT_USAGE,
        )
    place = Path(os.path.realpath(f"{home}/{target[2:]}" if target.startswith("~") else target))
    if place.is_relative_to(own) or own.is_relative_to(place):
        raise Unprepared(f"file_mounts: {target}: {own} is holdfast's own folder", EXIT_USAGE)
    return place


# ---- what


def _plan(mount: Mount, place: Path, folder: Path, open_source: Callable[[str], Foreign]) -> _Plan:
    marks = folder / _MARKS
    marks.mkdir(mode=0o700, exist_ok=True)
    mark_path = marks / f"{hashlib.blake2b(mount.target.encode(), digest_size=8).hexdigest()}.json"
    source, files = None, [ForeignFile("", mount.size_bytes, mount.digest)]
    if mount.url:
        source = open_source(mount.url)
        files = source.files()
        _check_names(files, mount.url)
    listing = digest(msgspec.json.encode(files))
    wanted = _Mark(
        target=mount.target, source=mount.source, listing=listing, boot=_boot(),
        stamp_ns=time.time_ns() // _STAMP_NS * _STAMP_NS,
    )  # fmt: skip
    known = _known(mark_path, wanted, place)
    is_one = mount.is_file or [each.name for each in files] == [""]
    root = place.parent if is_one else place
    names = [each._replace(name=place.name) for each in files] if is_one else files
    if known is not None:
        wanted = known
    lacks = missing(root, names, wanted.stamp_ns) if source is not None else [] if wanted.is_whole else names
    return _Plan(
        mount=mount, place=place, mark=mark_path, source=source, found=wanted, root=root, names=names,
        read_as=(lambda name: "") if is_one else (lambda name: name),
        lacks_bytes=sum(-(-each.size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES for each in lacks),
    )  # fmt: skip


def _known(path: Path, wanted: _Mark, place: Path) -> _Mark | None:
    """The mark of an earlier start, where it still holds. Unprepared where somebody else's files are in the place."""
    mark = _read_mark(path)
    aside = path.with_suffix("")
    if aside.exists():
        if os.path.lexists(place):
            _remove(aside)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            aside.rename(place)
    if mark is None or mark.target != wanted.target:
        if _is_taken(place):
            raise Unprepared(
                f"file_mounts: {wanted.target}: {place} is there already and is not empty: choose another target, or leave it "
                "out of the working folder or image",
                EXIT_USAGE,
            )
        return None
    if (mark.source, mark.listing, mark.boot) == (wanted.source, wanted.listing, wanted.boot):
        return mark
    # Ours, and of other bytes: all are copied again, over those that are there.
    wanted.stamp_ns = max(wanted.stamp_ns, mark.stamp_ns + _STAMP_NS)
    return None


def _check_names(files: Sequence[ForeignFile], url: str) -> None:
    for each in files:
        parts = each.name.split("/")
        if each.name and (each.name.startswith("/") or "\0" in each.name or {"", ".", ".."} & set(parts)):
            raise UsageError(f"{url} holds an object whose name is no file's: {each.name!r}")


def _weigh(plans: Sequence[_Plan]) -> None:
    """Is there room for all of it, disk by disk? UsageError otherwise."""
    disks: dict[int, tuple[int, Path]] = {}
    for plan in plans:
        there = next(path for path in (plan.root, *plan.root.parents) if path.exists())
        lacks, _ = disks.get(there.stat().st_dev, (0, there))
        disks[there.stat().st_dev] = (lacks + plan.lacks_bytes, there)
    for lacks, there in disks.values():
        disk = os.statvfs(there)
        room = int((disk.f_bavail - _SPARE * disk.f_blocks) * disk.f_frsize)
        if lacks > room:
            raise UsageError(
                f"{format_bytes(lacks)} are to be copied, and the disk of {there} has room for {format_bytes(max(0, room))}: "
                "ask for a larger one (`resources: {disk_size: GiB}`), or copy less"
            )


# ---- carried out


def _carry_out(plan: _Plan, store: Store, tick: Callable[[], None], say: Callable[[str], None]) -> None:
    began_s = time.monotonic()
    if plan.source is None:
        if plan.found.is_whole and os.path.lexists(plan.place):
            return
        _write_mark(plan)
        beside(lambda: _unpack(plan, store), tick)
        how = f"{format_bytes(plan.mount.size_bytes)}"
    else:
        plan.root.mkdir(parents=True, exist_ok=True)
        work = plan.work
        if plan.found.is_whole and not work.files:
            say(f"{plan.mount.target}: {plan.mount.url} is here already, unchanged")
            return
        said = f"{len(work.files)} of {len(plan.names)} files, {format_bytes(plan.lacks_bytes)}"
        say(f"{plan.mount.target}: {said}, from {plan.mount.url}")
        plan.found.is_whole = False
        _write_mark(plan)
        copy(work, tick, say)
        how = f"{len(work.files)} files"
    plan.found.is_whole = True
    _write_mark(plan)
    say(f"{plan.mount.target}: {how} in {format_duration(round(time.monotonic() - began_s))}")


def _unpack(plan: _Plan, store: Store) -> None:
    """From the archive beside the working folder's. What an earlier try has left goes first."""
    key = archive_key(plan.mount.digest)
    data = store.get(key, max_bytes=plan.mount.size_bytes)
    if digest(data) != plan.mount.digest:
        raise IntegrityError(f"{store.url}/{key} does not hold the bytes that it is named by")
    new = plan.mark.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    unpack(data, new)
    _empty(plan.place)
    plan.place.parent.mkdir(parents=True, exist_ok=True)
    if plan.mount.is_file:
        (only,) = new.iterdir()
        shutil.move(only, plan.place)
    else:
        plan.place.mkdir(exist_ok=True)
        for each in new.iterdir():
            shutil.move(each, plan.place / each.name)
    shutil.rmtree(new)


def _is_taken(place: Path) -> bool:
    """An empty folder is free: disks are mounted on such."""
    if not place.is_dir() or place.is_symlink():
        return os.path.lexists(place)
    return any(each.name != "lost+found" for each in place.iterdir())


def _empty(place: Path) -> None:
    """Take away what is ours, but not the folder itself: a disk may be mounted there."""
    if place.is_dir() and not place.is_symlink():
        for each in place.iterdir():
            if each.name != "lost+found":
                _remove(each)
    else:
        _remove(place)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_mark(path: Path) -> _Mark | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Mark)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_mark(plan: _Plan) -> None:
    new = plan.mark.with_suffix(".writing")
    new.write_bytes(msgspec.json.encode(plan.found))
    new.replace(plan.mark)


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"
