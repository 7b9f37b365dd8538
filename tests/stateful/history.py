"""What must be true of a run, told from nothing but the heads that were applied and the states that were saved.

    attempt → FaultyStore → Witness → a client of the place
                              ↓
                           History: the lineage, every state, every name that was ever condemned

The rules of retention are written down here a second time, in the plainest form, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from interleaved import RUN_ID, load_tree, same_state
from places import Place

from holdfast.checkpoint.format import CheckpointRef, Head, Root, head_key
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.read import open_checkpoint
from holdfast.checkpoint.retain import Keep, checkpoint_keys, read_root
from holdfast.core.errors import IntegrityError, NotFound
from holdfast.core.sealed import MAX_RECORD_BYTES, unseal
from holdfast.store.base import Body, Entry, Store

__all__ = ["History", "State", "Witness", "make_state"]

State = dict[str, Any]


def make_state(step: int, values: Sequence[int]) -> State:
    """Three arrays of six chunks in all, each chunk one of a few contents, so that contents come back; and one that is new."""
    chunks = [np.full(32, value, dtype=np.uint8) for value in values]
    return {
        "a": np.concatenate(chunks[:2]),
        "b": chunks[2],
        "c": np.concatenate(chunks[3:]),
        "own": np.array([step], dtype=np.int64),
        "step": step,
    }


class History:
    """`chain` is the lineage: every head that ever was the truth, in order."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.clean = place.open(place.url)
        self.chain: list[Head] = []
        self.states: dict[int, State] = {}
        self.keeps: dict[str, Keep] = {}
        self.forks: dict[str, int] = {}
        self.condemned: set[str] = set()
        self._nonces: set[str] = set()
        self._roots: dict[str, Root] = {}
        self._read: set[str] = set()

    @property
    def retained(self) -> list[CheckpointRef]:
        return self.chain[-1].checkpoints if self.chain else []

    def owns(self, lineage: Lineage) -> bool:
        return bool(self.chain) and self.chain[-1].owner == lineage._owner

    def reached(self) -> set[str]:
        """Every object that the truth's checkpoints need."""
        return {key for ref in self.retained for key in checkpoint_keys(ref, self._root(ref))}

    def assert_committed(self, ref: CheckpointRef) -> None:
        """From here on it can only be dropped by a head of the lineage, and each of those is checked against its rule."""
        assert any(ref in head.checkpoints for head in self.chain), f"{ref.name} was reported as committed, and is not"

    # The lineage grows

    def saw(self, key: str) -> None:
        """A head was put, whatever the client was told. Is it there, and is it new?"""
        try:
            head = unseal(self.clean.get(key, max_bytes=MAX_RECORD_BYTES), Head, what=key)
        except NotFound:
            return
        if head.nonce not in self._nonces:
            self._nonces.add(head.nonce)
            self._append(head)

    def _append(self, head: Head) -> None:
        truth = self.chain[-1] if self.chain else None
        if truth is not None and head.number <= truth.number:
            return  # A stale attempt's, at a number that was pruned: it must come to learn that it does not count.
        if truth is None:
            assert (head.number, head.parent, head.checkpoints) == (1, "", [])
        else:
            assert head.number == truth.number + 1, "a number was left out"
            assert head.parent == truth.nonce, "the new truth does not derive from the old one"
            self._derives(head, truth)
        self.chain.append(head)
        self.condemned |= set(head.condemned)
        assert not self.reached() & self.condemned, "a condemned object is referred to"

    def _derives(self, head: Head, truth: Head) -> None:
        """Who may write this head, and which checkpoints it must have."""
        before = truth.checkpoints
        if head.kind in ("claim", "rollback"):
            assert head.owner != truth.owner or head.kind == "claim"
            assert head.attempt == truth.attempt + 1
        else:
            assert head.owner == truth.owner, "a fenced attempt's head became the truth"
            assert head.attempt == truth.attempt
        if head.kind == "rollback":
            assert 0 < len(head.checkpoints) < len(before)
            assert head.checkpoints == before[: len(head.checkpoints)], "a rollback dropped what it must not"
        elif head.kind == "save":
            new = head.checkpoints[-1]
            assert new not in before
            assert head.checkpoints == _kept(self.keeps[head.owner], [*before, new]), "retention is not what it says"
        else:
            assert head.kind in ("claim", "sweep")
            assert head.checkpoints == before, "checkpoints were lost"

    def _root(self, ref: CheckpointRef) -> Root:
        if ref.name not in self._roots:
            self._roots[ref.name] = read_root(self.clean, ref)
        return self._roots[ref.name]

    # What stands

    def check(self, *, again: bool = True) -> None:
        """The truth is the lineage's end, and every checkpoint that it retains gives exactly what was saved.

        Without `again`, checkpoints that were read before are only looked for: names are never used twice, so what was right once
        and is still there is right.
        """
        truth = read_truth(self.clean, RUN_ID)
        assert truth.altered == ()
        assert truth.head == (self.chain[-1] if self.chain else None), "the truth is not the last head of the lineage"
        stored = {entry.key for entry in self.clean.list()}
        missing = self.reached() - stored
        assert not missing, f"the truth names objects that are gone: {sorted(missing)}"
        for ref in self.retained:
            if again or ref.name not in self._read:
                self._restores(self.clean, ref)
        for url, step in self.forks.items():
            if again or url not in self._read:
                head = read_truth(self.place.open(url)).head
                assert head is not None
                assert [ref.step for ref in head.checkpoints] == [step]
                self._restores(self.place.open(url), head.checkpoints[0])
                self._read.add(url)

    def _restores(self, store: Store, ref: CheckpointRef) -> None:
        try:
            state = load_tree(open_checkpoint(store, ref, self.place.open))
        except (NotFound, IntegrityError) as error:
            raise AssertionError(f"a hole in {store.url}/{ref.name}: {error}") from error
        self.assert_saved(ref, state)
        self._read.add(ref.name)

    def assert_saved(self, ref: CheckpointRef, state: State) -> None:
        assert same_state(state, self.states[ref.step]), f"{ref.name} holds another state than was saved"


def _kept(keep: Keep, refs: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """The newest, and the first that had the best figure of all."""
    assert keep.last is not None
    kept = set(range(len(refs))[-keep.last :])
    figures = [ref.figure for ref in refs if ref.figure is not None]
    if keep.best is not None and figures:
        best = min(figures) if keep.mode == "min" else max(figures)
        kept.add(next(index for index, ref in enumerate(refs) if ref.figure == best))
    return [ref for index, ref in enumerate(refs) if index in kept]


class Witness:
    """A client whose applied writes are told to the history, at the moment at which they are applied."""

    def __init__(self, inner: Store, history: History) -> None:
        self._inner, self._history = inner, history

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def is_near(self) -> bool:
        return self._inner.is_near

    def put(self, key: str, body: Body) -> None:
        self._inner.put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        try:
            return self._inner.put_new(key, body)
        finally:
            if key.startswith("heads/"):
                self._history.saw(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._inner.get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._inner.read_into(key, offset, buffer)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        chain = self._history.chain
        assert not chain or key != head_key(chain[-1].number), "the truth is deleted"
        assert key not in self._history.reached(), f"{key} is deleted, and the truth needs it"
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()
