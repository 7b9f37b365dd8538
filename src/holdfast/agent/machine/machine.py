"""`holdfast machine`: a life (life.py) with the real agent, watchdog, listener and threads around it.

    watchdog (first of all; from here on this machine ends whatever happens) → life → the end command, once

The watchdog outlives this process. It is told when the machine's time ends: first the boot's limit, then the grant's, which moves.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from holdfast.agent.attempts import RunOptions
from holdfast.agent.logs import LogLimits
from holdfast.agent.machine.ahead import Ahead
from holdfast.agent.machine.bell import Bell
from holdfast.agent.machine.boot import ThisMachine, this_machine
from holdfast.agent.machine.errands import beside
from holdfast.agent.machine.life import Life, Pace, Task
from holdfast.agent.machine.prepare import Prepared, prepare
from holdfast.agent.machine.records import Records
from holdfast.agent.record import AgentRecord
from holdfast.agent.restart import run_command
from holdfast.agent.rounds import Care
from holdfast.agent.watchdog import Lifetime, Limits, Watchdog
from holdfast.core.bootstrap import GUARDED, once_only
from holdfast.core.clock import Clock
from holdfast.core.contract import (
    ENV_MACHINE,
    ENV_MACHINE_STARTED,
    ENV_MARKET,
    ENV_PRICE,
    ENV_PRICE_ON_DEMAND,
    ENV_RUN,
    Progress,
)
from holdfast.core.errors import UsageError
from holdfast.core.events import Event, NullSink, Sink
from holdfast.core.ids import random_token
from holdfast.core.job_record import JobRecord
from holdfast.notice.base import Notice
from holdfast.notice.listen import Listener, listen
from holdfast.policy.restart import RestartLimits
from holdfast.store.base import Store

__all__ = ["run_machine"]

_GRACE_S, _LEFTOVER_GRACE_S = 30.0, 5.0
_END_S = 5.0
_OUTPUT_S, _LAST_OUTPUT_S = 60.0, 10.0
"""For the set-up's output to be kept: beside the job; before a machine ends that could not be made ready."""
_STAGED = "staged"
_BELL_S = 3.0
"""At the end, until a controller can have heard of the last word."""
_NEAR_POLL_S = 1.0
"""Where a request costs nothing."""


def run_machine(
    url: str,
    launch: int,
    *,
    end_command: str | None,
    environment: Mapping[str, str],
    clock: Clock,
    open_store: Callable[[str], Store],
    rng: random.Random,
    say: Callable[[str], None],
    pace: Pace | None = None,
) -> int:
    """Work for this launch until it is over, then run `end_command`, once, also when this process is killed. Returns the exit code.

    Must be called from the main thread. UsageError, before anything is guarded, for an environment that makes no sense and where
    another process works in this machine's folder.
    """
    machine = this_machine(environment, end_command, clock)
    machine.folder.mkdir(parents=True, exist_ok=True)
    with _only_process(machine.folder):
        end = None if machine.end_command is None else once_only(machine.end_command, str(machine.folder))
        watchdog = Watchdog(
            Lifetime(on_exit=end), grace_s=_GRACE_S, leftover_grace_s=_LEFTOVER_GRACE_S, outputs=[], clock=clock, say=say,
            limits=Limits(
                stop_at_s=machine.unborn_at_s, kill_at_s=machine.unborn_at_s + _END_S, end_at_s=machine.unborn_at_s + 2 * _END_S
            ),
            pid_file=machine.folder / GUARDED,
        )  # fmt: skip
        try:
            store = open_store(url)
            try:
                often = pace or (Pace(poll_s=_NEAR_POLL_S) if store.is_near else Pace())
                shell = _Shell(url, store, machine, watchdog, environment, clock, open_store, rng, say, often)
                return shell.run(launch)
            finally:
                store.close()
        finally:
            watchdog.end()


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """A second one would take the first one's records for its own, and end its machine."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another `holdfast machine` works in {folder}") from None
        yield
    finally:
        os.close(descriptor)


class _Guard:
    """The watchdog, as a life knows it."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def granted(self, limits: Limits) -> None:
        self._watchdog.begin_anew(limits=limits)

    def extend(self, limits: Limits) -> None:
        self._watchdog.extend(limits)

    def look(self) -> None:
        self._watchdog.look()


@dataclass(slots=True)
class _Shell:
    """What a life needs of the real world."""

    url: str
    store: Store
    machine: ThisMachine
    watchdog: Watchdog
    environment: Mapping[str, str]
    clock: Clock
    open_store: Callable[[str], Store]
    rng: random.Random
    say: Callable[[str], None]
    pace: Pace

    def run(self, launch: int) -> int:
        listeners: list[Listener] = []
        bell = Bell(launch, self.open_store, self.say)
        ahead = Ahead(
            self.store, self.machine.folder / _STAGED, clock=self.clock, say=self.say, look_s=self.pace.poll_s
        )

        def make_ready(job: JobRecord, tick: Callable[[], None]) -> Prepared:
            # A machine that waits may be taken away as well as one that works.
            listeners.append(
                listen(
                    job.notice, clock=self.clock, sink=NullSink(), on_notice=life.notices.heard,
                    environ=dict(self.environment), grace_s=job.grace_s,
                )
            )  # fmt: skip
            with self._told(job, launch) as (keep, say):
                return prepare(
                    job, self.store, self.machine.folder, self.environment, tick, self.clock, keep=keep, say=say
                )

        def work(life: Life, task: Task) -> int:
            for listener in listeners:
                listener.close()
            life.notices.begin_anew()
            return self._work(life, task, ahead)

        life = Life(
            records=Records(self.store), launch=launch, machine=self.machine, clock=self.clock, tokens=random_token,
            guard=_Guard(self.watchdog), prepare=make_ready, work=work, say=self.say, bell=bell, pace=self.pace,
            beside_waiting=ahead.beside_waiting,
        )  # fmt: skip
        try:
            return life.run()
        finally:
            bell.close(_BELL_S)
            ahead.close()
            for listener in listeners:
                listener.close()

    @contextmanager
    def _told(self, job: JobRecord, launch: int) -> Iterator[tuple[Callable[[bytes], None], Callable[[str], None]]]:
        """Where the set-up's output goes, and what is said of it: into the logs of the attempt that comes."""
        if not job.keeps_output or not (job.setup.strip() or job.mounts):
            yield (lambda data: None), self.say
            return
        record = AgentRecord(
            self.store, token=random_token()[:8], clock=self.clock, say=self.say, claimed=lambda: 0, logs=LogLimits(),
            heartbeat_s=math.inf,
        )  # fmt: skip
        record.begin(0)

        def say(line: str) -> None:
            self.say(line)
            record.keep(line.encode() + b"\n")

        say(f"holdfast: set-up of launch {launch} on {self.machine.name}")
        try:
            yield record.keep, say
        except BaseException:
            record.close(_LAST_OUTPUT_S)
            raise
        # A store that is slow keeps nobody from claiming.
        threading.Thread(target=record.close, args=(_OUTPUT_S,), name="holdfast-setup-logs", daemon=True).start()

    def _work(self, life: Life, task: Task, ahead: Ahead) -> int:
        job = task.job
        options = RunOptions(
            url=self.url,
            grace_s=job.grace_s,
            leftover_grace_s=_LEFTOVER_GRACE_S,
            limits=RestartLimits(
                max_errors=job.max_errors,
                max_errors_total=job.max_errors_total,
                max_infrastructure=job.max_infrastructure,
                no_progress_limit=job.no_progress_limit,
            ),
            care=Care(startup_report=True, notice=job.notice),
            logs=LogLimits() if job.keeps_output else None,
        )
        with beside(
            life.listen, life.speak, has_word=life.words.are_waiting, listen_s=self.pace.poll_s, speak_s=min(1.0, self.pace.pulse_s)
        ):  # fmt: skip
            return run_command(
                task.prepared.command, options, clock=self.clock, sink=_LastReasons(life), say=self.say, rng=self.rng,
                environment=dict(task.prepared.environment) | _facts(self.url, self.machine, task, self.clock) | ahead.environment,
                open_store=self.open_store, outside=_Outside(life, task, self.machine, self.watchdog, self.clock, ahead),
            )  # fmt: skip


@dataclass(slots=True)
class _LastReasons:
    """The agent says in an event why it has stopped; that belongs into the machine's last word."""

    life: Life

    def emit(self, event: Event) -> None:
        if event.name == "agent.stopped":
            self.life.why_ended = tuple(str(reason) for reason in event.fields.get("reasons", ()) if reason)


@dataclass(slots=True)
class _Outside:
    """Implements `rounds.Outside`."""

    life: Life
    task: Task
    machine: ThisMachine
    watchdog: Watchdog
    clock: Clock
    ahead: Ahead

    def begins(self, sink: Sink) -> None:
        """What exactly ran here: somebody will want to know."""
        answer, job = self.task.orders.answer, self.task.job
        fields = {
            "launch": self.life.launch,
            "attempt_of_machines": self.task.attempt,
            "machine": self.machine.name,
            "pool": None if answer is None or answer.pool is None else answer.pool.name,
            "job": job.name,
            "code": None if job.code is None else job.code.version,
            "holdfast": version("holdfast"),
            "holdfast_served": job.holdfast or None,
            "setup_s": round(self.task.prepared.setup_s, 3),
            "setup_cached": self.task.prepared.setup_cached,
            "uptime_s": round(self.clock.monotonic_s() - self.machine.boot_s, 3),
            "standby_for": self.task.intent.predecessor,
        }
        sink.emit(Event("machine.begun", self.clock.unix_s(), fields))

    def heard(self, notice: Notice) -> None:
        self.life.notices.heard(notice)

    def look(self, progress: Progress | None) -> str | None:
        self.ahead.look(progress)
        return self.life.look(progress)

    def limit(self) -> str:
        return self.life.limit()


def _facts(url: str, machine: ThisMachine, task: Task, clock: Clock) -> dict[str, str]:
    """What the ledger wants to know of this machine. While nobody has answered, the dearest that is allowed."""
    answer, allowed = task.orders.answer, task.intent.allowed
    pool = answer.pool if answer is not None else None
    here = next((each for each in allowed if each.pool == pool), None) or max(
        allowed, key=lambda each: each.ceiling_microusd_h, default=None
    )
    facts = {ENV_RUN: url, ENV_MACHINE: machine.name}
    # The controller's clock and this one may differ; billed since the boot at the latest.
    booted_unix_s = clock.unix_s() - (clock.monotonic_s() - machine.boot_s)
    created_unix_s = task.intent.created_unix_s or booted_unix_s
    facts[ENV_MACHINE_STARTED] = f"{min(booted_unix_s, created_unix_s):.3f}"
    if here is not None:
        price = answer.microusd_h if answer is not None and answer.microusd_h else here.ceiling_microusd_h
        facts |= {
            ENV_PRICE: f"{price / 1e6:.6f}",
            ENV_PRICE_ON_DEMAND: f"{here.on_demand_microusd_h / 1e6:.6f}",
            ENV_MARKET: (pool or here.pool).market,
        }
    return facts
