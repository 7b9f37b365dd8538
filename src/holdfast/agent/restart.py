"""Run a command, and start it again when it was preempted or crashed. Decisions are `policy.restart`'s; the I/O is here.

    start (environment, progress page) → wait (child.Supervisor) → evidence → policy.restart.decide → start … or leave

The command may be anything. When it uses holdfast, it finds the progress page through HOLDFAST_CONTROL and writes its figures
into it, and the agent knows how much was committed and how much was lost.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from holdfast.agent.child import Child, SignalInbox, Supervisor
from holdfast.agent.evidence import oom_kills
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import (
    ENV_ATTEMPT,
    ENV_CONTROL,
    ENV_FRESH,
    ENV_PREVIOUS_STEP,
    ENV_RUN,
    EXIT_INTERRUPTED,
    Progress,
    ProgressPage,
)
from holdfast.core.errors import UsageError
from holdfast.core.events import Event, Sink
from holdfast.policy.restart import (
    AttemptEnded,
    Decision,
    RestartLimits,
    RestartState,
    Stop,
    classify,
    decide,
    describe_exit,
)

__all__ = ["RunOptions", "run_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to run the command. Durations in seconds."""

    url: str | None = None
    """The run's URL for the command; None leaves its environment as it is."""
    fresh: bool = False
    """Begin a new generation of the run instead of resuming it. Told to the command until one start has claimed the run, so
    that a crash before that does not turn into a resume, and never after, so that a restart resumes."""
    grace_s: float = 30.0
    """From SIGTERM, until what still runs is killed."""
    leftover_grace_s: float = 5.0
    """From the end of the main process, until what it left behind is killed."""
    limits: RestartLimits = field(default_factory=RestartLimits)


def run_command(
    command: Sequence[str],
    options: RunOptions,
    *,
    clock: Clock,
    sink: Sink,
    say: Callable[[str], None],
    rng: random.Random,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `command` until it is done or is not worth another start; return the exit code to leave with.

    That is the last attempt's own (128 + n for death by signal n), EXIT_NO_PROGRESS, 128 + n when signal n stopped the agent
    while no command was running, or EXIT_INTERRUPTED when a second Ctrl-C killed the command. `say` gets one line per attempt,
    `sink` the events `attempt.started`, `attempt.ended` and `agent.stopped`. Owns the process's signal handlers meanwhile,
    so it must be called from the main thread. Raises UsageError when the command cannot be started.
    """
    if not command:
        raise UsageError("no command was given; write it after two dashes: holdfast run -- python train.py")
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder, SignalInbox() as inbox:
        page = ProgressPage(Path(folder))
        try:
            supervisor = Supervisor(inbox, clock, options.grace_s, options.leftover_grace_s)
            base = dict(os.environ if environment is None else environment) | {ENV_CONTROL: folder}
            return _Agent(tuple(command), options, page, supervisor, base, clock, sink, say, rng).run()
        finally:
            page.close()


class _Agent:
    """The loop over attempts. What it knows from one attempt to the next is all here."""

    def __init__(
        self,
        command: tuple[str, ...],
        options: RunOptions,
        page: ProgressPage,
        supervisor: Supervisor,
        environment: dict[str, str],
        clock: Clock,
        sink: Sink,
        say: Callable[[str], None],
        rng: random.Random,
    ) -> None:
        self._command = command
        self._options = options
        self._page = page
        self._supervisor = supervisor
        self._environment = environment
        self._clock = clock
        self._sink = sink
        self._say = say
        self._rng = rng
        self._attempt = 0
        self._reached_step: int | None = None
        """The last step that the newest attempt which claimed the run has completed; None until one has claimed it."""
        self._committed_step: int | None = None
        """The step that the next attempt can start from, as far as this agent has seen."""

    def run(self) -> int:
        state = RestartState()
        while self._supervisor.stop_signal is None:
            self._attempt += 1
            ended, progress = self._one_attempt()
            state, decision = decide(state, ended, self._options.limits, self._rng.random())
            self._report(ended, progress, decision)
            if isinstance(decision, Stop):
                return self._stop(
                    EXIT_INTERRUPTED if self._killed_by_ctrl_c(ended) else decision.exit_code, decision.reasons
                )
            self._supervisor.pause(decision.after_s)
        name = signal.Signals(self._supervisor.stop_signal).name
        self._say(f"holdfast: stopped by {name} while no command was running")
        return self._stop(128 + self._supervisor.stop_signal, (f"stopped by {name}",))

    def _killed_by_ctrl_c(self, ended: AttemptEnded) -> bool:
        return self._supervisor.stop_signal == signal.SIGINT and ended.exit_code == -signal.SIGKILL

    def _one_attempt(self) -> tuple[AttemptEnded, Progress | None]:
        self._page.reset()
        oom_kills_before = oom_kills()
        started_s = self._clock.monotonic_s()
        child = Child(self._command, self._attempt_environment())
        self._emit("attempt.started", start=self._attempt, pid=child.pid)
        exit_code = self._supervisor.wait_for(child)
        oom_kills_after = oom_kills()
        progress = self._read_progress()
        ended = AttemptEnded(
            exit_code=exit_code,
            progress_made=self._note_progress(progress),
            lasted_s=self._clock.monotonic_s() - started_s,
            stop_asked=self._supervisor.stop_signal is not None,
            oom_killed=None
            if oom_kills_before is None or oom_kills_after is None
            else oom_kills_after > oom_kills_before,
        )
        return ended, progress

    def _attempt_environment(self) -> dict[str, str]:
        environment = self._environment | {ENV_ATTEMPT: str(self._attempt)}
        if self._options.url is not None:
            environment[ENV_RUN] = self._options.url
        if self._reached_step is not None:
            environment[ENV_PREVIOUS_STEP] = str(self._reached_step)
            environment.pop(ENV_FRESH, None)
        elif self._options.fresh:
            environment[ENV_FRESH] = "1"
        return environment

    def _read_progress(self) -> Progress | None:
        try:
            return self._page.read()
        except ValueError:
            # The page is the command's to write; nonsense in it is no report, and no reason to lose sight of the command.
            return None

    def _note_progress(self, progress: Progress | None) -> bool | None:
        """Whether a checkpoint newer than the one that the attempt could start from was committed.

        A restore from an older checkpoint (the newest did not verify) starts there; a command that restores nothing has to
        come further than its predecessors.
        """
        if progress is None:
            return None
        self._reached_step = progress.step
        known = [step for step in (self._committed_step, progress.restored_step) if step is not None and step >= 0]
        made = progress.committed_step > min(known, default=0)
        newest = max(progress.restored_step, progress.committed_step)
        if progress.restored_step >= 0 or newest > (self._committed_step or 0):
            self._committed_step = newest
        return made

    def _report(self, ended: AttemptEnded, progress: Progress | None, decision: Decision) -> None:
        lost_steps = None
        figures = "it reported no progress"
        if progress is not None:
            kept = max(progress.committed_step, progress.restored_step, 0)
            lost_steps = max(0, progress.step - kept)
            reached = f"at step {progress.step}" if progress.step >= 0 else "before its first step"
            committed = f"last committed step {kept}" if kept else "nothing committed"
            figures = f"{reached}, {committed}, {lost_steps} {'step' if lost_steps == 1 else 'steps'} lost"
        following = (
            f"leaving with exit code {decision.exit_code}"
            if isinstance(decision, Stop)
            else f"starting attempt {self._attempt + 1}" + (" now" if not decision.after_s else "")
        )
        how = f"{describe_exit(ended.exit_code)} after {format_duration(ended.lasted_s)}"
        self._say(
            f"holdfast: attempt {self._attempt} ended: {how}; {figures}; {', '.join(decision.reasons)}; {following}"
        )
        self._emit(
            "attempt.ended",
            start=self._attempt,
            ending=classify(ended).name.lower(),
            **asdict(ended),
            progress=None if progress is None else asdict(progress) | {"phase": progress.phase.name.lower()},
            lost_steps=lost_steps,
            restart_after_s=None if isinstance(decision, Stop) else decision.after_s,
            reasons=list(decision.reasons),
        )

    def _stop(self, exit_code: int, reasons: tuple[str, ...]) -> int:
        self._emit("agent.stopped", exit_code=exit_code, starts=self._attempt, reasons=list(reasons))
        return exit_code

    def _emit(self, name: str, **fields: object) -> None:
        self._sink.emit(Event(name, self._clock.unix_s(), fields))
