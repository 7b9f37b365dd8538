"""Start the command again, or stop? A pure state machine: how an attempt ended goes in, a decision with its reasons comes out.

What the ending means (`Ending`) is read from evidence first, and from the exit code second. Three budgets are kept apart: capacity
that was taken away costs no error, however often it happens, and neither does a machine that fails. Above them stands progress:
attempts in a row that commit nothing new end the run, because they would only cost money. A command that never opened the
progress page (it does not know holdfast) has no known progress; for it the budgets and the growing delays are all there is.

    AttemptEnded ──→ classify ──→ Ending ──→ decide(RestartState, …) ──→ (RestartState, Restart | Stop)
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from holdfast.core.config import format_duration
from holdfast.core.contract import (
    EXIT_DONE,
    EXIT_FENCED,
    EXIT_INFRASTRUCTURE,
    EXIT_INTERRUPTED,
    EXIT_LIMIT,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    EXIT_USAGE,
)
from holdfast.core.errors import UsageError
from holdfast.policy.backoff import Backoff

__all__ = [
    "AttemptEnded",
    "Decision",
    "Ending",
    "Restart",
    "RestartLimits",
    "RestartState",
    "Stop",
    "classify",
    "decide",
    "describe_exit",
    "exit_code_of",
]


class Ending(Enum):
    """What the end of an attempt means."""

    DONE = "done"
    PREEMPTED = "preempted"
    ERROR = "error"
    INFRASTRUCTURE = "infrastructure"
    LIMIT = "limit"
    ASKED = "asked to stop"
    INTERRUPTED = "interrupted"
    TAKEN = "taken"
    FENCED = "fenced"
    USAGE = "usage"
    NO_PROGRESS = "no progress"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """How an attempt ended, and the evidence."""

    exit_code: int
    """As `subprocess` reports it: negative for death by that signal."""
    progress_made: bool | None
    """Whether a checkpoint newer than the one it started from was committed; None when the command reported nothing."""
    lasted_s: float
    stop_asked: bool = False
    """The agent itself had been told to stop, and had told the command."""
    oom_killed: bool | None = None
    """Whether the kernel's out-of-memory killer struck in this cgroup meanwhile; None when that cannot be read."""
    hang: str | None = None
    """Why the agent took the command for hung and ended it."""
    infrastructure: str | None = None
    """What failed in the machine (a GPU was lost): the command is not to blame, whatever its exit code."""
    started: bool = True
    """False: the machine was not fit for the command, which was never started; `infrastructure` says why."""
    limit: str | None = None
    """Which limit of time or money is used up."""
    notice: str | None = None
    """What the machine's provider has said: this machine goes. Nothing is started on it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """How much may go wrong. Delays in seconds."""

    max_errors: int = 3
    """Errors in a row that are answered by a restart. An attempt that made progress refills this budget."""
    max_errors_total: int = 30
    """Errors in all that are answered by a restart: progress does not refill it, so that a command that fails over and over, with a
    little progress each time, ends too."""
    max_infrastructure: int = 3
    """Failures of the machine in a row that are answered by a restart on it. An attempt that made progress refills this budget."""
    max_preemptions: int | None = None
    """Preemptions in all that are answered by a restart; None: any number."""
    no_progress_limit: int = 2
    """Attempts in a row without progress after which a person must look. The very first attempts count too: an attempt that is
    killed before its first save would be killed there again. 0 switches this off."""
    first_delay_s: float = 1.0
    """Before the restart after the first failure in a row; doubles with each further one."""
    max_delay_s: float = 120.0
    settled_s: float = 600.0
    """An attempt that lasted this long ends a row of failures as far as delays are concerned, progress known or not."""

    def __post_init__(self) -> None:
        counts = (self.max_errors, self.max_errors_total, self.max_infrastructure, self.max_preemptions or 0)
        if min(*counts, self.no_progress_limit) < 0:
            raise UsageError("limits of errors, preemptions and attempts without progress are zero or more")
        if not 0 <= self.first_delay_s <= self.max_delay_s < math.inf:
            raise UsageError("delays between restarts must keep 0 <= first_delay_s <= max_delay_s")


@dataclass(frozen=True, slots=True)
class RestartState:
    """What happened so far, in one life of the agent."""

    attempts: int = 0
    errors_in_a_row: int = 0
    errors: int = 0
    preemptions: int = 0
    infrastructure_in_a_row: int = 0
    without_progress: int = 0
    """Attempts in a row that are known to have committed nothing new."""
    short_in_a_row: int = 0
    """Attempts in a row that made no known progress and did not settle; the exponent of the delay."""
    reports_progress: bool = False
    """An attempt has reported progress or its absence: from then on an attempt that reports nothing has made none."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the command again after `after_s` seconds."""

    after_s: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave with `exit_code`."""

    exit_code: int
    reasons: tuple[str, ...]


Decision: TypeAlias = Restart | Stop

_FINAL = {
    Ending.DONE: "the command is done",
    Ending.ASKED: "the agent was told to stop",
    Ending.INTERRUPTED: "interrupted from the keyboard",
    Ending.FENCED: "another attempt owns the run now",
    Ending.USAGE: "a wrong argument, or another run than expected: it would fail again",
    Ending.NO_PROGRESS: "the command itself found that attempts make no progress",
    Ending.LIMIT: "the limit of time or money is reached",
    Ending.TAKEN: "preempted: the machine is taken away",
}


def exit_code_of(exit_code: int) -> int:
    """The exit code by which a shell reports this ending: 128 + the signal's number for death by a signal."""
    return 128 - exit_code if exit_code < 0 else exit_code


def describe_exit(exit_code: int) -> str:
    """`"exit code 1"`, `"killed by SIGKILL"`, `"exit code 137 (as after SIGKILL)"`: a shell's 137 is told apart."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"killed by signal {number}" if exit_code < 0 else f"exit code {exit_code}"
    return f"killed by {name}" if exit_code < 0 else f"exit code {exit_code} (as after {name})"


def classify(ended: AttemptEnded) -> Ending:
    """What the ending means. The exit code of a shell around the command (128 + n) counts like the signal itself."""
    if not ended.started:
        return Ending.INFRASTRUCTURE
    code = exit_code_of(ended.exit_code)
    if code == EXIT_DONE:
        return Ending.DONE
    if code == EXIT_FENCED:
        return Ending.FENCED
    if code == EXIT_NO_PROGRESS:
        return Ending.NO_PROGRESS
    if ended.limit is not None:
        return Ending.LIMIT
    if ended.notice is not None and code not in (EXIT_USAGE, EXIT_INTERRUPTED):
        return Ending.TAKEN
    if ended.stop_asked:
        return Ending.ASKED
    if ended.infrastructure is not None or code == EXIT_INFRASTRUCTURE:
        return Ending.INFRASTRUCTURE
    if ended.hang is not None:
        return Ending.ERROR
    if code == EXIT_USAGE:
        return Ending.USAGE
    if code == EXIT_INTERRUPTED:
        return Ending.INTERRUPTED
    if code in (EXIT_PREEMPTED, 128 + signal.SIGTERM):
        return Ending.PREEMPTED
    if code == 128 + signal.SIGKILL:
        return Ending.ERROR if ended.oom_killed else Ending.PREEMPTED
    return Ending.ERROR


def decide(
    state: RestartState, ended: AttemptEnded, limits: RestartLimits, jitter: float
) -> tuple[RestartState, Decision]:
    """What to do now that an attempt has ended, and what is known from here on.

    `jitter` in [0, 1) is drawn by the caller; it spreads a delay over its upper half, so that many machines that failed together
    do not come back together. The exit code is that of this attempt, EXIT_NO_PROGRESS, EXIT_INFRASTRUCTURE where the machine has
    failed, or EXIT_LIMIT instead of a code that asks for another start.
    """
    ending = classify(ended)
    state = _advance(state, ended, ending, limits)
    reasons = [_what_happened(ended, ending)]
    code = exit_code_of(ended.exit_code)
    if ending is Ending.LIMIT and code in (EXIT_PREEMPTED, 128 + signal.SIGTERM, 128 + signal.SIGKILL):
        code = EXIT_LIMIT
    elif ending is Ending.INFRASTRUCTURE:
        code = EXIT_INFRASTRUCTURE
    elif ending is Ending.TAKEN:
        # Whatever a command that was ended in haste has left with: it is to be started again, elsewhere.
        code = EXIT_PREEMPTED
    if ending in _FINAL or not ended.started:
        return state, Stop(code, tuple(reasons))
    if limits.no_progress_limit and state.without_progress >= limits.no_progress_limit:
        attempts = "1 attempt" if state.without_progress == 1 else f"{state.without_progress} attempts in a row"
        reasons.append(f"{attempts} committed no new checkpoint")
        return state, Stop(EXIT_NO_PROGRESS, tuple(reasons))
    spent = _spent_budget(state, ending, limits)
    if spent:
        return state, Stop(code, (*reasons, spent))
    after_s = _delay_s(state, ending, limits, jitter)
    if after_s:
        row = f", after {state.short_in_a_row} failures in a row" if state.short_in_a_row > 1 else ""
        reasons.append(f"waiting {format_duration(after_s)}{row}")
    return state, Restart(after_s, tuple(reasons))


def _advance(state: RestartState, ended: AttemptEnded, ending: Ending, limits: RestartLimits) -> RestartState:
    reports = state.reports_progress or ended.progress_made is not None
    progress = ended.progress_made if ended.progress_made is not None or not reports else False
    if ending is Ending.INFRASTRUCTURE and not progress:
        # A machine that fails says nothing about the command: neither for it nor against it.
        return replace(
            state,
            attempts=state.attempts + 1,
            infrastructure_in_a_row=state.infrastructure_in_a_row + 1,
            short_in_a_row=1 if ended.lasted_s >= limits.settled_s else state.short_in_a_row + 1,
            reports_progress=reports,
        )
    error = ending is Ending.ERROR
    settled = ended.lasted_s >= limits.settled_s
    return replace(
        state,
        attempts=state.attempts + 1,
        errors_in_a_row=(0 if progress else state.errors_in_a_row) + error,
        errors=state.errors + error,
        preemptions=state.preemptions + (ending in (Ending.PREEMPTED, Ending.TAKEN)),
        infrastructure_in_a_row=(0 if progress else state.infrastructure_in_a_row) + (ending is Ending.INFRASTRUCTURE),
        without_progress=state.without_progress + 1 if progress is False else 0,
        # After progress or a long life this failure is the first of a new row.
        short_in_a_row=1 if progress or settled else state.short_in_a_row + 1,
        reports_progress=reports,
    )


def _what_happened(ended: AttemptEnded, ending: Ending) -> str:
    if ending is Ending.LIMIT and ended.limit:
        return ended.limit
    if ending is Ending.TAKEN and ended.notice:
        return f"preempted: {ended.notice}"
    if ending in _FINAL:
        return _FINAL[ending]
    if ending is Ending.INFRASTRUCTURE:
        return f"the machine has failed: {ended.infrastructure or 'the command says so'}"
    if ended.hang is not None:
        return f"an error: it hung, and was ended: {ended.hang}"
    oom = "the kernel's out-of-memory killer struck in this cgroup"
    if ending is Ending.ERROR:
        return f"an error: {oom}" if ended.oom_killed else "an error"
    if exit_code_of(ended.exit_code) == EXIT_PREEMPTED:
        return "preempted: capacity was taken away and the command has saved"
    if exit_code_of(ended.exit_code) == 128 + signal.SIGTERM:
        return "taken as a preemption: SIGTERM, and not from this agent"
    if ended.oom_killed is None:
        return "taken as a preemption: SIGKILL (whether memory ran out cannot be read here)"
    return "taken as a preemption: SIGKILL, and memory did not run out"


def _spent_budget(state: RestartState, ending: Ending, limits: RestartLimits) -> str | None:
    if ending is Ending.PREEMPTED:
        if limits.max_preemptions is not None and state.preemptions > limits.max_preemptions:
            return (
                f"no more restarts: {_times(state.preemptions)} preempted, max_preemptions is {limits.max_preemptions}"
            )
        return None
    if ending is Ending.INFRASTRUCTURE:
        row, most = state.infrastructure_in_a_row, limits.max_infrastructure
        failed = f"{row} failures of the machine in a row, max_infrastructure is {most}; start the run on another one"
        return f"no more restarts: {failed}" if row > most else None
    if state.errors_in_a_row > limits.max_errors:
        return f"no more restarts: {state.errors_in_a_row} errors in a row, max_errors is {limits.max_errors}"
    if state.errors > limits.max_errors_total:
        return f"no more restarts: {state.errors} errors in all, max_errors_total is {limits.max_errors_total}"
    return None


def _delay_s(state: RestartState, ending: Ending, limits: RestartLimits, jitter: float) -> float:
    """A preemption is answered at once, unless the attempts before ended early too: then something else is wrong."""
    failures = state.short_in_a_row - (ending is Ending.PREEMPTED)
    if failures < 1:
        return 0.0
    return Backoff(limits.first_delay_s, limits.max_delay_s).delay_s(failures, jitter)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
