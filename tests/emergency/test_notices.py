"""Notices at any moment of a real training: the last finished step is durable whenever the arithmetic says that it fits, nothing is
torn, the exit code is 75, and the restart goes on bit-exactly."""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from forking import Zygote
from grounds import Ground, eventually
from trainer import PER_EPOCH

from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.testing.metadata import metadata_server

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
TRAININGS, ROUNDS = (10, 5) if LONG else (2, 1)
"""At once, since they mostly wait; and how often."""
LEAD_S = {"aws": 13.0, "gcp": 11.0, "azure": 10.0}
"""AWS is asked every 5 s, so half of it may be over when it is heard."""


@pytest.mark.parametrize(
    "cloud", [pytest.param("aws", marks=pytest.mark.long), pytest.param("gcp", marks=pytest.mark.long), "azure"]
)
def test_at_random_moments(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, cloud: str) -> None:
    rng = random.Random(cloud)
    notice = f"gcp:{LEAD_S['gcp']:g}s" if cloud == "gcp" else cloud
    for number in range(ROUNDS):
        with ExitStack() as machines:
            grounds, servers = [], []
            for other in range(TRAININGS):
                # Each on a machine of its own: the word of one that is done may end the machine (Azure's acknowledgement).
                server = machines.enter_context(metadata_server(cloud))
                servers.append(server)
                save_every = rng.choice(["1 h", "3 steps", "1 step"])
                ground = Ground(zygote, tmp_path / f"{number}-{other}", notice=notice, save_every=save_every)
                ground.start(server.environment, pace_s=0.25, stay_s=rng.random() * 3, place=some_place(rng))
                grounds.append(ground)
                time.sleep(rng.random() * 0.5)
            time.sleep(rng.random())
            for server in servers:
                server.do("preempt", **({} if cloud == "gcp" else {"lead": LEAD_S[cloud]}))
            codes = [ground.wait() for ground in grounds]
        for ground, code in zip(grounds, codes, strict=True):
            assert code == EXIT_PREEMPTED, ground.log.read_text()
            ground.assert_nothing_lost()
            ground.assert_exact(reference)


def some_place(rng: random.Random) -> str:
    return rng.choice(["", f"stepping:{rng.randrange(12)}", f"waiting:{rng.randrange(1, 40)}", "restored"])


def test_from_a_file(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path / "a", notice=f"file:{tmp_path / 'going'}", save_every="1 h")
    ground.start(pace_s=0.05)
    ground.until(lambda: ground.step() >= 5)
    (tmp_path / "going").write_text("5 s")
    assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    ground.assert_nothing_lost()
    ground.assert_exact(reference)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("stepping:3", marks=pytest.mark.long),
        f"evaluating:{0}",
        f"waiting:{4 * PER_EPOCH + 2}",
        pytest.param("waiting:1", marks=pytest.mark.long),
        "restored",
    ],
)
@pytest.mark.parametrize("lead_s", [3.0])
def test_at_a_place(zygote: Zygote, reference: dict[str, Any], tmp_path: Path, place: str, lead_s: float) -> None:
    """In a step, an evaluation, a wait for data, before the first step: what can be given up is given up in time."""
    ground = Ground(zygote, tmp_path / "a", save_every="1 h")
    with ground.attended():
        ground.start(place=place, pace_s=0.05)
        ground.until_place()
        ground.tell(lead_s)
        if place.startswith(("stepping", "restored")):
            ground.go_on()
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
        if ground.durable_step():
            eventually(lambda: ground.heard == ["n"])
    ground.assert_nothing_lost()
    ground.assert_exact(reference)


def test_during_an_interval_save(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """The one that is on its way is finished, and the last step is saved behind it."""
    ground = Ground(zygote, tmp_path / "a", save_every="1 step")
    (ground.control / "put").write_text("0.2")
    with ground.attended():
        ground.start(pace_s=0.05)
        ground.until(lambda: ground.durable_step() >= 2)
        ground.tell(4.0)
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    ground.assert_nothing_lost()
    ground.assert_exact(reference)


def test_during_the_restore(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    ground = Ground(zygote, tmp_path / "a", save_every="4 steps")
    ground.start(pace_s=0.02)
    ground.until(lambda: ground.durable_step() >= 4)
    ground.kill()
    before = ground.durable_step()
    (ground.control / "read").write_text("0.5")
    with ground.attended():
        ground.start(pace_s=0.02)
        ground.until(lambda: len(ground.events("attempt.claimed")) == 2 or ground.step() < 0)
        ground.tell(3.0)
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    assert ground.durable_step() >= before
    ground.assert_exact(reference)


def test_in_a_compile_the_snapshot_in_memory_is_committed(
    zygote: Zygote, reference: dict[str, Any], tmp_path: Path
) -> None:
    """The loop comes to no boundary; a save is on its way; the process ends by itself in time when that is durable."""
    ground = Ground(zygote, tmp_path / "a", place="compiling:6", save_at=(6,), wait_for_save=False)
    (ground.control / "put").write_text("2")
    with ground.attended():
        ground.start()
        ground.until_place()
        ground.tell(3.0)
        began_s = time.monotonic()
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
        assert time.monotonic() - began_s < 30  # of the 60 s that the compile takes
        eventually(lambda: ground.heard == ["n"])
    assert ground.durable_step() == 6
    assert ground.events("attempt.leaving")[-1].fields["without_boundary"]
    ground.assert_exact(reference)


def test_in_a_compile_with_nothing_in_memory(zygote: Zygote, reference: dict[str, Any], tmp_path: Path) -> None:
    """Nothing can be done; when the machine stays after all, training goes on, and a later notice is heard."""
    ground = Ground(zygote, tmp_path / "a", place="compiling:6", stay_s=1.5, save_every="3 steps")
    with ground.attended():
        ground.start(pace_s=0.02)
        ground.until_place()
        eventually(lambda: ground.durable_step() == 6)
        ground.tell(0.5)
        ground.until(lambda: "no newer snapshot" in ground.log.read_text())
        ground.tell(None, kind="withdrawn", stands=False)
        ground.until(lambda: ground.step() >= 8)
        ground.tell(3.0, id="later")
        assert ground.wait() == EXIT_PREEMPTED, ground.log.read_text()
    ground.assert_nothing_lost()
    ground.assert_exact(reference)
