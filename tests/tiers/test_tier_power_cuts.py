"""The power of the machine fails at any moment, the store does not: what was reported to be on the disk is there, whole, when the
disk is still there; and a record whose bytes the cut has taken is noticed and passed over."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from disk import Folder, all_answers, materialise, questions, survivor
from interleaved import RUN_ID, FakeClock, InlineExecutor, load_tree, no_home
from seam import Seam
from two_tiers_parts import begin, newest_in_store, number_of, state

from holdfast.checkpoint.commit import Committer
from holdfast.checkpoint.heads import Lineage, read_truth
from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.snapshot import lay_out, stream
from holdfast.checkpoint.tier import LocalTier, Staged, Tier, keys_of, load_staged
from holdfast.checkpoint.tree import flatten
from holdfast.core.ids import seeded_tokens
from holdfast.store.memory import MemoryStore

pytestmark = pytest.mark.usefixtures("small_chunks")

_LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
_MOST = 256 if _LONG else 24


class _Cut(NamedTuple):
    """`newest`: the last state that was reported to be on the disk, or in the store."""

    disk: Folder
    objects: dict[str, bytes]
    newest: int


@dataclass
class _Machine:
    """The two halves of a save in one thread, so that the calls always come in the same order."""

    base: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    cuts: list[_Cut] = field(default_factory=list)
    newest: int = -1

    def work(self, seam: Seam) -> None:
        seam.after = lambda: self.cut(seam)
        tokens = seeded_tokens(1)
        lineage = Lineage(self.store, RUN_ID, clock=FakeClock(), tokens=tokens)
        lineage.claim()
        tier = Tier(LocalTier(self.base / "disk"), RUN_ID)
        committer = Committer(
            self.store, lineage, keep=Keep(1), open_home=no_home, clock=FakeClock(), tokens=tokens,
            hashing=InlineExecutor(), sending=InlineExecutor(),
        )  # fmt: skip
        under_way: list[Staged] = []
        committed: set[str] = set()
        for number, promoted in ((1, True), (2, False), (4, True), (5, False), (6, False), (7, True)):
            waiting = under_way[-1:]
            tier.keep_only({key for staged in waiting for key in keys_of(staged)} | committed)
            flat = flatten(state(number))
            snapshot = stream(flat, lay_out(flat), step=number, epoch=0, metadata={})
            staged = committer.stage(snapshot, tier, waiting)
            self.newest = number
            self.cut(seam)
            under_way.append(staged)
            if promoted:
                committer.promote(staged, tier)
                committer.sweep()
                committed, under_way = keys_of(staged), []
                self.cut(seam)
        tier.store.close()

    def cut(self, seam: Seam) -> None:
        self.cuts.append(_Cut(copy.deepcopy(seam.disk), dict(self.store._contents.objects), self.newest))


def _recorded(base: Path, **changes: bool) -> _Machine:
    base.mkdir()
    machine = _Machine(base)
    seam = Seam(base)
    for name, value in changes.items():
        setattr(seam, name, value)
    with seam.installed():
        machine.work(seam)
    return machine


def _check_all(machine: _Machine, scratch: Path, *, flushed: bool, most: int = _MOST) -> tuple[int, set[int]]:
    """How many survivors there were, and by how much what they gave back is newer than what was reported."""
    seen: set[int] = set()
    gains: set[int] = set()
    for cut in machine.cuts if flushed else machine.cuts[:: 1 if _LONG else 20]:
        asked = questions(cut.disk)
        for answers in all_answers(asked, most):
            tree = survivor(cut.disk, asked, answers)
            told_apart = hash((frozenset(item for item in tree.items() if "/.tmp/" not in item[0]), cut.newest))
            if told_apart in seen:
                continue
            seen.add(told_apart)
            materialise(tree, scratch)
            gains.add(_check(scratch, cut, flushed=flushed))
            shutil.rmtree(scratch)
    return len(seen), gains


def _check(folder: Path, cut: _Cut, *, flushed: bool) -> int:
    store = MemoryStore()
    store._contents.objects.update(cut.objects)
    head = read_truth(store, RUN_ID).head
    assert head is not None
    tier, passed_over = Tier(LocalTier(folder / "disk"), RUN_ID), []

    def fell_back(fallback: Any) -> None:
        passed_over.append(fallback.checkpoint.step)

    found = load_staged(tier, store, head, no_home, load_tree, fell_back=fell_back)
    tier.store.close()
    number = newest_in_store(store) if found is None else number_of(found[1])
    if flushed:
        assert number >= cut.newest, "what was reported to be on the disk is lost"
        assert not passed_over, "a record names bytes that the cut has taken"
    return number - cut.newest


def test_the_power_fails_after_every_change(tmp_path: Path) -> None:
    machine = _recorded(tmp_path / "base")
    assert len(machine.cuts) > 100
    count, gains = _check_all(machine, tmp_path / "cut", flushed=True)
    assert count > 100
    assert gains <= {0, 1, 2}
    assert 0 in gains


@pytest.mark.parametrize("changes", [{"flush_files": False}, {"flush_folders": False}], ids=str)
def test_a_disk_that_lies_about_flushing(tmp_path: Path, changes: dict[str, bool]) -> None:
    """Then staged checkpoints may be lost, which the check above would find; but never is a wrong value restored."""
    machine = _recorded(tmp_path / "base", **changes)
    _, gains = _check_all(machine, tmp_path / "cut", flushed=False, most=_MOST if _LONG else 4)
    assert min(gains) < 0, "the check can fail"


def test_the_next_attempt_after_a_cut(tmp_path: Path) -> None:
    """From a few of the survivors the real thing goes on: restores, adopts, saves, and leaves no garbage."""
    machine = _recorded(tmp_path / "base")
    for number, cut in enumerate(machine.cuts[:: max(1, len(machine.cuts) // 12)]):
        asked = questions(cut.disk)
        here = tmp_path / str(number)
        materialise(survivor(cut.disk, asked, [question.answers - 1 for question in asked]), here)
        store = MemoryStore()
        store._contents.objects.update(cut.objects)
        attempt = begin(store, LocalTier(here / "disk"))
        assert attempt.restored >= cut.newest
        attempt.save(11)
        attempt.close()
        assert attempt.warnings() == []
        assert newest_in_store(store) == 11
