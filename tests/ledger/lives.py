"""Runs that never ran: attempts that compute, save and die at will, the events that they would have recorded, and the truth.

The truth is kept apart, step by step, so that what a report says can be compared with it. Times are whole microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from holdfast.core.events import Event
from holdfast.ledger.doings import Doing
from holdfast.ledger.segments import segment_key
from holdfast.store.base import Store

__all__ = ["Life", "World", "s"]

Ending = Literal["finish", "leave", "interrupt", "fail", "fence", "die"]


def s(microseconds: int) -> float:
    return microseconds / 1_000_000


@dataclass
class Life:
    """One attempt, and what is true of it."""

    number: int
    start_step: int
    step: int
    machine: str
    spent: list[int] = field(default_factory=lambda: [0] * len(Doing))
    step_us: dict[int, int] = field(default_factory=dict)
    """What each step that it computed took."""
    recorded_step: int = 0
    """The last step that something durable knows of."""
    first_step_us: int | None = None
    events: list[Event] = field(default_factory=list)
    segments: int = 0
    ended: str = ""

    @property
    def elapsed_us(self) -> int:
        return sum(self.spent)


class World:
    """Writes the events of lives into a store, as trainer and agent do. `clock_us` is the wall clock of the machine at hand."""

    def __init__(self, store: Store, *, with_agent: bool = False, writer: str = "0") -> None:
        self.store, self.with_agent, self.writer = store, with_agent, writer
        self.lives: list[Life] = []
        self.saved_steps: list[int] = []
        self.now_us = 1_700_000_000_000_000
        """True time."""
        self.skew_us = 0
        self.monotonic_us = 5_000_000

    @property
    def life(self) -> Life:
        return self.lives[-1]

    # ---- beginning

    def begin(
        self,
        *,
        machine: str,
        gap_us: int = 0,
        startup_us: int = 4_000_000,
        restore_us: int = 2_000_000,
        prep_us: int = 0,
        back: int = 0,
        is_heard: bool = True,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """A new attempt, `gap_us` after the one before. It restores the newest checkpoint, or one `back` before it."""
        self._pass(gap_us)
        if not self.lives or self.life.machine != machine:
            self.monotonic_us = 5_000_000 + len(self.lives)
        del self.saved_steps[len(self.saved_steps) - back :]
        start = self.saved_steps[-1] if self.saved_steps else 0
        previous_step = self.life.step if self.lives and self.with_agent else -1
        from_life = next((life.number for life in reversed(self.lives) if start in life.step_us), None)
        life = Life(len(self.lives) + 1, start, start, machine, recorded_step=start)
        self.lives.append(life)
        self.spend(Doing.STARTUP, startup_us)
        self.spend(Doing.RESTORE, 1000)
        facts = {"generation": 1, "machine": machine, "boot": machine, "market": "spot", **(facts or {})}
        self._tell("attempt.claimed", step=0, monotonic_s=s(self.monotonic_us), **facts)
        if is_heard:
            self.flush()
        self.spend(Doing.RESTORE, restore_us)
        restored = f"00000001-{from_life}-0123abcd" if from_life else None
        self._tell("attempt.started", previous_step=previous_step, restored=restored)
        if is_heard:
            self.flush()
        self.spend(Doing.PREPARATION, prep_us)

    # ---- living

    def spend(self, doing: Doing, us: int) -> None:
        self.life.spent[doing] += us
        self._pass(us)

    def do_step(self, step_us: int, data_us: int = 0, *, logs: bool = False) -> None:
        life = self.life
        self.spend(Doing.DATA, data_us)
        self.spend(Doing.STEP, step_us)
        life.step += 1
        life.step_us[life.step] = step_us
        if life.first_step_us is None:
            life.first_step_us = life.spent[Doing.STEP]
        if logs:
            self._emit("metrics", step=life.step, epoch=0, values={"loss": 1.0})

    def save(self, stall_us: int, *, commits: bool = True, reason: str = "interval") -> None:
        self._tell("progress", snapshot=True)
        self.spend(Doing.STALL, stall_us)
        self.flush()
        if commits:
            self.saved_steps.append(self.life.step)
            figures = {"total_bytes": 1000, "sent_bytes": 600, "deduplicated_bytes": 400}
            self._emit(
                "save.committed", step=self.life.step, reason=reason, stall_s=s(stall_us), durable_s=0.5, **figures
            )
        else:
            self._emit("save.failed", step=self.life.step, reason=reason, error="no")

    def pulse(self) -> None:
        self._tell("progress", snapshot=False)
        self.flush()

    def jump(self, us: int) -> None:
        """Somebody sets the machine's wall clock."""
        self.skew_us += us

    # ---- ending

    def end(self, how: Ending, *, after_us: int = 0) -> None:
        """`after_us`: what the process lives on after its last word."""
        life = self.life
        life.ended = how
        if how == "die":
            life.events.clear()
        elif how in ("leave", "interrupt"):
            if life.step > max(life.step_us.keys() & set(self.saved_steps), default=life.start_step):
                self.save(30_000, reason="leaving")
            code = 75 if how == "leave" else 130
            self._tell("attempt.leaving", code=code, drained=True, notice_to_durable_s=1.25)
        else:
            self._tell({"finish": "attempt.finished", "fail": "attempt.failed", "fence": "attempt.fenced"}[how])
        self.flush()
        self._pass(after_us)
        if self.with_agent:
            ending = {"finish": "done", "leave": "preempted", "die": "preempted", "interrupt": "interrupted"}.get(
                how, "error"
            )
            fields = {
                "ending": ending, "lasted_s": s(life.elapsed_us + after_us), "exit_code": 0,
                "progress": {"attempt": life.number, "step": life.step},
            }  # fmt: skip
            event = Event("attempt.ended", s(self.now_us + self.skew_us), fields)
            self.store.put(segment_key(life.number, "agent-x", 0), msgspec.json.encode(event) + b"\n")

    # ---- recording

    def flush(self) -> None:
        life = self.life
        if life.events:
            body = b"".join(msgspec.json.encode(event) + b"\n" for event in life.events)
            self.store.put(segment_key(life.number, self.writer, life.segments), body)
            life.recorded_step = max([life.recorded_step, *(event.fields.get("step", 0) for event in life.events)])
            life.segments += 1
            life.events.clear()

    def _tell(self, name: str, **fields: Any) -> None:
        life = self.life
        totals = {doing.field: s(life.spent[doing]) for doing in Doing}
        first = None if life.first_step_us is None else s(life.first_step_us)
        self._emit(name, **({"step": life.step} | totals | {"first_step_s": first} | fields))

    def _emit(self, name: str, **fields: Any) -> None:
        self.life.events.append(Event(name, s(self.now_us + self.skew_us), fields))

    def _pass(self, us: int) -> None:
        self.now_us += us
        self.monotonic_us += us

    # ---- the truth

    def computed(self, life: Life) -> range:
        """The steps that it is known to have computed: the agent knows all, else what was recorded counts."""
        return range(life.start_step + 1, (life.step if self.with_agent else life.recorded_step) + 1)

    def lost(self, life: Life) -> list[int]:
        """The steps of a life that some later one computed again, or would have had to."""
        later = [other.start_step for other in self.lives if other.number > life.number]
        return [step for step in self.computed(life) if any(start < step for start in later)]
