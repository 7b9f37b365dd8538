"""The power fails at any moment: what was reported as committed is there afterwards, and every checkpoint is whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cuts import ROOT, Cut, Killed, Record, Survivors, dies_at, record
from disk import File, Folder, all_answers, materialise, questions, survivor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interleaved import SCALE
from seam import Seam
from story import Trainer, check, local_store, same, state

from holdfast.core.errors import HoldfastError
from holdfast.store import local
from holdfast.store.base import Body
from holdfast.store.local import LocalStore


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_power_fails_after_every_change(tmp_path: Path, named: bool) -> None:
    made = record(tmp_path / "base", named=named)
    survivors = Survivors(tmp_path / "cut", named=named)
    for cut in made.cuts:
        survivors.check_all(cut)
    assert survivors.checked > 100
    assert survivors.outcomes == {0, 1}


@pytest.fixture(scope="module", params=[False, True], ids=["unnamed", "named"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Record]:
    return request.param, record(tmp_path_factory.mktemp("told") / "base", named=request.param)


@settings(
    max_examples=1000 if SCALE > 1 else 60, deadline=None, derandomize=SCALE == 1,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
def test_any_mixture_of_what_reached_the_disk(
    told: tuple[bool, Record], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """And a second cut while the attempt after the first one is at work."""
    named, made = told
    folder = tmp_path_factory.mktemp("cut")
    cut = data.draw(st.sampled_from(made.cuts))
    tree = _draw(data, cut)
    materialise(tree, folder / "base")
    seam = Seam(folder / "base", plan=dies_at(data.draw(st.integers(0, 60))))
    seam.adopt(tree)
    with seam.installed():
        store = local_store(folder / "base" / ROOT, named=named)
        try:
            Trainer(store, 8).save(cut.newest + 2)
        except Killed:
            pass
        store.close()
    tree = _draw(data, Cut(seam.disk, cut.newest))
    materialise(tree, folder / "again")
    check(folder / "again" / ROOT, cut.newest, named=named, or_also=cut.newest + 2)
    shutil.rmtree(folder)


def _draw(data: st.DataObject, cut: Cut) -> dict[str, bytes | None]:
    asked = questions(cut.disk)
    return survivor(cut.disk, asked, [data.draw(st.integers(0, question.answers - 1)) for question in asked])


@pytest.mark.parametrize("named", [False, True])
def test_killed_then_gone_on_then_the_power_fails(tmp_path: Path, named: bool) -> None:
    """What the killed process had not flushed, and the next one found and relied on, must not be lost."""
    survivors = Survivors(tmp_path / "cut", named=named, with_ledger=False)
    at, killed = 0, True
    while killed:
        base = tmp_path / f"base-{at}"
        base.mkdir()
        seam = Seam(base, plan=dies_at(at))
        with seam.installed():
            first = local_store(base / ROOT, named=named)
            try:
                trainer = Trainer(first, 1)
                for number in range(2):
                    trainer.save(number)
                killed = False
            except Killed:
                pass
            seam.plan = lambda number, call: None
            second = local_store(base / ROOT, named=named)
            going_on = Trainer(second, 2)
            found = next(n for n in (-1, 0, 1) if same(going_on.restored, state(n) if n >= 0 else None))
            going_on.save(found + 1)
            first.close()
            second.close()
        survivors.check_all(Cut(seam.disk, found + 1), most=16)
        at += 1
    assert at > 80
    assert survivors.outcomes == {0}


# The check can fail: each of these mistakes loses a checkpoint, and is found.


class _Renames(LocalStore):
    """Takes a name by rename, whoever has it."""

    def put_new(self, key: str, body: bytes) -> bool:
        if not key.startswith("heads/"):
            return super().put_new(key, body)
        return self._write(key, lambda folder, name: self._renamed(folder, name, body))

    def _renamed(self, folder: int, name: str, body: bytes) -> bool:
        with self._temporary([memoryview(body)]) as (temporary, temporaries):
            vars(local)["os"].rename(temporary, name, src_dir_fd=temporaries, dst_dir_fd=folder)
        return True


class _HeadFirst(LocalStore):
    """Names a checkpoint before its bytes are written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._waiting: list[tuple[str, bytes]] = []

    def put(self, key: str, body: Body) -> None:
        if key.startswith(("data/", "checkpoints/")):
            self._waiting.append((key, _joined(body)))
        else:
            super().put(key, body)

    def put_new(self, key: str, body: bytes) -> bool:
        created = super().put_new(key, body)
        while key.startswith("heads/") and self._waiting:
            super().put(*self._waiting.pop(0))
        return created


def _joined(body: Body) -> bytes:
    return bytes(body) if isinstance(body, bytes | memoryview) else b"".join(body)


def _forget_files(seam: Seam) -> None:
    seam.flush_files = False


def _forget_folders(seam: Seam) -> None:
    seam.flush_folders = False


def _nothing(seam: Seam) -> None:
    return None


class _Mistake(NamedTuple):
    what: str
    found: str
    change: Callable[[Seam], None] = _nothing
    open_store: Callable[[Path], LocalStore] | None = None


_MISTAKES = [
    _Mistake("files are not flushed", "not a holdfast record|is not whole", change=_forget_files),
    _Mistake("folders are not flushed", "was reported|was recorded before a save is lost", change=_forget_folders),
    _Mistake("a head is taken by rename", "a stale attempt's save was committed", open_store=_Renames),
    _Mistake("the head is written before the data", "is not whole", open_store=_HeadFirst),
]


@pytest.mark.parametrize(("what", "found", "change", "open_store"), _MISTAKES, ids=[case.what for case in _MISTAKES])
def test_the_check_finds_a_mistake(
    tmp_path: Path,
    what: str,
    found: str,
    change: Callable[[Seam], None],
    open_store: Callable[[Path], LocalStore] | None,
) -> None:
    survivors = Survivors(tmp_path / "cut")
    with pytest.raises((AssertionError, HoldfastError), match=found):
        _cut_everywhere(survivors, lambda: record(tmp_path / "base", change=change, open_store=open_store))


def _cut_everywhere(survivors: Survivors, recorded: Callable[[], Record]) -> None:
    for cut in recorded().cuts:
        survivors.check_all(cut)


# The model itself


def test_a_volatile_name_may_be_either_until_its_folder_is_flushed() -> None:
    base, file = Folder(), File()
    file.write(0, b"x" * 9000)
    base.bind("a", file)
    assert [node is file for node in base.bindings("a")] == [False, True]
    assert _trees(base) > 4
    file.flushed()
    assert _trees(base) == 2
    base.flushed()
    assert _trees(base) == 1
    base.bind("a", None)
    base.flush_failed()
    base.flushed()
    assert _trees(base) == 2, "a flush after a failed one writes nothing of what was lost"


def _trees(base: Folder) -> int:
    asked = questions(base)
    return len({frozenset(survivor(base, asked, answers).items()) for answers in all_answers(asked, 10**6)})
