"""The machine itself: with one rule of the protocol left out at a time, it must find the harm within so many examples.

What is left out here is what `docs/decisions/0002-numbered-heads.md` and the docstrings of heads.py, commit.py and retain.py say
must not be.
"""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import RunMachine
from places import MemoryPlace

from holdfast.checkpoint import commit, read, retain
from holdfast.checkpoint.commit import Committed, Committer
from holdfast.checkpoint.format import CheckpointRef, Head, head_key
from holdfast.checkpoint.heads import Change, Lineage, Truth, read_truth
from holdfast.checkpoint.retain import Pinned, Roots, checkpoint_keys
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.checkpoint.write import KnownChunks, Written
from holdfast.core.errors import StoreUnavailable
from holdfast.core.sealed import seal
from holdfast.store.base import Store

_EXAMPLES = 300


class NoListAfterThePut(Lineage):
    """A put that is applied counts: nobody looks whether a higher head exists."""

    def _confirm(self, body: Head) -> Head:
        self._head, self._pending = body, None
        return body


class TakesTheAnswerAtItsWord(Lineage):
    """ "The name is taken" means that somebody else took it, and no answer means that nothing was written."""

    def _put(self, body: Head) -> bool:
        return self._store.put_new(head_key(body.number), seal(body))


class MovesItsBody(Lineage):
    """Who loses the race for a number puts the same body at the next one."""

    def claim(self, change: Change | None = None, *, revive: bool = False) -> Head:
        body = read_truth(self._store, self._run_id).head or self._nothing()
        attempt, parent = body.attempt + 1, body.nonce
        while True:
            body = msgspec.structs.replace(body, owner=self._owner, attempt=attempt, kind="claim")
            body = self._stamp(change(body) if change else body, body.number + 1, parent)
            if self._put(body):
                return self._confirm(body)


class Unforgetting(KnownChunks):
    def retain(self, *retained: object) -> None:
        """Keeps what only dropped checkpoints hold."""


class _Everything(set[str]):
    """Whatever is asked for is in it."""

    def __ge__(self, other: object) -> bool:
        return True


class DeduplicatesAgainstThePast(Committer):
    """A chunk that was there once is referred to, and nobody looks again when the head is made."""

    def _commit(self, snapshot: Snapshot, finish: bool) -> Committed:
        if not isinstance(self.known, Unforgetting):
            self.known = Unforgetting()
        return super()._commit(snapshot, finish)

    def _next(self, current: Head, ref: CheckpointRef, written: Written, finish: bool) -> Head:
        reached = set(written.root.objects)
        following = super()._next(msgspec.structs.replace(current, condemned=[]), ref, written, finish)
        condemned = {*current.condemned, *following.condemned} - self._deleted - reached
        return msgspec.structs.replace(following, condemned=sorted(condemned))

    def _retained_objects(self, head: Head) -> set[str]:
        return _Everything()


class DeletesBeforeTheHeadStands(Committer):
    def _next(self, current: Head, ref: CheckpointRef, written: Written, finish: bool) -> Head:
        following = super()._next(current, ref, written, finish)
        for key in following.condemned:
            self._store.delete(key)
        return following


class TakesBackAnUnknownCommit(Committer):
    """After a commit without an answer, the writer deletes what it has uploaded."""

    def _commit(self, snapshot: Snapshot, finish: bool) -> Committed:
        try:
            return super()._commit(snapshot, finish)
        except StoreUnavailable:
            head = self._lineage.head
            for entry in list(self._store.list(f"data/{head.attempt}/")):
                if entry.key not in self._retained_objects(head):
                    self._store.delete(entry.key)
            raise


def _expect_harm(machine: type[RunMachine]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            lambda: machine(MemoryPlace()),  # type: ignore[arg-type]  # any callable will do
            settings=settings(
                max_examples=_EXAMPLES,
                stateful_step_count=20,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.parametrize(
    "lineage", [NoListAfterThePut, pytest.param(TakesTheAnswerAtItsWord, marks=pytest.mark.long), MovesItsBody]
)
def test_a_rule_of_heads_left_out_is_found(lineage: type[Lineage]) -> None:
    _expect_harm(type("Machine", (RunMachine,), {"lineage_type": lineage}))


@pytest.mark.parametrize(
    "committer",
    [
        DeduplicatesAgainstThePast,
        DeletesBeforeTheHeadStands,
        pytest.param(TakesBackAnUnknownCommit, marks=pytest.mark.long),
    ],
)
def test_a_rule_of_commits_left_out_is_found(committer: type[Committer]) -> None:
    _expect_harm(type("Machine", (RunMachine,), {"committer_type": committer}))


def _sweep_what_is_not_mine(store: Store, head: Head, roots: Roots) -> set[str]:
    """Orphans are all that is not the sweeper's own and that its head does not reach, and they go where they are found."""
    reached = {key for ref in head.checkpoints for key in checkpoint_keys(ref, roots.get(ref))}
    for key in [entry.key for prefix in ("data/", "checkpoints/") for entry in store.list(prefix)]:
        if key not in reached and not re.match(rf"data/{head.attempt}/|checkpoints/\d+-{head.attempt}-", key):
            store.delete(key)
    return set()


def test_orphans_that_are_only_not_mine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "find_orphans", _sweep_what_is_not_mine)
    _expect_harm(RunMachine)


def test_a_sweep_that_does_not_look_at_pins_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain, "pinned_keys", lambda store, open_home: Pinned(set(), [], []))
    _expect_harm(RunMachine)


@pytest.mark.long
def test_a_reader_that_does_not_look_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "read_truth", lambda store, run_id: Truth(None, 0))
    _expect_harm(RunMachine)
