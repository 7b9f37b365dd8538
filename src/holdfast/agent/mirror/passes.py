"""One look at the folder after the other: what is complete and new becomes a committed checkpoint.

    look: scan → settled? closed? whole by its own format? → the rest as the store has it → commit
    last: the same once more when the command has ended, when only what is known to be complete counts

What is not complete is carried over from the state before: a file that is being written anew stays in the mirror as it was. A
deletion counts only when it has lasted, because some scripts delete before they write.

Invariants:
  - A file is in a state with bytes that it had while its size and times stood still, from the look until they were copied or sent.
  - When the command was killed, what changed since it was last seen complete is not taken, unless it is the only such file, its
    format says that it is whole, and it is known to change by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.agent.mirror.folder import Names, Scan, Signature, Watch, open_for_writing, scan
from holdfast.agent.mirror.local import Memory, remember
from holdfast.agent.mirror.sources import KnownFile, Source, StoredFile, Taker
from holdfast.agent.mirror.state import FileNote, FolderState, take
from holdfast.agent.mirror.whole import says_whole
from holdfast.checkpoint.assemble import Assembled
from holdfast.checkpoint.commit import Committed, Committer
from holdfast.checkpoint.heads import Lineage
from holdfast.checkpoint.read import CheckpointReader
from holdfast.checkpoint.retain import Keep, StoreOpener
from holdfast.checkpoint.threads import DaemonPool
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, SaveError
from holdfast.core.events import Event, Sink
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["Passes", "Suspects"]

_DELETION_SETTLES = 10
"""A deletion counts after this many settle times."""
_PATIENCE_SETTLES = 15
"""For how many settle times a complete file waits for others that are being written: they may belong together."""
_OPEN_FILES_ARE_SEEN = Path("/proc/self/fd").is_dir()
_HASH_THREADS = 2
_SEND_THREADS = 2
"""Each holds one object of up to 64 MiB in memory."""


@dataclass(frozen=True, slots=True)
class Suspects:
    """What a killed command has left: units that may be half written, and units of the mirror that are missing."""

    torn: frozenset[str]
    missing: frozenset[str]


class Passes:
    """What is known of the folder and of its mirror. Thread safety: none; one thread at a time.

    Failure contract: when a pass raises, the state before stands, and the next pass tries again.
    """

    def __init__(
        self,
        root: Path,
        names: Names,
        store: Store,
        lineage: Lineage,
        *,
        settle_s: float,
        keep: Keep,
        open_home: StoreOpener,
        reading: ThreadPoolExecutor,
        clock: Clock,
        tokens: TokenSource,
        sink: Sink,
        say: Callable[[str], None],
    ) -> None:
        self.root, self.names = root, names
        self._store, self._lineage, self._open_home = store, lineage, open_home
        self._settle_s, self._clock, self._sink, self._say, self._reading = settle_s, clock, sink, say, reading
        self._hashing = DaemonPool(_HASH_THREADS, "holdfast-mirror-hash")
        self._sending = DaemonPool(_SEND_THREADS, "holdfast-mirror-send")
        self._committer = Committer(
            store, lineage, keep=keep, open_home=open_home, clock=clock, tokens=tokens, hashing=self._hashing,
            sending=self._sending, before_commit=self._verify,
        )  # fmt: skip
        self._watch = Watch(settle_s)
        self._held = FolderState()
        self._stored_files: dict[str, Assembled] = {}
        self._reader: CheckpointReader | None = None
        self._local: dict[str, Signature] = {}
        """Files and links of the folder that are as the newest state has them."""
        self._complete: dict[str, Mapping[str, Signature]] = {}
        """Units that were seen complete and are not stored yet."""
        self._changed_alone: set[str] = set()
        self._taker: Taker | None = None
        self._restless: set[Path] = set()
        """Large files that were written to while they were sent: they are copied first from then on."""
        self._changed_since_s: dict[str, float] = {}
        self._waiting_since_s: float | None = None
        self._said: set[str] = set()
        self._last: tuple[Scan, set[str], set[str]] = (Scan(), set(), set())
        self.data_commits = 0
        """States committed that held new data, logs apart."""

    # ---- what is known at the start

    def adopt(self, state: FolderState, reader: CheckpointReader, local: Mapping[str, Signature]) -> None:
        """The newest state of the mirror; `local` are the files and links of the folder that are exactly as in it."""
        self._held, self._reader, self._local = state, reader, dict(local)
        self._stored_files = {path: reader.arrays[note.array] for path, note in state.files.items()}
        self._committer.known.add(reader.ref.name, *reader.parts, home=reader.ref.home)
        self._committer.roots.remember(reader.root)

    def trust(self, found: Scan, changed_alone: Iterable[str] = ()) -> None:
        """All that lies in the folder is complete: the command does not run, and nobody is known to have been interrupted."""
        self._complete = {unit: dict(found.units[unit]) for unit in self._changed(found)}
        self._changed_alone.update(changed_alone)
        self.remember()

    @property
    def held(self) -> FolderState:
        return self._held

    @property
    def reader(self) -> CheckpointReader | None:
        """Of the newest state."""
        return self._reader

    def local_after(self, found: Scan, units: Iterable[str]) -> dict[str, Signature]:
        """What the folder has as stored, now that these units were put back."""
        local = dict(self._local)
        for unit in units:
            local |= found.units.get(unit, {})
        return local

    def held_members(self, unit: str) -> set[str]:
        return {path for path in (*self._held.files, *self._held.links) if self.names.unit_of(path) == unit}

    def remember(self) -> None:
        complete = dict(self._local)
        for members in self._complete.values():
            complete |= members
        name = self._reader.ref.name if self._reader is not None else ""
        remember(self.root, Memory(self._lineage.head.run_id, name, complete, sorted(self._changed_alone)))

    # ---- looking

    def look(self) -> bool:
        """One pass while the command runs. Whether a state was committed. Raises what a commit raises."""
        now_s = self._clock.monotonic_s()
        found = scan(self.root, self.names)
        self._watch.observe(found, now_s)
        self._tell_refused(found)
        changed = self._changed(found)
        ready = self._ready(found, changed, now_s)
        self._note_complete(found, ready)
        dropped = {unit for unit in self._absent(found) if self._has_stayed_away(unit, now_s)}
        if not changed and not dropped:
            self._waiting_since_s = None
        if not ready and not dropped:
            return False
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        has_data = bool(dropped) or any(not self.names.is_appended(unit) for unit in ready)
        others_write = any(not self.names.is_appended(unit) for unit in changed - ready)
        if (others_write or not has_data) and now_s - self._waiting_since_s < _PATIENCE_SETTLES * self._settle_s:
            return False
        return self._commit(found, ready, dropped)

    def last(self, *, clean: bool) -> Suspects:
        """Decide, once the command has ended, what of its last work is complete. `clean`: it ended of its own will, so all is.

        Nothing is sent yet: `commit_last` does that. Returns what must not be seen by the next start.
        """
        now_s = self._clock.monotonic_s()
        found = scan(self.root, self.names)
        changed = self._changed(found)
        whole = {unit: self._says_whole(unit, found) for unit in changed}
        accepted = {unit for unit in changed if self.names.is_appended(unit)}
        for unit in changed - accepted:
            seen = self._complete.get(unit) == found.units[unit]
            if whole[unit] is not False and (clean or seen):
                accepted.add(unit)
        rest = changed - accepted
        if len(rest) == 1 and rest <= self._changed_alone and all(whole[unit] for unit in rest):
            accepted |= rest
        self._complete = {unit: dict(found.units[unit]) for unit in accepted}
        absent = self._absent(found)
        dropped = {unit for unit in absent if clean or self._has_stayed_away(unit, now_s)}
        self._last = (found, accepted, dropped)
        self.remember()
        return Suspects(frozenset(changed - accepted), frozenset(absent - dropped))

    def commit_last(self) -> bool:
        """Store what `last` has accepted. Whether a state was committed. Raises what a commit raises; may be called again."""
        found, accepted, dropped = self._last
        return bool(accepted or dropped) and self._commit(found, accepted, dropped)

    def close(self) -> None:
        self._hashing.shutdown(wait=False, cancel_futures=True)
        self._sending.shutdown(wait=False, cancel_futures=True)

    # ---- what is new, and what of it is complete

    def _changed(self, found: Scan) -> set[str]:
        changed = set()
        for unit, members in found.units.items():
            same = all(self._local.get(path) == signature for path, signature in members.items())
            if not same or self.held_members(unit) != members.keys():
                changed.add(unit)
        return changed

    def _absent(self, found: Scan) -> set[str]:
        units = {self.names.unit_of(path) for path in (*self._held.files, *self._held.links)}
        return {unit for unit in units if unit is not None and unit not in found.units}

    def _has_stayed_away(self, unit: str, now_s: float) -> bool:
        return self._watch.absent_for_s(unit, now_s) >= _DELETION_SETTLES * self._settle_s

    def _ready(self, found: Scan, changed: set[str], now_s: float) -> set[str]:
        """Units that are complete: at rest, closed, and not cut short by their own format.

        A file by itself need not be at rest when its format says that it is whole and nobody has it open: a script may write it
        more often than it ever settles.
        """
        self._changed_since_s = {unit: self._changed_since_s.get(unit, now_s) for unit in changed}
        settled = {unit for unit in changed if self._watch.is_settled(unit, now_s)}
        restless = {
            unit for unit in changed - settled
            if unit in found.files and now_s - self._changed_since_s[unit] >= self._settle_s and _OPEN_FILES_ARE_SEEN
        }  # fmt: skip
        if all(self.names.is_appended(unit) for unit in settled | restless):
            return settled
        opened = open_for_writing(self.root)
        ready = {unit for unit in restless - opened if self._says_whole(unit, found)}
        for unit in settled:
            if self.names.is_appended(unit):
                ready.add(unit)
            elif not opened.isdisjoint(found.units[unit]) or self._says_whole(unit, found) is False:
                self._watch.disturbed(unit, now_s)
            else:
                ready.add(unit)
        return ready

    def _says_whole(self, unit: str, found: Scan) -> bool | None:
        """What the formats of the unit's changed files say: False when one is cut short, True when all say that they are whole."""
        said: list[bool | None] = []
        for path, signature in found.units[unit].items():
            if path in found.files and self._local.get(path) != signature:
                try:
                    said.append(says_whole(self.root / path))
                except OSError:
                    said.append(False)
        return False if False in said else True if said and all(said) else None

    def _note_complete(self, found: Scan, ready: set[str]) -> None:
        news = {unit: dict(found.units[unit]) for unit in ready}
        if any(self._complete.get(unit) != members for unit, members in news.items()):
            self._complete |= news
            self.remember()

    def _tell_refused(self, found: Scan) -> None:
        for path in sorted(found.refused - self._said):
            self._said.add(path)
            self._say(
                f"mirror: {path} is left out: only files, folders and links that stay inside the folder are mirrored"
            )

    # ---- a new state

    def _commit(self, found: Scan, wanted: set[str], dropped: set[str]) -> bool:
        with contextlib.closing(Taker(self.root.parent, frozenset(self._restless))) as taker:
            self._taker = taker
            sources = self._take(found, wanted, taker)
            taken = {
                unit for unit in wanted if all(path in sources or path in found.links for path in found.units[unit])
            }
            state = self._assemble(found, taken, dropped, sources)
            # An emptied folder is more likely a script that starts anew than a wish to forget everything.
            if not state.files or not (taken or dropped):
                return False
            number = max((ref.step for ref in self._lineage.head.checkpoints), default=0) + 1
            about = {"folder": _shown([self.root.name])[0], "files": len(state.files), "taken": _shown(taken)}
            snapshot = take(state, sources, number=number, metadata={"step": number, "mirror": about})
            committed = self._committer.commit(snapshot)
        self._note_committed(found, taken, state, committed, snapshot.paths)
        self._emit(
            "mirror.committed",
            step=number, checkpoint=committed.ref.name, files=len(state.files), taken=_shown(taken), dropped=_shown(dropped),
            total_bytes=committed.total_bytes, sent_bytes=committed.sent_bytes,
            deduplicated_bytes=committed.deduplicated_bytes,
        )  # fmt: skip
        self._sweep()
        return True

    def _take(self, found: Scan, wanted: set[str], taker: Taker) -> dict[str, Source]:
        """Where the files of the wanted units come from. One that is not what was seen any more leaves its unit out."""
        sources: dict[str, Source] = {}
        for unit in sorted(wanted):
            files = {path: found.files[path][0] for path in found.units[unit] if path in found.files}
            try:
                sources |= {path: self._source(path, signature, taker) for path, signature in files.items()}
            except SaveError:
                self._watch.disturbed(unit, self._clock.monotonic_s())
        return sources

    def _source(self, path: str, signature: Signature, taker: Taker) -> Source:
        if self._local.get(path) == signature:
            return KnownFile(self.root / path, signature, self._stored_files[path])
        return taker.take(self.root / path, signature)

    def _verify(self) -> None:
        """Before the head: what was read must still be what was seen."""
        changed = self._taker.changed() if self._taker is not None else []
        self._restless.update(changed)
        if changed:
            raise SaveError(f"{changed[0]} changed while it was sent; it is taken again when it has settled")

    def _assemble(self, found: Scan, taken: set[str], dropped: set[str], sources: dict[str, Source]) -> FolderState:
        """The new state. What is carried over from the one before gets its source here."""
        files: dict[str, FileNote] = {}
        links: dict[str, str] = {}
        for path in (*self._held.files, *self._held.links):
            unit = self.names.unit_of(path)
            if unit is None or unit in taken or unit in dropped:
                continue
            if path in self._held.links:
                links[path] = self._held.links[path]
            else:
                files[path], sources[path] = self._held.files[path], self._carried(path, found)
        for path in (path for unit in taken for path in found.units[unit]):
            if path in found.links:
                links[path] = found.links[path][1]
            else:
                signature, mode = found.files[path]
                files[path] = FileNote(mode, signature.mtime_ns, signature.size_bytes)
        known = {**self._held.folders, **found.folders}
        parents = {parent for path in (*files, *links) for parent in _parents(path)}
        folders = {folder: known[folder] for folder in sorted(parents) if folder in known}
        return FolderState(dict(sorted(files.items())), links, folders)

    def _note_committed(
        self, found: Scan, taken: set[str], state: FolderState, committed: Committed, paths: list[str]
    ) -> None:
        ref, written = committed.ref, committed.written
        assert written is not None, "an agent is the only rank of its run"
        data = {unit for unit in taken if not self.names.is_appended(unit)}
        self._note_changed_alone(data)
        self.data_commits += bool(data)
        self._reader = CheckpointReader(self._store, ref, written.root, [written.part], self._open_home)
        self._stored_files = {
            path: self._reader.arrays[entry.name] for path, entry in zip(paths, written.part.arrays, strict=True)
        }
        named = {path: replace(note, array=self._stored_files[path].name) for path, note in state.files.items()}
        self._held = replace(state, files=named)
        kept = {path: sig for path, sig in self._local.items() if path in state.files or path in state.links}
        self._local = kept | {path: sig for unit in taken for path, sig in found.units[unit].items()}
        self._complete = {unit: members for unit, members in self._complete.items() if unit not in taken}
        self._waiting_since_s = None
        self.remember()

    def _carried(self, path: str, found: Scan) -> Source:
        stored, seen = self._stored_files[path], found.files.get(path)
        if seen is not None and seen[0] == self._local.get(path):
            return KnownFile(self.root / path, seen[0], stored)
        return StoredFile(stored, self._stored, self._reading)

    def _stored(self) -> CheckpointReader:
        if self._reader is None:
            raise SaveError("a state refers to a file that is neither in the folder nor in the store")
        return self._reader

    def _note_changed_alone(self, data: set[str]) -> None:
        first = {unit for unit in data if not self.held_members(unit)}
        if len(data) == 1 and not first and data <= self._held.files.keys():
            self._changed_alone |= data
        else:
            self._changed_alone -= data

    def _sweep(self) -> None:
        try:
            self._committer.sweep()
        except HoldfastError as error:
            self._emit("sweep.failed", error=str(error))

    def _emit(self, name: str, **fields: Any) -> None:
        self._sink.emit(Event(name, self._clock.unix_s(), fields))


def _shown(units: Iterable[str]) -> list[str]:
    """Names for people and for JSON: bytes that are no text are replaced, and a long list is cut."""
    return [unit.encode("utf-8", "replace").decode() for unit in sorted(units)[:100]]


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
