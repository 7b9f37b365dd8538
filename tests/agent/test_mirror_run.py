"""Scripts that have never heard of holdfast, under the real agent, killed at random moments and brought to their end.

A script checks what it finds: a file that cannot be loaded, or files of one checkpoint that do not belong together, end it with an
exit code that no restart hides. Kills are timed by what the script prints, so a busy machine only makes the test slower.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.checkpoint.runs.verify import verify
from holdfast.store.local import LocalStore

AGENT = """
import random, sys
from pathlib import Path
from holdfast.agent.mirror import MirrorOptions
from holdfast.agent.restart import RunOptions, run_command
from holdfast.core.clock import SystemClock
from holdfast.core.events import NullSink
from holdfast.policy.restart import RestartLimits
from holdfast.store.open import open_store
url, folder, *command = sys.argv[1:]
options = RunOptions(
    url=url, mirror=MirrorOptions(folder=Path(folder), settle_s=0.2, look_every_s=0.05),
    limits=RestartLimits(first_delay_s=0, max_delay_s=0, no_progress_limit=0),
)
say = lambda line: print(line, file=sys.stderr, flush=True)
sys.exit(run_command(command, options, clock=SystemClock(), sink=NullSink(), say=say, rng=random.Random(1),
                     open_store=open_store))
"""

PLAIN_TORCH = """
import os, sys, time, torch
out, steps = sys.argv[1], int(sys.argv[2])
os.makedirs(out, exist_ok=True)
path = os.path.join(out, "ckpt.pt")
step, weights = 0, torch.zeros(300_000)
if os.path.exists(path):
    loaded = torch.load(path)
    step, weights = loaded["step"], loaded["weights"]
    if not bool((weights == step).all()):
        sys.exit(2)
print("started", os.getpid(), step, flush=True)
while step < steps:
    step, weights = step + 1, weights + 1
    time.sleep(0.02)
    if step % 5 == 0:
        torch.save({"step": step, "weights": weights}, path)
    print("step", step, flush=True)
"""

FOLDERS = """
import json, os, re, shutil, sys, time
out, steps = sys.argv[1], int(sys.argv[2])
os.makedirs(out, exist_ok=True)
names = ("model.bin", "optimizer.bin", "trainer_state.json")
found = sorted(int(name.split("-")[1]) for name in os.listdir(out) if re.fullmatch(r"checkpoint-\\d+", name))
step = found[-1] if found else 0
for name in names if found else ():
    path = os.path.join(out, f"checkpoint-{step}", name)
    if not os.path.exists(path) or open(path, "rb").read() != bytes([step % 251]) * 200_000:
        sys.exit(2)
print("started", os.getpid(), step, flush=True)
while step < steps:
    step += 1
    time.sleep(0.02)
    if step % 20 == 0:
        os.mkdir(os.path.join(out, f"checkpoint-{step}"))
        for name in names:
            with open(os.path.join(out, f"checkpoint-{step}", name), "wb") as file:
                for _ in range(20):
                    file.write(bytes([step % 251]) * 10_000)
                    time.sleep(0.0005)
        shutil.rmtree(os.path.join(out, f"checkpoint-{step - 40}"), ignore_errors=True)
    print("step", step, flush=True)
"""


class Place:
    """A store that stays, and machines that come and go."""

    def __init__(self, tmp_path: Path, script: str, steps: int) -> None:
        self.url = str(tmp_path / "store" / "run")
        self.machine = tmp_path / "machine"
        self.out = self.machine / "out"
        self.script = tmp_path / "script.py"
        self.script.write_text(script)
        self.steps = steps
        self.agent: subprocess.Popen[str] | None = None
        self.pid = 0
        self.started_at: list[int] = []
        self.said = tmp_path / "said"

    def start(self) -> None:
        self.machine.mkdir(exist_ok=True)
        command = [sys.executable, str(self.script), str(self.out), str(self.steps)]
        with self.said.open("a") as said:
            self.agent = subprocess.Popen(
                [sys.executable, "-c", AGENT, self.url, str(self.out), *command],
                stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def lines(self) -> Iterator[list[str]]:
        """What the script prints, word by word; notes every start."""
        assert self.agent is not None
        assert self.agent.stdout is not None
        for line in self.agent.stdout:
            words = line.split()
            if words[0] == "started":
                self.pid = int(words[1])
                self.started_at.append(int(words[2]))
            yield words

    def run_for(self, steps: int) -> bool:
        """False when the command came to its end first."""
        done = 0
        for words in self.lines():
            done += words[0] == "step"
            if done >= steps:
                return True
        return False

    def kill_the_machine(self) -> None:
        assert self.agent is not None
        self.agent.kill()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for _ in self.lines():
            pass
        self.wait()

    def wait(self) -> int:
        assert self.agent is not None
        with self.agent:
            for _ in self.lines():
                pass
            return self.agent.wait(60)

    def fresh_machine(self) -> None:
        shutil.rmtree(self.machine)

    def problems(self) -> list[str]:
        return [line for line in self.said.read_text().splitlines() if "exit code 2" in line or "Traceback" in line]


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    script, steps = request.param
    made = Place(tmp_path, script, steps)
    yield made
    if made.agent is not None and made.agent.poll() is None:
        made.kill_the_machine()


def bring_to_its_end(place: Place, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        place.start()
        if not place.run_for(rng.randrange(1, 60)):
            place.wait()
            break
        how = rng.choice(["machine", "machine", "command", "sigterm"])
        if how == "command":
            # The agent is left, and starts it again in the same folder.
            os.kill(place.pid, signal.SIGKILL)
            place.run_for(rng.randrange(5, 40))
        if how == "sigterm":
            assert place.agent is not None
            place.agent.send_signal(signal.SIGTERM)
            place.wait()
        else:
            place.kill_the_machine()
        if rng.random() < 0.6:
            place.fresh_machine()
    place.start()
    assert place.wait() == 0, place.said.read_text()[-3000:]
    assert not place.problems(), place.said.read_text()[-3000:]


KINDS = pytest.mark.parametrize(
    "place", [(PLAIN_TORCH, 150), (FOLDERS, 150)], indirect=True, ids=["plain torch.save", "checkpoint folders"]
)


@KINDS
def test_killed_at_random_moments_it_comes_to_its_end_without_ever_reading_a_torn_file(place: Place) -> None:
    bring_to_its_end(place, kills=3, seed=3)
    assert any(step > 0 for step in place.started_at), "it did resume"
    report = verify(LocalStore(Path(place.url)), open_home=lambda url: LocalStore(Path(url)))
    assert report.good
    last = place.started_at[-1]
    place.fresh_machine()
    place.start()
    assert place.wait() == 0
    assert place.started_at[-1] >= max(last, place.steps - place.steps % 20)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
@KINDS
def test_killed_many_times(place: Place, seed: int) -> None:
    bring_to_its_end(place, kills=25, seed=100 + seed)


STEPS_AND_A_SAVE_ON_SIGTERM = """
import json, os, signal, sys, time
path = os.path.join(sys.argv[1], "state.json")
step = json.load(open(path))["step"] if os.path.exists(path) else 0
os.makedirs(sys.argv[1], exist_ok=True)
def leave(*_):
    with open(path, "w") as file: json.dump({"step": step}, file)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
print("started", os.getpid(), step, flush=True)
while step < int(sys.argv[2]):
    step += 1
    time.sleep(0.01)
    print("step", step, flush=True)
"""


@pytest.mark.parametrize("place", [(STEPS_AND_A_SAVE_ON_SIGTERM, 60)], indirect=True, ids=["saves on SIGTERM"])
def test_what_a_script_saves_on_sigterm_is_stored_before_the_agent_leaves(place: Place) -> None:
    place.start()
    assert place.run_for(20)
    assert place.agent is not None
    place.agent.send_signal(signal.SIGTERM)
    assert place.wait() == 75
    saved = json.loads((place.out / "state.json").read_text())["step"]
    assert saved >= 20
    place.fresh_machine()
    place.start()
    assert place.wait() == 0
    assert place.started_at == [0, saved]


@pytest.mark.parametrize("place", [(STEPS_AND_A_SAVE_ON_SIGTERM, 100_000)], indirect=True, ids=["endless"])
def test_an_attempt_whose_run_was_taken_over_stops_its_command(place: Place, tmp_path: Path) -> None:
    place.start()
    assert place.run_for(1)
    (place.out / "more.bin").write_bytes(b"something to store")
    (tmp_path / "other").mkdir()
    other = Place(tmp_path / "other", FOLDERS, 1)
    other.url = place.url
    other.start()
    assert other.wait() == 0
    (place.out / "even more.bin").write_bytes(b"something to store")
    assert place.wait() == 76
    assert "another attempt owns this run now" in place.said.read_text()


def test_a_mirror_needs_a_url_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {name: value for name, value in os.environ.items() if name != "HOLDFAST_RUN"}
    for arguments, message in (
        (["--mirror", "out"], "--mirror needs the URL"),
        (["--run", str(tmp_path / "run"), "--mirror", str(tmp_path / "file")], "name the folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "holdfast", "run", *arguments, "--", "true"],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
