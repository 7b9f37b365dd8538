"""One attempt after the other: start, wait, evidence, decision. What the agent knows from one to the next is all here.

start (environment, progress page) → wait (child.Supervisor, rounds.Rounds) → rescue, last pass over a mirrored folder → evidence
→ policy.restart → start again … or leave
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from holdfast.agent.child import Child, Supervisor
from holdfast.agent.evidence import oom_kills
from holdfast.agent.heir import rescue
from holdfast.agent.logs import LogLimits
from holdfast.agent.mirror import Mirror, MirrorOptions
from holdfast.agent.rounds import Care, Rounds
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import (
    ENV_ATTEMPT,
    ENV_FRESH,
    ENV_PREVIOUS_STEP,
    ENV_RUN,
    EXIT_DONE,
    EXIT_FENCED,
    EXIT_INFRASTRUCTURE,
    EXIT_INTERRUPTED,
    EXIT_LIMIT,
    EXIT_PREEMPTED,
    Progress,
    ProgressPage,
)
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
from holdfast.store.base import Store

__all__ = ["Attempts", "RunOptions"]

_LAST_WORDS_S = 0.5
"""Kept of the time before a deadline for what comes after the last pass over a mirrored folder."""


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
    care: Care = field(default_factory=Care)
    logs: LogLimits | None = field(default_factory=LogLimits)
    """None: the command's output goes to the terminal only."""
    heartbeat_s: float = 60.0
    mirror: MirrorOptions | None = None
    """A folder that the command writes, kept under the run's URL; the agent itself claims the run then."""


class Attempts:
    """The loop over attempts. What it knows from one attempt to the next is all here."""

    def __init__(
        self,
        command: tuple[str, ...],
        options: RunOptions,
        page: ProgressPage,
        supervisor: Supervisor,
        rounds: Rounds,
        mirror: Mirror | None,
        environment: dict[str, str],
        clock: Clock,
        sink: Sink,
        say: Callable[[str], None],
        rng: random.Random,
        open_store: Callable[[str], Store] | None,
    ) -> None:
        self._open_store = open_store
        self._command = command
        self._options = options
        self._page = page
        self._supervisor = supervisor
        self._rounds = rounds
        self._mirror = mirror
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
        while not self._supervisor.is_stopping():
            going = self._rounds.notices.going
            if going is not None:
                self._say(f"holdfast: {going}: nothing more is started")
                return self._stop(EXIT_PREEMPTED, (going,))
            self._attempt += 1
            ended, progress = self._one_attempt()
            if not ended.started and self._supervisor.is_stopping():
                break
            state, decision = decide(state, ended, self._options.limits, self._rng.random())
            self._report(ended, progress, decision)
            if isinstance(decision, Stop):
                return self._stop(
                    EXIT_INTERRUPTED if self._killed_by_ctrl_c(ended) else decision.exit_code, decision.reasons
                )
            self._supervisor.pause(decision.after_s, self._rounds)
        return self._stopped_between_attempts(self._supervisor.stop_signal)

    def _stopped_between_attempts(self, stop_signal: int | None) -> int:
        going = self._rounds.notices.going
        if going is not None:
            return self._stop(EXIT_PREEMPTED, (going,))
        if self._rounds.limit_reached is not None or stop_signal is None:
            return self._stop(EXIT_LIMIT, (self._rounds.limit_reached or "",))
        name = signal.Signals(stop_signal).name
        self._say(f"holdfast: stopped by {name} while no command was running")
        return self._stop(128 + stop_signal, (f"stopped by {name}",))

    def _killed_by_ctrl_c(self, ended: AttemptEnded) -> bool:
        return self._supervisor.stop_signal == signal.SIGINT and ended.exit_code == -signal.SIGKILL

    def _one_attempt(self) -> tuple[AttemptEnded, Progress | None]:
        self._page.reset()
        started_s = self._clock.monotonic_s()
        unfit = self._rounds.before_start(self._attempt, self._pause)
        if unfit is not None:
            lasted_s = self._clock.monotonic_s() - started_s
            return _not_started(unfit, lasted_s), None
        if self._mirror is not None:
            self._mirror.watch(fresh=self._options.fresh)
        report = self._rounds.last_words_before_start()
        oom_kills_before = oom_kills()
        started_s = self._clock.monotonic_s()
        output = self._rounds.output
        child = Child(
            self._command,
            self._attempt_environment(),
            stdout=None if output is None else output.stdout,
            stderr=None if output is None else output.stderr,
        )
        self._rounds.started(child)
        for line in report:
            self._say(line)
        self._emit("attempt.started", start=self._attempt, pid=child.pid)
        exit_code = self._supervisor.wait_for(child, self._rounds)
        findings = self._rounds.ended(exit_code)
        self._rescue(exit_code)
        mirrored = self._end_of_mirror(exit_code)
        exit_code = EXIT_FENCED if self._mirror is not None and self._mirror.fenced is not None else exit_code
        oom_kills_after = oom_kills()
        progress = self._read_progress()
        ended = AttemptEnded(
            exit_code=exit_code,
            progress_made=self._note_progress(progress) if mirrored is None else mirrored,
            lasted_s=self._clock.monotonic_s() - started_s,
            stop_asked=self._supervisor.is_stopping(),
            oom_killed=None
            if oom_kills_before is None or oom_kills_after is None
            else oom_kills_after > oom_kills_before,
            hang=findings.hang,
            infrastructure=findings.infrastructure,
            limit=findings.limit,
            notice=findings.notice,
        )
        return ended, progress

    def _end_of_mirror(self, exit_code: int) -> bool | None:
        """Keep the folder as the command has left it. Whether new data was stored; None without a mirror."""
        if self._mirror is None:
            return None
        self._mirror.finish(exit_code)
        until_s = self._clock.monotonic_s() + self._options.grace_s
        notices = self._rounds.notices

        def left_s() -> float:
            if notices.going is not None:
                return (notices.left_s() or 0.0) - _LAST_WORDS_S
            return until_s - self._clock.monotonic_s()

        self._mirror.wait(self._supervisor.pause, self._supervisor.is_stopping, left_s)
        return self._mirror.has_progressed()

    def _rescue(self, exit_code: int) -> None:
        """Commit the snapshot that a trainer has left in shared memory, unless it has left in good order.

        The memory is kept for the next attempt, which may read there what it would have to fetch.
        """
        control = self._rounds.notices.control
        if exit_code in (EXIT_DONE, EXIT_FENCED):
            control.forget_slots()
            return
        slots = control.slots()
        if self._open_store is not None and slots:
            ref = rescue(
                self._rounds.folder, slots, open_store=self._open_store, clock=self._clock, sink=self._sink,
                say=self._say,
            )  # fmt: skip
            if ref is not None:
                self._page.committed(ref.step)

    def _pause(self, seconds: float) -> bool:
        self._supervisor.pause(seconds, self._rounds)
        return not self._supervisor.is_stopping()

    def _attempt_environment(self) -> dict[str, str]:
        environment = self._environment | {ENV_ATTEMPT: str(self._attempt)}
        if self._mirror is not None:
            # The run is the agent's own: a script that uses holdfast after all must not claim it.
            environment.pop(ENV_RUN, None)
        elif self._options.url is not None:
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
        figures = "it reported no progress" if ended.started else "the command was not started"
        if progress is not None:
            kept, lost_steps = progress.kept_step, progress.lost_steps
            reached = f"at step {progress.step}" if progress.step >= 0 else "before its first step"
            committed = f"last committed step {kept}" if kept else "nothing committed"
            figures = f"{reached}, {committed}, {lost_steps} {'step' if lost_steps == 1 else 'steps'} lost"
        following = (
            f"leaving with exit code {decision.exit_code}"
            if isinstance(decision, Stop)
            else f"starting attempt {self._attempt + 1}" + (" now" if not decision.after_s else "")
        )
        how = "" if not ended.started else f"{describe_exit(ended.exit_code)} after {format_duration(ended.lasted_s)}; "
        self._say(
            f"holdfast: attempt {self._attempt} ended: {how}{figures}; {', '.join(decision.reasons)}; {following}"
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


def _not_started(unfit: str, lasted_s: float) -> AttemptEnded:
    return AttemptEnded(
        exit_code=EXIT_INFRASTRUCTURE, progress_made=None, lasted_s=lasted_s, infrastructure=unfit, started=False
    )
