"""Lightning's DDP with the callback: whichever rank is killed, all are started again, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from adapter_grounds import struck_often
from forking import Zygote
from jobs import Job
from launchers import command_of, started, workers_of
from waiting import eventually

from holdfast.core.contract import EXIT_PREEMPTED

ZYGOTE = "pl_zygote.py"
KILLS = 12
GIVE_UP_S = 60.0
SETTINGS: dict[str, Any] = {
    "devices": 2, "strategy": "ddp", "val_check_interval": 4, "accumulate_grad_batches": 2, "ema": True, "max_epochs": 3,
}  # fmt: skip
# 44 samples on two ranks are 5 batches of 4 on each, and one of 2: three steps of two batches.
STEPS = 9


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Never interrupted; at another pace of saving, since it must not matter."""
    return Job(zygote, tmp_path_factory.mktemp("reference") / "job", **SETTINGS, save_every="epoch").finish()


def stop(job: Job, place: str, rank: int, number: int, saved: int | None = None, **changes: Any) -> list[int]:
    """An attempt in which this rank gets this signal at that place, once this step is saved. Exit codes."""
    mark = job.folder / "place"
    mark.unlink(missing_ok=True)
    job.start(for_rank={rank: {"pause_in": place}}, **changes)
    eventually(lambda: mark.exists() or job.ended(rank), job.said, give_up_s=GIVE_UP_S)
    assert mark.exists(), job.said()
    eventually(lambda: saved is None or job.durable_step() >= saved, job.said, give_up_s=GIVE_UP_S)
    job.signal(rank, number)
    if number != signal.SIGKILL:
        mark.unlink()
    return job.wait()


def test_uninterrupted(reference: list[dict[str, Any]]) -> None:
    assert [outcome["step"] for outcome in reference] == [STEPS, STEPS]
    for epoch in range(3):
        used = [sample for outcome in reference for sample in outcome["samples"][epoch * 22 : (epoch + 1) * 22]]
        assert sorted(used) == list(range(44))


@pytest.mark.parametrize("rank", [0, 1])
def test_any_rank_killed(zygote: Zygote, reference: list[dict[str, Any]], tmp_path: Path, rank: int) -> None:
    job = Job(zygote, tmp_path, **SETTINGS, save_every="1 step")
    for place in ("stepping:1", "ending:9") if rank else ("evaluating:5",):
        assert stop(job, place, rank, signal.SIGKILL)[rank] == -signal.SIGKILL
    assert job.finish() == reference


@pytest.mark.long
def test_random_kills(zygote: Zygote, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of either rank or both, at any moment."""
    for outcome in struck_often(zygote, tmp_path, SETTINGS, KILLS, "lightning"):
        assert outcome == reference


def test_what_ddp_remembers_of_an_evaluation(zygote: Zygote, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """The last step is left to do; it begins after an evaluation, in whose wake no buffers are handed out."""
    job = Job(zygote, tmp_path, **SETTINGS)
    assert stop(job, f"ending:{STEPS}", 1, signal.SIGKILL, saved=8, save_every="8 steps")[1] == -signal.SIGKILL
    assert job.finish() == reference


def test_a_notice_on_one_rank(zygote: Zygote, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """All leave at one step, which they agree on."""
    job = Job(zygote, tmp_path, **SETTINGS, save_every="1 h")
    assert stop(job, "stepping:4", 1, signal.SIGTERM) == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.said()
    assert len(job.head_checkpoints()) == 1
    assert job.finish() == reference


def test_another_number_of_ranks(zygote: Zygote, tmp_path: Path) -> None:
    """In the middle of an epoch: the exact next sample, and a warning about averages. A sampler that Lightning was told not to put
    in is not missed, and that is said as well."""
    job = Job(zygote, tmp_path, **{**SETTINGS, "save_every": "1 h", "use_distributed_sampler": False, "max_epochs": 2})
    assert stop(job, "stepping:1", 0, signal.SIGTERM) == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.said()
    assert "every rank gets its part of one order all the same" in job.said()
    step = job.durable_step()
    assert 0 < step < 3, "in the middle of the first epoch"
    outcome = job.finish(1, devices=1)[0]
    assert "2 → 1 ranks in the middle of an epoch: each kept averages of its own" in job.said()
    assert outcome["epoch"] == 2


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["alone", "torchrun"])
def test_the_launchers(zygote: Zygote, reference: list[dict[str, Any]], tmp_path: Path, launcher: str) -> None:
    """Lightning itself starts the other rank from the first; or torchrun does, and starts none again."""
    job, log, place = Job(zygote, tmp_path / "job"), tmp_path / "log", tmp_path / "place"
    train = {"url": str(job.url), "result": str(job.folder / "result"), **SETTINGS, "save_every": "1 step"}
    for rank, where, number in (
        (1, "stepping:4", signal.SIGKILL), (0, "ending:6", signal.SIGKILL), (1, "stepping:7", signal.SIGTERM), (0, "", 0),
    ):  # fmt: skip
        if number == signal.SIGTERM:
            train["save_every"] = "1 h"
        request = json.dumps({"train": train, "pauses": [[rank, where]]})
        command = command_of(launcher, [str(Path(__file__).with_name("launched.py")), "pl_victim.train", request])
        with (
            log.open("a") as output,
            started(command, tmp_path, environ={"VICTIM_PLACE": str(place)}, output=output) as process,
        ):
            if number:
                eventually(lambda: place.exists() or process.poll() is not None, log.read_text, give_up_s=GIVE_UP_S)
                assert process.poll() is None, log.read_text()
                ranks = workers_of(process)
                os.kill(ranks.get(rank, process.pid), number)
                place.unlink()
            code = process.wait(GIVE_UP_S)
            assert not workers_of(process)
        # Torchrun has an exit code of its own for ranks that have failed.
        if number == signal.SIGTERM:
            assert code == (EXIT_PREEMPTED if launcher == "alone" else 1), log.read_text()
        else:
            assert (code == 0) == (number == 0), log.read_text()
    assert job.outcome() == reference
