"""A real training with `local=` and a store that is slow, killed at random moments, on one machine, on two, and by a notice: it
ends bit-identical to one that never was, every sample used once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import victim
from forking import Zygote
from killing import Ground

from holdfast.checkpoint.heads import read_truth
from holdfast.checkpoint.runs.promote_staged import promote_staged
from holdfast.checkpoint.tier import LocalTier
from holdfast.core.clock import SystemClock
from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.core.ids import random_token
from holdfast.store.local import LocalStore

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
KILLS = 60 if LONG else 3


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(Path(__file__).parent / "slow_zygote.py") as process:
        yield process


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reference")
    return Ground(zygote, folder, str(folder / "run"), workers=0).finish()


def _ground(zygote: Zygote, folder: Path, **more: Any) -> Ground:
    train = {"workers": 0, "local": str(folder / "disk"), "slow_s": 0.03, "save_every": "2 steps", **more}
    return Ground(zygote, folder, str(folder / "run"), **train)


def _assert_same(ground: Ground, outcome: dict[str, Any], reference: dict[str, Any]) -> None:
    assert outcome == reference, ground.log.read_text()[-3000:]
    used = outcome["samples"]
    for start in range(0, len(used), victim.SAMPLES):
        assert sorted(used[start : start + victim.SAMPLES]) == list(range(victim.SAMPLES))


def test_random_kills(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """Now and then the machine's disk is gone with it, or the command promotes what lies there."""
    rng, kills, log = random.Random(5), 0, ""
    while kills < KILLS:
        ground = _ground(zygote, tmp_path / str(kills), outlives=rng.random() < 0.3)
        while ground.kills < (6 if LONG else 3) and _killed_at_random(ground, rng):
            what = rng.random()
            if what < 0.2:
                shutil.rmtree(ground.folder / "disk", ignore_errors=True)
            elif what < 0.6 and (ground.folder / "disk").is_dir():
                _promote(ground)
        outcome = ground.outcome() if ground.result.exists() else ground.finish()
        _assert_same(ground, outcome, reference)
        kills += ground.kills
        log += ground.log.read_text()
        if (ground.folder / "disk").exists():
            assert not any((ground.folder / "disk").iterdir()), "a finished run leaves nothing on the disk"
    assert "resumes at step" in log


def _killed_at_random(ground: Ground, rng: random.Random) -> bool:
    """One attempt. False when it finished first."""
    attempt = ground.start()
    attempt.wait_until(lambda: attempt.step() >= 0)
    attempt.wait_for_step(attempt.step() + rng.randrange(victim.EPOCHS * victim.SAMPLES // victim.BATCH // 2))
    attempt.signal(signal.SIGKILL)
    killed = attempt.wait() == -signal.SIGKILL
    ground.kills += killed
    return killed


def _promote(ground: Ground) -> None:
    store, local = LocalStore(ground.url), LocalTier(ground.folder / "disk")
    if read_truth(store).head is not None:
        promote_staged(store, local, open_home=LocalStore, clock=SystemClock(), tokens=random_token)


@pytest.mark.parametrize("by_command", [False, True])
def test_resumes_from_the_disk(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, by_command: bool) -> None:
    """The store takes minutes for a checkpoint, so nothing but the first head gets there. The next attempt goes on from the disk;
    or the command promotes it, and the next attempt is one on another machine."""
    ground = _ground(zygote, tmp_path, slow_s=60)
    attempt = ground.start()
    attempt.wait_for_step(9)
    # On a busy machine the steps may be faster than the disk.
    attempt.wait_until(lambda: list((tmp_path / "disk").glob("*/objects/staged/*.json")))
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    head = read_truth(LocalStore(tmp_path / "run")).head
    assert head is not None
    assert head.checkpoints == []
    ground.train["slow_s"] = 0
    if by_command:
        command = [sys.executable, "-m", "holdfast", "checkpoints", "promote", ground.url, "--local"]
        command.append(str(tmp_path / "disk"))
        planned, done, again = (
            subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
            for more in (["--dry-run"], ["--json"], [])
        )
        assert "would become the newest checkpoint" in planned
        assert json.loads(done)["promoted"] is True
        assert "nothing in" in again
        shutil.rmtree(tmp_path / "disk")
    outcome = ground.finish()
    _assert_same(ground, outcome, reference)
    resumed = int(ground.log.read_text().split("resumes at step ")[1].split()[0])
    assert resumed > 0


@pytest.mark.parametrize("outlives", [False, True])
def test_leaving_on_a_notice(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, outlives: bool) -> None:
    """It waits until the store has the checkpoint; on a disk that outlives the machine it need not."""
    ground = _ground(zygote, tmp_path, slow_s=60 if outlives else 0.05, outlives=outlives, save_every="1 h")
    attempt = ground.start()
    attempt.wait_for_step(5)
    attempt.signal(signal.SIGTERM)
    assert attempt.wait() == EXIT_PREEMPTED, ground.log.read_text()
    assert "could NOT be saved" not in ground.log.read_text()
    head = read_truth(LocalStore(tmp_path / "run")).head
    assert head is not None
    assert [ref.step >= 5 for ref in head.checkpoints] == ([] if outlives else [True])
    ground.train["slow_s"] = 0
    outcome = ground.finish()
    _assert_same(ground, outcome, reference)
