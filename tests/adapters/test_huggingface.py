"""`transformers.Trainer` with the callback: however often and wherever it is killed, it ends as if it never was."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from adapter_grounds import (
    References,
    check_stream,
    fetched_by_the_last,
    ground_for,
    killed_often,
    saved_steps,
    stopped_at,
)
from forking import Zygote

from holdfast.core.contract import EXIT_PREEMPTED

ZYGOTE = "hf_zygote.py"
SAMPLES, BATCH, EPOCHS, EVALUATION_SAMPLES = 44, 4, 3, 10
PER_EPOCH = SAMPLES // BATCH
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 60 if LONG else 3
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"eval_strategy": "epoch"},
    # 11 batches are 3 steps of 3 and one of 2; evaluations and logs fall into the middle of epochs and of each other.
    "accumulating": {
        "gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "eval_on_start": True,
        "bf16": True,
    },
    # A last batch of 2 that belongs to a short last step, workers, and everything logged at the end of an epoch.
    "workers": {
        "gradient_accumulation_steps": 4, "dataloader_num_workers": 2, "dataloader_persistent_workers": True,
        "per_device_train_batch_size": 3, "eval_strategy": "epoch", "logging_strategy": "epoch",
    },
    # Stops in the middle of an epoch.
    "max_steps": {"max_steps": 2 * PER_EPOCH + 4, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
                  "eval_steps": 5, "metric_for_best_model": "loss"},
    # The first steps overflow and are skipped; the scale goes down and up again.
    "scaler": {"scaler": True, "optim": "adamw_torch", "gradient_accumulation_steps": 2, "eval_strategy": "epoch"},
}  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.long if name == "max_steps" else ()) for name in SETTINGS]
STEPS = {"plain": 33, "accumulating": 12, "workers": 12, "max_steps": 26, "scaler": 18}


@pytest.mark.parametrize("name", NAMES)
def test_uninterrupted(references: References, name: str) -> None:
    outcome = references[name]
    assert outcome["step"] == STEPS[name]
    for start in range(0, len(outcome["samples"]), SAMPLES):
        used = outcome["samples"][start : start + SAMPLES]
        assert sorted(used) == list(range(SAMPLES)) or (name == "max_steps" and len(set(used)) == len(used) == 16)


def test_the_scaler_skips_steps(references: References) -> None:
    """Otherwise the trainings that are killed with it show nothing."""
    rates = [entry["learning_rate"] for entry in references["scaler"]["history"] if "learning_rate" in entry]
    assert rates[0] < 2e-3, "the first two steps were skipped, so the schedule stood still"
    assert references["scaler"]["scaler"]["scale"] < 2.0**21


@pytest.mark.parametrize("name", NAMES)
def test_random_kills(zygote: Zygote, references: References, tmp_path: Path, name: str) -> None:
    for outcome in killed_often(zygote, tmp_path, SETTINGS[name], KILLS, name):
        assert outcome == references[name]


PLACES = [
    ("plain", "1 step", "stepping:1"),
    ("plain", "3 steps", f"evaluating:{PER_EPOCH}"),
    ("plain", "1 step", f"finishing:{3 * PER_EPOCH}"),
    ("accumulating", "1 step", "stepping:4"),
    ("accumulating", "3 steps", "evaluating:6"),
    ("workers", "1 step", "ending:8"),
]
MORE_PLACES = [
    ("plain", "1 step", f"stepping:{PER_EPOCH}"),
    ("plain", "3 steps", f"ending:{3 * PER_EPOCH}"),
    ("workers", "3 steps", "evaluating:8"),
    ("scaler", "1 step", "stepping:3"),
    ("max_steps", "1 step", "finishing:26"),
    *((name, {"1 step": "3 steps", "3 steps": "1 step"}[every], place) for name, every, place in PLACES),
]


@pytest.mark.parametrize(
    ("name", "every", "place"), [*PLACES, *(pytest.param(*each, marks=pytest.mark.long) for each in MORE_PLACES)]
)
def test_killed_at(zygote: Zygote, references: References, tmp_path: Path, name: str, every: str, place: str) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    assert stopped_at(ground, place, signal.SIGKILL, save_every=every) == -signal.SIGKILL
    assert ground.finish() == references[name]


@pytest.mark.parametrize(
    ("name", "step"), [("plain", 16), ("accumulating", 6), pytest.param("workers", 7, marks=pytest.mark.long)]
)
def test_a_notice_is_answered_with_a_checkpoint(
    zygote: Zygote, references: References, tmp_path: Path, name: str, step: int
) -> None:
    """At the end of the step at hand, whatever the interval; and the rest reads what is left and nothing else."""
    ground = ground_for(zygote, tmp_path, SETTINGS[name], save_every="1 h")
    assert stopped_at(ground, f"stepping:{step}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    assert saved_steps(ground) == [step]
    assert ground.finish() == references[name]
    if name != "workers":  # those fetch elsewhere
        used, batches = references[name]["samples"], SETTINGS[name].get("gradient_accumulation_steps", 1)
        epoch, within = divmod(step, -(-PER_EPOCH // batches))
        left = used[epoch * SAMPLES + within * batches * BATCH :]
        evaluated = [int(e.split()[-1]) for e in references[name]["events"] if e.startswith("evaluated at")]
        evaluations = sum(at > step for at in evaluated) * EVALUATION_SAMPLES
        assert len(fetched_by_the_last(ground)) == len(left) + evaluations


def test_a_notice_ends_an_evaluation_between_epochs(zygote: Zygote, references: References, tmp_path: Path) -> None:
    """It is done again after the resume, so nobody waits for it."""
    ground = ground_for(zygote, tmp_path, SETTINGS["plain"], save_every="1 h")
    assert stopped_at(ground, f"evaluating:{PER_EPOCH}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    assert saved_steps(ground) == [PER_EPOCH]
    assert ground.finish() == references["plain"]


def test_a_finished_run_trains_nothing(zygote: Zygote, references: References, tmp_path: Path) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS["max_steps"])
    first = ground.finish()
    again = ground.finish()
    assert first == references["max_steps"]
    assert fetched_by_the_last(ground) == []
    assert {**again, "rng": first["rng"]} == first


BEST: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True,
    "save_total_limit": 1, "metric_for_best_model": "loss", "greater_is_better": True,
}  # fmt: skip


@pytest.mark.parametrize("machine", [pytest.param("the same machine", marks=pytest.mark.long), "another machine"])
def test_the_best_model_survives_the_machine(zygote: Zygote, tmp_path: Path, machine: str) -> None:
    """The Trainer keeps it in a folder that goes with the machine."""
    reference = ground_for(zygote, tmp_path / "reference", {**BEST, "save_every": "epoch"}).finish()
    assert reference["best"][1] < reference["step"] - 4, "the best model is not simply one of the last"
    ground = ground_for(zygote, tmp_path / "killed", BEST)
    for step in (reference["best"][1] + 3, reference["step"]):
        stopped_at(ground, f"stepping:{step}", signal.SIGKILL)
        if machine == "another machine":
            shutil.rmtree(ground.folder / "output")
    assert ground.finish() == reference


@pytest.mark.long
@pytest.mark.parametrize("data", ["datasets", "shuffled-datasets"])
def test_streams_of_datasets(zygote: Zygote, tmp_path: Path, data: str) -> None:
    """Its state is used, unless a shuffle buffer would be lost: then the stream is read again."""
    pytest.importorskip("datasets")
    settings = {"data": data, "max_steps": 2 * PER_EPOCH + 5}
    reference = ground_for(zygote, tmp_path / "reference", settings).finish()
    first, second = (reference["samples"][start : start + SAMPLES] for start in (0, SAMPLES))
    assert sorted(first) == sorted(second) == list(range(SAMPLES))
    assert (first != second) == (data == "shuffled-datasets"), "set_epoch() reaches the stream"
    ground = ground_for(zygote, tmp_path / "killed", {**settings, "save_every": "3 steps"})
    for step in (5, PER_EPOCH + 1, 2 * PER_EPOCH + 4):
        stopped_at(ground, f"stepping:{step}", signal.SIGKILL)
    assert ground.finish() == reference
    assert ("a buffer that its state does not hold" in ground.log.read_text()) == (data == "shuffled-datasets")


@pytest.mark.parametrize("data", [pytest.param("stream", marks=pytest.mark.long), "stateful-stream"])
def test_streams(zygote: Zygote, tmp_path: Path, data: str) -> None:
    check_stream(zygote, tmp_path, data, SAMPLES, BATCH)


@pytest.mark.long
def test_batches_of_similar_length(zygote: Zygote, tmp_path: Path) -> None:
    settings = {
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
        "eval_strategy": "epoch",
    }
    reference = ground_for(zygote, tmp_path / "reference", {**settings, "save_every": "epoch"}).finish()
    assert sorted(reference["samples"][:SAMPLES]) == list(range(SAMPLES))
    for outcome in killed_often(zygote, tmp_path / "killed", settings, 3, "lengths"):
        assert outcome == reference
