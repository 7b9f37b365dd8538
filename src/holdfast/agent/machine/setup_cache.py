"""The set-up of one machine, for the next: what it has made is kept in the store, and put in place there instead of running it.

    key: the set-up's text, the code, the environment, this machine's kind and what is installed on it
    code/setup-<key> → pieces code/<BLAKE3>.setup, verified → put in place                        (setup_archive.py)
    else: look around → the set-up runs → what has it changed? (changes.py) → pack → the job begins; beside it: pieces, record

A set-up that has changed anything but the working folder and the machine's own environment is not kept, nor one that has left a
secret's value in a file; why, is said. The first record stands. Nothing here keeps a job from being set up: whatever fails,
the set-up is run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import msgspec

from holdfast.agent.machine.changes import Entry, Seen, Surroundings, changes, list_tree, usual_surroundings
from holdfast.agent.machine.records import TROUBLE
from holdfast.agent.machine.setup_archive import MOST_BYTES, PIECE_BYTES, Piece, Uncacheable, pack, put_in_place, unpack
from holdfast.checkpoint.threads import DaemonPool
from holdfast.core.clock import Clock
from holdfast.core.config import format_bytes, format_duration
from holdfast.core.errors import IntegrityError, StoreFull
from holdfast.core.job_record import JobRecord
from holdfast.core.sealed import FORMAT_VERSION, digest
from holdfast.store.base import Store
from holdfast.store.records import read_record, write_record

__all__ = ["SetupCache", "SetupRecord", "piece_key", "record_key", "trees_of"]

_FORM = 1
"""Of what stands in an archive: another number is another key."""
_AT_ONCE = 3
_LOOK_S = 0.2
_PAUSES_S = (2.0, 10.0, 30.0, 60.0)
_T = TypeVar("_T")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class SetupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`code/setup-<key>`: what one machine's set-up has made, by pieces, and what it has removed, by tree."""

    format: int
    key: str
    machine: str
    pieces: tuple[Piece, ...]
    gone: dict[str, tuple[str, ...]]
    files: int
    began_unix_s: float
    took_s: float

    def __post_init__(self) -> None:
        for piece in self.pieces:
            if not _DIGEST.fullmatch(piece.digest) or not 0 < piece.size_bytes <= PIECE_BYTES:
                raise ValueError("a piece is named by a BLAKE3 in hex, and has a size")
        if self.total_bytes > MOST_BYTES:
            raise ValueError(f"a set-up has at most {MOST_BYTES} bytes")

    @property
    def total_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)


def record_key(key: str) -> str:
    return f"code/setup-{key}"


def piece_key(piece: Piece) -> str:
    return f"code/{piece.digest}.setup"


def trees_of(job: JobRecord, folder: Path, prefix: Path | None = None) -> dict[str, Path]:
    """What a set-up may change: the working folder, and the environment where that is this machine's own."""
    venv = Path(sys.prefix if prefix is None else prefix)
    trees = {"work": folder / "work"}
    if job.uses_venv and venv.is_relative_to(folder) and venv != folder:
        trees["venv"] = venv
    return trees


class SetupCache:
    """One machine's. Owned by the main thread; `say` may be called from another."""

    def __init__(
        self,
        job: JobRecord,
        store: Store,
        folder: Path,
        environment: Mapping[str, str],
        *,
        machine: str,
        clock: Clock,
        tick: Callable[[], None],
        say: Callable[[str], None],
        trees: Mapping[str, Path] | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        """`tick` is called every moment, and raises when the machine is no longer wanted."""
        self._store, self._folder, self._machine, self._clock = store, folder, machine, clock
        self._tick, self._say = tick, say
        self._trees = dict(trees_of(job, folder) if trees is None else trees)
        self._surroundings = surroundings or usual_surroundings(environment, [folder, *self._trees.values()])
        self._mounted = [mount.target for mount in job.mounts]
        self.key = _key(job, self._trees)
        self._is_kept = False
        """Whether there is nothing to keep: a record stands, or it cannot be seen what the set-up does."""
        self._before: dict[str, dict[str, Entry]] = {}
        self._around: dict[str, Seen] = {}
        self._began_unix_s, self._began_s = clock.unix_s(), clock.monotonic_s()
        self._sender: threading.Thread | None = None

    # ---- on a machine that finds it

    def restore(self) -> bool:
        """Put in place what another machine has made. False: the set-up must be run, on trees that are as they were."""
        began_s = self._clock.monotonic_s()
        try:
            record = read_record(self._store, record_key(self.key), SetupRecord)
            if record is None:
                return False
            self._is_kept = True
            if record.key != self.key:
                raise IntegrityError(f"{record_key(self.key)} is the record of another set-up")
            files = self._take(record)
        except TROUBLE as error:
            self._say(f"holdfast: the cached set-up cannot be used, so it is run here: {_words(error)}")
            return False
        self._say(
            f"holdfast: set-up taken from the cache, as {record.machine} has left it: {files} files, "
            f"{format_bytes(record.total_bytes)}, in {format_duration(round(self._clock.monotonic_s() - began_s, 1))} instead of "
            f"{format_duration(round(record.took_s, 1))}"
        )
        return True

    def _take(self, record: SetupRecord) -> int:
        archive, unpacked = self._folder / "setup.got", self._folder / "setup.new"
        shutil.rmtree(unpacked, ignore_errors=True)
        try:
            if shutil.disk_usage(self._folder).free < 2.1 * record.total_bytes:
                raise StoreFull(f"{self._folder}: no room for {format_bytes(2 * record.total_bytes)}")
            self._fetch(record, archive)
            gone = {label: frozenset(names) for label, names in record.gone.items()}
            made = unpack(archive, self._trees, gone, unpacked, self._tick)
            put_in_place(made, self._trees, gone)
            self._age({"/".join(path.parts[1:]) for path in made.files if path.parts[0] == "work"}, record)
            return len(made.files)
        finally:
            archive.unlink(missing_ok=True)
            shutil.rmtree(unpacked, ignore_errors=True)

    def _fetch(self, record: SetupRecord, archive: Path) -> None:
        archive.touch(mode=0o600)
        places = accumulate((piece.size_bytes for piece in record.pieces), initial=0)
        pool = DaemonPool(_AT_ONCE, "holdfast-setup-get")
        tasks = [
            pool.submit(self._fetch_piece, piece, archive, place)
            for piece, place in zip(record.pieces, places, strict=False)
        ]
        try:
            waiting = set(tasks)
            while waiting:
                done, waiting = wait(waiting, timeout=_LOOK_S, return_when=FIRST_EXCEPTION)
                for task in done:
                    task.result()
                self._tick()
        finally:
            # A request that hangs holds nobody up: what it still brings goes into a file without a name.
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_piece(self, piece: Piece, archive: Path, place: int) -> None:
        with archive.open("rb+") as file:
            body = self._store.get(piece_key(piece), max_bytes=piece.size_bytes)
            if len(body) != piece.size_bytes or digest(body) != piece.digest:
                raise IntegrityError(f"{piece_key(piece)} does not hold the bytes that it is named by")
            file.seek(place)
            file.write(body)

    def _age(self, made: Collection[str], record: SetupRecord) -> None:
        """What was in the working folder before is older than what the set-up has made, as it was on the first machine: `make`
        would make it again. What was mounted there goes by its own times."""
        work, before_s = self._trees["work"], record.began_unix_s - 1
        for name, entry in list_tree(work, self._tick).items():
            is_mounted = any(name == target or name.startswith(f"{target}/") for target in self._mounted)
            if entry.kind == "f" and name not in made and not is_mounted and entry.mtime_ns > before_s * 1e9:
                with suppress(OSError):
                    os.utime(work / name, (before_s, before_s))

    # ---- on a machine that does not

    def look_around(self) -> None:
        """Before the set-up runs."""
        if self._is_kept:
            return
        try:
            self._before = {label: list_tree(tree, self._tick) for label, tree in self._trees.items()}
            self._around = self._surroundings.look(self._tick)
        except OSError as error:
            self._is_kept = True
            self._say(f"holdfast: the set-up will not be cached: {_words(error)}")
        self._began_unix_s, self._began_s = self._clock.unix_s(), self._clock.monotonic_s()

    def keep(self, secrets: Mapping[str, str]) -> None:
        """After the set-up has run, and before the job begins, which changes the same trees. It is sent beside the job."""
        if self._is_kept:
            return
        took_s, archive = self._clock.monotonic_s() - self._began_s, self._folder / "setup.tar"
        try:
            why = self._surroundings.difference(self._around, self._surroundings.look(self._tick))
            if why is not None:
                raise Uncacheable(f"{why}, outside of the working folder and the environment")
            found = {
                label: changes(self._before[label], list_tree(tree, self._tick)) for label, tree in self._trees.items()
            }
            pieces = pack(self._trees, found, archive, secrets, self._tick)
        except TROUBLE as error:
            archive.unlink(missing_ok=True)
            self._say(f"holdfast: the set-up is not cached: {_words(error)}")
            return
        record = SetupRecord(
            format=FORMAT_VERSION, key=self.key, machine=self._machine, pieces=tuple(pieces),
            gone={label: found[label].gone for label in found}, files=sum(len(each.new) for each in found.values()),
            began_unix_s=self._began_unix_s, took_s=took_s,
        )  # fmt: skip
        self._sender = threading.Thread(
            target=self._send, args=(record, archive), name="holdfast-setup-put", daemon=True
        )
        self._sender.start()

    def _send(self, record: SetupRecord, archive: Path) -> None:
        """In a thread: the job does not wait for it. Without the record, nothing is there."""
        try:
            with archive.open("rb") as file:
                for piece in record.pieces:
                    self._patiently(partial(self._store.put_new, piece_key(piece), file.read(piece.size_bytes)))
            stands = self._patiently(lambda: write_record(self._store, record_key(self.key), record))
        except TROUBLE as error:
            self._say(f"holdfast: the set-up is not cached: {_words(error)}")
            return
        finally:
            archive.unlink(missing_ok=True)
        if stands == record:
            size = format_bytes(record.total_bytes)
            self._say(f"holdfast: the set-up is cached for the next machines: {record.files} files, {size}")

    def _patiently(self, act: Callable[[], _T]) -> _T:
        for pause_s in _PAUSES_S:
            try:
                return act()
            except TROUBLE:
                self._clock.sleep(pause_s)
        return act()


def _key(job: JobRecord, trees: Mapping[str, Path]) -> str:
    """Whoever has the same gets the same set-up. Of secrets the names count: a new value needs no new set-up."""
    facts = {
        "form": _FORM,
        "setup": job.setup,
        "code": None if job.code is None else job.code.version,
        "mounts": msgspec.to_builtins(job.mounts),
        "envs": job.envs,
        "secrets": sorted(job.secrets),
        "trees": {label: str(tree) for label, tree in trees.items()},
        "uses_venv": job.uses_venv,
        "holdfast": version("holdfast"),
        "python": sys.version,
        "machine": [platform.machine(), *_kind_of_machine()],
        "system": _text("/etc/os-release"),
        "packages": digest(_text("/var/lib/dpkg/status").encode()),
        "distributions": _distributions(),
        "user": os.geteuid(),
    }
    return digest(json.dumps(facts, sort_keys=True).encode())


def _kind_of_machine() -> list[str]:
    """What is compiled on one machine may run on no other kind: what its CPU and its GPUs can do."""
    cpu = [line for line in _text("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features"))][:1]
    gpus = sorted(
        line.strip()
        for path in Path("/proc/driver/nvidia/gpus").glob("*/information")
        for line in _text(str(path)).splitlines()
        if line.startswith("Model")
    )
    return [*cpu, *gpus, _text("/proc/driver/nvidia/version")]


def _distributions() -> list[list[str]]:
    """What is installed for this Python, by where it is looked for: names and versions."""
    found = []
    for place in filter(os.path.isdir, sys.path):
        with suppress(OSError):
            found.append(sorted(name for name in os.listdir(place) if name.endswith((".dist-info", ".egg-info"))))
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())
