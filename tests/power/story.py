"""A short training history on the local store, what must be found wherever it is cut off, and how a later attempt goes on.

    first attempt: claim (new run), save 0 to 2        → deduplication, retention and sweeping all happen
    second attempt: claim, restore; the first one's save is refused; save 3, save 4; the ledger is flushed before each commit

Everything runs in one thread and from a seed, so that the n-th call of the operating system is always the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import FakeClock, InlineExecutor, load_tree, make_state, no_home, same_state
from seam import Seam

from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.format import Head
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import restore_newest
from holdfast.checkpoint.retain import Keep, checkpoint_keys, read_root
from holdfast.checkpoint.runs.begin import claim_empty
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tree import flatten
from holdfast.core.errors import Fenced
from holdfast.core.events import Event
from holdfast.core.ids import TokenSource, seeded_tokens
from holdfast.ledger.append import Ledger
from holdfast.ledger.read import read_events
from holdfast.store.base import Store
from holdfast.store.local import LocalStore

__all__ = ["SAVES", "Trainer", "check", "local_store", "same", "state", "tell_story"]

SAVES = 5
_STALE = 50
_FOLLOWING = 60
_BOOKKEEPING = ("heads/", "events/", "probes/", ".tmp/")
"""Besides what the head reaches. A killed attempt may leave a probe of a few bytes; a killed writer leaves its temporary file for
a day."""


def state(number: int) -> dict[str, Any]:
    return {**make_state("A", number), "large": np.full(3000, number // 3, dtype=np.int64)}


def same(one: Any, other: Any) -> bool:
    return one is other or (one is not None and other is not None and same_state(one, other))


def local_store(root: Path, *, named: bool) -> LocalStore:
    """`named`: as on a file system without unnamed files."""
    store = LocalStore(root)
    store._unnamed_files = not named
    return store


def claim(store: Store, tokens: TokenSource) -> Lineage:
    """As a trainer does it: a new run is probed, gets its record and its first head."""
    head = read_truth(store).head
    if head is None or not head.checkpoints:
        return claim_empty(store, clock=FakeClock(), tokens=tokens)
    lineage = Lineage(store, head.run_id, clock=FakeClock(), tokens=tokens)
    lineage.claim()
    return lineage


class Trainer:
    """One attempt in the calling thread. `restored` is the state that it began with, None where there was none."""

    def __init__(self, store: Store, seed: int, *, with_ledger: bool = False) -> None:
        tokens = seeded_tokens(seed)
        self.store = store
        self.lineage = claim(store, tokens)
        head = self.lineage.head
        self.ledger = (
            Ledger(store, attempt=head.attempt, node="n", clock=FakeClock(), flush_every_s=1e6) if with_ledger else None
        )
        self.committer = Committer(
            store, self.lineage, keep=Keep(2), open_home=no_home, clock=FakeClock(), tokens=tokens,
            hashing=InlineExecutor(), sending=InlineExecutor(),
            before_commit=self.ledger.flush if self.ledger else lambda: None,
        )  # fmt: skip
        self.restored = self._restore(head)

    def _restore(self, head: Head) -> Any:
        found = restore_newest(self.store, head, no_home, lambda reader: (reader, load_tree(reader)), fell_back=_never)
        if found is None:
            return None
        reader, tree = found
        self.committer.known.add(reader.ref.name, *reader.parts, home=None)
        self.committer.roots.remember(reader.root)
        return tree

    def save(self, number: int) -> None:
        if self.ledger:
            self.ledger.emit(Event("saving", 0.0, {"step": number}))
        flat = flatten(state(number))
        self.committer.commit(stream(flat, lay_out(flat), step=number, epoch=0, metadata={}))

    def close(self) -> None:
        if self.ledger:
            self.ledger.close()


def _never(fallback: object) -> None:
    raise AssertionError(f"a checkpoint that a head names is not whole: {fallback}")


def tell_story(
    open_store: Callable[[], Store], reported: Callable[[int], None], *, with_ledger: bool = True, saves: int = SAVES
) -> None:
    """`reported` is told of every save as soon as it is committed, before the sweep that follows."""
    first = Trainer(open_store(), 1, with_ledger=with_ledger)
    assert first.restored is None
    _save(first, range(3), reported)
    second = Trainer(open_store(), 2, with_ledger=with_ledger)
    assert same(second.restored, state(2))
    try:
        first.save(_STALE)
    except Fenced:
        pass
    else:
        raise AssertionError("a stale attempt's save was committed")
    _save(second, range(3, saves), reported)
    for trainer in (first, second):
        trainer.close()
        trainer.store.close()


def _save(trainer: Trainer, numbers: range, reported: Callable[[int], None]) -> None:
    for number in numbers:
        trainer.save(number)
        reported(number)
        trainer.committer.sweep()


def check(
    folder: Path, newest: int, *, named: bool = False, with_ledger: bool = True, or_also: int | None = None
) -> int:
    """`newest` is the last save that was reported, -1 for none. Returns the one that is found: it, the one after it, or `or_also`.

    A fresh attempt restores the very same, goes on, and clears away everything that is not needed.
    """
    with Seam().installed():
        return _check(folder, newest, named, with_ledger, newest + 1 if or_also is None else or_also)


def _check(folder: Path, newest: int, named: bool, with_ledger: bool, or_also: int) -> int:
    store = local_store(folder, named=named)
    head = read_truth(store).head
    read = head and restore_newest(store, head, no_home, load_tree, fell_back=_never)
    allowed = [
        number for number in sorted({newest, newest + 1, or_also}) if same(read, state(number) if number >= 0 else None)
    ]
    assert allowed, f"save {newest} was reported; found: {read and read['who']}"
    if with_ledger:
        events = [recorded.event.fields["step"] for recorded in read_events(store)]
        assert [step for step in events if step <= newest] == list(range(newest + 1)), (
            f"what was recorded before a save is lost: {events}"
        )
    following = Trainer(store, 3)
    assert same(following.restored, read)
    following.save(_FOLLOWING)
    following.committer.sweep()
    restored = restore_newest(store, following.lineage.head, no_home, load_tree, fell_back=_never)
    assert same(restored, state(_FOLLOWING))
    _no_garbage(store, folder, following.lineage.head)
    store.close()
    return allowed[0]


def _no_garbage(store: Store, folder: Path, head: Head) -> None:
    reached = {key for ref in head.checkpoints for key in checkpoint_keys(ref, read_root(store, ref))}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    lost = (reached | {"run.json"}) - files
    assert not lost, f"was reported as written and is lost: {sorted(lost)}"
    garbage = {file for file in files - reached - {"run.json"} if not file.startswith(_BOOKKEEPING)}
    assert not garbage, f"garbage that no sweep removes: {sorted(garbage)}"
