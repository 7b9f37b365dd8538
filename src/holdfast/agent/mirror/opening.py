"""Before a start: what shall the script find in its folder?

On a fresh machine (the folder is absent or empty) the newest state that verifies. Otherwise, in this order:
  1. The folder took part in the newest state (this machine's memory says so): it stays, with what is complete and newer. What is
     not known to be complete is moved aside, and the mirror's version takes its place.
  2. It took part in another state of this run (somebody else went on, or the run was rolled back): the store wins, and the folder
     is kept under another name.
  3. Nothing is remembered: the store wins when the newest file of the folder is not newer than the newest of the state, and the
     folder is kept under another name; else the folder stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holdfast.agent.mirror.folder import Names, Scan, Signature, scan
from holdfast.agent.mirror.local import Memory, recall
from holdfast.agent.mirror.passes import Passes, Suspects
from holdfast.agent.mirror.restore import clear_leftovers, put_back, restore_whole, set_aside, set_torn_aside
from holdfast.agent.mirror.state import FolderState, read_state
from holdfast.agent.mirror.whole import says_whole
from holdfast.checkpoint.format import Head
from holdfast.checkpoint.near import NearFor
from holdfast.checkpoint.read import CheckpointReader, Fallback, restore_newest
from holdfast.checkpoint.retain import StoreOpener
from holdfast.core.config import format_bytes
from holdfast.core.ids import TokenSource
from holdfast.store.base import Store

__all__ = ["mend", "open_folder"]


def open_folder(
    passes: Passes,
    store: Store,
    head: Head,
    open_home: StoreOpener,
    *,
    fresh: bool,
    reading: ThreadPoolExecutor,
    tokens: TokenSource,
    say: Callable[[str], None],
    fell_back: Callable[[Fallback], None],
    near: Sequence[NearFor] = (),
) -> CheckpointReader | None:
    """Restore, keep or mend, by the rules above. Returns the state that was restored, None when the folder stays as it was.
    `near`: where on this machine copies may be.

    Raises RestoreError, and what the store raises.
    """
    root, names = passes.root, passes.names
    clear_leftovers(root)
    found = scan(root, names)
    memory = recall(root)
    if memory is not None and memory.run_id != head.run_id:
        memory = None
    newest = next((ref.name for ref in reversed(head.checkpoints) if ref.generation == head.generation), "")

    def load(reader: CheckpointReader) -> CheckpointReader | None:
        state = read_state(reader)
        stays = "" if found.is_empty() else _why_it_stays(found, memory, state, newest, names)
        if stays:
            passes.adopt(state, reader, _equal(found, memory, state))
            say(f"mirror: {root} stays as it is: {stays}")
            return None

        def make_way() -> None:
            if not found.is_empty():
                say(f"mirror: what was in {root} is older than the stored state, and is kept as {set_aside(root)}")

        restore_whole(root, state, reader, reading, tokens(), make_way)
        passes.adopt(state, reader, _signatures(scan(root, names), state))
        passes.remember()
        size = format_bytes(state.total_bytes)
        say(f"mirror: {root} restored: {len(state.files)} files, {size}, state {reader.ref.step} of {store.url}")
        return reader

    restored = None if fresh else restore_newest(store, head, open_home, load, fell_back=fell_back, near=near)
    if restored is None:
        suspects = _suspects(passes, found, memory) if memory is not None and not fresh else None
        if suspects is not None and (suspects.torn or suspects.missing):
            mend(passes, suspects, reading=reading, tokens=tokens, say=say)
        passes.trust(scan(root, names), memory.changed_alone if memory is not None else ())
    return restored


def mend(
    passes: Passes,
    suspects: Suspects,
    *,
    reading: ThreadPoolExecutor,
    tokens: TokenSource,
    say: Callable[[str], None],
) -> None:
    """Take what is half written out of the script's way, and put back what the mirror has in its place.

    Raises RestoreError, IntegrityError, NotFound, and what the store raises.
    """
    root, reader, held = passes.root, passes.reader, passes.held
    if suspects.torn:
        aside = set_torn_aside(root, suspects.torn)
        say(f"mirror: not known to be complete, moved to {aside}: {_listed(suspects.torn)}")
    members = {unit: passes.held_members(unit) for unit in suspects.torn | suspects.missing}
    back = {unit for unit, paths in members.items() if paths}
    if back and reader is not None:
        put_back(root, back, held, set().union(*(members[unit] for unit in back)), reader, reading, tokens())
        passes.adopt(held, reader, passes.local_after(scan(root, passes.names), back))
        say(f"mirror: put back as stored: {_listed(back)}")


def _listed(units: frozenset[str] | set[str]) -> str:
    shown = sorted(units)[:5]
    return ", ".join(shown) + (f" and {len(units) - len(shown)} more" if len(units) > len(shown) else "")


def _why_it_stays(found: Scan, memory: Memory | None, state: FolderState, newest: str, names: Names) -> str:
    """ "" when the store's state takes the folder's place."""
    if memory is not None:
        return "this machine has written the newest state" if memory.checkpoint == newest else ""
    local_ns = max(
        (signature.mtime_ns for path, (signature, _) in found.files.items() if names.unit_of(path)), default=0
    )
    stored_ns = max((note.mtime_ns for note in state.files.values()), default=0)
    return "it holds files that are newer than those of the stored state" if local_ns > stored_ns else ""


def _signatures(found: Scan, state: FolderState) -> dict[str, Signature]:
    files = {path: signature for path, (signature, _) in found.files.items() if path in state.files}
    return files | {path: signature for path, (signature, _) in found.links.items() if path in state.links}


def _equal(found: Scan, memory: Memory | None, state: FolderState) -> dict[str, Signature]:
    """Files of the folder that are as the state has them: seen complete with the same size and time, and not touched since."""
    if memory is None:
        return {}
    equal = {}
    for path, (signature, _) in found.files.items():
        note = state.files.get(path)
        seen = note is not None and memory.complete.get(path) == signature
        if note is not None and seen and (note.size_bytes, note.mtime_ns) == (signature.size_bytes, signature.mtime_ns):
            equal[path] = signature
    for path, (signature, target) in found.links.items():
        if state.links.get(path) == target:
            equal[path] = signature
    return equal


def _suspects(passes: Passes, found: Scan, memory: Memory) -> Suspects:
    """What nobody has seen complete: this agent was not there when it was written, and the one before was killed."""
    torn = set()
    for unit, members in found.units.items():
        seen = all(memory.complete.get(path) == signature for path, signature in members.items())
        if not seen and not passes.names.is_appended(unit) and not _is_lone_and_whole(passes.root, unit, memory):
            torn.add(unit)
    held = {passes.names.unit_of(path) for path in (*passes.held.files, *passes.held.links)}
    return Suspects(frozenset(torn), frozenset(unit for unit in held if unit is not None and unit not in found.units))


def _is_lone_and_whole(root: Path, unit: str, memory: Memory) -> bool:
    try:
        return unit in memory.changed_alone and says_whole(root / unit) is True
    except OSError:
        return False
