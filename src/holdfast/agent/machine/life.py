"""The life of a machine, from its first record to its last word. What it does is done by others; here is the order.

    intent, holder (one machine for a launch, and no second) → job → grant
        → nobody before it:  claimed → prepare → work
        → a standby:         prepare → ready → wait (gate.py), and fetch what will be restored (ahead.py) → claimed → work
    → released → the end

Every wait calls `_tick`: it listens to the controller, moves the watchdog's limits, and leaves (`_Leave`) where there is a reason.

The order of two records decides a race: the machine writes `holder` and then reads the answer; a controller that gives a launch up
writes `void` and then reads `holder`. At least one of them sees the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from holdfast.agent.machine.bell import Bell
from holdfast.agent.machine.boot import ThisMachine
from holdfast.agent.machine.gate import Gate
from holdfast.agent.machine.grants import limits_of
from holdfast.agent.machine.kept import KeptWork
from holdfast.agent.machine.orders import Orders
from holdfast.agent.machine.prepare import Prepared, Unprepared
from holdfast.agent.machine.records import TROUBLE, Records, patiently
from holdfast.agent.machine.words import NoticeBook, Words
from holdfast.agent.watchdog import Limits
from holdfast.core.clock import Clock
from holdfast.core.config import format_duration
from holdfast.core.contract import EXIT_DONE, EXIT_FENCED, EXIT_LIMIT, EXIT_PREEMPTED, EXIT_USAGE, Progress
from holdfast.core.errors import Fenced, HoldfastError
from holdfast.core.ids import TokenSource
from holdfast.core.job_record import JOB_KEY, JobRecord
from holdfast.core.launches import Holder, Intent, MachineWord, Pulse, holder_key, intent_key, pulse_key, word_key
from holdfast.core.sealed import FORMAT_VERSION

__all__ = ["EXIT_STOPPED", "Guard", "Life", "Pace", "Task"]

_Record = TypeVar("_Record", bound=msgspec.Struct)
EXIT_STOPPED = 143
"""Told to stop before there was anything to stop: as if SIGTERM had ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often is asked and said, and how long is waited. Seconds."""

    poll_s: float = 5.0
    pulse_s: float = 30.0
    absent_s: float = 60.0
    """A record that must be there and is not is waited for so long."""
    last_word_s: float = 60.0
    """For the last word to be written; the machine ends in any case."""


class Guard(Protocol):
    """Who ends this machine when nobody else does."""

    def granted(self, limits: Limits) -> None:
        """The first limits that a grant gives, in the place of those of the boot."""
        ...

    def extend(self, limits: Limits) -> None: ...

    def look(self) -> None:
        """Called now and then: the guard may have died."""
        ...


@dataclass(slots=True, kw_only=True)
class Task:
    """What the machine has to work on, once it has claimed."""

    intent: Intent
    job: JobRecord
    prepared: Prepared
    attempt: int
    orders: Orders


class _Leave(Exception):
    """The machine is to end without working, or without working on. `said`: nobody has to be told."""

    def __init__(self, exit_code: int, *reasons: str, silently: bool = False) -> None:
        super().__init__(*reasons)
        self.exit_code, self.reasons, self.silently = exit_code, reasons, silently


@dataclass(slots=True, kw_only=True)
class Life:
    """One machine's part in one launch. Thread safety: `run` and `look` belong to one thread; `listen`, `speak` and what is in
    `notices` may be called from others once the work has begun."""

    records: Records
    launch: int
    machine: ThisMachine
    clock: Clock
    tokens: TokenSource
    guard: Guard
    prepare: Callable[[JobRecord, Callable[[], None]], Prepared]
    work: Callable[[Life, Task], int]
    say: Callable[[str], None]
    bell: Bell
    """Rung after each word that is written."""
    beside_waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """What a standby does at the gate (ahead.py). Leaving it must not take time: the gate is open then."""
    pace: Pace = field(default_factory=Pace)
    orders: Orders = field(init=False)
    words: Words = field(init=False)
    notices: NoticeBook = field(init=False)
    kept: KeptWork = field(init=False, default_factory=KeptWork)
    why_ended: tuple[str, ...] = field(init=False, default=())
    """What whoever worked says about the end."""
    is_holder: bool = field(init=False, default=False)
    has_claimed: bool = field(init=False, default=False)
    _job: JobRecord | None = field(init=False, default=None)
    _limits: Limits | None = field(init=False, default=None)
    _listened_s: float = field(init=False, default=float("-inf"))
    _pulsed_s: float = field(init=False, default=float("-inf"))
    _alone: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.orders = Orders(self.records, self.launch)
        self.words = Words(
            self.records, self.launch, self.machine.name, self.machine.boot_s, self.clock, self.bell.ring
        )
        self.notices = NoticeBook(self.words, self.clock)

    def run(self) -> int:
        """All of it. Returns the exit code; whoever has called it then ends the machine."""
        try:
            exit_code, reasons, silently = self._work(), self._why_stopped(), False
        except _Leave as leave:
            exit_code, reasons, silently = leave.exit_code, leave.reasons, leave.silently
        except Unprepared as error:
            exit_code, reasons, silently = error.exit_code, (str(error),), False
        except Fenced as error:
            exit_code, reasons, silently = EXIT_FENCED, (str(error),), True
        except HoldfastError as error:
            exit_code, reasons, silently = 1, (str(error),), False
        self.say(
            f"holdfast: machine of launch {self.launch} leaves with exit code {exit_code}: {'; '.join(reasons) or 'done'}"
        )
        if self.is_holder and not silently:
            self.words.say("released", exit_code=exit_code, reasons=reasons)
        if self.is_holder and self._alone:
            self._last_words()
        return exit_code

    # ---- before the work

    def _work(self) -> int:
        intent = self._must_read(intent_key(self.launch), Intent, "nobody has asked for this machine")
        self._become_holder()
        self._listen_now()
        job = self._job = self._must_read(JOB_KEY, JobRecord, "there is nothing to do")
        self.bell.hang(job.home, intent.run_id)
        self._wait_until(lambda: self.orders.grant is not None)
        if intent.predecessor is None:
            attempt = self._claim()
            prepared = self.prepare(job, self._tick)
        else:
            prepared = self.prepare(job, self._tick)
            self.words.say("ready")
            gate = Gate(self.records, intent.predecessor, self._grace_s(), self.clock)
            with self.beside_waiting():
                self._wait_until(lambda: self._is_open(gate))
            attempt = self._claim()
        self._tick()
        task = Task(intent=intent, job=job, prepared=prepared, attempt=attempt, orders=self.orders)
        return self.work(self, task)

    def _must_read(self, key: str, kind: type[_Record], why: str) -> _Record:
        until_s = self.clock.monotonic_s() + self.pace.absent_s
        while True:
            found = patiently(lambda: self.records.read(key, kind), self._tick, self.clock)
            if found is not None:
                return found
            if self.clock.monotonic_s() >= until_s:
                raise _Leave(EXIT_USAGE, f"{why}: {key} is not there")
            self.clock.sleep(min(self.pace.poll_s, 1.0))

    def _become_holder(self) -> None:
        holder = Holder(
            format=FORMAT_VERSION, launch=self.launch, machine=self.machine.name, boot=self.machine.boot,
            at_unix_s=self.clock.unix_s(), nonce=self.tokens(),
        )  # fmt: skip
        if not patiently(lambda: self.records.put(holder_key(self.launch), holder), self._tick, self.clock):
            raise _Leave(EXIT_FENCED, f"another machine works for launch {self.launch}", silently=True)
        self.is_holder = True

    def _claim(self) -> int:
        """The word is there before anything begins: who waits for this machine to release must know that it has begun."""
        attempt = patiently(self._next_attempt, self._tick, self.clock)
        self.words.say("claimed", attempt=attempt)
        self.has_claimed = True
        patiently(self.words.send, self._tick, self.clock)
        return attempt

    def _next_attempt(self) -> int:
        """How often machines of this run have begun to work, this time included: by the newest that has."""
        keys: dict[int, list[int]] = {}
        for kind, launch, part, _ in self.records.parts("machines/"):
            if kind == "word" and launch != self.launch:
                keys.setdefault(launch, []).append(part)
        for launch in sorted(keys, reverse=True):
            for part in sorted(keys[launch]):
                word = self.records.read(word_key(launch, part), MachineWord)
                if word is not None and word.kind == "claimed":
                    return (word.attempt or 0) + 1
        return 1

    def _is_open(self, gate: Gate) -> bool:
        try:
            why = gate.look()
        except TROUBLE:
            return False
        if why is not None:
            self.say(f"holdfast: {why}: this machine begins")
        return why is not None

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        self._tick()
        while not is_so():
            self.clock.sleep(min(self.pace.poll_s, 1.0) if self.records.is_near else self.pace.poll_s)
            self._tick()

    def _tick(self) -> None:
        """Listen when it is time to; hold to the limits; raise `_Leave` when there is a reason."""
        now_s = self.clock.monotonic_s()
        if self.is_holder and now_s - self._listened_s >= self.pace.poll_s:
            self._listen_now()
        self._move_limits()
        if self.clock.monotonic_s() >= self._stop_at_s():
            why = "no grant has come" if self.orders.grant is None else self.limit()
            raise _Leave(EXIT_LIMIT, why)
        self.guard.look()
        if self.orders.over is not None:
            raise _Leave(EXIT_FENCED, self.orders.over, silently=True)
        if self.orders.stop is not None:
            raise _Leave(EXIT_STOPPED, "told to stop", *self.orders.stop)
        if self.orders.home is not None and not self.has_claimed:
            raise _Leave(EXIT_DONE, "not needed", *self.orders.home, silently=True)
        if self.notices.goes is not None and not self.has_claimed:
            raise _Leave(EXIT_PREEMPTED, self.notices.goes)

    def _listen_now(self) -> None:
        self._listened_s = self.clock.monotonic_s()
        self.orders.look()
        try:
            self.words.send()
        except Fenced:
            raise
        except TROUBLE:
            # Said again the next time.
            return

    # ---- limits

    def _grace_s(self) -> float:
        return 0.0 if self.orders.grant is None else float(self.orders.grant.grace_s)

    def _stop_at_s(self) -> float:
        if self._limits is not None:
            return self._limits.stop_at_s
        return self.machine.unborn_at_s

    def _move_limits(self) -> None:
        # Its moments depend on how long the command needs to end, so a grant counts from when the job is known.
        if self.orders.grant is None or self._job is None:
            return
        limits = limits_of(self.orders.grant, self.machine.boot_s, self._job.grace_s)
        if self._limits is None:
            self._limits = limits
            self.guard.granted(limits)
        elif self._limits.or_later(limits) != self._limits:
            self._limits = self._limits.or_later(limits)
            self.guard.extend(self._limits)

    def limit(self) -> str:
        lifetime_s = 0 if self.orders.grant is None else self.orders.grant.lifetime_s
        return f"the grant of {format_duration(lifetime_s)} is used up"

    # ---- while it works

    def listen(self) -> None:
        """What the controller says; called now and then, in any one thread."""
        self.orders.look()

    def speak(self) -> None:
        """What this machine says: waiting words, and a pulse when one is due. Raises what stores raise."""
        try:
            self.words.send()
        except Fenced:
            self._alone = False
            raise
        if self.clock.monotonic_s() - self._pulsed_s < self.pace.pulse_s:
            return
        self._pulsed_s = self.clock.monotonic_s()
        self.records.replace(pulse_key(self.launch), self._pulse())

    def _pulse(self) -> Pulse:
        return Pulse(
            format=FORMAT_VERSION, launch=self.launch, machine=self.machine.name,
            uptime_s=max(0, int(self.clock.monotonic_s() - self.machine.boot_s)), step=self.kept.step,
            kept_step=self.kept.kept_step, kept_work_s=int(self.kept.kept_s), at_unix_s=self.clock.unix_s(),
        )  # fmt: skip

    def look(self, progress: Progress | None) -> str | None:
        """In the main thread, once a second or so. Why the command must be stopped; None: it goes on."""
        self._move_limits()
        self.kept.look(progress, self.clock.monotonic_s())
        if not self._alone:
            return "another machine speaks for this launch"
        if self.orders.over is not None:
            return self.orders.over
        if self.orders.stop is not None:
            return ", ".join(("told to stop", *self.orders.stop))
        return None

    # ---- the end

    def _why_stopped(self) -> tuple[str, ...]:
        if self.orders.stop is not None:
            return ("told to stop", *self.orders.stop, *self.why_ended)
        return self.why_ended

    def _last_words(self) -> None:
        """The pulse first: who reads the last word looks at it."""
        until_s = self.clock.monotonic_s() + self.pace.last_word_s

        def tick() -> None:
            if self.clock.monotonic_s() >= until_s:
                raise _Leave(0)

        with contextlib.suppress(*TROUBLE):
            if self.has_claimed:
                self.records.replace(pulse_key(self.launch), self._pulse())
        with contextlib.suppress(_Leave, Fenced):
            patiently(self.words.send, tick, self.clock)
