"""A rank dies beside the last save: the others save without it what they hold as well; else the last checkpoint stands."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from forking import Zygote
from job import EPOCHS, SAMPLES
from jobs import Job

from holdfast.core.contract import EXIT_PREEMPTED

BEFORE_ITS_PART = ("asked to begin", "own part")


def leave_while_one_dies(job: Job, size: int, dying: int, place: str) -> None:
    job.start(size, pace_s=0.05, for_rank={dying: {"place": place, "at": 1}})
    job.until_step(4)
    job.signal(0, signal.SIGTERM)
    codes = job.wait()
    assert codes.pop(dying) == -signal.SIGKILL, job.said()
    assert codes == [EXIT_PREEMPTED] * (size - 1), job.said()


@pytest.mark.parametrize("place", BEFORE_ITS_PART)
@pytest.mark.parametrize(("kind", "size"), [("ddp", 3), pytest.param("hsdp", 2, marks=pytest.mark.long)])
def test_the_others_save_what_they_hold(zygote: Zygote, tmp_path: Path, kind: str, size: int, place: str) -> None:
    job = Job(zygote, tmp_path / "a", kind=kind, save_every="1 h", global_batch=12)
    leave_while_one_dies(job, size, size - 1, place)
    assert job.durable_step() == job.step(0) >= 4, job.said()
    # It is a checkpoint like one of so many ranks fewer: any number goes on from it.
    job.finish(size)
    everything = [(epoch, number) for epoch in range(EPOCHS) for number in range(SAMPLES)]
    assert sorted(job.samples_seen()) == everything


def test_what_only_the_dead_one_held_is_lost(zygote: Zygote, tmp_path: Path) -> None:
    job = Job(zygote, tmp_path / "a", kind="fsdp", save_every="2 steps")
    leave_while_one_dies(job, 2, 1, "leaving")
    assert 0 < job.durable_step() < job.step(0), job.said()
    assert "the state is not whole without what only rank 1 had" in job.said()
    job.finish()
