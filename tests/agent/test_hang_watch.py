"""Commands that really hang: in Python, in C code that keeps the interpreter's lock, before the claim, or without holdfast."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from holdfast.agent.restart import RunOptions, run_command
from holdfast.agent.rounds import Care
from holdfast.core.clock import SystemClock
from holdfast.core.contract import Phase
from holdfast.core.events import CollectingSink
from holdfast.core.stacks import ask_for_stacks, offers
from holdfast.policy.hang import HangLimits
from holdfast.policy.restart import RestartLimits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stacks are asked for by a real-time signal")

AT_ONCE = RestartLimits(first_delay_s=0, max_delay_s=0, max_errors=1)
TRAINER = """
import ctypes, os, signal, sys, time
from pathlib import Path
from holdfast.core.contract import Phase, ProgressPage
from holdfast.core.stacks import offer_stacks
attempt = int(os.environ["HOLDFAST_ATTEMPT"])
folder = Path(os.environ["HOLDFAST_CONTROL"])
page = ProgressPage(folder)
assert offer_stacks(folder)
if attempt == 2: sys.exit(0)
def begin():
    page.claimed(attempt); page.restored(10 * attempt); page.entered(Phase.TRAINING); page.stepped(10 * attempt + 1)
    page.committed(10 * attempt + 5)
"""


class Watched:
    """One call of the agent in this process."""

    def __init__(self, code: str, **limits: object) -> None:
        self.sink, self.lines = CollectingSink(), list[str]()
        care = Care(hang=HangLimits(**({"longest_look_s": 1000} | limits)))  # type: ignore[arg-type]
        self.exit_code = run_command(
            [sys.executable, "-c", code],
            RunOptions(limits=AT_ONCE, care=care, grace_s=0),
            clock=SystemClock(),
            sink=self.sink,
            say=self.lines.append,
            rng=random.Random(1),
        )

    @property
    def endings(self) -> list[object]:
        return [event.fields["ending"] for event in self.sink.named("attempt.ended")]

    @property
    def evidence(self) -> str:
        return "\n".join(self.sink.named("command.hung")[0].fields["evidence"])


def test_a_hang_in_c_code_that_keeps_the_interpreter_shows_its_stacks_and_costs_an_error() -> None:
    code = TRAINER + (
        "def stuck_in_a_collective():\n"
        "    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)\n"
        "begin()\n"
        "stuck_in_a_collective()\n"
    )
    run = Watched(code, declared_s={Phase.TRAINING: 0.5})
    assert run.exit_code == 0
    assert run.endings == ["error", "done"]
    assert "stuck_in_a_collective" in run.evidence
    assert "processes of the command" in run.evidence
    ended = run.sink.named("attempt.ended")[0].fields
    assert ended["hang"].startswith("training, no step for ")
    assert ended["progress_made"] is True
    assert "an error: it hung, and was ended" in run.lines[1]


def test_every_process_that_offers_its_stacks_is_asked_and_nobody_else() -> None:
    """The second one has a session of its own, as the ranks of a launcher have; a third has forked and offers nothing."""
    code = TRAINER + (
        "import subprocess\n"
        "rank = 'import sys\\nfrom pathlib import Path\\nfrom holdfast.core.stacks import offer_stacks\\n'\n"
        "rank += 'def waiting_in_rank_one(): sys.stdin.read()\\n'\n"
        "rank += 'offer_stacks(Path(sys.argv[1])); print(1, flush=True); waiting_in_rank_one()'\n"
        "other = subprocess.Popen([sys.executable, '-c', rank, str(folder)], stdin=subprocess.PIPE,\n"
        "    stdout=subprocess.PIPE, start_new_session=True)\n"
        "other.stdout.readline()\n"
        "if os.fork() == 0: signal.pause()\n"
        "begin()\n"
        "while True: signal.pause()\n"
    )
    run = Watched(code, declared_s={Phase.TRAINING: 0.5})
    assert run.evidence.count("Python stacks of process") == 2
    assert "waiting_in_rank_one" in run.evidence
    assert run.evidence.count("\n  ") > 4


def test_a_restore_that_hangs_before_the_claim_is_found_and_no_progress_stops_the_run() -> None:
    code = TRAINER.replace("sys.exit(0)", "pass") + "page.entered(Phase.RESTORING)\nwhile True: signal.pause()"
    run = Watched(code, declared_s={Phase.RESTORING: 0.3})
    assert run.endings == ["error"] * 2, "nothing was claimed, so the budget of errors is what ends it"
    assert run.sink.named("command.hung")[0].fields["reason"].startswith("restoring, no end of it for ")


def test_a_hung_wait_for_data_can_still_save_what_it_has() -> None:
    code = TRAINER + (
        "signal.signal(signal.SIGTERM, lambda *_: (page.committed(100 + attempt), os._exit(75)))\n"
        "begin()\n"
        "while True: signal.pause()\n"
    )
    sink, lines = CollectingSink(), list[str]()
    care = Care(hang=HangLimits(declared_s={Phase.TRAINING: 0.3}))
    options = RunOptions(limits=AT_ONCE, care=care, grace_s=60)
    arguments = {"clock": SystemClock(), "sink": sink, "say": lines.append, "rng": random.Random(1)}
    assert run_command([sys.executable, "-c", code], options, **arguments) == 0  # type: ignore[arg-type]
    first = sink.named("attempt.ended")[0].fields
    assert (first["exit_code"], first["ending"], first["progress"]["committed_step"]) == (75, "error", 101)


def test_a_command_without_holdfast_is_judged_by_its_output_and_only_if_asked() -> None:
    assert Watched("print('hello')", always_s=3600).endings == ["done"]
    run = Watched("import signal; print('hello', flush=True); signal.pause()", always_s=0.5)
    assert set(run.endings) == {"error"}
    assert "no output for" in str(run.sink.named("attempt.ended")[0].fields["hang"])
    assert "Python stacks" not in run.evidence
    assert "signal.pause()" in run.evidence, "the processes' command lines are shown"


def test_a_signal_that_nobody_catches_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / f"stacks-{os.getpid()}").touch()
    (tmp_path / "stacks-nonsense").touch()
    first = signal.SIGRTMIN + 9
    assert signal.getsignal(first) == signal.SIG_DFL
    assert offers(tmp_path) == []
    assert ask_for_stacks(tmp_path, os.getpid()) is None, "this process would not have lived to see it"
