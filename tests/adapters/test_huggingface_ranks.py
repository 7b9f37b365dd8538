"""`transformers.Trainer` on two ranks (DDP over gloo): killed anywhere, one rank or both, it ends as if it never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from adapter_grounds import References, struck_often
from forking import Zygote
from jobs import Job
from waiting import eventually

from holdfast.core.contract import EXIT_PREEMPTED

ZYGOTE = "hf_zygote.py"
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 25 if LONG else 2
SAMPLES, BATCH, EPOCHS = 44, 4, 3
OWN_SHARDS = {"accelerator_config": {"dispatch_batches": False}}
SETTINGS: dict[str, dict[str, Any]] = {
    # Six steps an epoch, the last one smaller; evaluations and logs in the middle of epochs and of each other; folders of the
    # Trainer's own; the best model is one of the first.
    "plain": {
        "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True,
        "save_total_limit": 1, "metric_for_best_model": "loss", "greater_is_better": True,
    },
    # 43 samples are 8 batches of 6, the last of which leaves one rank without a sample of its own: steps of 3, 3 and 2.
    "accumulating": {
        "data": "odd", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "eval_strategy": "epoch",
        "logging_steps": 2, "bf16": True,
    },
    "workers": {
        "gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 2,
        "train_sampling_strategy": "group_by_length",
    },
}  # fmt: skip
NAMES = ["plain", "accumulating", pytest.param("workers", marks=pytest.mark.long)]
EVERY_SAMPLE = [(epoch, index) for epoch in range(EPOCHS) for index in range(SAMPLES)]
STEPS = {"plain": 18, "accumulating": 9, "workers": 9}


@pytest.fixture(scope="module")
def references(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("references")
    return References(lambda name: Job(zygote, folder / name, **SETTINGS[name], save_every="epoch").finish())


def kill(job: Job, *ranks: int, step: int, **changes: Any) -> None:
    job.start(pace_s=0.01, **changes)
    job.until_step(step)
    for rank in ranks:
        job.signal(rank, signal.SIGKILL)
    job.wait_or_end()


@pytest.mark.parametrize("name", NAMES)
def test_uninterrupted(references: References, name: str) -> None:
    """Every sample once an epoch; ranks that had nothing left took one of another's."""
    first, second = references[name]
    assert first["step"] == second["step"] == STEPS[name]
    assert first["model"] == second["model"]
    assert first["rng"] != second["rng"]
    assert first["history"][:-1] == second["history"][:-1]
    # What has not been logged by the end is of this rank alone, as the Trainer has it.
    assert (first["returned"] == second["returned"]) == (name != "accumulating")
    count = 43 if SETTINGS[name].get("data") == "odd" else SAMPLES
    used = Counter(first["samples"] + second["samples"])
    assert sorted(used) == list(range(count))
    assert sum(used.values()) == EPOCHS * (count + count % 2)
    assert min(used.values()) == EPOCHS


@pytest.mark.parametrize("name", NAMES)
def test_random_kills(zygote: Zygote, references: References, tmp_path: Path, name: str) -> None:
    """Of either rank or both, at any moment."""
    for outcome in struck_often(zygote, tmp_path, SETTINGS[name], KILLS, name):
        assert outcome == references[name]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
@pytest.mark.parametrize("name", [*NAMES[1:], pytest.param("plain", marks=pytest.mark.long)])
def test_a_notice_to_one_rank_is_answered_by_all(
    zygote: Zygote, references: References, tmp_path: Path, name: str, rank: int
) -> None:
    """They save together at one step, whatever the interval, and leave with exit code 75; nothing is read again."""
    job = Job(zygote, tmp_path, **{**SETTINGS[name], "save_every": "1 h"})
    job.start(pace_s=0.03)
    job.until_step(STEPS[name] // 2)
    job.signal(rank, signal.SIGTERM)
    assert job.wait() == [EXIT_PREEMPTED] * 2, job.said()
    assert STEPS[name] // 2 <= job.durable_step() < STEPS[name]
    left = job.step()
    assert job.durable_step() == left
    assert job.finish() == references[name]


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["own part", "told", "outcome", "leaving"])
def test_killed_in_a_save(zygote: Zygote, references: References, tmp_path: Path, place: str, rank: int) -> None:
    if (place == "told" and rank == 1) or (place == "outcome" and rank == 0):
        pytest.skip("not on this rank")
    job = Job(zygote, tmp_path, **SETTINGS["plain"])
    job.start(for_rank={rank: {"place": place, "at": 1 if place == "leaving" else 2}}, pace_s=0.01)
    if place == "leaving":
        job.until_step(7)
        job.signal(1 - rank, signal.SIGTERM)
    codes = job.wait_or_end()
    assert codes[rank] == -signal.SIGKILL, job.said()
    outcome = job.finish()
    if (place, rank) == ("leaving", 1):
        # Rank 0 has saved alone: a checkpoint of one rank, after which the generators begin anew.
        assert [one["step"] for one in outcome] == [STEPS["plain"]] * 2
        assert sorted(job.samples_seen()) == EVERY_SAMPLE
    else:
        assert outcome == references["plain"]


def test_the_best_model_survives_the_machine(zygote: Zygote, references: References, tmp_path: Path) -> None:
    """Rank 0 keeps it, in the files that the Trainer asks for."""
    job = Job(zygote, tmp_path, **SETTINGS["plain"])
    best = references["plain"][0]["best"][1]
    assert best < STEPS["plain"] - 4, "the best model is not simply one of the last"
    kill(job, 0, 1, step=best + 3)
    shutil.rmtree(tmp_path / "output")
    assert job.finish() == references["plain"]


@pytest.mark.parametrize(("size", "batch", "accumulated"), [(1, 4, 2), pytest.param(4, 2, 1, marks=pytest.mark.long)])
def test_another_number_of_ranks(zygote: Zygote, tmp_path: Path, size: int, batch: int, accumulated: int) -> None:
    """In the middle of an epoch, with steps of the same size: every sample once, the same number of steps."""
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_every": "1 h"}
    job = Job(zygote, tmp_path, **settings)
    job.start(pace_s=0.03)
    job.until_step(8)
    job.signal(0, signal.SIGTERM)
    assert job.wait() == [EXIT_PREEMPTED] * 2, job.said()
    job.start(1)
    assert job.wait() == [1]
    assert "an optimizer step takes 8 → 4 samples in the middle of an epoch" in job.said()
    outcome = job.finish(size, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
    assert outcome[0]["step"] == STEPS["plain"]
    assert sorted(job.samples_seen()) == EVERY_SAMPLE


@pytest.mark.parametrize("data", ["stateful-stream", pytest.param("stream", marks=pytest.mark.long)])
def test_streams(zygote: Zygote, tmp_path: Path, data: str) -> None:
    """Each rank reads the stream and takes its part, of which the last is filled up. With a state, nothing is read again."""
    settings = {"data": data, "max_steps": 15, "save_every": "3 steps", **OWN_SHARDS}
    reference = Job(zygote, tmp_path / "reference", **settings).finish()
    used = Counter(index for rank in reference for index in rank["samples"])
    assert set(used) == set(range(SAMPLES))
    assert sum(used.values()) == 15 * 2 * BATCH
    assert [rank["samples"][:5] for rank in reference] == [[0, 1, 2, 3, 8], [4, 5, 6, 7, 12]]
    job = Job(zygote, tmp_path / "killed", **settings)
    # At the end of an epoch the stream is ready for the next one, and the epoch may not be over.
    for step in (3, 6):
        job.start(for_rank={1: {"pause_in": f"stepping:{step + 1}"}})
        eventually(lambda step=step: job.durable_step() == step or job.all_ended(), job.said)
        job.signal(0, signal.SIGKILL)
        job.signal(1, signal.SIGKILL)
        job.wait()
    assert job.durable_step() == 6
    assert job.finish() == reference
    left = [(15 - 6) * 2 * BATCH - 4 + SAMPLES * (data == "stream")] * 2
    assert [len(json.loads((job.folder / f"fetched.{rank}").read_text())) for rank in (0, 1)] == left
    assert ("reads and drops all batches" in job.said()) == (data == "stream")


@pytest.mark.long
@pytest.mark.parametrize("options", [{"even_batches": False}, {"split_batches": True}], ids=["uneven", "split"])
def test_accelerate_s_ways_to_cut(zygote: Zygote, tmp_path: Path, options: dict[str, bool]) -> None:
    """43 samples, 6 a step: every sample once, and one twice for the rank that is left without."""
    size = 6 if "split_batches" in options else 3
    settings = {
        "data": "odd",
        "per_device_train_batch_size": size,
        "accelerator_config": options,
        "num_train_epochs": 2,
    }
    outcome = Job(zygote, tmp_path, **settings).finish()
    used = Counter(outcome[0]["samples"] + outcome[1]["samples"])
    assert [rank["step"] for rank in outcome] == [16, 16]
    assert set(used) == set(range(43))
    assert sum(used.values()) == 2 * 44


@pytest.mark.long
def test_batch_rebalance_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    job = Job(zygote, tmp_path, train_sampling_strategy="batch_rebalance")
    job.start()
    assert job.wait() == [1, 1]
    assert "cuts batches up for 2 processes by itself" in job.said()


@pytest.mark.long
@pytest.mark.parametrize("data", ["datasets", "shuffled-datasets"])
def test_streams_of_datasets(zygote: Zygote, tmp_path: Path, data: str) -> None:
    """Cut up by its shards, of which each rank has its own."""
    pytest.importorskip("datasets")
    settings = {"data": data, "max_steps": 15, "save_every": "3 steps", **OWN_SHARDS}
    reference = Job(zygote, tmp_path / "reference", **settings).finish()
    assert sorted(index for rank in reference for index in rank["samples"][:22]) == list(range(SAMPLES))
    job = Job(zygote, tmp_path / "killed", **settings)
    for step in (5, 8):
        kill(job, 0, 1, step=step)
    assert job.durable_step() >= 3
    assert job.finish() == reference


def test_a_stream_that_rank_0_hands_out_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    job = Job(zygote, tmp_path, data="stateful-stream", max_steps=4)
    job.start()
    assert job.wait() == [1, 1]
    assert "'dispatch_batches': False" in job.said()
