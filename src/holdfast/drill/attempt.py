"""The user's command as a process that is watched and struck: bare, or under `holdfast run`.

    Course (one run: its URL, its folder, its lives) ─ start → Bare ─┐
                                                     ─ agent → Agent ┴→ Life: one start of the command; its page of progress

What the command writes goes through a pipe into `log`, so that limits on files never hit its prints. `Crew` knows every process
that was started and ends them all, with their families (family.py), whatever happens.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.contract import (
    ENV_ATTEMPT,
    ENV_CONTROL,
    ENV_NOTICE,
    ENV_PREVIOUS_STEP,
    ENV_RUN,
    Phase,
    Progress,
    ProgressPage,
)
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.drill.family import MARK, has_launched_ranks, kill_all, signal_all

__all__ = ["Agent", "Bare", "Course", "Crew", "Life", "Stuck"]

_LOOK_S = 0.002
_END_S = 5.0
_TAIL_BYTES = 8192
_LAUNCHERS_OWN = 1
"""Exit code of torchrun and `accelerate launch` whenever a rank has left with another code than 0, or they were told to go."""
_AGENTS_LINE = re.compile(r"holdfast: (attempt \d+ ended|  )")


class Stuck(HoldfastError):
    """A command did not get on within the time that it may take."""


class Crew:
    """Every process that the drill has started. Belongs to one thread."""

    def __init__(self) -> None:
        self._ends: list[Callable[[], None]] = []

    def add(self, end: Callable[[], None]) -> None:
        self._ends.append(end)

    def end_all(self) -> None:
        """SIGKILL to what is left of them, and to everything that they have led to."""
        while self._ends:
            self._ends.pop()()


@dataclass(slots=True, eq=False)
class Life:
    """One start of the command. Steps are -1 where nothing is known; `first_step_s` counts from the start of the process.
    `attempt`: the last that it has claimed, 0 for none. `launched`: it has not trained itself, but started what did as a rank."""

    pid: int
    started_s: float
    page: ProgressPage | None
    claimed: bool = False
    attempt: int = 0
    launched: bool = False
    restored_step: int = -1
    reached_step: int = -1
    phase: Phase = Phase.STARTING
    first_step_s: float | None = None
    first_step_at_s: float | None = None
    exit_code: int | None = None
    last_words: str = ""

    def look(self, now_s: float) -> None:
        progress: Progress | None = None
        if self.page is not None:
            with suppress(ValueError):
                progress = self.page.read()
        if progress is None:
            return
        if not self.claimed:
            self.claimed, self.launched = True, has_launched_ranks(self.pid)
        self.attempt = progress.attempt
        self.phase, self.restored_step, self.reached_step = progress.phase, progress.restored_step, progress.step
        if self.first_step_s is None and progress.restored_step >= 0 and progress.step > progress.restored_step:
            self.first_step_s, self.first_step_at_s = now_s - self.started_s, now_s

    def left_with(self, recorded: Mapping[int, int]) -> int | None:
        """Its exit code; where that is a launcher's, which does not hand on what its ranks leave with, the one that these have
        `recorded` in the ledger, by attempt. Nothing replaces a launcher that was killed or says that it is done."""
        if self.launched and self.exit_code == _LAUNCHERS_OWN:
            return recorded.get(self.attempt, self.exit_code)
        return self.exit_code

    @property
    def trains(self) -> bool:
        return self.phase in (Phase.TRAINING, Phase.EVALUATING)


@dataclass(slots=True)
class Course:
    """One run under attack. `limit_s` ends a start of the command that does not get on; None: never."""

    command: tuple[str, ...]
    folder: Path
    work: Path
    environment: Mapping[str, str]
    clock: Clock
    crew: Crew
    limit_s: float | None
    lives: list[Life] = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(self.folder / "run")

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, **more: str) -> Bare:
        """The command by itself, told where its run is as an agent would tell it."""
        return Bare(self, dict(more))

    def agent(self, *options: str) -> Agent:
        """The command under `holdfast run`."""
        return Agent(self, options)

    def tail(self) -> str:
        """The last words that say something, the agent's own left out."""
        if not self.log.exists():
            return ""
        text = self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not _AGENTS_LINE.match(line)]
        return lines[-1] if lines else ""

    def own_files(self) -> list[str]:
        """What the command has written into its working folder, by name."""
        if self.work.parent != self.folder:
            return []
        found = (path.relative_to(self.work) for path in self.work.rglob("*") if path.is_file())
        return sorted(str(path) for path in found if not any(part.startswith((".", "__")) for part in path.parts))


class _Process:
    """Something started for a course, its output kept, in a session of its own, with a mark that its family inherits."""

    def __init__(self, course: Course, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.course, self._mark = course, f"{course.folder}/{len(course.lives) + 1}"
        course.work.mkdir(parents=True, exist_ok=True)
        try:
            self._process = subprocess.Popen(
                list(command), cwd=course.work, env={**environment, MARK: self._mark}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(
                f"cannot start {command[0]!r}: {error.strerror}; is it installed and on the PATH?"
            ) from None
        self.started_s = course.clock.monotonic_s()
        course.crew.add(self.end)
        self._reader = threading.Thread(target=self._read, name="holdfast-drill-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        output = self._process.stdout
        assert output is not None
        with self.course.log.open("ab", buffering=0) as log, suppress(ValueError, OSError):
            while data := os.read(output.fileno(), 65536):
                log.write(data)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        self.look()
        return self._process.poll() is not None

    def look(self) -> None:
        raise NotImplementedError

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """True once the condition holds; False when everything has ended before. Raises Stuck."""
        clock, begun_s = self.course.clock, self.course.clock.monotonic_s()
        while True:
            has_ended = self.ended()
            if condition():
                return True
            if has_ended:
                return False
            if self.course.limit_s is not None and clock.monotonic_s() - begun_s > self.course.limit_s:
                self.end()
                raise Stuck(
                    f"it did not get on within {self.course.limit_s:.0f} s; its last words: {self.course.tail()}"
                )
            clock.sleep(_LOOK_S)

    def wait(self) -> int:
        """The exit code as `subprocess` reports it, once it has ended. Raises Stuck."""
        self.wait_until(lambda: False)
        return self._collect()

    def _collect(self) -> int:
        code = self._process.wait()
        kill_all(self._process.pid, self._mark)
        self._reader.join(_END_S)
        self.look()
        return code

    def end(self) -> None:
        if self._process.poll() is None:
            kill_all(self._process.pid, self._mark)
        self._collect()
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


class Bare(_Process):
    """One start of the command, with nobody around it."""

    def __init__(self, course: Course, more: Mapping[str, str]) -> None:
        folder = course.folder / f"control-{len(course.lives) + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        page = ProgressPage(folder)
        page.reset()
        told = {
            ENV_RUN: course.url, ENV_CONTROL: str(folder), ENV_NOTICE: "none", ENV_ATTEMPT: str(len(course.lives) + 1),
        }  # fmt: skip
        claimed = [life.reached_step for life in course.lives if life.claimed]
        if claimed:
            told[ENV_PREVIOUS_STEP] = str(claimed[-1])
        super().__init__(course, course.command, {**course.environment, **told, **more})
        self.life = Life(self.pid, self.started_s, page)
        course.lives.append(self.life)

    def look(self) -> None:
        life = self.life
        life.look(self.course.clock.monotonic_s())
        if life.exit_code is None:
            life.exit_code = self._process.poll()
        if life.exit_code is not None and not self._reader.is_alive():
            life.last_words = life.last_words or self.course.tail()

    def signal(self, number: int) -> None:
        """To the main process only."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """To everything that it has led to, loader workers and a launcher's ranks included."""
        signal_all(self.pid, number)


class Agent(_Process):
    """`holdfast run` around the command; each start that it makes becomes a life of the course."""

    def __init__(self, course: Course, options: Sequence[str]) -> None:
        self._report = course.folder / f"agent-{len(course.lives) + 1}.jsonl"
        self._known = 0
        self._current: Life | None = None
        around = [
            sys.executable, "-m", "holdfast", "run", "--run", course.url, "--report", str(self._report), "--no-logs",
            "--no-progress-limit", "0", "--grace", "20 s", *options, "--",
        ]  # fmt: skip
        super().__init__(course, [*around, *course.command], course.environment)

    def look(self) -> None:
        events = _events(self._report)
        for event in events[self._known :]:
            fields = event["fields"]
            if event["name"] == "attempt.started":
                self._current = Life(int(fields["pid"]), self.course.clock.monotonic_s(), None)
                self.course.lives.append(self._current)
            elif event["name"] == "attempt.ended" and self._current is not None:
                self._ended(self._current, fields)
                self._current = None
        self._known = len(events)
        life = self._current
        if life is not None:
            life.page = life.page or _page_of(life.pid)
            life.look(self.course.clock.monotonic_s())

    def _ended(self, life: Life, fields: dict[str, Any]) -> None:
        life.exit_code, life.last_words = int(fields["exit_code"]), self.course.tail()
        progress = fields.get("progress")
        if progress is not None:
            life.claimed = True
            life.reached_step, life.restored_step = int(progress["step"]), int(progress["restored_step"])

    @property
    def life(self) -> Life | None:
        """The start that runs now."""
        return self._current

    def kill_command(self) -> Life | None:
        """SIGKILL the command with all that it has started, as a machine that vanishes does. None when it does not run."""
        life = self._current
        if life is None:
            return None
        kill_all(life.pid)
        return life


def _events(report: Path) -> list[dict[str, Any]]:
    if not report.exists():
        return []
    # The last line may be half written.
    whole = report.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _page_of(pid: int) -> ProgressPage | None:
    """The page that the agent has given this process, once it is one."""
    with suppress(OSError):
        for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = item.partition(b"=")
            folder = Path(os.fsdecode(value))
            if name == ENV_CONTROL.encode() and (folder / ProgressPage.FILE_NAME).exists():
                return ProgressPage(folder)
    return None
