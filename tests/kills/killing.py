"""Starting victims, watching how far they are, and killing them at chosen or random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.contract import ENV_CONTROL, ProgressPage

HERE = Path(__file__).parent
GIVE_UP_S = 120.0


class Zygote:
    """A warmed process that forks victims."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=30)


@dataclass
class Victim:
    """One attempt that is running."""

    zygote: Zygote
    pid: int
    page: ProgressPage
    log: Path

    def step(self) -> int:
        progress = self.page.read()
        return -1 if progress is None else progress.step

    def ended(self) -> bool:
        try:
            with open(f"/proc/{self.pid}/stat") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def wait_for_step(self, step: int) -> None:
        """Until `step` is done or the victim has ended by itself."""
        self.wait_until(lambda: self.step() >= step)

    def wait_until(self, condition: Any) -> None:
        deadline_s = time.monotonic() + GIVE_UP_S
        while not condition() and not self.ended():
            assert time.monotonic() < deadline_s, f"the victim does not get on:\n{self.log.read_text()}"
            time.sleep(0.0005)

    def signal(self, number: int, *, group: bool = True) -> None:
        try:
            if group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self) -> int:
        """Its exit code; negative for a signal. What is left of its process group goes too."""
        status = int(self.zygote.ask({"wait": self.pid})["status"])
        self.signal(signal.SIGKILL)
        self.page.close()
        return status


class Ground:
    """A run under attack: its URL, its folder on this machine, and how often it has been killed."""

    def __init__(
        self, zygote: Zygote, folder: Path, url: str, environ: dict[str, str] | None = None, **train: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.zygote, self.folder, self.url, self.train = zygote, folder, url, train
        self.environ = environ or {}
        self.result = folder / "result.json"
        self.log = folder / "log"
        self.kills = 0

    def start(self, **changes: Any) -> Victim:
        page = ProgressPage(self.folder)
        page.reset()
        environ = {**self.environ, ENV_CONTROL: str(self.folder), "VICTIM_PLACE": str(self.folder / "place")}
        (self.folder / "place").unlink(missing_ok=True)
        train = {"url": self.url, "result": str(self.result), **self.train, **changes}
        started = self.zygote.ask({"start": {"train": train, "environ": environ, "log": str(self.log)}})
        return Victim(self.zygote, int(started["pid"]), page, self.log)

    def finish(self) -> dict[str, Any]:
        """Let an attempt run to its end and read what came out."""
        status = self.start().wait()
        assert status == 0, f"exit status {status}\n{self.log.read_text()}"
        return self.outcome()

    def outcome(self) -> dict[str, Any]:
        outcome: dict[str, Any] = json.loads(self.result.read_text())
        return outcome

    def place_reached(self) -> bool:
        return (self.folder / "place").exists()

    def go_on(self) -> None:
        (self.folder / "place").unlink()

    def kill_at_random(self, rng: random.Random) -> bool:
        """One attempt, killed somewhere. False when it finished first."""
        victim = self.start()
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.25)
        else:
            victim.wait_until(lambda: victim.step() >= 0)
            victim.wait_for_step(victim.step() + rng.randrange(8))
            time.sleep(rng.random() * 0.01)
        victim.signal(signal.SIGKILL)
        killed = victim.wait() == -signal.SIGKILL
        self.kills += killed
        return killed


@contextmanager
def warmed() -> Iterator[Zygote]:
    zygote = Zygote()
    try:
        yield zygote
    finally:
        zygote.close()
