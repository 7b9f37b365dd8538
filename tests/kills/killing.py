"""Starting victims, watching how far they are, and killing them at chosen or random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forking import Zygote

from holdfast.core.contract import ENV_CONTROL, ProgressPage

HERE = Path(__file__).parent
GIVE_UP_S = 120.0


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
        status = self.zygote.wait(self.pid)
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
        return Victim(self.zygote, self.zygote.start(train, environ, self.log), page, self.log)

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
