"""Lightning with the callback: however often and wherever it is killed, it ends as if it never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from forking import Zygote
from killing import Ground

from holdfast.checkpoint.heads import read_truth
from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.store.open import open_store

HERE = Path(__file__).parent
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


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(HERE / "pl_zygote.py") as process:
        yield process


@pytest.fixture(scope="module")
def references(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same trainings, never interrupted; at another pace of saving, since it must not matter."""
    folder = tmp_path_factory.mktemp("references")
    return {
        name: Ground(zygote, folder / name, str(folder / name / "run"), **settings, save_every="epoch").finish()
        for name, settings in SETTINGS.items()
    }


def ground_for(zygote: Zygote, folder: Path, settings: dict[str, Any]) -> Ground:
    return Ground(zygote, folder, str(folder / "run"), **settings)


def saved_steps(ground: Ground) -> list[int]:
    head = read_truth(open_store(ground.url)).head
    return [] if head is None else [ref.step for ref in head.checkpoints]


def fetched_by_the_last(ground: Ground) -> list[int]:
    fetched: list[int] = json.loads((ground.folder / "fetched").read_text())
    return fetched


def stopped_at(ground: Ground, place: str, number: int, **changes: Any) -> int:
    """One attempt that gets this signal at that place. Its exit code."""
    attempt = ground.start(pause_in=place, **changes)
    attempt.wait_until(ground.place_reached)
    assert ground.place_reached(), ground.log.read_text()
    attempt.signal(number)
    if number != signal.SIGKILL and not place.startswith("evaluating"):
        ground.go_on()
    return attempt.wait()


def test_uninterrupted(references: dict[str, dict[str, Any]]) -> None:
    steps = {name: outcome["step"] for name, outcome in references.items()}
    stopped = references["stopping"]["epoch"]
    assert steps == {
        "plain": 33, "accumulating": 12, "manual": 33 + 18, "limited": 35, "max_steps": 26, "stopping": stopped * PER_EPOCH,
    }  # fmt: skip
    assert 4 <= stopped < 9, "EarlyStopping has something to do"
    for name in ("plain", "accumulating", "manual"):
        used = references[name]["samples"]
        assert [sorted(used[start : start + SAMPLES]) for start in range(0, len(used), SAMPLES)] == [
            [*range(SAMPLES)]
        ] * EPOCHS
    evaluated = [event for event in references["limited"]["events"] if event.startswith("evaluated")]
    assert len(evaluated) == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_random_kills(zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    while ground.kills < KILLS and ground.kill_at_random(rng):
        pass
    assert ground.finish() == references[name]


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
def test_killed_at(
    zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path, name: str, place: str, every: str
) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    assert stopped_at(ground, place, signal.SIGKILL, save_every=every) == -signal.SIGKILL
    assert ground.finish() == references[name]


def test_killed_when_only_the_end_is_left(
    zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """All epochs are saved: what is left are the hooks of the end, and the mark that says so."""
    ground = ground_for(zygote, tmp_path, {**SETTINGS["plain"], "save_every": "epoch"})
    attempt = ground.start(pause_in=f"finishing:{3 * PER_EPOCH}")
    attempt.wait_until(lambda: ground.place_reached() and 3 * PER_EPOCH in saved_steps(ground))
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    head = read_truth(open_store(ground.url)).head
    assert head is not None
    assert not head.finished
    assert ground.finish() == references["plain"]
    assert fetched_by_the_last(ground) == []
    head = read_truth(open_store(ground.url)).head
    assert head is not None
    assert head.finished


@pytest.mark.parametrize(("name", "step"), [("plain", 16), ("accumulating", 6), ("manual", 7), ("limited", 9)])
def test_a_notice_is_answered_with_a_checkpoint(
    zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path, name: str, step: int
) -> None:
    """At the end of the step at hand, whatever the interval; and the rest reads what is left and nothing else."""
    ground = ground_for(zygote, tmp_path, {**SETTINGS[name], "save_every": "1 h"})
    assert stopped_at(ground, f"stepping:{step}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    assert len(saved_steps(ground)) == 1
    assert ground.finish() == references[name]
    if name == "plain":  # others look ahead, or fetch in workers
        left = references[name]["samples"][step * BATCH :]
        assert len(fetched_by_the_last(ground)) == len(left) + 2 * EVALUATION_SAMPLES


def test_a_notice_ends_an_evaluation_between_epochs(
    zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """It is done again after the resume, so nobody waits for it."""
    ground = ground_for(zygote, tmp_path, {**SETTINGS["plain"], "save_every": "1 h"})
    assert stopped_at(ground, f"evaluating:{PER_EPOCH}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    assert saved_steps(ground) == [PER_EPOCH]
    assert ground.finish() == references["plain"]


@pytest.mark.parametrize("name", ["max_steps", "stopping"])
def test_a_finished_run_trains_nothing(
    zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    ground = ground_for(zygote, tmp_path, SETTINGS[name])
    first = ground.finish()
    again = ground.finish()
    assert first == references[name]
    assert fetched_by_the_last(ground) == []
    assert {**again, "rng": first["rng"]} == first


def test_lightning_s_own_checkpoints_may_go(
    zygote: Zygote, references: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """ModelCheckpoint knows what it had found best, though its files went with the machine."""
    ground = ground_for(zygote, tmp_path, SETTINGS["accumulating"])
    for step in (5, 9):
        stopped_at(ground, f"stepping:{step}", signal.SIGKILL)
        shutil.rmtree(ground.folder / "output")
    assert ground.finish() == references["accumulating"]


@pytest.mark.long
def test_the_other_package(
    references: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pytorch_lightning` has the same content, and the same import of the callback serves it."""
    monkeypatch.setenv("HOLDFAST_TEST_LIGHTNING", "pytorch_lightning")
    rng = random.Random(1)
    with Zygote(HERE / "pl_zygote.py") as zygote:
        for name in ("accumulating", "stopping"):
            ground = ground_for(zygote, tmp_path / name, SETTINGS[name])
            while ground.kills < 4 and ground.kill_at_random(rng):
                pass
            assert ground.finish() == references[name]


@pytest.mark.parametrize("data", ["stream", "stateful-stream"])
def test_streams(zygote: Zygote, tmp_path: Path, data: str) -> None:
    """Without a state, what was used is read and dropped, and a warning at the start says so; with one, nothing is."""
    settings = {"data": data, "max_steps": 2 * PER_EPOCH + 5, "limit_train_batches": PER_EPOCH, "limit_val_batches": 0,
                "save_every": "1 h"}  # fmt: skip
    reference = ground_for(zygote, tmp_path / "reference", settings).finish()
    assert reference["samples"] == [*range(SAMPLES), *range(SAMPLES), *range(5 * BATCH)]
    ground = ground_for(zygote, tmp_path / "noticed", settings)
    for step in (6, PER_EPOCH + 4):
        assert stopped_at(ground, f"stepping:{step}", signal.SIGTERM) == EXIT_PREEMPTED, ground.log.read_text()
    outcome = ground.finish()
    again = 4 * BATCH if data == "stream" else 0
    left = (SAMPLES - 4 * BATCH) + 5 * BATCH
    assert len(fetched_by_the_last(ground)) == again + left
    assert ("reads and drops all batches" in ground.log.read_text()) == (data == "stream")
    assert outcome == reference
