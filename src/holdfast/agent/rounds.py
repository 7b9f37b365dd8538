"""The rounds that the agent makes while the command runs: is it alive, is the machine well, is there time left?

    Supervisor ── once a second ──→ Rounds.look ─→ watchdog, service manager, heartbeat
                                                 ─→ lifetime, GPUs, hang: EndNow, and the reason as evidence for policy/restart.py

Everything that goes on beside the command is opened here, and closed here in the right order: the output first, then the record
that keeps it, then the watchdog, which runs what is to be run at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from holdfast.agent.child import Child, EndNow
from holdfast.agent.gpu import Gpus, driver_present
from holdfast.agent.hang import HangWatch
from holdfast.agent.notices import NoticeDesk
from holdfast.agent.output import Output
from holdfast.agent.record import AgentRecord
from holdfast.agent.startup import Startup, describe_machine, describe_price, startup_lines
from holdfast.agent.systemd import ServiceManager
from holdfast.agent.watchdog import Lifetime, Watchdog
from holdfast.core.clock import Clock
from holdfast.core.config import format_bytes, format_duration
from holdfast.core.contract import ENV_NOTICE, KeptWord, Progress, ProgressPage
from holdfast.core.events import Event, Sink
from holdfast.notice.base import Notice
from holdfast.policy.hang import HangLimits

__all__ = ["Care", "Findings", "Outside", "Rounds"]

_WAIT_FOR_HEAD_S = 5.0
_WAIT_FOR_GPU_NAMES_S = 2.0
_WAIT_FOR_LOST_GPU_S = 300.0
_LOOK_S = 1.0
_STATUS_S = 10.0
_CLOSE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Care:
    """How to look after the command and its machine."""

    lifetime: Lifetime = field(default_factory=Lifetime)
    hang: HangLimits | None = field(default_factory=HangLimits)
    """None: a command is never taken for hung."""
    wait_gpu_s: float | None = None
    """Wait this long for the GPUs before every start; None: only after one was lost."""
    startup_report: bool = False
    notice: str | None = None
    """Where to listen for word that the machine goes; None: `$HOLDFAST_NOTICE`, else `auto`."""


@dataclass(slots=True)
class Findings:
    """What was found out about one attempt, as policy/restart.py takes it."""

    hang: str | None = None
    infrastructure: str | None = None
    limit: str | None = None
    notice: str | None = None


class Outside(Protocol):
    """Who has started this agent on the machine, and says how long it may work (machine/). The watchdog is theirs, and so is the
    end. Called in the main thread, where it is not said otherwise; nothing here may wait."""

    @property
    def watchdog(self) -> Watchdog: ...

    def begins(self, sink: Sink) -> None:
        """The agent begins; what is emitted there is kept under the run's URL."""
        ...

    def heard(self, notice: Notice) -> None:
        """What the machine has been told; in the listener's thread."""
        ...

    def look(self, progress: Progress | None) -> str | None:
        """Called once a second or so; moves the watchdog's limits. Why the command must be stopped; None: it goes on."""
        ...

    def limit(self) -> str:
        """Which limit it is that ends the work at the watchdog's moment."""
        ...


class Rounds:
    """Implements `child.Attendant`. Owned by the main thread."""

    def __init__(
        self,
        care: Care,
        *,
        url: str | None,
        record: AgentRecord | None,
        keeps_output: bool,
        grace_s: float,
        leftover_grace_s: float,
        page: ProgressPage,
        folder: Path,
        environment: MutableMapping[str, str],
        clock: Clock,
        sink: Sink,
        say: Callable[[str], None],
        outside: Outside | None = None,
    ) -> None:
        self._outside, self._was_stopped = outside, False
        self._care, self._url, self._record = care, url, record
        self._grace_s, self._leftover_grace_s = grace_s, leftover_grace_s
        self.folder = folder
        self._page, self._environment, self._clock, self._sink, self._say = page, environment, clock, sink, say
        self._service = ServiceManager(environment, clock)
        self._gpus: Gpus | None = None
        self._had_lost_gpu = False
        self._start = 0
        self._status_at_s = clock.monotonic_s()
        self._findings = Findings()
        self._limit_reached: str | None = None
        watches_output = keeps_output or (care.hang is not None and care.hang.always_s is not None)
        self.output = Output(record.keep if record is not None else _forget, clock) if watches_output else None
        self._hang = (
            None
            if care.hang is None
            else HangWatch(care.hang, page=page, folder=folder, clock=clock, output_bytes=self._output_bytes)
        )
        self.notices = NoticeDesk(
            care.notice or environment.get(ENV_NOTICE) or "auto",
            folder,
            url=url,
            progress=self._progress,
            grace_s=grace_s,
            environment=environment,
            clock=clock,
            sink=sink,
            say=say,
            told=outside.heard if outside is not None else _unheard,
        )
        outputs = self.output.reading_ends if self.output is not None else []
        self._watchdog: Watchdog | None = None
        if outside is not None:
            self._watchdog = outside.watchdog
            self._watchdog.begin_anew(grace_s=grace_s, outputs=outputs)
            outside.begins(sink)
        elif self.output is not None or care.lifetime.on_exit is not None or math.isfinite(care.lifetime.limit_s):
            self._watchdog = Watchdog(
                care.lifetime,
                grace_s=grace_s,
                leftover_grace_s=leftover_grace_s,
                outputs=outputs,
                clock=clock,
                say=say,
            )

    def _output_bytes(self) -> int:
        return 0 if self.output is None else self.output.passed_bytes

    def _progress(self) -> Progress | None:
        # The page is the command's to write; nonsense in it is no report.
        with suppress(ValueError):
            return self._page.read()
        return None

    # ---- around an attempt

    def before_start(self, start: int, pause: Callable[[float], bool]) -> str | None:
        """Get ready. Why the machine is not fit for the command; None when it is. `pause` is False when the agent shall stop."""
        self._start = start
        self._findings = Findings()
        self.notices.begin()
        if self._record is not None:
            self._record.begin(start)
        wants_gpu = self._care.wait_gpu_s is not None or self._had_lost_gpu
        if self._gpus is None and (wants_gpu or driver_present()):
            self._gpus = Gpus(self._clock, environment=self._environment)
        if self._gpus is not None and wants_gpu:
            limit_s = self._care.wait_gpu_s if self._care.wait_gpu_s is not None else _WAIT_FOR_LOST_GPU_S
            self._service.status("waiting for the GPU")
            return self._gpus.wait_until_ready(limit_s, pause)
        return None

    def last_words_before_start(self) -> list[str]:
        """The startup report, before the first start. Waits shortly for what is still being asked."""
        head = self._record.wait_for_head(_WAIT_FOR_HEAD_S) if self._record is not None else None
        if self._gpus is not None:
            self._gpus.look(ask_s=_WAIT_FOR_GPU_NAMES_S if self._start == 1 else 0.0)
            self._gpus.attempt_starts()
        if not self._care.startup_report or self._start > 1:
            return []
        checkpoint = None
        if head is not None:
            checkpoint = "none yet" if head.step is None else f"the newest is of step {head.step}"
            checkpoint += "; the run is finished" if head.finished else ""
        elif self._record is not None:
            checkpoint = f"not known: the store did not answer within {format_duration(_WAIT_FOR_HEAD_S)}"
        lifetime = self._care.lifetime
        return startup_lines(
            Startup(
                start=self._start,
                url=self._url,
                attempt=head.attempt if head is not None else None,
                checkpoint=checkpoint,
                machine=describe_machine(),
                gpus=self._gpus.describe() if self._gpus is not None else None,
                price=describe_price(self._environment),
                limit=f"all ends within {format_duration(lifetime.limit_s)}"
                if math.isfinite(lifetime.limit_s)
                else None,
            )
        )

    def started(self, child: Child) -> None:
        if self._hang is not None:
            self._hang.attempt_starts()
        if self._watchdog is not None:
            self._watchdog.command_started(child.pid)
        self._service.ready(_doing(self._start, None))

    def ended(self, exit_code: int) -> Findings:
        """The command has ended; what is known about why."""
        if self._watchdog is not None:
            self._watchdog.command_ended()
        if self.output is not None:
            self.output.settle()
        if self._gpus is not None and exit_code != 0 and self._findings.infrastructure is None:
            # A program whose GPU is lost may well end before anybody has looked.
            self._findings.infrastructure = self._gpus.trouble(fresh=True)
        self._had_lost_gpu = self._findings.infrastructure is not None
        if self._watchdog is not None and self._clock.monotonic_s() >= self._watchdog.stop_at_s:
            # The watchdog may have acted before this agent could look.
            self._limit_reached = self._limit()
        self._findings.limit = self._limit_reached
        self._findings.notice = self.notices.going
        return self._findings

    @property
    def limit_reached(self) -> str | None:
        return self._limit_reached

    def close(self, *, unstored: str | None = None) -> None:
        """In the end, whatever it was. What does not get through in time is given up.

        `unstored`: why the last state of a mirrored folder is not stored; None: it is, or there is none.
        """
        if self._gpus is not None:
            self._gpus.close()
        if self.output is not None:
            self.output.close()
        if self._outside is not None:
            self._outside.watchdog.forget_outputs()
        if self._record is not None:
            self._record.close(_CLOSE_S)
        # The word may end the machine, so it comes when all is kept.
        self.notices.acknowledge()
        self.notices.close(self._kept(unstored))

    def _kept(self, unstored: str | None) -> KeptWord:
        progress = self._progress()
        lost = [] if unstored is None else [f"the last state of the mirrored folder: {unstored}"]
        if progress is not None and progress.lost_steps:
            lost.append(f"{progress.lost_steps} {'step' if progress.lost_steps == 1 else 'steps'} of the command")
        if self._record is not None and self._record.lost_output_bytes:
            lost.append(f"{format_bytes(self._record.lost_output_bytes)} of its output")
        return KeptWord(step=None if progress is None else progress.kept_step, lost=lost)

    def run_on_exit(self) -> None:
        """The last thing of all: the machine may be gone after it."""
        if self._watchdog is not None and self._outside is None:
            self._watchdog.end()

    # ---- child.Attendant

    @property
    def every_s(self) -> float:
        """Seldom enough to cost nothing, and in time for the end of the lifetime."""
        if self._watchdog is None or self._limit_reached is not None:
            return self.notices.every_s
        return min(self.notices.every_s, max(0.0, self._watchdog.stop_at_s - self._clock.monotonic_s()))

    def look(self, child: Child | None) -> EndNow | None:
        self._service.look()
        if self._watchdog is not None:
            self._watchdog.look()
            asked = self._outside.look(self._progress()) if self._outside is not None else None
            if self._limit_reached is None and self._clock.monotonic_s() >= self._watchdog.stop_at_s:
                asked = self._limit_reached = self._limit()
            if asked is not None and not self._was_stopped:
                self._was_stopped = True
                self._say(f"holdfast: {asked}: stopping")
                if not self._stops_by_itself(child):
                    return EndNow(self._grace_s, stop=True)
        taken = self.notices.look()
        if taken is not None:
            return taken
        if child is None:
            return None
        self._beat()
        if self._limit_reached is not None or self._findings.infrastructure or self._findings.hang:
            return None
        return self._look_at_machine() or self._look_at_command(child)

    def _limit(self) -> str:
        return self._care.lifetime.reason() if self._outside is None else self._outside.limit()

    def _stops_by_itself(self, child: Child | None) -> bool:
        """Whether a trainer has heard that it has to stop. It saves and leaves then, whatever shells and pipes are around it; a
        signal would reach the shell and break the pipe."""
        if self._outside is None or child is None or not self.notices.control.connected:
            return False
        self._outside.watchdog.command_told()
        self.notices.order("holdfast", self._grace_s)
        return True

    def received(self, number: int) -> bool:
        return self.notices.received(number)

    def told(self, grace_s: float) -> None:
        if self._watchdog is not None and math.isfinite(grace_s):
            self._watchdog.command_told()
        restarts = self._findings.hang or self._findings.infrastructure
        if math.isfinite(grace_s) and not restarts:
            self._service.stopping(grace_s + self._leftover_grace_s + _CLOSE_S)

    def window_changed(self) -> None:
        if self.output is not None:
            self.output.follow_window()

    def _look_at_machine(self) -> EndNow | None:
        trouble = self._gpus.trouble() if self._gpus is not None else None
        if trouble is None:
            return None
        self._findings.infrastructure = trouble
        self._say(f"holdfast: the machine has failed: {trouble}; ending the command")
        return EndNow(self._grace_s)

    def _look_at_command(self, child: Child) -> EndNow | None:
        reason = self._hang.look(child) if self._hang is not None else None
        if self._hang is None or reason is None:
            return None
        self._findings.hang = reason
        evidence = self._hang.evidence(child)
        self._say("\n".join([f"holdfast: the command hangs ({reason}); ending it. What it was doing:", *evidence]))
        fields = {"start": self._start, "reason": reason, "evidence": evidence}
        self._sink.emit(Event("command.hung", self._clock.unix_s(), fields))
        return EndNow(self._grace_s)

    def _beat(self) -> None:
        is_due = self._record is not None and self._record.heartbeat_due
        now_s = self._clock.monotonic_s()
        if not is_due and now_s < self._status_at_s:
            return
        progress = self._progress()
        if now_s >= self._status_at_s:
            self._status_at_s = now_s + _STATUS_S
            self._service.status(_doing(self._start, progress))
        if self._record is not None and is_due:
            self._record.beat(
                start=self._start,
                attempt=None if progress is None else progress.attempt,
                at_step=None if progress is None else progress.step,
                committed_step=None if progress is None else progress.committed_step,
                phase=None if progress is None else progress.phase.name.lower(),
                output_bytes=self._output_bytes(),
            )


def _doing(start: int, progress: Progress | None) -> str:
    if progress is None:
        return f"attempt {start} runs"
    saved = f", step {progress.committed_step} is saved" if progress.committed_step >= 0 else ""
    return f"attempt {start}, step {progress.step} ({progress.phase.name.lower()}){saved}"


def _unheard(notice: Notice) -> None:
    """Nobody is outside."""


def _forget(data: bytes) -> None:
    """Output that is only watched."""
