"""Lightning's DDP with the callback: whichever rank is killed, all are started again, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from forking import Zygote
from waiting import eventually

from holdfast.checkpoint.heads import read_truth
from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.store.open import open_store

HERE = Path(__file__).parent
GIVE_UP_S = 60.0
SETTINGS: dict[str, Any] = {
    "devices": 2, "strategy": "ddp", "val_check_interval": 4, "accumulate_grad_batches": 2, "ema": True, "max_epochs": 3,
}  # fmt: skip
# 44 samples on two ranks are 5 batches of 4 on each, and one of 2: three steps of two batches.
STEPS = 9


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """Both ranks of a training, in a folder of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.log, self.place = folder, folder / "log", folder / "place"
        self.url = str(folder / "run")
        self.train = {"url": self.url, "result": str(folder / "result"), **SETTINGS, **settings}

    def start(self, **changes: Any) -> None:
        self.place.unlink(missing_ok=True)
        for rank in range(2):
            (self.folder / f"pid.{rank}").unlink(missing_ok=True)
        self._launch({**self.train, **changes}, {"VICTIM_PLACE": str(self.place), "CUDA_VISIBLE_DEVICES": ""})

    def _launch(self, train: dict[str, Any], environ: dict[str, str]) -> None:
        raise NotImplementedError

    def wait(self) -> list[int]:
        """Until all ranks have ended."""
        raise NotImplementedError

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid.{rank}").read_text())

    def has_ended(self, rank: int) -> bool:
        return (self.folder / f"pid.{rank}").exists() and not alive(self.pid(rank))

    def stop(self, place: str, rank: int, number: int, saved: int | None = None, **changes: Any) -> list[int]:
        """An attempt in which this rank gets this signal at that place, once this step is saved. Exit codes."""
        self.start(pause_in=place, pause_rank=rank, **changes)
        eventually(lambda: self.place.exists() or self.has_ended(rank), self.log.read_text, give_up_s=GIVE_UP_S)
        assert self.place.exists(), self.log.read_text()
        eventually(lambda: saved is None or saved in self.saved_steps(), give_up_s=GIVE_UP_S)
        os.kill(self.pid(rank), number)
        if number != signal.SIGKILL:
            self.place.unlink()
        return self.wait()

    def finish(self) -> list[dict[str, Any]]:
        self.start()
        codes = self.wait()
        assert not any(codes), self.log.read_text()
        return [json.loads((self.folder / name).read_text()) for name in ("result", "result.1")]

    def saved_steps(self) -> list[int]:
        head = read_truth(open_store(self.url)).head
        return [] if head is None else [ref.step for ref in head.checkpoints]


class Forked(Job):
    """As torchrun starts ranks, but from a process that has imported everything already."""

    zygote: Zygote

    def _launch(self, train: dict[str, Any], environ: dict[str, str]) -> None:
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
        self.pids = [
            self.zygote.start(train, {**environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}, self.log)
            for rank in range(2)
        ]

    def wait(self) -> list[int]:
        return [self.zygote.wait(pid) for pid in self.pids]


class Launched(Job):
    """By Lightning itself, which starts the other rank from the first, or by torchrun."""

    launcher: tuple[str, ...] = ()

    def _launch(self, train: dict[str, Any], environ: dict[str, str]) -> None:
        paths = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent / "kills", HERE.parent / "support"))
        script = [*self.launcher, str(HERE / "pl_victim.py"), json.dumps(train)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *script], env={**os.environ, **environ, "PYTHONPATH": paths}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> list[int]:
        code = self.process.wait(GIVE_UP_S)
        for rank in range(2):
            eventually(lambda rank=rank: not alive(self.pid(rank)), self.log.read_text, give_up_s=GIVE_UP_S)
        return [code]


class Torchrun(Launched):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def forked() -> Iterator[type[Forked]]:
    with Zygote(HERE / "pl_zygote.py") as process:
        Forked.zygote = process
        yield Forked


@pytest.fixture(scope="module")
def reference(forked: type[Forked], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Never interrupted; at another pace of saving, since it must not matter."""
    return forked(tmp_path_factory.mktemp("reference") / "job", save_every="epoch").finish()


def test_uninterrupted(reference: list[dict[str, Any]]) -> None:
    assert [outcome["step"] for outcome in reference] == [STEPS, STEPS]
    for epoch in range(3):
        used = [sample for outcome in reference for sample in outcome["samples"][epoch * 22 : (epoch + 1) * 22]]
        assert sorted(used) == list(range(44))


@pytest.mark.parametrize("rank", [0, 1])
def test_any_rank_killed(forked: type[Forked], reference: list[dict[str, Any]], tmp_path: Path, rank: int) -> None:
    job = forked(tmp_path / "job", save_every="1 step")
    for place in ("stepping:1", "ending:9") if rank else ("evaluating:5",):
        assert job.stop(place, rank, signal.SIGKILL)[rank] == -signal.SIGKILL
    assert job.finish() == reference


def test_what_ddp_remembers_of_an_evaluation(
    forked: type[Forked], reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The last step is left to do; it begins after an evaluation, in whose wake no buffers are handed out."""
    job = forked(tmp_path / "job")
    assert job.stop(f"ending:{STEPS}", 1, signal.SIGKILL, saved=8, save_every="8 steps")[1] == -signal.SIGKILL
    assert job.finish() == reference


def test_a_notice_on_one_rank(forked: type[Forked], reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """All leave at one step, which they agree on."""
    job = forked(tmp_path / "job", save_every="1 h")
    assert job.stop("stepping:4", 1, signal.SIGTERM) == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.log.read_text()
    assert len(job.saved_steps()) == 1
    assert job.finish() == reference


@pytest.mark.long
@pytest.mark.parametrize("how", [Launched, Torchrun])
def test_the_launchers(reference: list[dict[str, Any]], tmp_path: Path, how: type[Launched]) -> None:
    job = how(tmp_path / "job", save_every="1 step")
    for rank, place in ((1, "stepping:4"), (0, "ending:6")):
        assert job.stop(place, rank, signal.SIGKILL) != [0]
    codes = job.stop("stepping:7", 1, signal.SIGTERM, save_every="1 h")
    # Torchrun has an exit code of its own for ranks that have failed.
    assert codes == [EXIT_PREEMPTED if how is Launched else 1], job.log.read_text()
    assert job.finish() == reference
