"""What the agent keeps under the run's URL: its events, its heartbeats and the command's output. Nothing waits for it.

    begin(start) ─→ thread: which attempt will this be? (newest head + 1) ─→ Ledger "agent-…", LogKeeper
    emit, keep, beat ─→ held in memory until that is known ─→ events/, logs/

The attempt's number is read, not claimed: the command claims the run, and its claim becomes the newest head's number plus one.
Where two agents work at once the numbers may meet; the writers' names never do. A store that cannot be reached delays the record,
never the command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.agent.logs import PREFIX, LogKeeper, LogLimits, parse_log_key
from holdfast.checkpoint.heads import read_truth
from holdfast.core.clock import Clock
from holdfast.core.errors import HoldfastError
from holdfast.core.events import Event
from holdfast.ledger.append import Ledger
from holdfast.store.base import Store

__all__ = ["AgentRecord", "RunHead"]

_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class RunHead:
    """What the URL said when an attempt was about to start. `step` is that of its newest checkpoint, None without one."""

    attempt: int
    """The number that the coming attempt will have."""
    step: int | None
    finished: bool


class AgentRecord:
    """A sink, and a keeper of output. Thread-safe, except `begin` and `close`, which belong to the main thread.

    `claimed` says which attempt the running command has claimed, 0 while it has not: a store that answers late may name
    the claim of the very command that is asked about.
    """

    def __init__(
        self,
        store: Store,
        *,
        token: str,
        clock: Clock,
        say: Callable[[str], None],
        claimed: Callable[[], int],
        logs: LogLimits | None,
        heartbeat_s: float,
    ) -> None:
        self._store, self._token, self._clock = store, token, clock
        self._claimed, self._heartbeat_s = claimed, heartbeat_s
        self._logs = LogKeeper(store, token=token, clock=clock, say=say, limits=logs) if logs is not None else None
        self._lock = threading.Lock()
        self._held: list[Event] = []
        self._ledger: Ledger | None = None
        self._start = 0
        self._beaten_s = clock.monotonic_s()
        self._closing = threading.Event()
        self._known = threading.Event()
        self.head: RunHead | None = None
        """As of the start that runs now; None while the store has not said."""

    def begin(self, start: int) -> None:
        """The command is about to be started for the `start`-th time by this agent; 0: it is made ready for."""
        with self._lock:
            ledger, self._ledger = self._ledger, None
            self._start, self.head, self._known = start, None, threading.Event()
        if ledger is not None:
            # A store that does not answer must not hold up the next start.
            threading.Thread(target=ledger.close, name="holdfast-ledger-end", daemon=True).start()
        if self._logs is not None:
            self._logs.begin(start)
        threading.Thread(target=self._find_out, args=(start, self._known), name="holdfast-number", daemon=True).start()

    def wait_for_head(self, timeout_s: float) -> RunHead | None:
        """What the URL says about the coming attempt, if it says so in time."""
        self._known.wait(timeout_s)
        return self.head

    def emit(self, event: Event) -> None:
        with self._lock:
            if self._ledger is None:
                self._held.append(event)
                return
            self._ledger.emit(event)
            self._ledger.nudge()

    def keep(self, data: bytes) -> None:
        """Output of the command, or a line of the agent's own."""
        if self._logs is not None:
            self._logs.keep(data)

    @property
    def heartbeat_due(self) -> bool:
        return self._clock.monotonic_s() - self._beaten_s >= self._heartbeat_s

    def beat(self, **figures: object) -> None:
        """Record that agent and command are alive."""
        self._beaten_s = self._clock.monotonic_s()
        self.emit(Event("agent.heartbeat", self._clock.unix_s(), figures))

    def flush(self, timeout_s: float) -> bool:
        """Make durable what there is: call it when a notice has come. False when the store was not quick enough."""
        with self._lock:
            if self._ledger is not None:
                self._ledger.nudge()
        return self._logs is None or self._logs.flush(timeout_s)

    @property
    def lost_output_bytes(self) -> int:
        """Of what was to be kept; final after `close`."""
        return 0 if self._logs is None else self._logs.dropped_bytes

    def close(self, timeout_s: float) -> None:
        """Make durable what can be within `timeout_s`, and stop."""
        give_up_s = self._clock.monotonic_s() + timeout_s
        self._known.wait(timeout_s)
        self._closing.set()
        with self._lock:
            ledger, self._ledger = self._ledger, None
        end = threading.Thread(target=ledger.close if ledger else lambda: None, name="holdfast-ledger-end", daemon=True)
        end.start()
        if self._logs is not None:
            self._logs.close(max(0.0, give_up_s - self._clock.monotonic_s()))
        end.join(max(0.0, give_up_s - self._clock.monotonic_s()))

    def _find_out(self, start: int, known: threading.Event) -> None:
        failures = 0
        while not self._closing.is_set() and start == self._start:
            try:
                head = _coming(self._store, self._claimed)
                break
            except (HoldfastError, OSError):
                self._closing.wait(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
        else:
            return
        ledger = Ledger(self._store, attempt=head.attempt, node=f"agent-{self._token}-{start}", clock=self._clock)
        if self._logs is not None:
            for number in range(start + 1):
                self._logs.label(number, head.attempt)
        with self._lock:
            if start != self._start or self._closing.is_set():
                stale: Ledger | None = ledger
            else:
                stale, self._ledger, self.head = None, ledger, head
                for event in self._held:
                    ledger.emit(event)
                self._held.clear()
                ledger.nudge()
        known.set()
        if stale is not None:
            stale.close()


def _coming(store: Store, claimed: Callable[[], int]) -> RunHead:
    head = read_truth(store).head
    if head is not None:
        steps = [ref.step for ref in head.checkpoints if ref.generation == head.generation]
        return RunHead(claimed() or head.attempt + 1, max(steps, default=None), head.finished)
    # A command that makes no heads: count by what earlier agents have kept of its output.
    segments = (parse_log_key(entry.key) for entry in store.list(PREFIX))
    attempts = (segment.attempt for segment in segments if segment is not None and segment.start)
    return RunHead(max(attempts, default=0) + 1, None, False)
