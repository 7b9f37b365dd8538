"""Invariant 4: however often and wherever a run is killed, it ends bit-identical to one that never was, every sample used once."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import victim
from forking import Zygote
from killing import HERE, Ground

from holdfast.checkpoint.heads import read_truth
from holdfast.core.contract import EXIT_FENCED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from holdfast.store.open import open_store
from holdfast.testing.servers import ministack_server

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 100 if LONG else 12


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(HERE / "zygote.py") as process:
        yield process


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training, never interrupted; with other loader settings too, since they must not matter."""
    folder = tmp_path_factory.mktemp("reference")
    outcome = Ground(zygote, folder / "a", str(folder / "a/run")).finish()
    again = Ground(zygote, folder / "b", str(folder / "b/run"), workers=0, save_every="epoch").finish()
    assert outcome == again
    assert len(outcome["samples"]) == victim.EPOCHS * victim.SAMPLES
    return outcome


def assert_every_sample_once_per_epoch(outcome: dict[str, Any]) -> None:
    used = outcome["samples"]
    for start in range(0, len(used), victim.SAMPLES):
        assert sorted(used[start : start + victim.SAMPLES]) == list(range(victim.SAMPLES))


def kill_until_done(ground: Ground, rng: random.Random, at_most: int) -> dict[str, Any]:
    while ground.kills < at_most and ground.kill_at_random(rng):
        pass
    return ground.finish() if not ground.result.exists() else ground.outcome()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_random_kills_on_a_folder(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, workers: int) -> None:
    rng = random.Random(workers)
    kills = 0
    while kills < KILLS / 2:
        ground = Ground(zygote, tmp_path / str(kills), str(tmp_path / str(kills) / "run"), workers=workers)
        outcome = kill_until_done(ground, rng, at_most=12)
        assert outcome == reference
        assert_every_sample_once_per_epoch(outcome)
        kills += ground.kills


def test_random_kills_on_s3(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    with ministack_server() as server:
        server.make_bucket("bucket")
        ground = Ground(zygote, tmp_path, "s3://bucket/runs/victim", environ=dict(server.environment))
        outcome = kill_until_done(ground, random.Random(3), at_most=KILLS // 4)
    assert outcome == reference
    assert ground.kills == KILLS // 4


PER_EPOCH = victim.SAMPLES // victim.BATCH


@pytest.mark.parametrize("step", [0, 1, PER_EPOCH - 1, PER_EPOCH, 2 * PER_EPOCH], ids=lambda step: f"after step {step}")
def test_killed_at(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, step: int) -> None:
    """In the first step, at the end of an epoch, at the start of the next."""
    ground = Ground(zygote, tmp_path, str(tmp_path / "run"))
    attempt = ground.start()
    attempt.wait_for_step(step)
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    assert ground.finish() == reference


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_during_evaluation(
    zygote: Zygote, reference: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    """The evaluation is done again, not skipped; a signal with a handler leaves at once and loses no step."""
    ground = Ground(zygote, tmp_path, str(tmp_path / "run"), save_every="1 h")
    attempt = ground.start(pause_in=f"evaluating:{PER_EPOCH}")
    attempt.wait_until(ground.place_reached)
    attempt.signal(number)
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}
    assert attempt.wait() == expected[number], ground.log.read_text()
    head = read_truth(open_store(ground.url)).head
    assert head is not None
    assert [ref.step for ref in head.checkpoints] == ([] if number == signal.SIGKILL else [PER_EPOCH])
    assert ground.finish() == reference


@pytest.mark.parametrize("group", [True, False], ids=["whole group", "main process"])
def test_terminated_in_the_middle(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, group: bool) -> None:
    """SIGTERM finishes the step, saves and leaves with the documented code, also when it reaches the loader workers."""
    ground = Ground(zygote, tmp_path, str(tmp_path / "run"), save_every="1 h")
    attempt = ground.start()
    attempt.wait_for_step(5)
    attempt.signal(signal.SIGTERM, group=group)
    assert attempt.wait() == EXIT_PREEMPTED, ground.log.read_text()
    head = read_truth(open_store(ground.url)).head
    assert head is not None
    assert head.checkpoints[-1].step >= 5
    assert ground.finish() == reference


def test_killed_during_restore(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path, str(tmp_path / "run"))
    attempt = ground.start()
    attempt.wait_for_step(10)
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    for _ in range(3):
        attempt = ground.start()
        attempt.wait_until(lambda attempt=attempt: attempt.page.read() is not None)
        attempt.signal(signal.SIGKILL)
        assert attempt.wait() == -signal.SIGKILL
    assert ground.finish() == reference


def test_two_processes_on_one_run(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """The older one is fenced at its next save; the newer one is not disturbed."""
    url = str(tmp_path / "run")
    first = Ground(zygote, tmp_path / "first", url)
    attempt = first.start(pause_in=f"stepping:{PER_EPOCH + 1}")
    attempt.wait_until(first.place_reached)
    assert Ground(zygote, tmp_path / "second", url).finish() == reference
    first.go_on()
    assert attempt.wait() == EXIT_FENCED, first.log.read_text()
    assert "another attempt owns this run" in first.log.read_text()
    assert not first.result.exists()


def test_fenced_while_leaving(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """What a stale attempt saves on its way out does not count either."""
    url = str(tmp_path / "run")
    first = Ground(zygote, tmp_path / "first", url, save_every="1 h")
    attempt = first.start(pause_in=f"evaluating:{PER_EPOCH}")
    attempt.wait_until(first.place_reached)
    assert Ground(zygote, tmp_path / "second", url).finish() == reference
    attempt.signal(signal.SIGTERM, group=False)
    assert attempt.wait() == EXIT_FENCED, first.log.read_text()
