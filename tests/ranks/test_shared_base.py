"""A frozen base of several ranks: each refers to it for its own part, and sends what it has trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from forking import Zygote
from jobs import Job

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.runs.verify import verify
from holdfast.store.local import LocalStore
from holdfast.store.open import open_store

TRAINED = {"frozen": True, "save_every": "2 steps"}


def sent_bytes(job: Job) -> int:
    return sum(path.stat().st_size for path in (job.url / "data").rglob("*") if path.is_file())


def homes(job: Job) -> set[str]:
    return {pin.home for pin in read_truth(LocalStore(job.url)).head.pins}


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_what_is_frozen_is_not_sent_again(zygote: Zygote, kind: str, tmp_path: Path) -> None:
    """The trial dies in the middle of a save, and goes on; it ends as one that sends everything, and its checkpoints are whole."""
    base = Job(zygote, tmp_path / "base", kind=kind, **TRAINED)
    base.finish()
    alone = Job(zygote, tmp_path / "alone", kind=kind, **TRAINED)
    expected = alone.finish()
    trial = Job(zygote, tmp_path / "trial", kind=kind, base=str(base.url), **TRAINED)
    trial.start(for_rank={1: {"place": "handed in", "at": 4}})
    trial.wait_or_end()
    assert homes(trial) == {LocalStore(base.url).url}
    assert trial.finish() == expected
    assert sent_bytes(trial) < 0.9 * sent_bytes(alone)
    assert verify(LocalStore(trial.url), open_home=open_store).good
    assert len(list((base.url / "pins").glob("*.json"))) == 1


def test_a_rank_that_cannot_read_the_base_sends_its_part_whole(zygote: Zygote, tmp_path: Path) -> None:
    base = Job(zygote, tmp_path / "base", **TRAINED)
    base.finish()
    expected = Job(zygote, tmp_path / "alone", **TRAINED).finish()
    trial = Job(zygote, tmp_path / "trial", base=str(base.url), **TRAINED)
    trial.start(for_rank={1: {"blind": True}})
    assert trial.wait() == [0, 0]
    assert "cannot read the base" in trial.said()
    assert trial.outcome() == expected


def test_a_base_that_is_not_there_stops_all_ranks(zygote: Zygote, tmp_path: Path) -> None:
    trial = Job(zygote, tmp_path / "trial", base=str(tmp_path / "bass"), **TRAINED)
    trial.start()
    assert all(code > 0 for code in trial.wait())
    assert "no run here" in trial.said()
    assert not (tmp_path / "bass").exists()
