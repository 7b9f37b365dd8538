"""From `holdfast launch` to the last cent, with real processes on the rehearsal cloud: machines taken, the controller killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.heads import read_truth
from holdfast.provider.base import Machine
from holdfast.provider.local import LocalCloud
from holdfast.store.open import open_store

HOLDFAST = (sys.executable, "-m", "holdfast")
IMPATIENT = (sys.executable, str(Path(__file__).parent / "impatient.py"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "chargpt"
GIVE_UP_S = 300.0
CANARY = "canary-0f8e2d6a91c4b7"
COUNTING = """
import os, time, numpy as np, holdfast
class Count:
    def __init__(self): self.values = np.zeros(1000)
    def state_dict(self): return {"values": self.values}
    def load_state_dict(self, tree): self.values[:] = tree["values"]
count, rng = Count(), np.random.default_rng(7)
order = np.random.default_rng(1).integers(0, 1000, 4000)
with holdfast.Run(save_every="10 steps") as run:
    run.track(count=count)
    for _ in run.epochs(1):
        for index in run.batches(list(range(400))):
            count.values[order[index * 10: index * 10 + 10]] += index
            time.sleep(0.05)
print("counted", int(count.values @ np.arange(1000)))
"""


class Rehearsal:
    """A cloud, a run, and the controller that is at work."""

    def __init__(
        self, folder: Path, config: dict[str, Any], job: dict[str, Any], command: tuple[str, ...] = HOLDFAST
    ) -> None:
        self.folder, self._command = folder, command
        (folder / "cloud.json").write_text(json.dumps(config))
        self.cloud = LocalCloud.open(folder / "cloud", folder / "cloud.json")
        self.job = folder / "job.yaml"
        self.job.write_text(
            json.dumps({**job, "checkpoint": {"url": str(folder / "run")}, "resources": {"infra": "local"}})
        )
        self.controller: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        self._start("launch", str(self.job), "--cloud", str(self.folder / "cloud"), "--yes", "--slice", "10 min")

    def go_on(self) -> None:
        self._start("controller", str(self.folder / "run"), "--slice", "10 min")

    def _start(self, *words: str) -> None:
        with (self.folder / "controller.log").open("a") as log:
            self.controller = subprocess.Popen([*self._command, *words], stdout=log, stderr=log, text=True)

    def kill_controller(self) -> None:
        assert self.controller is not None
        self.controller.send_signal(signal.SIGKILL)
        self.controller.wait()

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
        store = open_store(str(self.folder / "run"))
        try:
            head = read_truth(store).head
        finally:
            store.close()
        return max((ref.step for ref in head.checkpoints), default=0) if head is not None else 0

    def status(self) -> dict[str, Any]:
        command = [*HOLDFAST, "status", str(self.folder / "run"), "--json"]
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
        return subprocess.run(
            [*HOLDFAST, "logs", str(self.folder / "run")], capture_output=True, text=True, check=True
        ).stdout

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


@pytest.fixture
def rehearse(tmp_path: Path) -> Iterator[Any]:
    made: list[Rehearsal] = []

    def make(config: dict[str, Any], job: dict[str, Any], command: tuple[str, ...] = HOLDFAST) -> Rehearsal:
        made.append(Rehearsal(tmp_path, config, job, command))
        return made[-1]

    yield make
    for each in made:
        if each.controller is not None and each.controller.poll() is None:
            each.kill_controller()
        each.cloud.end()


CONFIG: dict[str, Any] = {
    "network": "shared", "grace_s": 3,
    "types": {"small": {"cpus": 2, "memory_gib": 8}},
    "pools": [
        {"name": "local/here/a/small/spot", "capacity": 3, "price": "0.30"},
        {"name": "local/here/b/small/spot", "capacity": 3, "price": "0.35"},
        {"name": "local/here/a/small/on-demand", "price": "1.00"},
    ],
    "notice": {"lead_s": 10},
}  # fmt: skip


def test_taken_once_and_the_controller_killed(rehearse: Any, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "count.py").write_text(COUNTING)
    secret = tmp_path / "token"
    secret.write_text(CANARY)
    secret.chmod(0o600)
    run = "test ${#TOKEN} -gt 20\npython count.py"
    secrets = {"TOKEN": f"file:{secret}"}
    world = rehearse(CONFIG, {"name": "count", "run": run, "workdir": "code", "budget": 2, "secrets": secrets})
    world.launch()
    logs = tmp_path / "run" / "logs"
    world.wait_for(lambda: any("attempt 1" in path.read_text() for path in logs.rglob("*.log")))
    world.kill_controller()
    (first,) = world.alive()
    world.cloud.preempt(first.id, lead_s=0)
    world.go_on()
    assert world.finish() == 0, world.story()
    reference = subprocess.run(
        [sys.executable, str(code / "count.py")], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "HOLDFAST_RUN": str(tmp_path / "reference")},
    )  # fmt: skip
    counted = re.search(r"counted \d+", reference.stdout)
    assert counted is not None
    assert counted[0] in world.output()
    assert [line["why"] for line in world.status()["launches"]] == ["preempted", "released, exit code 0"]
    world.check_books()
    for place in (tmp_path / "run", tmp_path / "cloud", tmp_path / "controller.log"):
        for path in place.rglob("*") if place.is_dir() else (place,):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


@pytest.mark.long
def test_twenty_preemptions(rehearse: Any, tmp_path: Path) -> None:
    """A real training; machines go with notice and without, gaps force on-demand, spot comes back; the same weights to the bit."""
    arguments = "--epochs 4 --batches 150 --workers 0"
    reference = tmp_path / "reference.json"
    alone = ["train.py", "--url", str(tmp_path / "reference"), "--proof", str(reference), *arguments.split()]
    subprocess.run([sys.executable, *alone], cwd=EXAMPLE, check=True, capture_output=True)
    run = f"python train.py {arguments} --save-every '5 steps' --proof proof.json\necho proof: $(cat proof.json)"
    limits = {"budget": 5, "deadline": "3h", "plan": {"work": "20 min", "changeover": "40 s"}, "fallback_after": "20 s"}
    job = {"name": "chargpt", "run": run, "workdir": str(EXAMPLE), **limits}
    zones = string.ascii_lowercase[:6]
    spot = [{"name": f"local/here/{zone}/small/spot", "capacity": 2, "price": "0.30"} for zone in zones]
    world = rehearse({**CONFIG, "pools": [*spot, CONFIG["pools"][-1]]}, job, IMPATIENT)
    world.launch()
    rng = random.Random(3)

    def on(market: str) -> list[Machine]:
        return [each for each in world.alive() if each.pool.market == market]

    def get_on() -> None:
        steps = world.steps()
        world.wait_for(lambda: world.steps() > steps)

    for taken in range(20):
        if taken in (7, 14):
            for zone in zones:
                world.cloud.set_pool(f"local/here/{zone}/small/spot", capacity=0)
            world.wait_for(lambda: on("on-demand"))
            get_on()
            for zone in zones:
                world.cloud.set_pool(f"local/here/{zone}/small/spot", capacity=2)
        (first, *_) = world.wait_for(lambda: on("spot"))
        get_on()
        world.cloud.preempt(first.id, lead_s=rng.choice([0, 10]))
        if taken % 6 == 3:
            world.kill_controller()
            world.go_on()
        world.wait_for(lambda first=first: all(each.id != first.id for each in world.alive()))
    assert world.finish(1800) == 0, world.story()
    proof = json.loads(re.findall(r"proof: (\{.*\})", world.output())[-1])
    assert proof == json.loads(reference.read_text())
    world.check_books()
