"""One command as a child process, the signals on their way to it, and what it leaves behind.

The command gets a session of its own. So a Ctrl-C at the terminal reaches only the agent, which passes it to the
command's main process, once: loader workers do not get it, because a main process whose workers have died cannot finish
its step and save. The command can still read from the terminal. Two things differ from a bare command: Ctrl-Z stops the
agent only, and a shell script must `exec` its last command, or the shell gets the signals (at SIGTERM the shell dies, and
what it leaves behind is then told to stop in turn).

    signal → SignalInbox → Supervisor → Child (main process), later: its process group
    Attendant.look, now and then → EndNow → the same way
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError, UsageError

__all__ = ["Attendant", "Child", "EndNow", "SignalInbox", "Supervisor"]

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Launchers use the first two for their own agreements with the command; the third lets progress bars follow the window.
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_PR_SET_PDEATHSIG = 1
_LOOK_AGAIN_S = 0.05
_DYING_S = 10.0


class SignalInbox:
    """Signals as data: while it is open they are queued instead of acting on this process.

    Thread safety: belongs to the main thread, as Python's signal handlers do (UsageError elsewhere). A signal that was ignored
    when it opened (`nohup`) stays ignored. Closing puts the former handlers back.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._readable = self._writable = self._former_wakeup = -1

    def __enter__(self) -> SignalInbox:
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._readable, False)
        os.set_blocking(self._writable, False)
        try:
            self._former_wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        except ValueError:
            os.close(self._readable)
            os.close(self._writable)
            raise UsageError("a command can be supervised from the main thread only") from None
        for number in (*_STOPPING, *_PASSED_ON, signal.SIGCHLD):
            former = signal.getsignal(number)
            if number in _STOPPING and former is signal.SIG_IGN:
                continue
            signal.signal(number, _only_wake)
            self._handlers[number] = former if former is not None else signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, former in self._handlers.items():
            signal.signal(number, former)
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._readable)
        os.close(self._writable)

    def wait(self, timeout_s: float) -> list[int]:
        """Return when a signal has come or a child has changed, at the latest after `timeout_s` (may be infinite)."""
        select.select([self._readable], [], [], None if math.isinf(timeout_s) else max(0.0, timeout_s))
        try:
            return [number for number in os.read(self._readable, 4096) if number != signal.SIGCHLD]
        except BlockingIOError:
            return []


def _only_wake(number: int, frame: FrameType | None) -> None:
    """A Python handler must exist for the number to be written to the wake-up descriptor."""


class _Member(NamedTuple):
    pid: int
    parent_pid: int


class Child:
    """A started command. Until `reap`, its number cannot be given to another process, even when it is dead.

    When the agent itself dies (SIGKILL, out of memory), the kernel sends SIGTERM to the command, so that it saves and ends
    instead of working on unseen. This needs Linux; elsewhere the command lives on.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        try:
            with warnings.catch_warnings():
                # Python 3.12 and later warn of any code between fork and exec when there are other threads.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process = subprocess.Popen(
                    list(command),
                    env=dict(environment),
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),  # noqa: PLW1509 - calls prctl, getppid and _exit: takes no lock
                )
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            raise UsageError(
                f"cannot start {command[0]!r}: {error.strerror}; is it installed and on the PATH?"
            ) from None
        except OSError as error:
            raise HoldfastError(f"cannot start {command[0]!r}: {error.strerror or error}") from error
        self.pid = self._process.pid

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, number: int) -> None:
        """Send a signal to the main process only."""
        os.kill(self.pid, number)

    def catches(self, number: int) -> bool:
        """Whether the main process has a handler for the signal, so that it does not die of it; False where that cannot be read."""
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{self.pid}/status").read_text(errors="replace").splitlines():
                name, _, mask = line.partition(":")
                if name == "SigCgt":
                    return bool(int(mask, 16) >> (number - 1) & 1)
        return False

    def kill_group(self) -> None:
        """SIGKILL the main process and everything that stayed in its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def living_members(self) -> list[_Member]:
        """Processes of the command's group that still run; empty where there is no /proc to read them from."""
        members = []
        for entry in Path("/proc").iterdir() if sys.platform == "linux" else ():
            if entry.name.isdigit():
                # A process may end while it is looked at. The name, in parentheses, may hold anything.
                with suppress(OSError):
                    fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                    if fields[0] not in "ZX" and int(fields[2]) == self.pid:
                        members.append(_Member(int(entry.name), int(fields[1])))
        return members

    def reap(self) -> int:
        """The exit code, negative for death by a signal. Kills what is still there."""
        self.kill_group()
        return self._process.wait()


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def between_fork_and_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            # The agent died before the request took effect.
            os._exit(128 + signal.SIGTERM)

    return between_fork_and_exec


@dataclass(frozen=True, slots=True)
class EndNow:
    """The command must be ended: SIGTERM now, and SIGKILL to its group `grace_s` later. `stop` ends the agent's work as well."""

    grace_s: float
    stop: bool = False


class Attendant(Protocol):
    """Who looks after the command while it runs. Called in the main thread; nothing here may take longer than a few seconds."""

    @property
    def every_s(self) -> float:
        """Seconds until the next look."""
        ...

    def look(self, child: Child | None) -> EndNow | None:
        """Called now and then, between two starts too (None). The command is ended when it says so."""
        ...

    def received(self, number: int) -> bool:
        """The agent got a signal. True: it means that the machine or the job goes."""
        ...

    def told(self, grace_s: float) -> None:
        """The command has just been told to stop, and has `grace_s` (may be infinite)."""
        ...

    def window_changed(self) -> None:
        """The terminal has another size now; the command is told afterwards."""
        ...


class Supervisor:
    """Waits for one child after the other, and remembers whether the agent has been told to stop.

    SIGTERM and SIGHUP: the command gets SIGTERM and `grace_s` to end, then its whole group is killed. The first Ctrl-C is
    passed on without a limit, because somebody is watching; the second kills the group at once.
    """

    def __init__(self, inbox: SignalInbox, clock: Clock, grace_s: float, leftover_grace_s: float) -> None:
        self._inbox = inbox
        self._clock = clock
        self._grace_s = grace_s
        self._leftover_grace_s = leftover_grace_s
        self._kill_at_s = math.inf
        self._told: set[int] = set()
        self._attendant: Attendant | None = None
        self.stop_signal: int | None = None
        """The first signal that told the agent to stop."""

    def is_stopping(self) -> bool:
        return self.stop_signal is not None

    def wait_for(self, child: Child, attendant: Attendant | None = None) -> int:
        """Until the child has ended and nothing of its group is left. Returns its exit code as `Child.reap` does."""
        self._attendant = attendant
        look_at_s = self._clock.monotonic_s() if attendant is not None else math.inf
        try:
            while not child.has_ended():
                self._receive(child, min(self._kill_at_s, look_at_s) - self._clock.monotonic_s())
                if attendant is not None and self._clock.monotonic_s() >= look_at_s:
                    self._end_if_asked(attendant.look(child), child)
                    look_at_s = self._clock.monotonic_s() + attendant.every_s
                if self._clock.monotonic_s() >= self._kill_at_s:
                    child.kill_group()
                    self._kill_at_s = math.inf
            self._clear_leftovers(child)
        finally:
            exit_code = child.reap()
        return exit_code

    def pause(self, seconds: float, attendant: Attendant | None = None) -> None:
        """Let `seconds` pass, or less when the agent is told to stop."""
        self._attendant = attendant or self._attendant
        until_s = self._clock.monotonic_s() + seconds
        while self.stop_signal is None:
            left_s = until_s - self._clock.monotonic_s()
            self._receive(None, left_s if attendant is None else min(left_s, attendant.every_s))
            if left_s <= 0:
                return
            if attendant is not None:
                self._end_if_asked(attendant.look(None), None)

    def _end_if_asked(self, asked: EndNow | None, child: Child | None) -> None:
        if asked is None:
            return
        if asked.stop and self.stop_signal is None:
            self.stop_signal = signal.SIGTERM
        if child is None:
            return
        self._kill_at_s = min(self._kill_at_s, self._clock.monotonic_s() + asked.grace_s)
        if signal.SIGTERM not in self._told:
            self._tell(signal.SIGTERM, child)
        if asked.stop:
            self._told.add(signal.SIGTERM)

    def _receive(self, child: Child | None, timeout_s: float) -> None:
        for number in self._inbox.wait(timeout_s):
            is_notice = self._attendant is not None and self._attendant.received(number)
            if number in _STOPPING:
                self._told_to_stop(number, child)
            elif child is not None:
                if number == signal.SIGWINCH and self._attendant is not None:
                    self._attendant.window_changed()
                # A notice is passed on in its own way. The signal reaches only who waits for it: by default it kills.
                if not is_notice or child.catches(number):
                    child.send(number)

    def _tell(self, number: int, child: Child) -> None:
        child.send(number)
        if self._attendant is not None:
            self._attendant.told(self._kill_at_s - self._clock.monotonic_s())

    def _told_to_stop(self, number: int, child: Child | None) -> None:
        # The command knows what SIGTERM means; a closed terminal means the same.
        passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        now_s = self._clock.monotonic_s()
        if passed == signal.SIGTERM:
            self._kill_at_s = min(self._kill_at_s, now_s + self._grace_s)
        elif passed in self._told:
            self._kill_at_s = now_s
        if passed not in self._told and child is not None:
            self._tell(passed, child)
        self._told.add(passed)
        if self.stop_signal is None:
            self.stop_signal = number

    def _clear_leftovers(self, child: Child) -> None:
        """What outlived the main process is told to stop, then killed: no loader worker, no orphaned trainer stays.

        Only processes whose parent is gone from the group get SIGTERM: a trainer whose shell has died must be able to save with its
        workers alive.
        """
        living = child.living_members()
        pids = {member.pid for member in living}
        for member in living:
            if member.parent_pid not in pids:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(member.pid, signal.SIGTERM)
        if self._kill_at_s == math.inf:
            self._kill_at_s = self._clock.monotonic_s() + self._leftover_grace_s
        self._wait_until_gone(child)
        child.kill_group()
        # The next attempt must find their memory and devices free. One that hangs in the kernel cannot be waited for.
        self._kill_at_s = self._clock.monotonic_s() + _DYING_S
        self._wait_until_gone(child)
        self._kill_at_s = math.inf

    def _wait_until_gone(self, child: Child) -> None:
        while child.living_members() and self._clock.monotonic_s() < self._kill_at_s:
            self._receive(None, _LOOK_AGAIN_S)
