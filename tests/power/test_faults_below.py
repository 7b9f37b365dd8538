"""Every call that changes the disk fails once: the save fails cleanly or not at all, and the run goes on.

After the last save the power is cut, with the failed flush remembered: what it did not write, no later flush has written.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from cuts import ROOT, Cut, Survivors
from disk import all_answers, questions, survivor
from interleaved import SCALE, FakeClock, no_home
from parts import request
from seam import HALF, Plan, Seam
from story import claim, local_store, state

from holdfast.checkpoint.retain import Keep
from holdfast.checkpoint.saver import Saver, SaverOptions
from holdfast.core.errors import NotFound, SaveError, StoreError, StoreFull, StoreUnavailable
from holdfast.core.events import CollectingSink
from holdfast.core.ids import seeded_tokens
from holdfast.store.base import Store

_SAVES = 4


def _open_saver(store: Store) -> Saver:
    """One thread for each kind of work, so that the calls always come in the same order."""
    tokens = seeded_tokens(1)
    return Saver(
        store, claim(store, tokens), options=SaverOptions(keep=Keep(2), hash_threads=1, send_threads=1, max_unsaved=1),
        open_home=no_home, clock=FakeClock(), tokens=tokens, sink=CollectingSink(),
    )  # fmt: skip


def _train(store: Store) -> tuple[list[int], list[SaveError]]:
    """The saves that were reported as committed, and the errors of the others. Opening is tried twice, as an agent does."""
    try:
        saver = _open_saver(store)
    except StoreError:
        saver = _open_saver(store)
    committed: list[int] = []
    errors: list[SaveError] = []
    for number in range(_SAVES):
        try:
            saver.save(request(state(number), number)).wait(60)
            committed.append(number)
        except SaveError as error:
            errors.append(error)
        assert saver.drain(60)
        saver.check(lambda message: None)
    saver.close(60)
    return committed, errors


class _Fails:
    """Change `at` fails with this error. With `after_half`, half of a write is taken first, as on a disk that fills up."""

    def __init__(self, at: int, error: int, *, after_half: bool = False) -> None:
        self._at, self._error, self._after_half = at, error, after_half
        self.failed = ""

    def __call__(self, number: int, call: str) -> str | None:
        if number == self._at and self._after_half and call == "writev":
            return HALF
        if number == self._at + self._after_half:
            self.failed = call
            raise OSError(self._error, os.strerror(self._error))
        return None


def _record(base: Path, named: bool, plan: Plan) -> tuple[Seam, list[int], list[SaveError]]:
    base.mkdir()
    seam = Seam(base, plan=plan)
    with seam.installed():
        store = local_store(base / ROOT, named=named)
        committed, errors = _train(store)
        store.close()
    return seam, committed, errors


@pytest.mark.parametrize(
    ("error", "named"),
    [(errno.ENOSPC, False), (errno.EIO, False), pytest.param(errno.EIO, True, marks=pytest.mark.long)],
)
def test_every_change_of_the_disk_fails_once(tmp_path: Path, error: int, named: bool) -> None:
    survivors = Survivors(tmp_path / "cut", named=named, with_ledger=False)
    healthy, committed, errors = _record(tmp_path / "healthy", named, lambda number, call: None)
    assert committed == list(range(_SAVES))
    assert errors == []
    failed_saves = 0
    # The saves make the same calls one after the other, so that every second of all is each of them in one save or another.
    for at, call in list(enumerate(healthy.calls))[:: 1 if SCALE > 1 else 2]:
        for after_half in (False, True) if call == "writev" else (False,):
            plan = _Fails(at, error, after_half=after_half)
            seam, committed, errors = _record(tmp_path / f"{at}-{after_half}", named, plan)
            assert plan.failed
            assert len(committed) >= _SAVES - 1, "the save after the failed one must succeed"
            assert len(committed) + len(errors) == _SAVES
            for failure in errors:
                assert isinstance(failure.__cause__, StoreFull if error == errno.ENOSPC else StoreUnavailable)
            failed_saves += len(errors)
            survivors.check_all(Cut(seam.disk, committed[-1]), most=16)
    assert failed_saves > 0
    assert survivors.outcomes == {0}


@pytest.mark.parametrize("named", [False, True])
def test_what_could_not_be_flushed_gets_no_name(tmp_path: Path, named: bool) -> None:
    """Each flush fails once. A name that is reported is on the disk for certain, and so are all of its bytes."""
    body, failing, failed = b"x" * 10_000, 0, "fsync"
    while failed:
        base = tmp_path / str(failing)
        base.mkdir()
        plan = _FlushFails(failing)
        seam = Seam(base, plan=plan)
        with seam.installed():
            store = local_store(base / ROOT, named=named)
            for _ in range(2):
                try:
                    assert store.put_new("heads/x", body)
                    break
                except StoreUnavailable:
                    with pytest.raises(NotFound):
                        store.get("heads/x", max_bytes=10**6)
            store.close()
        asked = questions(seam.disk)
        for answers in all_answers(asked, 64):
            assert survivor(seam.disk, asked, answers)[str(ROOT / "heads" / "x")] == body
        failed = plan.failed
        failing += 1
    assert failing > 5


class _FlushFails:
    """The flush with this number fails."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.failed = ""

    def __call__(self, number: int, call: str) -> str | None:
        if call == "fsync":
            self._left -= 1
            if self._left == -1:
                self.failed = call
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None
