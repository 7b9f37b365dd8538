"""Loops with `accelerate.Accelerator`: however often and wherever they are killed, they end as if they never were."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from adapter_grounds import (
    References,
    fetched_by_the_last,
    ground_for,
    killed_often,
    saved_steps,
    stopped_at,
    struck_often,
)
from forking import Zygote
from jobs import Job

from holdfast.core.contract import EXIT_PREEMPTED

ZYGOTE = "accelerate_zygote.py"
SAMPLES, BATCH, EPOCHS = 44, 4, 3
PER_EPOCH = SAMPLES // BATCH
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS, STRIKES = (60, 12) if LONG else (4, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    # 11 batches are 3 steps of 3 and one of 2.
    "accumulating": {"accumulation": 3, "adjust_scheduler": True, "precision": "bf16", "whole": True},
    # Each batch is a step, and saves wait for the end of an accumulation, which may lie in the next epoch.
    "across epochs": {"accumulation": 3, "grouped": False, "sync_with_dataloader": False},
    "workers": {"workers": 2, "accumulation": 4, "batch": 3, "loaders": {"use_seedable_sampler": True}},
    # Steps that the scaler skips, and their effect on the schedule.
    "scaler": {"scaler": True, "accumulation": 2, "whole": True},
    "stateful loader": {"loaders": {"use_stateful_dataloader": True}, "accumulation": 2},
    "stateful loader of a stream": {"loaders": {"use_stateful_dataloader": True}, "data": "stateful-stream"},
    "stream": {"data": "stream", "accumulation": 2, "grouped": False},
    "stateful stream": {"data": "stateful-stream", "accumulation": 2, "grouped": False, "batch": 5},
}
STEPS = {
    "accumulating": 12, "across epochs": 33, "workers": 12, "scaler": 18, "stateful loader": 18,
    "stateful loader of a stream": 33, "stream": 33, "stateful stream": 27,
}  # fmt: skip
OFTEN = ("accumulating", "across epochs", "scaler", "stateful stream")
"""What `make test` has time for."""
WORLDS: dict[str, dict[str, Any]] = {
    "accumulating": {"accumulation": 3, "precision": "bf16", "whole": True},
    "split": {"loaders": {"split_batches": True, "use_seedable_sampler": True}, "accumulation": 2},
    "uneven": {"loaders": {"even_batches": False}, "batch": 5},
    "stream": {"data": "stateful-stream", "accumulation": 2, "grouped": False},
    "sharded stream": {"data": "stateful-stream", "loaders": {"dispatch_batches": False}},
    "stateful loader": {"loaders": {"use_stateful_dataloader": True}},
}


def some(settings: dict[str, Any], often: tuple[str, ...]) -> list[Any]:
    return [name if name in often else pytest.param(name, marks=pytest.mark.long) for name in settings]


@pytest.mark.parametrize("name", some(SETTINGS, OFTEN))
def test_random_kills(zygote: Zygote, references: References, tmp_path: Path, name: str) -> None:
    for outcome in killed_often(zygote, tmp_path, SETTINGS[name], KILLS, name):
        assert outcome == references[name]


@pytest.mark.parametrize("name", some(SETTINGS, OFTEN))
def test_uninterrupted(references: References, name: str) -> None:
    outcome = references[name]
    assert outcome["steps"] == STEPS[name]
    for start in range(0, EPOCHS * SAMPLES, SAMPLES):
        assert sorted(outcome["samples"][start : start + SAMPLES]) == list(range(SAMPLES))
    accumulation = SETTINGS[name].get("accumulation", 1)
    if SETTINGS[name].get("sync_with_dataloader", True):
        per_epoch = len(outcome["syncs"]) // EPOCHS
        for number, (synced, count, at_end) in enumerate(outcome["syncs"], 1):
            place = (number - 1) % per_epoch + 1
            assert at_end == (place == per_epoch)
            assert synced == (at_end or place % accumulation == 0)
            assert count == (0 if at_end else place)
    if SETTINGS[name].get("scaler"):
        assert 0 < outcome["skipped"] < outcome["steps"]


PLACES = [
    ("accumulating", f"stepping:{4}", "1 step"),
    ("across epochs", f"stepping:{PER_EPOCH}", "1 step"),
    ("across epochs", f"evaluating:{PER_EPOCH}", "1 step"),
    pytest.param("scaler", "stepping:5", "1 step", marks=pytest.mark.long),
    pytest.param("stateful loader", "evaluating:6", "2 steps", marks=pytest.mark.long),
    pytest.param("stateful loader of a stream", "evaluating:11", "1 step", marks=pytest.mark.long),
    pytest.param("stateful stream", "evaluating:9", "1 step", marks=pytest.mark.long),
    pytest.param("workers", "stepping:7", "3 steps", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "place", "every"), PLACES)
def test_killed_at(zygote: Zygote, references: References, tmp_path: Path, name: str, place: str, every: str) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    assert stopped_at(ground, place, signal.SIGKILL, save_every=every) == -signal.SIGKILL
    assert ground.finish() == references[name]


@pytest.mark.parametrize(
    ("name", "step"), [("accumulating", 6), ("across epochs", 16), ("scaler", 3), ("stateful stream", 13)]
)
def test_a_notice_is_answered_with_a_checkpoint(
    zygote: Zygote, references: References, tmp_path: Path, name: str, step: int
) -> None:
    """Where the accumulation at hand ends, whatever the interval; and the rest reads what is left and nothing else."""
    ground = ground_for(zygote, tmp_path, SETTINGS[name], save_every="1 h")
    assert stopped_at(ground, f"stepping:{step}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    accumulation = SETTINGS[name].get("accumulation", 1)
    assert step < saved_steps(ground)[-1] <= step + (1 if SETTINGS[name].get("grouped", True) else accumulation)
    outcome = ground.finish()
    assert outcome == references[name]
    fetched = fetched_by_the_last(ground)
    assert outcome["samples"][-len(fetched) :] == fetched


@pytest.mark.parametrize("name", some(WORLDS, ("accumulating", "split")))
def test_two_ranks(zygote: Zygote, tmp_path: Path, name: str) -> None:
    reference = Job(zygote, tmp_path / "reference", **WORLDS[name], save_every="5 steps").finish()
    for outcome in struck_often(zygote, tmp_path / "struck", WORLDS[name], STRIKES, name):
        assert outcome == reference
    seen = reference[0]["samples"] + reference[1]["samples"]
    assert set(seen) == set(range(SAMPLES))
    if name in ("accumulating", "split", "uneven"):
        assert all(seen.count(index) == EPOCHS for index in range(SAMPLES))


@pytest.mark.long
def test_two_ranks_leave_together_at_a_notice(zygote: Zygote, tmp_path: Path) -> None:
    settings = WORLDS["accumulating"]
    reference = Job(zygote, tmp_path / "reference", **settings).finish()
    job = Job(zygote, tmp_path / "noticed", **{**settings, "save_every": "1 h"})
    job.start(pace_s=0.05)
    job.until_step(3)
    job.signal(1, signal.SIGTERM)
    assert job.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.said()
    assert job.durable_step() >= 3
    assert job.finish() == reference
