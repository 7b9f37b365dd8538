"""From a recorded history to everything that a power cut may leave of it, and the check of each survivor."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from disk import Folder, Tree, all_answers, materialise, questions, survivor
from seam import Plan, Seam
from story import check, local_store, tell_story

from holdfast.store.base import Store

__all__ = ["MOST", "ROOT", "Cut", "Killed", "Record", "Survivors", "dies_at", "record"]

ROOT = Path("made", "for", "run")
"""Below the base, which alone is durable before the run begins."""
MOST = 48
"""Combinations of one cut that are tried one by one; beyond, its corners are, and random ones by hypothesis."""


class Killed(BaseException):
    """The process ends here; nothing that it would still do reaches the disk."""


class Cut(NamedTuple):
    """A moment at which the power may fail. `newest`: the last save reported by then."""

    disk: Folder
    newest: int


@dataclass
class Record:
    """A history's cuts, one after each change of the disk."""

    cuts: list[Cut] = field(default_factory=list)
    newest: int = -1

    def reported(self, number: int) -> None:
        self.newest = number


def dies_at(at: int) -> Plan:
    """Killed before change `at` and, so that no clean-up is done, before every later one."""

    def plan(number: int, call: str) -> str | None:
        if number >= at:
            raise Killed
        return None

    return plan


def record(
    base: Path,
    *,
    named: bool = False,
    open_store: Callable[[Path], Store] | None = None,
    change: Callable[[Seam], None] = lambda seam: None,
    with_ledger: bool = True,
) -> Record:
    """Tell the story once, and keep what the disk may hold before and after each change."""
    made = Record()
    base.mkdir()
    seam = Seam(base, after=lambda: made.cuts.append(Cut(copy.deepcopy(seam.disk), made.newest)))
    change(seam)

    def opening() -> Store:
        return open_store(base / ROOT) if open_store else local_store(base / ROOT, named=named)

    with seam.installed():
        tell_story(opening, made.reported, with_ledger=with_ledger)
    made.cuts.append(Cut(copy.deepcopy(seam.disk), made.newest))
    return made


class Survivors:
    """Checks trees, each once: many cuts leave the same one."""

    def __init__(self, folder: Path, *, named: bool = False, with_ledger: bool = True) -> None:
        self._folder, self._named, self._with_ledger = folder, named, with_ledger
        self._seen: set[tuple[int, int]] = set()
        self.outcomes: set[int] = set()
        folder.mkdir()

    @property
    def checked(self) -> int:
        return len(self._seen)

    def check_all(self, cut: Cut, most: int = MOST) -> None:
        asked = questions(cut.disk)
        for answers in all_answers(asked, most):
            self.check(survivor(cut.disk, asked, answers), cut.newest)

    def check(self, tree: Tree, newest: int) -> None:
        # What lies among the temporary files is never read, so that one survivor stands for all that differ there only.
        told_apart = frozenset(item for item in tree.items() if "/.tmp/" not in item[0])
        key = (hash(told_apart), newest)
        if key in self._seen:
            return
        self._seen.add(key)
        here = self._folder / str(len(self._seen))
        materialise(tree, here)
        found = check(here / ROOT, newest, named=self._named, with_ledger=self._with_ledger)
        self.outcomes.add(found - newest)
        shutil.rmtree(here)
