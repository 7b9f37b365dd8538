"""The agent's side of the watchdog (watchdog_process.py): how long the machine may work, and a process that holds to it.

    Lifetime (hours, dollars) → stop_at_s: the agent stops the command     → kill_at_s: the watchdog ends everything
    agent ── control pipe: which command runs, who was told ──→ watchdog
    agent ←─ alive pipe: ends with the watchdog ──
    agent and watchdog share the token that allows to run the on-exit command, once

Both limits are hard: the command is told to stop so early that its grace period ends before them. Under a grant that is renewed
they move while the command runs (`extend`): later, never earlier.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.agent import watchdog_process
from holdfast.agent.watchdog_process import run_once
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.errors import HoldfastError, UsageError

__all__ = ["Lifetime", "Limits", "Watchdog"]

_SLACK_S = 5.0
"""What the agent is given to act by itself, before the watchdog does."""
_START_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """What the machine is there for. Counted from the agent's start."""

    max_hours: float | None = None
    max_cost: float | None = None
    """In dollars; needs the price."""
    price_per_hour: float | None = None
    on_exit: str | None = None
    """A shell command that is run once when the agent has gone, for whatever reason."""

    def __post_init__(self) -> None:
        if self.max_hours is not None and not 0 < self.max_hours < math.inf:
            raise UsageError("max_hours is a number of hours above zero")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise UsageError("the price is a number of dollars per hour, zero or more")
        if self.max_cost is not None and not 0 < self.max_cost < math.inf:
            raise UsageError("max_cost is a number of dollars above zero")
        if self.max_cost is not None and self.price_per_hour is None:
            raise UsageError("max_cost needs the machine's price: --price 1.20 (dollars per hour)")

    @property
    def limit_s(self) -> float:
        """Seconds until nothing may run any more; infinite without a limit."""
        hours = [self.max_hours] if self.max_hours is not None else []
        if self.max_cost is not None and self.price_per_hour:
            hours.append(self.max_cost / self.price_per_hour)
        return 3600 * min(hours, default=math.inf)

    def stop_after_s(self, grace_s: float) -> float:
        """Seconds until the command is told to stop: early enough for its grace period, but at least half of the time is its
        own."""
        return max(self.limit_s / 2, self.limit_s - grace_s)

    def reason(self) -> str:
        """Which limit it is that ends the work."""
        limit = f"the machine's time of {format_duration(self.limit_s)} is over"
        by_cost = self.max_cost is not None and self.limit_s != 3600 * (self.max_hours or math.inf)
        return f"{limit}: that is ${self.max_cost:g} at ${self.price_per_hour:g} per hour" if by_cost else limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Moments on the machine's monotonic clock. Infinite: never."""

    stop_at_s: float = math.inf
    """The agent tells the command to stop."""
    kill_at_s: float = math.inf
    """The watchdog kills what still runs."""
    end_at_s: float = math.inf
    """It kills an agent that does not leave then, and runs the end."""

    def or_later(self, other: Limits) -> Limits:
        """Each moment as late as either says."""
        return Limits(
            stop_at_s=max(self.stop_at_s, other.stop_at_s),
            kill_at_s=max(self.kill_at_s, other.kill_at_s),
            end_at_s=max(self.end_at_s, other.end_at_s),
        )


class Watchdog:
    """A watchdog process, and a new one when it dies. Belongs to the agent's main thread."""

    def __init__(
        self,
        lifetime: Lifetime,
        *,
        grace_s: float,
        leftover_grace_s: float,
        outputs: Sequence[tuple[int, int]],
        clock: Clock,
        say: Callable[[str], None],
        limits: Limits | None = None,
        pid_file: Path | None = None,
    ) -> None:
        """`limits`: instead of those that follow from the lifetime, counted from now. `pid_file`: always names the process."""
        self._lifetime, self._outputs, self._say = lifetime, list(outputs), say
        self._grace_s, self._leftover_grace_s, self._pid_file = grace_s, leftover_grace_s, pid_file
        started_s = clock.monotonic_s()
        self._limits = limits or Limits(
            stop_at_s=started_s + lifetime.stop_after_s(grace_s + leftover_grace_s + _SLACK_S),
            kill_at_s=started_s + lifetime.limit_s,
        )
        self._group = 0
        self._told = False
        self._control = self._alive = -1
        self._token, token_source = os.pipe()
        os.write(token_source, b"1")
        # Without a writer, who comes second reads the end of the pipe instead of waiting.
        os.close(token_source)
        try:
            self.pid = self._begin()
        except BaseException:
            if lifetime.on_exit is not None:
                run_once(self._token, lifetime.on_exit)
            raise

    @property
    def stop_at_s(self) -> float:
        """When the agent tells the command to stop, on the monotonic clock."""
        return self._limits.stop_at_s

    def extend(self, limits: Limits) -> None:
        """The work may go on until then. A moment that is earlier than what stands already changes nothing."""
        longer = self._limits.or_later(limits)
        if longer != self._limits:
            self._limits = longer
            moments = (longer.stop_at_s + _SLACK_S, longer.kill_at_s, longer.end_at_s)
            self._tell(f"later {' '.join(map(repr, moments))}")

    def begin_anew(
        self, *, limits: Limits | None = None, grace_s: float | None = None, outputs: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Go on with other settings, while no command runs. There is no moment without a watchdog: the old one leaves last."""
        before = self._control, self._alive
        self._limits, self._outputs = limits or self._limits, list(outputs)
        self._grace_s = self._grace_s if grace_s is None else grace_s
        try:
            self.pid = self._begin()
        except BaseException:
            self._control, self._alive = before
            raise
        with suppress(OSError):
            os.write(before[0], b"replaced\n")
        for descriptor in before:
            os.close(descriptor)

    def forget_outputs(self) -> None:
        """The command's output has ended; a watchdog that is started from here on has none to pass on."""
        self._outputs = []

    def command_started(self, group: int) -> None:
        self._group, self._told = group, False
        self._tell(f"command {group}")

    def command_told(self) -> None:
        """It has been told to stop; its grace period is the agent's to watch."""
        if self._group and not self._told:
            self._told = True
            self._tell("told")

    def command_ended(self) -> None:
        self._group = 0
        self._tell("gone")

    def look(self) -> None:
        """Replace a watchdog that has died."""
        if self._is_alive(0.0):
            return
        self._say("holdfast: the watchdog has died; starting another one")
        self._let_go()
        self.pid = self._begin()

    def end(self) -> None:
        """The agent is done: have the on-exit command run, and wait for its end."""
        self._tell("end")
        os.close(self._control)
        self._is_alive(None)
        os.close(self._alive)
        if self._lifetime.on_exit is not None:
            # Nothing happens here unless the watchdog was killed before it could.
            run_once(self._token, self._lifetime.on_exit)
        os.close(self._token)

    def _begin(self) -> int:
        control_read, self._control = os.pipe()
        self._alive, alive_write = os.pipe()
        settings = {
            "agent": os.getpid(),
            "on_exit": self._lifetime.on_exit,
            "grace_s": self._grace_s,
            "leftover_grace_s": self._leftover_grace_s,
            "stop_at_s": _finite(self._limits.stop_at_s + _SLACK_S),
            "kill_at_s": _finite(self._limits.kill_at_s),
            "end_at_s": _finite(self._limits.end_at_s),
            "control": control_read,
            "alive": alive_write,
            "token": self._token,
            "outputs": self._outputs,
            "group": self._group,
            "told": self._told,
        }
        command = [sys.executable, "-I", "-S", str(Path(watchdog_process.__file__)), json.dumps(settings)]
        inherited = (control_read, alive_write, self._token, *(end for output in self._outputs for end in output))
        try:
            subprocess.run(
                command,
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                timeout=_START_S,
                check=False,
            )
        finally:
            os.close(control_read)
            os.close(alive_write)
        if not select.select([self._alive], [], [], _START_S)[0]:
            raise HoldfastError("the watchdog process did not start in time, so nothing would end this machine's work")
        first = os.read(self._alive, 64)
        if not first:
            raise HoldfastError("the watchdog process could not be started, so nothing would end this machine's work")
        if self._pid_file is not None:
            # Who waits for this file ends the machine when it does not come: that is the safe side.
            with suppress(OSError):
                written = self._pid_file.with_suffix(".new")
                written.write_bytes(first)
                written.replace(self._pid_file)
        return int(first)

    def _is_alive(self, timeout_s: float | None) -> bool:
        """Wait for its end, without limit where that is None. Its one word has been read: what can be read now is the end."""
        return not select.select([self._alive], [], [], timeout_s)[0]

    def _tell(self, line: str) -> None:
        with suppress(OSError):
            os.write(self._control, line.encode() + b"\n")

    def _let_go(self) -> None:
        for descriptor in (self._control, self._alive):
            os.close(descriptor)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
