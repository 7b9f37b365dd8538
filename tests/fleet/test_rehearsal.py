"""From `holdfast launch` to the last cent, with real processes on the rehearsal cloud: machines taken, the controller killed."""

from __future__ import annotations

import json
import os
import random
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rehearsing import HOLDFAST, IMPATIENT, Rehearsal

from holdfast.provider.base import Machine

EXAMPLE = Path(__file__).parents[2] / "examples" / "chargpt"
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


@pytest.fixture
def rehearse(tmp_path: Path) -> Iterator[Any]:
    made: list[Rehearsal] = []

    def make(config: dict[str, Any], job: dict[str, Any], command: tuple[str, ...] = HOLDFAST) -> Rehearsal:
        made.append(Rehearsal(tmp_path, config, job, command))
        return made[-1]

    yield make
    for each in made:
        each.end()


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
    arguments = "--epochs 4 --batches 300 --workers 0"
    reference = tmp_path / "reference.json"
    alone = ["train.py", "--url", str(tmp_path / "reference"), "--proof", str(reference), *arguments.split()]
    subprocess.run([sys.executable, *alone], cwd=EXAMPLE, check=True, capture_output=True)
    run = f"python train.py {arguments} --save-every '5 steps' --proof proof.json\necho proof: $(cat proof.json)"
    limits = {"budget": 5, "deadline": "3h", "plan": {"work": "10 min", "changeover": "10 s"}, "fallback_after": "20 s"}
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
        (first, *_) = world.wait_for(lambda: not on("on-demand") and on("spot"))
        get_on()
        world.cloud.preempt(first.id, lead_s=rng.choice([0, 10]))
        if taken % 6 == 3:
            world.kill_controller()
            world.go_on()
        if taken in (5, 11):
            # Suspended in the middle of its work; it wakes long after another one has taken over, and goes on.
            world.suspend_controller()
            world.go_on()
        if taken in (9, 15):
            world.wake_controllers()
        world.wait_for(lambda first=first: all(each.id != first.id for each in world.alive()))
    assert world.finish(1800) == 0, world.story()
    assert world.others_left() == [0, 0]
    proof = json.loads(re.findall(r"proof: (\{.*\})", world.output())[-1])
    assert proof == json.loads(reference.read_text())
    world.check_books()


@pytest.mark.long
@pytest.mark.parametrize("told", ["advised", "notice withdrawn"])
def test_warned_and_not_taken(rehearse: Any, tmp_path: Path, told: str) -> None:
    """After advice the run moves once its new machine is ready; after a notice that is taken back the other one goes home."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "count.py").write_text(COUNTING.replace("range(400)", "range(1200)").replace("4000", "12000"))
    world = rehearse(CONFIG, {"name": "count", "run": "python count.py", "workdir": "code", "budget": 2})
    world.launch()
    world.wait_for(lambda: world.steps() >= 50)
    (first,) = world.alive()
    if told == "advised":
        world.cloud.advise(first.id)
    else:
        world.cloud.preempt(first.id, lead_s=60)
        world.wait_for(lambda: len(world.alive()) == 2)
        world.cloud.withdraw(first.id)
    assert world.finish() == 0, world.story()
    whys = [line["why"] for line in world.status()["launches"]]
    if told == "advised":
        assert whys == ["stopped, exit code 75", "released, exit code 0"], world.story()
    else:
        assert whys == ["released, exit code 0", "stopped"], world.story()
    reference = subprocess.run(
        [sys.executable, str(code / "count.py")], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "HOLDFAST_RUN": str(tmp_path / "reference")},
    )  # fmt: skip
    assert re.findall(r"counted \d+", reference.stdout) == re.findall(r"counted \d+", world.output())
    world.check_books()
