"""Two runs of one fleet with real processes: taken, the fleet's controller killed, its index thrown away, another one goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rehearsing import GIVE_UP_S, HOLDFAST
from test_rehearsal import CONFIG, COUNTING

from holdfast.provider.local import LocalCloud


class Played:
    """A cloud, a home, and its controllers one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "controller.log"
        (folder / "cloud.json").write_text(json.dumps(CONFIG))
        self.cloud = LocalCloud.open(folder / "cloud", folder / "cloud.json")
        self.controller: subprocess.Popen[str] | None = None
        code = folder / "code"
        code.mkdir()
        (code / "count.py").write_text(COUNTING.replace("time.sleep(0.05)", "time.sleep(0.15)"))

    def control(self) -> None:
        words = [
            "controller",
            *self.home,
            "--index",
            str(self.folder / "index.sqlite"),
            "--until-empty",
            "--slice",
            "10 min",
        ]
        with self.log.open("a") as log:
            self.controller = subprocess.Popen([*HOLDFAST, *words], stdout=log, stderr=log, text=True)

    @property
    def home(self) -> list[str]:
        return ["--home", str(self.folder / "home")]

    def launch(self, name: str, *words: str) -> str:
        job = self.folder / f"{name}.yaml"
        job.write_text(
            json.dumps(
                {"name": name, "run": "python count.py", "workdir": "code", "budget": 2, "resources": {"infra": "local"},
                 "checkpoint": {"url": str(self.folder / name)}}
            )
        )  # fmt: skip
        command = [*HOLDFAST, "launch", str(job), "--cloud", str(self.folder / "cloud"), "-y", *self.home, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIVE_UP_S)
        return done.stderr

    def wait_for(self, what: Any) -> Any:
        until_s = time.monotonic() + GIVE_UP_S
        while not (found := what()):
            assert time.monotonic() < until_s, self.log.read_text()[-8000:]
            time.sleep(0.2)
        return found

    def begun(self, name: str, attempt: int) -> bool:
        return any(f"attempt {attempt}" in path.read_text() for path in (self.folder / name / "logs").rglob("*.log"))

    def shown(self, command: str) -> dict[str, Any]:
        index = ["--index", str(self.folder / "index.sqlite")]
        done = subprocess.run(
            [*HOLDFAST, command, *self.home, *index, "--json"], capture_output=True, text=True, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    made = Played(tmp_path)
    yield made
    if made.controller is not None and made.controller.poll() is None:
        made.controller.kill()
        made.controller.wait()
    made.cloud.end()


@pytest.mark.long
def test_two_runs_of_a_fleet(played: Played) -> None:
    said = played.launch("one", "-d")
    assert "Nobody looks after this fleet" in said
    played.control()
    played.wait_for(lambda: list((played.folder / "home").rglob("controllers/*")))
    said = played.launch("two")
    assert "was heard" in said
    played.wait_for(lambda: played.begun("one", 1) and played.begun("two", 1))
    assert played.controller is not None
    played.controller.kill()
    played.controller.wait()
    (played.folder / "index.sqlite").unlink()
    one = min(played.cloud.machines("default"), key=lambda each: each.created_unix_s)
    played.cloud.preempt(one.id, lead_s=0)
    played.control()
    played.wait_for(lambda: played.begun("one", 2))
    assert {run["name"] for run in played.shown("status")["runs"]} <= {"one", "two"}
    assert played.controller.wait(GIVE_UP_S) == 0, played.log.read_text()[-8000:]
    shown = played.shown("status")
    assert (shown["runs"], {each["name"]: each["outcome"] for each in shown["over"]}) == (
        [],
        {"one": "done", "two": "done"},
    )
    assert {each["name"]: each["launches"] for each in shown["over"]} == {"one": 2, "two": 1}
    invoice = played.cloud.invoice()
    assert shown["spent_microusd"] == invoice["total_microusd"] == played.shown("cost")["spent_microusd"]
    outputs = [
        subprocess.run(
            [*HOLDFAST, "logs", str(played.folder / name)], capture_output=True, text=True, check=True
        ).stdout
        for name in ("one", "two")
    ]
    counted = [re.findall(r"counted \d+", output) for output in outputs]
    assert counted[0] == counted[1]
    assert len(counted[0]) == 1


@pytest.mark.long
def test_a_fleets_controller_leaves_in_order(played: Played) -> None:
    """And a cancelled run ends under the next one."""
    played.launch("one", "-d")
    played.control()
    played.wait_for(lambda: played.begun("one", 1))
    assert played.controller is not None
    played.controller.send_signal(signal.SIGTERM)
    assert played.controller.wait(GIVE_UP_S) == 130
    assert not list((played.folder / "home").rglob("controllers/*"))
    assert len([each for each in played.cloud.machines("default") if each.state == "running"]) == 1
    subprocess.run([*HOLDFAST, "cancel", str(played.folder / "one"), "-y"], check=True, capture_output=True)
    played.control()
    assert played.controller.wait(GIVE_UP_S) == 0
    (over,) = played.shown("status")["over"]
    assert over["outcome"] == "cancelled"
    assert over["cost_microusd"] == played.cloud.invoice()["total_microusd"]
