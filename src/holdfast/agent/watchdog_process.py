"""The watchdog: a small process that outlives the agent, and sees to it that a machine does not outlive its purpose.

It is started by path, in a process of its own (`python -I -S`), and uses nothing but the standard library, so it is small and
starts in a moment. It is told about the command over a pipe. When the pipe ends, the agent has gone, however it went. Then, or
when the time is over and the agent does not react, it does the agent's last duties:

    command still there → SIGTERM, grace, SIGKILL to its group
    output of the command → read on and passed to where it would have gone (a writer without a reader dies of SIGPIPE)
    on-exit command → run once, by whoever of agent and watchdog takes the token first (`run_once`)

Moments only move later: a word of the agent's that comes late, or twice, ends nothing that was allowed to go on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

__all__ = ["Watchdog", "group_members", "main", "run_once"]

_POLL_S = 0.1
_LAST_WORDS_S = 2.0
"""For the last of the command's output, if something keeps it open or nobody reads it."""
_AGENTS_END_S = 20.0
"""What an agent is given to flush and leave, once its command has been killed."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP)


def run_once(token: int, command: str) -> int:
    """Run a shell command unless somebody else has; its exit code, 0 when it was somebody else.

    The token is one byte in a pipe that agent and watchdog share: one reader gets it, and no full disk or cleaned folder can take
    it away. Invariant: it is taken by the very process that then becomes the shell. So a caller that is killed before leaves the
    command to the next one, and a caller that is killed after leaves it running.
    """
    child = os.fork()
    if child == 0:
        try:
            if os.read(token, 1):
                for number in _IGNORED:
                    signal.signal(number, signal.SIG_DFL)
                os.execv("/bin/sh", ["/bin/sh", "-c", command])
            os._exit(0)
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def group_members(group: int) -> list[tuple[int, int]]:
    """(pid, parent's pid) of every living process of a group; where there is no /proc, the group's leader stands for it."""
    if not os.path.isdir("/proc/self"):
        try:
            os.killpg(group, 0)
        except OSError:
            return []
        return [(group, 0)]
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # A process may end while it is looked at. The name, in parentheses, may hold anything.
            with suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
                if fields[0] not in "ZX" and int(fields[2]) == group:
                    members.append((int(entry), int(fields[1])))
    return members


def _send(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)


class Watchdog:
    """Times are of the machine's monotonic clock, which agent and watchdog share. Descriptors are inherited."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._control: int = settings["control"]
        self._token: int = settings["token"]
        self._outputs: list[list[int]] = settings["outputs"]
        self._agent: int = settings["agent"]
        self._on_exit: str | None = settings["on_exit"]
        self._grace_s: float = settings["grace_s"]
        self._leftover_grace_s: float = settings["leftover_grace_s"]
        self._stop_at_s = _seconds(settings["stop_at_s"])
        self._kill_at_s = _seconds(settings["kill_at_s"])
        self._end_at_s = _seconds(settings["end_at_s"])
        self._group: int = settings["group"]
        self._told: bool = settings["told"]
        self._ended_well = self._is_replaced = False
        self._text = b""

    def watch(self) -> None:
        """Until the agent has gone, in whatever way; then the last duties."""
        while self._listen(self._until_next_s()):
            now_s = time.monotonic()
            if now_s >= self._kill_at_s:
                self._end_agent()
                break
            if now_s >= self._stop_at_s and not self._told:
                self._told = True
                self._say("the time is over, and the agent does not react: stopping the command")
                _send(self._agent, signal.SIGTERM)
                _send(self._group or self._agent, signal.SIGTERM)
        if self._is_replaced:
            return
        if not self._ended_well:
            passing = [threading.Thread(target=_pass_on, args=output, daemon=True) for output in self._outputs]
            for thread in passing:
                thread.start()
            if self._group:
                self._end_command()
            for thread in passing:
                thread.join(_LAST_WORDS_S)
        if self._on_exit is not None:
            code = run_once(self._token, self._on_exit)
            if code:
                self._say(f"the command to run at the end has failed with exit code {code}: {self._on_exit}")

    def _until_next_s(self) -> float:
        next_s = min(self._kill_at_s, self._kill_at_s if self._told else self._stop_at_s)
        return max(0.0, min(next_s - time.monotonic(), 3600.0))

    def _listen(self, timeout_s: float) -> bool:
        """Take in what the agent says; False when it has gone."""
        if not select.select([self._control], [], [], timeout_s)[0]:
            return True
        data = os.read(self._control, 4096)
        self._text += data
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            word, _, argument = line.decode(errors="replace").partition(" ")
            if word == "command":
                self._group, self._told = int(argument), False
            elif word == "gone":
                self._group = 0
            elif word == "told":
                self._told = True
            elif word == "end":
                self._ended_well = True
            elif word == "later":
                stop_at_s, kill_at_s, end_at_s = map(float, argument.split())
                self._stop_at_s = max(self._stop_at_s, stop_at_s)
                self._kill_at_s = max(self._kill_at_s, kill_at_s)
                self._end_at_s = max(self._end_at_s, end_at_s)
            elif word == "replaced":
                self._is_replaced = True
        return bool(data) and not self._is_replaced

    def _end_agent(self) -> None:
        """The last moment has come, and the agent still runs."""
        self._say("the time is over: killing what still runs")
        if self._group:
            with suppress(OSError):
                os.killpg(self._group, signal.SIGKILL)
        _send(self._agent, signal.SIGTERM)
        now_s = time.monotonic()
        give_up_s = min(now_s + _AGENTS_END_S, max(now_s, self._end_at_s))
        while time.monotonic() < give_up_s:
            if not self._listen(_POLL_S):
                return
        _send(self._agent, signal.SIGKILL)

    def _end_command(self) -> None:
        """The agent has died, and its command works on. The kernel has told its main process to stop; who does not know that, is
        told here.

        Only processes whose parent is not in the group are told: a trainer must be able to save with its workers alive.
        """
        kill_s = min(time.monotonic() + self._grace_s, max(self._kill_at_s, time.monotonic()))
        told: set[int] = {self._group} if sys.platform == "linux" or self._told else set()
        while members := group_members(self._group):
            pids = {pid for pid, _ in members}
            for pid, parent in members:
                if parent not in pids and pid not in told:
                    told.add(pid)
                    _send(pid, signal.SIGTERM)
            if self._group not in pids:
                # The main process has ended: what it left behind has the shorter grace period.
                kill_s, self._leftover_grace_s = min(kill_s, time.monotonic() + self._leftover_grace_s), float("inf")
            if time.monotonic() >= kill_s:
                with suppress(OSError):
                    os.killpg(self._group, signal.SIGKILL)
                return
            time.sleep(_POLL_S)

    def _say(self, message: str) -> None:
        with suppress(OSError):
            os.write(2, f"holdfast: watchdog: {message}\n".encode())


def _seconds(value: float | None) -> float:
    return float("inf") if value is None else value


def _pass_on(reading_end: int, target: int) -> None:
    """The command's output, from now until it ends."""
    with suppress(OSError):
        while True:
            select.select([reading_end], [], [])
            try:
                data = os.read(reading_end, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                return
            # Where nobody reads any more, it is still taken from the command.
            with suppress(OSError):
                while data:
                    data = data[os.write(target, data) :]


def main() -> None:
    """Settings come as JSON in the first argument. Daemonised first: no terminal, no session and no parent of the agent's."""
    settings = json.loads(sys.argv[1])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    alive: int = settings["alive"]
    for descriptor in (settings["control"], settings["token"], alive, *(end for end, _ in settings["outputs"])):
        os.set_inheritable(descriptor, False)
    with suppress(OSError):
        # The agent may have gone already; then there is all the more to do.
        os.write(alive, f"{os.getpid()}\n".encode())
    # As long as this process lives, it holds the writing end of `alive`.
    Watchdog(settings).watch()


if __name__ == "__main__":
    main()
