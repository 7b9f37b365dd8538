"""Lightning with the callback: however often and wherever it is killed, it ends as if it never was."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from adapter_grounds import (
    References,
    check_stream,
    fetched_by_the_last,
    ground_for,
    head_of,
    killed_often,
    saved_steps,
    stopped_at,
)
from forking import Zygote

from holdfast.core.contract import EXIT_PREEMPTED

ZYGOTE = "pl_zygote.py"
SAMPLES, BATCH, EPOCHS, EVALUATION_SAMPLES = 44, 4, 3, 10
PER_EPOCH = SAMPLES // BATCH
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 60 if LONG else 3
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"num_sanity_val_steps": 2, "ema": True},
    # 11 batches are 3 steps of 3 and one of 2; evaluations fall into the middle of epochs and of accumulations.
    "accumulating": {"accumulate_grad_batches": 3, "val_check_interval": 4, "precision": "bf16-mixed", "checkpoints": True},
    "manual": {"model": "manual", "val_check_interval": 0.5, "ema": True},
    # Epochs that end before their loader does, evaluations at every other end.
    "limited": {"limit_train_batches": 7, "check_val_every_n_epoch": 2, "max_epochs": 5, "workers": 2},
    # Stops in the middle of an epoch.
    "max_steps": {
        "max_steps": 2 * PER_EPOCH + 4, "max_epochs": -1, "schedule": "plateau", "val_check_interval": 5,
        "check_val_every_n_epoch": None,
    },
    # Stops when it has had enough, but not before the fourth epoch; the data change with every second one.
    "stopping": {
        "max_epochs": 9, "min_epochs": 4, "patience": 1, "schedule": "plateau", "data": "redrawn",
        "reload_dataloaders_every_n_epochs": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_uninterrupted(references: References, name: str) -> None:
    outcome = references[name]
    stopped = outcome["epoch"]
    assert outcome["step"] == {
        "plain": 33, "accumulating": 12, "manual": 33 + 18, "limited": 35, "max_steps": 26, "stopping": stopped * PER_EPOCH,
    }[name]  # fmt: skip
    if name == "stopping":
        assert 4 <= stopped < 9, "EarlyStopping has something to do"
    if name in ("plain", "accumulating", "manual"):
        used = outcome["samples"]
        for start in range(0, EPOCHS * SAMPLES, SAMPLES):
            assert sorted(used[start : start + SAMPLES]) == [*range(SAMPLES)]
    if name == "limited":
        assert len([event for event in outcome["events"] if event.startswith("evaluated")]) == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_random_kills(zygote: Zygote, references: References, tmp_path: Path, name: str) -> None:
    for outcome in killed_often(zygote, tmp_path, SETTINGS[name], KILLS, name):
        assert outcome == references[name]


RARELY = pytest.mark.long
PLACES = [
    pytest.param("plain", "stepping:1", marks=RARELY),
    ("plain", f"stepping:{PER_EPOCH}"),
    pytest.param("plain", f"evaluating:{PER_EPOCH}", marks=RARELY),
    ("plain", f"ending:{3 * PER_EPOCH}"),
    ("plain", f"finishing:{3 * PER_EPOCH}"),
    pytest.param("accumulating", "stepping:4", marks=RARELY),
    ("accumulating", "evaluating:6"),
    ("manual", "evaluating:24"),
    pytest.param("limited", "ending:7", marks=RARELY),
    ("limited", "evaluating:14"),
    ("max_steps", "evaluating:20"),
    ("max_steps", "finishing:26"),
    ("stopping", f"ending:{3 * PER_EPOCH}"),
    pytest.param("stopping", f"stepping:{3 * PER_EPOCH + 2}", marks=RARELY),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
@pytest.mark.parametrize("every", ["1 step", pytest.param("3 steps", marks=RARELY)])
def test_killed_at(zygote: Zygote, references: References, tmp_path: Path, name: str, place: str, every: str) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    assert stopped_at(ground, place, signal.SIGKILL, save_every=every) == -signal.SIGKILL
    assert ground.finish() == references[name]


def test_killed_when_only_the_end_is_left(zygote: Zygote, references: References, tmp_path: Path) -> None:
    """All epochs are saved: what is left are the hooks of the end, and the mark that says so."""
    ground = ground_for(zygote, tmp_path, SETTINGS["plain"], save_every="epoch")
    attempt = ground.start(pause_in=f"finishing:{3 * PER_EPOCH}")
    attempt.wait_until(lambda: ground.place_reached() and 3 * PER_EPOCH in saved_steps(ground))
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    assert not head_of(ground).finished
    assert ground.finish() == references["plain"]
    assert fetched_by_the_last(ground) == []
    assert head_of(ground).finished


@pytest.mark.parametrize(("name", "step"), [("plain", 16), ("accumulating", 6), ("manual", 7), ("limited", 9)])
def test_a_notice_is_answered_with_a_checkpoint(
    zygote: Zygote, references: References, tmp_path: Path, name: str, step: int
) -> None:
    """At the end of the step at hand, whatever the interval; and the rest reads what is left and nothing else."""
    ground = ground_for(zygote, tmp_path, SETTINGS[name], save_every="1 h")
    assert stopped_at(ground, f"stepping:{step}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    assert len(saved_steps(ground)) == 1
    assert ground.finish() == references[name]
    if name == "plain":  # others look ahead, or fetch in workers
        left = references[name]["samples"][step * BATCH :]
        assert len(fetched_by_the_last(ground)) == len(left) + 2 * EVALUATION_SAMPLES


def test_a_notice_ends_an_evaluation_between_epochs(zygote: Zygote, references: References, tmp_path: Path) -> None:
    """It is done again after the resume, so nobody waits for it."""
    ground = ground_for(zygote, tmp_path, SETTINGS["plain"], save_every="1 h")
    assert stopped_at(ground, f"evaluating:{PER_EPOCH}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    assert saved_steps(ground) == [PER_EPOCH]
    assert ground.finish() == references["plain"]


@pytest.mark.parametrize("name", ["max_steps", "stopping"])
def test_a_finished_run_trains_nothing(zygote: Zygote, references: References, tmp_path: Path, name: str) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    first = ground.finish()
    again = ground.finish()
    assert first == references[name]
    assert fetched_by_the_last(ground) == []
    assert {**again, "rng": first["rng"]} == first


def test_lightning_s_own_checkpoints_may_go(zygote: Zygote, references: References, tmp_path: Path) -> None:
    """ModelCheckpoint knows what it had found best, though its files went with the machine."""
    ground = ground_for(zygote, tmp_path, SETTINGS["accumulating"])
    for step in (5, 9):
        stopped_at(ground, f"stepping:{step}", signal.SIGKILL)
        shutil.rmtree(ground.folder / "output")
    assert ground.finish() == references["accumulating"]


@pytest.mark.long
def test_the_other_package(references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pytorch_lightning` has the same content, and the same import of the callback serves it."""
    monkeypatch.setenv("HOLDFAST_TEST_LIGHTNING", "pytorch_lightning")
    with Zygote(Path(__file__).with_name(ZYGOTE)) as zygote:
        for name in ("accumulating", "stopping"):
            for outcome in killed_often(zygote, tmp_path / name, SETTINGS[name], 4, name):
                assert outcome == references[name]


@pytest.mark.parametrize("data", ["stream", "stateful-stream"])
def test_streams(zygote: Zygote, tmp_path: Path, data: str) -> None:
    check_stream(zygote, tmp_path, data, SAMPLES, BATCH, limit_train_batches=PER_EPOCH, limit_val_batches=0)
