"""Numbered heads: who owns a run, and which checkpoints it has. The rules of fencing live here, and only here.

A head is one immutable object; `put_new` (put if absent) is the only conditional write that S3, GCS, Azure and a POSIX folder
share, so the run's history is a chain of numbers, each won by exactly one writer. The highest number is the truth.

Invariants (docs/decisions/0002-numbered-heads.md has the reasons):
  - Identity is a fresh random token per claim; the attempt number is only for people.
  - A body is computed from the head just before it and names that head's nonce; it is never moved to another number.
  - A put without a clear answer is resolved by reading the number back: own nonce, applied; another nonce, lost; absent, unknown,
    and then the same bytes are put at the same number again until there is an answer.
  - After an applied put the heads are listed: a higher one by somebody else means that this one does not count (`Fenced`), since
    pruned numbers can be won by a very stale writer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from holdfast.checkpoint.format import Head, head_key
from holdfast.core.clock import Clock
from holdfast.core.errors import Fenced, IntegrityError, NotFound, RestoreError, RunRemoved, StoreUnavailable
from holdfast.core.ids import TokenSource
from holdfast.core.sealed import FORMAT_VERSION, MAX_RECORD_BYTES, seal, unseal
from holdfast.store.base import Store

__all__ = ["Change", "Lineage", "Truth", "head_numbers", "read_head", "read_truth"]

_HEAD_NAME = re.compile(r"heads/(\d{8,12})\.json")
_RETRY_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
HEADS_KEPT = 32
"""Older heads are pruned; these many stay for people who ask what happened."""
_VANISHED_TRIES = 100
"""How often a reader starts over because the head that it had listed was pruned meanwhile."""

Change = Callable[[Head], Head]
"""Computes the next head's content from the current one; number, nonce, parent and time are filled in by the lineage."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The newest head that can be believed. `altered` names higher heads whose bytes do not verify."""

    head: Head | None
    highest: int
    altered: tuple[str, ...] = ()


def head_numbers(store: Store) -> list[int]:
    """The numbers of all heads, ascending. Objects with other names are ignored."""
    matches = (_HEAD_NAME.fullmatch(entry.key) for entry in store.list("heads/"))
    numbers = ((int(match[1]), match[0]) for match in matches if match)
    return sorted(number for number, key in numbers if key == head_key(number))


def read_head(store: Store, number: int, run_id: str | None) -> Head:
    """Two tries: a bit that flipped on its way here must not make an older head the truth."""
    try:
        return _read_head_once(store, number, run_id)
    except IntegrityError:
        return _read_head_once(store, number, run_id)


def _read_head_once(store: Store, number: int, run_id: str | None) -> Head:
    key = head_key(number)
    head = unseal(store.get(key, max_bytes=MAX_RECORD_BYTES), Head, what=f"{store.url}/{key}")
    if head.number != number or (run_id is not None and head.run_id != run_id):
        raise IntegrityError(
            f"{store.url}/{key}: holds head {head.number} of run {head.run_id}; it has been swapped or copied"
        )
    return head


def read_truth(store: Store, run_id: str | None = None) -> Truth:
    """The newest head: list, get the highest, list once more. Who finds a higher head, or the one listed pruned, starts over.

    A head whose bytes do not verify is passed over for the one below it, and reported in `altered`. Raises RunConflict for one
    that a newer holdfast has written.
    """
    numbers = head_numbers(store)
    for _ in range(_VANISHED_TRIES):
        head, altered, vanished = None, [], False
        for number in reversed(numbers):
            try:
                head = read_head(store, number, run_id)
                break
            except NotFound:
                vanished = True
                break
            except IntegrityError as error:
                altered.append(str(error))
        again = head_numbers(store)
        if not vanished and again[-1:] == numbers[-1:]:
            return Truth(head, numbers[-1] if numbers else 0, tuple(altered))
        numbers = again
    raise StoreUnavailable(f"{store.url}: the heads that the store lists cannot be read, or change too fast to follow")


class Lineage:
    """A claim on a run: the only way to write heads.

    Thread safety: none; one thread (the saver's) advances at a time. After `Fenced` every call raises `Fenced` again.
    """

    def __init__(self, store: Store, run_id: str, *, clock: Clock, tokens: TokenSource) -> None:
        self._store = store
        self._run_id = run_id
        self._clock = clock
        self._tokens = tokens
        self._owner = tokens()
        self._head: Head | None = None
        self._pending: Head | None = None
        self._fenced: str | None = None

    @property
    def head(self) -> Head:
        """The newest head of this claim."""
        if self._head is None:
            raise RuntimeError("the run has not been claimed yet")
        return self._head

    def claim(self, change: Change | None = None, *, revive: bool = False) -> Head:
        """Become the owner. `change` may alter the claiming head; `revive` allows to claim a run that has been removed.

        Losing the race for a number means computing again from the new truth. Raises Fenced when a higher head appears after the
        claim was applied, RunRemoved for a tombstone, RestoreError when there are heads and none verifies (`revive` starts over
        all the same), StoreUnavailable when there is no answer.
        """
        while True:
            self._refuse_if_fenced()
            truth = self._truth()
            if truth.altered and truth.head is None and not revive:
                raise RestoreError(
                    f"{self._store.url}: none of the run's {len(truth.altered)} heads verifies, so its checkpoints cannot be found "
                    f"({truth.altered[0]}). Bring the heads back from a copy, or start over with fresh=True"
                )
            previous = truth.head or self._nothing()
            if previous.removed and not revive:
                raise RunRemoved(
                    f"{self._store.url}: this run has been removed; start a new generation with fresh=True"
                )
            body = msgspec.structs.replace(
                previous, owner=self._owner, attempt=previous.attempt + 1, kind="claim", finished=False, removed=False
            )
            body = self._stamp(change(body) if change else body, truth.highest + 1, previous.nonce)
            if self._put(body):
                return self._confirm(body)

    def _truth(self) -> Truth:
        """Patient with bytes that flip on the way: who claims on the head below the newest drops that one's checkpoint for good."""
        for pause_s in _RETRY_PAUSES_S[:2]:
            truth = read_truth(self._store, self._run_id)
            if not truth.altered:
                return truth
            self._clock.sleep(pause_s)
        return read_truth(self._store, self._run_id)

    def advance(self, kind: str, change: Change) -> Head:
        """Put the next head, computed by `change` from the newest of this claim.

        Raises Fenced when another attempt owns the run, StoreUnavailable when the outcome is unknown: the next call then first
        finds out (the put may still have been applied, and counts if it was).
        """
        self.settle()
        current = self.head
        body = self._stamp(msgspec.structs.replace(change(current), kind=kind), current.number + 1, current.nonce)
        if not self._put(body):
            self._fence(f"head {body.number} was written by another attempt")
        return self._confirm(body)

    def prune(self) -> None:
        """Remove heads that are too old to matter. Only after the newest has been confirmed."""
        for number in head_numbers(self._store):
            if number <= self.head.number - HEADS_KEPT:
                self._store.delete(head_key(number))

    def _nothing(self) -> Head:
        return Head(
            format=FORMAT_VERSION, run_id=self._run_id, number=0, nonce="", parent="", owner="", attempt=0, kind="none",
            generation=1, unix_s=0.0, identity="", checkpoints=[], condemned=[], pins=[], finished=False, removed=False,
        )  # fmt: skip

    def _stamp(self, body: Head, number: int, parent: str) -> Head:
        return msgspec.structs.replace(
            body, number=number, nonce=self._tokens(), parent=parent, unix_s=self._clock.unix_s()
        )

    def settle(self) -> None:
        """Find out what became of a write whose outcome is unknown. Raises as `advance`."""
        self._refuse_if_fenced()
        if self._pending is not None:
            body = self._pending
            if not self._put(body):
                self._fence(f"head {body.number} was written by another attempt")
            self._confirm(body)

    def _refuse_if_fenced(self) -> None:
        if self._fenced:
            raise Fenced(self._fenced)

    def _put(self, body: Head) -> bool:
        """True: this very body is at its number. False: another is. Raises StoreUnavailable while it is unknown.

        The body stays pending until `_confirm`, whatever is raised on the way there.
        """
        data, key = seal(body), head_key(body.number)
        self._pending = body
        for pause_s in (*_RETRY_PAUSES_S, None):
            try:
                if self._store.put_new(key, data):
                    break
            except StoreUnavailable:
                if pause_s is None:
                    raise
            found = self._read_back(body.number, retry=pause_s is not None)
            if found == data:
                break
            if found is not None:
                self._pending = None
                return False
            if pause_s is None:
                raise StoreUnavailable(f"{self._store.url}/{key}: the outcome of the write is still unknown")
            self._clock.sleep(pause_s)
        return True

    def _read_back(self, number: int, *, retry: bool) -> bytes | None:
        """The bytes at `number`; b"" when it is absent although a higher head exists; None while nothing can be said.

        Seen by the list and not by the read before it: it has just landed, and may be this very write. Bytes that do not verify
        are read again, since they may be this write's, flipped on the way.
        """
        key = head_key(number)
        try:
            try:
                found = self._store.get(key, max_bytes=MAX_RECORD_BYTES)
                unseal(found, Head, what=f"{self._store.url}/{key}")
                return found
            except NotFound:
                return b"" if any(existing > number for existing in head_numbers(self._store)) else None
        except (StoreUnavailable, IntegrityError):
            if not retry:
                raise
            return None

    def _confirm(self, body: Head) -> Head:
        """The put is applied; does it count? While the listing fails it stays pending, and the next call asks again."""
        highest = max(head_numbers(self._store), default=0)
        if highest > body.number:
            self._fence(f"head {highest} has been written by another attempt in the meantime")
        self._head, self._pending = body, None
        return body

    def _fence(self, why: str) -> None:
        self._fenced = (
            f"{self._store.url}: another attempt owns this run now ({why}). This process is stale and must not write. "
            "If two were started by mistake, stop this one; the other goes on from the newest checkpoint"
        )
        self._pending = None
        raise Fenced(self._fenced)
