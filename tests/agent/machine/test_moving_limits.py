"""The watchdog's moments move later and never earlier: through words that come twice or not at all, and through its own death."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from agents import GIVE_UP_S

AGENT = """
import os, signal, sys, time
from pathlib import Path
from holdfast.agent.watchdog import Lifetime, Limits, Watchdog
from holdfast.core.clock import SystemClock
folder, way = Path(sys.argv[1]), sys.argv[2]
def until(seconds):
    return Limits(stop_at_s=begun + seconds, kill_at_s=begun + seconds, end_at_s=begun + seconds)
begun = time.monotonic()
watchdog = Watchdog(
    Lifetime(on_exit=f"echo ended >> {folder}/ended"), grace_s=0, leftover_grace_s=0, outputs=[], clock=SystemClock(), say=print,
    limits=until(3), pid_file=folder / "guarded",
)
def kill_it():
    os.kill(watchdog.pid, signal.SIGKILL)
    while watchdog._is_alive(0.0): time.sleep(0.01)
if way == "extended, then replaced":
    watchdog.extend(until(5)); kill_it(); watchdog.look()
elif way == "dead while it is extended":
    kill_it(); watchdog.extend(until(5)); watchdog.look()
elif way == "anew":
    watchdog.begin_anew(limits=until(5), outputs=[os.pipe()])
elif way == "shorter words":
    watchdog.extend(until(5)); watchdog.extend(until(1)); watchdog.extend(until(5))
elif way == "shorter grant":
    watchdog.begin_anew(limits=until(60)); watchdog.begin_anew(limits=until(5))
assert int((folder / "guarded").read_text()) == watchdog.pid
time.sleep(max(0, begun + 4 - time.monotonic()))
(folder / "past").touch()
while True: time.sleep(1)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "way",
    ["extended, then replaced", "dead while it is extended", "anew", "shorter words", "shorter grant"],
)
def test_the_end_comes_at_the_latest_moment_that_was_said(way: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AGENT, str(tmp_path), way],
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
    )
    assert done.returncode < 0, done.stderr
    assert (tmp_path / "past").exists(), "the first moment was moved"
    assert (tmp_path / "ended").read_text() == "ended\n"
