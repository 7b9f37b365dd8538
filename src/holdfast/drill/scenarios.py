"""What is done to a run: each scenario interrupts one run several times and lets it finish.

A scenario returns a `Record`: what was struck, which ends are right for it, and whether steps may be lost by it. Whether all is
well afterwards is not its business (judge.py). One that cannot be played here, or would play nothing, raises `Skipped` with the
reason.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from holdfast.core.config import format_duration
from holdfast.core.contract import EXIT_DONE, EXIT_FENCED, EXIT_PREEMPTED, Phase
from holdfast.drill.attempt import Agent, Bare, Course, Life
from holdfast.drill.story import ends_at
from holdfast.drill.tear import tear_newest

__all__ = ["SCENARIOS", "Baseline", "Record", "Scenario", "Skipped", "Strike"]

_EARLIEST, _LATEST = 0.08, 0.9
"""Interruptions fall into this part of a run: after something has been computed, and before the end."""
_LEAST_LEAD_S = 5.0
_LEAD_SHARE = 0.6
_TINY_FILE_BYTES = 512
_DAY_S = 86_400


class Skipped(Exception):
    """The scenario was not played, and why."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the uninterrupted run has shown."""

    steps: int
    run_s: float
    step_s: float
    evaluates: bool
    launched: bool = False
    """By torchrun or the like, which has exit codes of its own."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One interruption: of which start, which exit codes are right after it, and whether it may cost steps."""

    life: Life
    right_codes: frozenset[int]
    may_lose: bool


@dataclass(slots=True)
class Record:
    """What was done, for the judge."""

    strikes: list[Strike] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    must_fall_back: int = 0

    def struck(self, life: Life, *codes: int, may_lose: bool = False) -> None:
        self.strikes.append(Strike(life, frozenset(codes), may_lose))


Play = Callable[[Course, Baseline, Sequence[float]], Record]


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play` gets the course, the baseline and one random number in [0, 1) for each interruption."""

    what: str
    play: Play


def _moments(baseline: Baseline, luck: Sequence[float], latest: float = _LATEST) -> list[float]:
    """One in each part of the run, as steps and a fraction of one more."""
    part = (latest - _EARLIEST) / len(luck)
    return [baseline.steps * (_EARLIEST + part * (number + draw)) for number, draw in enumerate(luck)]


def _reaches(attempt: Bare | Agent, moment: float, step_s: float) -> bool:
    """Wait for that place between two steps, or in the middle of one. False when the command has ended before."""

    def is_there() -> bool:
        life = attempt.life
        return life is not None and life.trains and life.reached_step >= int(moment)

    if not attempt.wait_until(is_there):
        return False
    attempt.course.clock.sleep(moment % 1 * step_s)
    return not attempt.ended()


def finish(course: Course, attempt: Bare | None = None) -> None:
    """Start the command as often as it says that it was only preempted, until it ends otherwise."""
    code = EXIT_PREEMPTED
    while code == EXIT_PREEMPTED:
        code = _end_of(attempt or course.start())
        attempt = None


def _end_of(attempt: Bare) -> int:
    """Once it has ended: what it left with, or its ranks."""
    code = attempt.wait()
    told = attempt.life.left_with(ends_at(Path(attempt.course.url)))
    return code if told is None else told


def _one_after_the_other(
    course: Course,
    baseline: Baseline,
    moments: Sequence[float],
    strike: Callable[[Bare], bool],
    before_next: Callable[[int], Mapping[str, str] | None],
) -> None:
    """Start, strike, see it end, start again. `strike` is False when there was nothing to strike; `before_next` prepares the start
    behind that strike, counted from 1, and may add to its environment."""
    more: Mapping[str, str] | None = None
    for number, moment in enumerate(moments, 1):
        attempt = course.start(**(more or {}))
        if not _reaches(attempt, moment, baseline.step_s) or not strike(attempt):
            attempt.wait()
            return
        if _end_of(attempt) not in (EXIT_PREEMPTED, EXIT_DONE, -signal.SIGTERM):
            return
        more = before_next(number)
    finish(course, course.start(**(more or {})))


def _nothing(number: int) -> None:
    return None


def _has_ended(life: Life) -> bool:
    return life.exit_code is not None


def _has_claimed(life: Life) -> bool:
    return life.claimed


# ---- without a word


def _kill(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    record, agent = Record(), course.agent("--notice", "none")
    for moment in _moments(baseline, luck):
        if not _reaches(agent, moment, baseline.step_s):
            break
        life = agent.kill_command()
        if life is None or not agent.wait_until(partial(_has_ended, life)):
            break
        if life.exit_code == -signal.SIGKILL:
            record.struck(life, -signal.SIGKILL, may_lose=True)
    agent.wait()
    return record


# ---- with a word before


def _notice(lead_s: float) -> Play:
    def play(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
        record = Record()
        for number, moment in enumerate(_moments(baseline, luck, 0.6), 1):
            word = course.folder / f"notice-{number}"
            agent = course.agent("--notice", f"file:{word}")
            if not _reaches(agent, moment, baseline.step_s) or (life := agent.life) is None:
                agent.wait()
                return record
            left_s = (baseline.steps - life.reached_step) * baseline.step_s
            given_s = lead_s if left_s > lead_s else max(_LEAST_LEAD_S, min(lead_s, _LEAD_SHARE * left_s))
            if given_s < lead_s:
                record.notes.append(f"given as {format_duration(given_s)}: this run is too short for more")
            begun_s = course.clock.monotonic_s()
            word.write_text(f"{given_s}s")
            code = agent.wait()
            took_s = course.clock.monotonic_s() - begun_s
            # The agent may end what has saved and is on its way out; what a launcher sees is the agent's own code.
            right = (EXIT_PREEMPTED, EXIT_DONE, -signal.SIGTERM)
            # A launcher needs a second or more to go once its ranks have saved and left. Whether they had is told by lost steps.
            record.struck(life, *right, *([-signal.SIGKILL] if baseline.launched else []))
            if code not in (EXIT_PREEMPTED, EXIT_DONE):
                record.faults.append(f"the agent left with exit code {code} instead of {EXIT_PREEMPTED}")
            if took_s > given_s:
                (record.notes if baseline.launched else record.faults).append(
                    f"it ended {format_duration(took_s - given_s)} after the deadline"
                )
            if code == EXIT_DONE:
                record.notes.append("the training was over before the deadline")
                return record
        finish(course)
        return record

    return play


def _sigterm(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    record = Record()

    def strike(attempt: Bare) -> bool:
        attempt.signal(signal.SIGTERM)
        record.struck(attempt.life, EXIT_PREEMPTED, EXIT_DONE)
        return True

    _one_after_the_other(course, baseline, _moments(baseline, luck), strike, _nothing)
    return record


def _sigterm_group(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    record = Record()

    def strike(attempt: Bare) -> bool:
        attempt.signal_all(signal.SIGTERM)
        record.struck(attempt.life, EXIT_PREEMPTED, EXIT_DONE)
        return True

    _one_after_the_other(course, baseline, _moments(baseline, luck), strike, _nothing)
    return record


def _evaluation(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    if not baseline.evaluates:
        raise Skipped("the script never evaluates (nothing is inside `with run.evaluating():`)")
    record = Record()

    def strike(attempt: Bare) -> bool:
        def evaluates() -> bool:
            if attempt.life.phase is not Phase.EVALUATING:
                return False
            attempt.signal(signal.SIGTERM)
            return True

        if not attempt.wait_until(evaluates):
            return False
        record.struck(attempt.life, EXIT_PREEMPTED, EXIT_DONE)
        return True

    _one_after_the_other(course, baseline, _moments(baseline, luck), strike, _nothing)
    if not record.strikes:
        raise Skipped("its evaluations are over within milliseconds: none could be met")
    return record


# ---- the storage


def _torn(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    record = Record()

    def strike(attempt: Bare) -> bool:
        attempt.signal(signal.SIGTERM)
        record.struck(attempt.life, EXIT_PREEMPTED, EXIT_DONE, may_lose=True)
        return True

    def tear(number: int) -> None:
        # The first stop makes the checkpoint that is fallen back to.
        if number > 1:
            what = tear_newest(Path(course.url), flip=number % 2 == 0)
            record.notes.extend([what] if what else [])
            record.must_fall_back += what is not None

    first, *rest = luck
    _one_after_the_other(course, baseline, _moments(baseline, [first / 2, *rest, first]), strike, tear)
    if not record.must_fall_back:
        raise Skipped("there were never two checkpoints to fall back to (keep=1, or the run is too short)")
    return record


def _needs_their_exit_codes(baseline: Baseline) -> None:
    if baseline.launched:
        raise Skipped("the launcher has an exit code of its own, and its ranks have nowhere to record theirs")


def _store(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    """The folder goes away, as a file system does that loses its server, and comes back after the command has left."""
    _needs_their_exit_codes(baseline)
    record, away = Record(), Path(course.url + ".away")

    def strike(attempt: Bare) -> bool:
        # Stopped meanwhile: between the two lines below it would find no folder and make one.
        attempt.signal_all(signal.SIGSTOP)
        os.rename(course.url, away)
        Path(course.url).touch()
        attempt.signal(signal.SIGTERM)
        attempt.signal_all(signal.SIGCONT)
        record.struck(attempt.life, EXIT_PREEMPTED, may_lose=True)
        return True

    def come_back(number: int) -> None:
        Path(course.url).unlink()
        os.rename(away, course.url)

    try:
        _one_after_the_other(course, baseline, _moments(baseline, luck), strike, come_back)
    finally:
        if away.exists():
            with suppress(OSError):
                come_back(0)
    return record


def _full_disk(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    """No file may grow beyond a few bytes: every write of a checkpoint fails as on a full disk."""
    _needs_their_exit_codes(baseline)
    record = Record()

    def strike(attempt: Bare) -> bool:
        _, hard = resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE, (_TINY_FILE_BYTES, hard))
        attempt.signal(signal.SIGTERM)
        record.struck(attempt.life, EXIT_PREEMPTED, may_lose=True)
        return True

    _one_after_the_other(course, baseline, _moments(baseline, luck), strike, _nothing)
    return record


# ---- two at once, and clocks


def _two(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    """A machine that is thought dead and wakes up: stopped, replaced, and let go on."""
    record, running = Record(), course.start()
    sleepers: list[Bare] = []
    for moment in _moments(baseline, luck):
        if not _reaches(running, moment, baseline.step_s):
            break
        running.signal_all(signal.SIGSTOP)
        sleeper, running = running, course.start()
        sleepers.append(sleeper)
        record.struck(sleeper.life, EXIT_FENCED, may_lose=True)
        running.wait_until(partial(_has_claimed, running.life))
        sleeper.signal_all(signal.SIGCONT)
    finish(course, running)
    for sleeper in sleepers:
        sleeper.wait()
    return record


def _clock(course: Course, baseline: Baseline, luck: Sequence[float]) -> Record:
    library = _faketime()
    if library is None:
        raise Skipped("the clock of one command can be set with libfaketime only: pip install libfaketime")
    record = Record()

    def strike(attempt: Bare) -> bool:
        attempt.signal(signal.SIGTERM)
        record.struck(attempt.life, EXIT_PREEMPTED, EXIT_DONE)
        return True

    def jump(number: int) -> Mapping[str, str]:
        # Backwards first: what was written then lies in the future now.
        shift_s = (-2 if number % 2 else 2) * _DAY_S
        return {"LD_PRELOAD": str(library), "FAKETIME": f"{shift_s:+d}", "DONT_FAKE_MONOTONIC": "1"}

    _one_after_the_other(course, baseline, _moments(baseline, luck), strike, jump)
    record.notes.append("the clock went two days back, and forth")
    return record


def _faketime() -> Path | None:
    """The library, from Python's package or from the system's."""
    package = importlib.util.find_spec("libfaketime")
    if package is not None and package.origin is not None:
        found = sorted(Path(package.origin).parent.rglob("libfaketime.so.1"))
        if found:
            return found[0]
    system = [Path(path) for path in sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))]
    named = ctypes.util.find_library("faketime")
    return system[0] if system else Path(named) if named and Path(named).is_absolute() else None


SCENARIOS: dict[str, Scenario] = {
    "kill": Scenario("SIGKILL at random moments, under the agent", _kill),
    "notice-120": Scenario("word 120 s before the end", _notice(120.0)),
    "notice-30": Scenario("word 30 s before the end", _notice(30.0)),
    "notice-5": Scenario("word 5 s before the end", _notice(5.0)),
    "sigterm": Scenario("SIGTERM to the process", _sigterm),
    "sigterm-group": Scenario("SIGTERM to its whole group", _sigterm_group),
    "eval": Scenario("SIGTERM in the middle of an evaluation", _evaluation),
    "torn": Scenario("the newest checkpoint is damaged between two attempts", _torn),
    "store": Scenario("the store is gone when the last save is made", _store),
    "two": Scenario("an attempt that was thought dead wakes up", _two),
    "full-disk": Scenario("the disk is full when the last save is made", _full_disk),
    "clock": Scenario("the clock jumps between two attempts", _clock),
}
"""By name, in the order in which they are played."""
