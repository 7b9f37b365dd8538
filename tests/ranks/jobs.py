"""Jobs of several ranks on one machine: start them, strike them, read what became of them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from forking import Zygote
from waiting import eventually

from holdfast.checkpoint.format import CheckpointRef
from holdfast.checkpoint.heads import read_truth
from holdfast.store.local import LocalStore


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """One run in a folder, and the ranks that train it."""

    def __init__(self, zygote: Zygote, folder: Path, **train: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.zygote, self.folder, self.train = zygote, folder, train
        self.url, self.log = folder / "run", folder / "log"
        self.pids: list[int] = []
        self.environ: dict[str, str] = {}
        """Of every rank, beside its own variables."""

    def start(
        self,
        size: int = 2,
        for_rank: dict[int, dict[str, Any]] | None = None,
        per_machine: int | None = None,
        **changes: Any,
    ) -> None:
        port = free_port()
        for path in self.folder.glob("run.step-*"):
            path.unlink()
        self.pids = []
        for rank in range(size):
            train = {"url": str(self.url), "result": str(self.folder / "result"), **self.train, **changes}
            train |= (for_rank or {}).get(rank, {})
            environ = {
                "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "LOCAL_RANK": str(rank % (per_machine or size)), "LOCAL_WORLD_SIZE": str(per_machine or size), **self.environ,
            }  # fmt: skip
            self.pids.append(self.zygote.start(train, environ, f"{self.log}.{rank}"))

    def signal(self, rank: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def ended(self, rank: int) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    def all_ended(self) -> bool:
        return all(self.ended(rank) for rank in range(len(self.pids)))

    def wait(self) -> list[int]:
        """Exit codes; negative for signals. What hangs is a broken test."""
        try:
            eventually(self.all_ended, self.said)
        except AssertionError:
            for rank in range(len(self.pids)):
                self.signal(rank, signal.SIGKILL)
            raise
        return [self.zygote.wait(pid) for pid in self.pids]

    def wait_or_end(self) -> list[int]:
        """As a launcher does it: when one rank has failed, the others are ended."""
        eventually(lambda: any(self.ended(rank) for rank in range(len(self.pids))), self.said)
        give_up_s = time.monotonic() + 15.0
        while not self.all_ended() and time.monotonic() < give_up_s:
            time.sleep(0.01)
        for rank in range(len(self.pids)):
            self.signal(rank, signal.SIGKILL)
        return self.wait()

    def step(self, rank: int = 0) -> int:
        with suppress(OSError, ValueError):
            return int(Path(f"{self.url}.step-{rank}").read_text())
        return -1

    def until_step(self, step: int, rank: int = 0) -> None:
        eventually(lambda: self.step(rank) >= step or self.all_ended(), self.said)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log.*")))

    def head_checkpoints(self) -> list[CheckpointRef]:
        head = read_truth(LocalStore(self.url)).head
        return [] if head is None else head.checkpoints

    def durable_step(self) -> int:
        return max((ref.step for ref in self.head_checkpoints()), default=0)

    def samples_seen(self) -> list[tuple[int, int]]:
        """What all ranks of all worlds have computed with, where no step was computed twice."""
        lines = [line for path in self.folder.glob("run.samples-*") for line in path.read_text().splitlines()]
        return [(int(epoch), int(number)) for epoch, number in (line.split() for line in lines)]

    def outcome(self, size: int = 2) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"result.{rank}").read_text()) for rank in range(size)]

    def finish(self, size: int = 2, **changes: Any) -> list[dict[str, Any]]:
        """Nobody interrupts it any more; what came out."""
        self.start(size, pace_s=0.0, notice="none", **changes)
        assert self.wait() == [0] * size, self.said()
        return self.outcome(size)

    def strike_at_random(self, rng: random.Random, number: int) -> bool:
        """A signal to a random rank, or to all, somewhere in the run. False when it has ended before."""
        self.start(pace_s=0.01)
        self.until_step(self.durable_step() + rng.randrange(1, 6))
        time.sleep(rng.random() * 0.02)
        if self.all_ended():
            self.wait()
            return False
        for rank in rng.choice([[0], [1], [0, 1]]):
            self.signal(rank, number)
        self.wait_or_end()
        return True
