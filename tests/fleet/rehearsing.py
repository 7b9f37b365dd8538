"""A run on the rehearsal cloud with everything real: the command, its controller, the machines, the training, the bill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from holdfast.checkpoint.heads import read_truth
from holdfast.provider.base import Machine
from holdfast.provider.local import LocalCloud
from holdfast.store.open import open_store

__all__ = ["HOLDFAST", "IMPATIENT", "Rehearsal"]

HOLDFAST = (sys.executable, "-m", "holdfast")
IMPATIENT = (sys.executable, str(Path(__file__).parent / "impatient.py"))
GIVE_UP_S = 300.0


class Rehearsal:
    """A cloud, a run, and the controller that is at work."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        job: dict[str, Any],
        command: tuple[str, ...] = HOLDFAST,
        url: str | None = None,
    ) -> None:
        self.folder, self._command, self.url = folder, command, url or str(folder / "run")
        (folder / "cloud.json").write_text(json.dumps(config))
        self.cloud = LocalCloud.open(folder / "cloud", folder / "cloud.json")
        self.job = folder / "job.yaml"
        self.job.write_text(json.dumps({**job, "checkpoint": {"url": self.url}, "resources": {"infra": "local"}}))
        self.controller: subprocess.Popen[str] | None = None
        self._others: list[subprocess.Popen[str]] = []

    def launch(self) -> None:
        self._start("launch", str(self.job), "--cloud", str(self.folder / "cloud"), "--yes", "--slice", "10 min")

    def go_on(self) -> None:
        self._start("controller", self.url, "--slice", "10 min")

    def _start(self, *words: str) -> None:
        with (self.folder / "controller.log").open("a") as log:
            self.controller = subprocess.Popen([*self._command, *words], stdout=log, stderr=log, text=True)

    def kill_controller(self) -> None:
        assert self.controller is not None
        self.controller.send_signal(signal.SIGKILL)
        self.controller.wait()

    def suspend_controller(self) -> None:
        assert self.controller is not None
        self.controller.send_signal(signal.SIGSTOP)
        self._others.append(self.controller)

    def wake_controllers(self) -> None:
        for each in self._others:
            each.send_signal(signal.SIGCONT)

    def others_left(self) -> list[int]:
        """Exit codes of those that were suspended and woke up."""
        return [each.wait(GIVE_UP_S) for each in self._others]

    def end(self) -> None:
        for each in (self.controller, *self._others):
            if each is not None and each.poll() is None:
                each.kill()
                each.wait()
        self.cloud.end()

    def finish(self, limit_s: float = GIVE_UP_S) -> int:
        assert self.controller is not None
        try:
            return self.controller.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.story()) from None

    def alive(self) -> list[Machine]:
        return [each for each in self.cloud.machines("default") if each.state == "running"]

    def steps(self) -> int:
        """Of the newest checkpoint."""
        store = open_store(self.url)
        try:
            head = read_truth(store).head
        finally:
            store.close()
        return max((ref.step for ref in head.checkpoints), default=0) if head is not None else 0

    def status(self) -> dict[str, Any]:
        command = [*HOLDFAST, "status", self.url, "--json"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        found: dict[str, Any] = json.loads(shown.stdout)
        return found

    def wait_for(self, what: Any, limit_s: float = GIVE_UP_S) -> Any:
        until_s = time.monotonic() + limit_s
        while time.monotonic() < until_s:
            if found := what():
                return found
            assert self.controller is not None
            assert self.controller.poll() is None, self.story()
            time.sleep(0.2)
        raise AssertionError(f"waited in vain: {self.story()}")

    def output(self) -> str:
        return subprocess.run([*HOLDFAST, "logs", self.url], capture_output=True, text=True, check=True).stdout

    def story(self) -> str:
        consoles = sorted((self.folder / "cloud" / "consoles").glob("*.log"))
        said = [each.read_text()[-1500:] for each in consoles[-3:]]
        return "\n".join([(self.folder / "controller.log").read_text()[-6000:], *said])

    def check_books(self) -> None:
        """Nothing is left, and our books are the provider's invoice, to the millionth of a dollar."""
        assert not self.alive()
        overview, invoice = self.status(), self.cloud.invoice()
        assert overview["spent_microusd"] == invoice["total_microusd"], (overview, invoice)
        assert not self.cloud.leftovers("default")
