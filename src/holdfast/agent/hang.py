"""Watches whether the command still moves, and says what it was doing when it does not. The decision is policy/hang.py's.

progress page, output, process state → Reading → policy.hang.observe → a reason to end it
end it → stacks of every process that offers them (core/stacks.py), state of every process of the group
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.agent.child import Child
from holdfast.core.clock import Clock
from holdfast.core.contract import Phase, ProgressPage
from holdfast.core.stacks import ask_for_stacks, forget_offers, offers
from holdfast.policy.hang import HangLimits, HangState, Reading, Verdict, observe

__all__ = ["HangWatch"]

_ANSWER_S = 3.0
_ANSWER_POLL_S = 0.05
_MAX_STACKS_BYTES = 32 << 10
_MAX_PROCESSES = 32


class HangWatch:
    """One per agent: what is learned about the command outlives an attempt. Owned by the main thread."""

    def __init__(
        self,
        limits: HangLimits,
        *,
        page: ProgressPage,
        folder: Path,
        clock: Clock,
        output_bytes: Callable[[], int],
    ) -> None:
        self._limits, self._page, self._folder, self._clock = limits, page, folder, clock
        self._output_bytes = output_bytes
        self._state = HangState()
        self._reports = False
        self.verdict: Verdict | None = None

    def attempt_starts(self) -> None:
        self._state = self._state.next_attempt()
        forget_offers(self._folder)

    def look(self, child: Child) -> str | None:
        """Why the command is taken for hung; None while it is not."""
        self._state, self.verdict = observe(self._state, self._read(child), self._limits)
        return self.verdict.reason if self.verdict.hung else None

    def _read(self, child: Child) -> Reading:
        phase = self._page.phase()
        with suppress(ValueError):
            progress = self._page.read()
            # A trainer enters a phase before it claims.
            self._reports = self._reports or progress is not None or phase not in (None, Phase.STARTING)
            sign = self._output_bytes() if not self._reports else progress.step if progress is not None else -1
            return Reading(
                now_s=self._clock.monotonic_s(),
                reports=self._reports,
                phase=phase or Phase.STARTING,
                sign_of_life=sign,
                paused=_state_of(child.pid) in ("T", "t"),
            )
        # Nonsense on the page is no report.
        return Reading(
            now_s=self._clock.monotonic_s(),
            reports=False,
            phase=Phase.STARTING,
            sign_of_life=self._output_bytes(),
        )

    def evidence(self, child: Child) -> list[str]:
        """What the command is doing, line by line. Nothing is ended by asking."""
        lines = []
        asked: dict[Path, int] = {}
        for pid in offers(self._folder)[:_MAX_PROCESSES]:
            size_bytes = _size_bytes(self._folder / f"stacks-{pid}")
            path = ask_for_stacks(self._folder, pid)
            if path is not None:
                asked[path] = size_bytes
        give_up_s = self._clock.monotonic_s() + _ANSWER_S
        for path, before_bytes in asked.items():
            lines.append(f"Python stacks of process {path.name.rpartition('-')[2]}:")
            lines += [f"  {line}" for line in self._answer(path, before_bytes, give_up_s)]
        lines.append("processes of the command (state, waiting in the kernel for, seconds of CPU):")
        lines += [f"  {_describe(member.pid)}" for member in child.living_members()[:_MAX_PROCESSES]]
        return lines

    def _answer(self, path: Path, before_bytes: int, give_up_s: float) -> list[str]:
        """What has been appended; complete when it has stopped growing."""
        size_bytes = before_bytes
        while self._clock.monotonic_s() < give_up_s:
            self._clock.sleep(_ANSWER_POLL_S)
            now_bytes = _size_bytes(path)
            if now_bytes == size_bytes and now_bytes > before_bytes:
                break
            size_bytes = now_bytes
        try:
            with path.open("rb") as file:
                file.seek(before_bytes)
                text = file.read(_MAX_STACKS_BYTES).decode(errors="replace")
        except OSError as error:
            return [f"cannot be read: {error.strerror}"]
        return text.splitlines() or ["no answer: the process cannot even handle a signal"]


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; the name before them, in parentheses, may hold anything."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def _state_of(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _describe(pid: int) -> str:
    fields = _stat(pid)
    if len(fields) < 13:
        return f"{pid}: has ended"
    name, waiting = "?", "-"
    with suppress(OSError):
        name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
    with suppress(OSError):
        waiting = Path(f"/proc/{pid}/wchan").read_text().strip() or "-"
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return f"{pid}: {fields[0]}, {'-' if waiting == '0' else waiting}, {cpu_s:.1f} s: {name}"
