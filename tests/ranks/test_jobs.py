"""Jobs of several ranks under attack: killed anywhere, at every phase of a save, told to stop on one rank only."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forking import Zygote
from job import BATCH, EPOCHS, SAMPLES
from jobs import Job
from waiting import eventually

from holdfast.core.contract import EXIT_PREEMPTED

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 25 if LONG else 3
STEPS = EPOCHS * SAMPLES // (2 * BATCH)


HARDEST = pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp", pytest.param("hsdp", marks=pytest.mark.long)],
    indirect=True,
)  # fmt: skip
"""Where the ranks share a state out, all that can go wrong where each has all of it can go wrong as well."""


@pytest.fixture(scope="session", params=["ddp", "fsdp", pytest.param("hsdp", marks=pytest.mark.long)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def reference(zygote: Zygote, kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    outcome = Job(zygote, tmp_path_factory.mktemp("reference"), kind=kind).finish()
    assert_every_sample_once(outcome)
    return outcome


def assert_every_sample_once(outcome: list[dict[str, Any]]) -> None:
    seen = sorted(tuple(pair) for rank in outcome for pair in rank["seen"])
    assert seen == [(epoch, number) for epoch in range(EPOCHS) for number in range(SAMPLES)]


def test_random_kills(zygote: Zygote, kind: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of rank 0, of rank 1, of both: the state of every rank comes out bit by bit."""
    rng, kills, number = random.Random(kind), 0, 0
    while kills < KILLS:
        job = Job(zygote, tmp_path / str(number), kind=kind)
        number += 1
        while kills < KILLS and job.strike_at_random(rng, signal.SIGKILL):
            kills += 1
        assert job.finish() == reference, job.said()


def test_told_on_one_rank_all_leave_at_one_step(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = Job(zygote, tmp_path / "a", kind=kind, save_every="1 h")
    for rank in (1, 0):
        job.start(pace_s=0.05)
        job.until_step(job.durable_step() + 4)
        job.signal(rank, signal.SIGTERM)
        assert job.wait() == [EXIT_PREEMPTED] * 2, job.said()
        assert job.durable_step() == job.step(0) == job.step(1), job.said()
    assert job.finish() == reference


@HARDEST
def test_a_notice_on_one_rank(zygote: Zygote, kind: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """It is heard by one machine only; all save at once, train on, and save last together before the deadline."""
    job = Job(zygote, tmp_path / "a", kind=kind, save_every="1 h")
    word = tmp_path / "word"
    job.start(pace_s=0.2, per_machine=1, for_rank={1: {"notice": f"file:{word}"}})
    job.until_step(3)
    word.write_text("5 s")
    assert job.wait() == [EXIT_PREEMPTED] * 2, job.said()
    assert job.durable_step() == job.step(0) == job.step(1) > 3, job.said()
    assert job.finish() == reference


PHASES = [
    *((0, place) for place in ("begin", "own part", "gathered", "root", "head", "told")),
    *((1, place) for place in ("asked to begin", "own part", "handed in", "outcome")),
]


@pytest.mark.parametrize(("rank", "place"), PHASES)
@pytest.mark.parametrize("kind", ["ddp"], indirect=True)
def test_killed_at_each_phase_of_a_save(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], tmp_path: Path, rank: int, place: str
) -> None:
    """The old checkpoint or the new one, whole; nobody hangs; and the restart comes out the same."""
    job = Job(zygote, tmp_path / "a", kind=kind)
    job.start(pace_s=0.002, for_rank={rank: {"place": place, "at": 2}})
    codes = job.wait()
    assert codes[rank] == -signal.SIGKILL, job.said()
    assert codes[1 - rank] != 0, job.said()
    # A save that comes while another is still being written may be left out for the next.
    assert 0 < job.durable_step() < STEPS, job.said()
    assert job.durable_step() % 3 == 0
    assert job.finish() == reference


@HARDEST
def test_a_rank_that_is_behind_does_not_spoil_the_last_save(
    zygote: Zygote, kind: str, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Saves pile up behind a slow store. Rank 0 passes one over for the final one, which rank 1 has yet to come to."""
    job = Job(zygote, tmp_path / "a", kind=kind)
    job.start(pace_s=0.005, for_rank={1: {"late_s": 1.5}})
    job.until_step(STEPS - 5)
    block = Path(f"{job.url}.block")
    block.touch()
    job.until_step(STEPS)
    eventually(lambda: "finished" in job.said() or waits_for_the_last_save(job), job.said)
    block.unlink()
    assert job.wait() == [0, 0], job.said()
    assert job.outcome() == reference


def waits_for_the_last_save(job: Job) -> bool:
    """By the time that rank 0 needs from the last step to its end, which is long over."""
    return time.time() - Path(f"{job.url}.step-0").stat().st_mtime > 0.5
