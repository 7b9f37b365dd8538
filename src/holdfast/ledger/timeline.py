"""The events of a run, read as what happened when: attempts on one axis of time, and how far each was with what at which moment.

    events → per attempt a draft → marks (running totals), saves, how it ended → placed one after the other

All times are whole microseconds. Within an attempt they come from its monotonic clock; between attempts of one start of one machine
too; only between machines from their wall clocks, and there an interval that would be negative is zero. What is not recorded is
assumed, and `notes` says what and for which attempt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from itertools import zip_longest

from holdfast.core.contract import EXIT_INTERRUPTED
from holdfast.ledger.doings import Doing
from holdfast.ledger.draft import Draft, drafts_of
from holdfast.ledger.marks import Mark, Save, accumulated, elapsed_us
from holdfast.ledger.read import Recorded

__all__ = ["AttemptRecord", "Ending", "Timeline", "timeline_of"]

_SILENCE_US = 60_000_000
"""Progress is recorded every 30 s and flushed every 15 s, so a clock that has advanced further since the last record has jumped."""
_ALIVE_US = 120_000_000
"""An attempt that said something this recently is taken to be running."""


class Ending(StrEnum):
    """How an attempt ended, as far as is known."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    MACHINE_FAILED = "machine failed"
    FENCED = "fenced"
    SILENT = "died without a word"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt. `boot_us` … `begin_us` on the run's axis:

    previous attempt's end ─ gap_us ─ machine on ─ boot_us ─ begin_us (process start) ─ elapsed_us ─ end
    """

    number: int
    generation: int
    machine: str | None
    market: str | None
    price_per_hour: Decimal | None
    on_demand_price_per_hour: Decimal | None
    start_step: int | None
    """The step that it went on from; None when it ended before it had restored."""
    reached_step: int
    """The last step that it is known to have completed."""
    marks: tuple[Mark, ...]
    saves: tuple[Save, ...]
    failed_saves: int
    fell_back: int
    ending: Ending
    end_is_assumed: bool
    first_step_us: int | None
    notice_to_durable_us: int | None
    unexplained_us: int
    """Of its life, what no record accounts for."""
    begin_us: int
    gap_us: int
    is_gap_billed: bool
    boot_us: int

    @property
    def elapsed_us(self) -> int:
        """From the start of its process to its end."""
        return elapsed_us(self.marks) + self.unexplained_us

    @property
    def computed_steps(self) -> int:
        return self.reached_step - (self.start_step or 0)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A run's attempts in order, and what had to be assumed."""

    attempts: tuple[AttemptRecord, ...]
    begun_unix_s: float
    notes: tuple[str, ...]


def timeline_of(events: Iterable[Recorded], *, now_unix_s: float) -> Timeline:
    """Read the events of a run, in each writer's order; an event that comes twice counts once. Pure."""
    drafts = drafts_of(events)
    notes: list[str] = []
    placed: list[AttemptRecord] = []
    for draft, following in zip_longest(drafts, drafts[1:]):
        _supply_start(draft, following, placed, notes)
        record = _record(draft, following, round(now_unix_s * 1e6), notes)
        placed.append(_placed(record, draft, placed, drafts, notes))
    return Timeline(tuple(placed), drafts[0].begun_unix_us / 1e6 if drafts else 0.0, tuple(notes))


def _supply_start(draft: Draft, following: Draft | None, before: list[AttemptRecord], notes: list[str]) -> None:
    """An attempt that computed something, and died before it was durable where it had begun."""
    if draft.start_step is None and max(draft.seen_step, following.previous_step if following else -1) > 0:
        saves = [save.step for other in before if other.generation == draft.generation for save in other.saves]
        draft.start_step = saves[-1] if saves else 0
        notes.append(f"attempt {draft.number} did not record where it began: taken to be step {draft.start_step}")


def _record(draft: Draft, following: Draft | None, now_us: int, notes: list[str]) -> AttemptRecord:
    ending = _ending(draft)
    if ending is Ending.SILENT and following is None and now_us - draft.last_unix_us < _ALIVE_US:
        ending = Ending.RUNNING
    start_step = draft.start_step
    marks = accumulated(draft.marks, start_step or 0)
    unexplained_us = 0
    assumed = ending is Ending.SILENT and draft.lasted_us is None
    if draft.ended_by is None and ending is not Ending.RUNNING:
        marks, unexplained_us = _with_tail(draft, following, marks)
    if assumed:
        notes.append(
            f"attempt {draft.number} ended without a word: its end is taken from its last record, and up to "
            f"{_SILENCE_US // 1_000_000} s of billed time may be missing"
        )
    return AttemptRecord(
        number=draft.number,
        generation=draft.generation,
        machine=draft.machine,
        market=draft.market,
        price_per_hour=draft.price_per_hour,
        on_demand_price_per_hour=draft.on_demand_price_per_hour,
        start_step=start_step,
        reached_step=max(marks[-1].step, start_step or 0) if marks else start_step or 0,
        marks=marks,
        saves=tuple(draft.saves),
        failed_saves=draft.failed_saves,
        fell_back=draft.fell_back,
        ending=ending,
        end_is_assumed=assumed,
        first_step_us=draft.first_step_us,
        notice_to_durable_us=draft.notice_to_durable_us,
        unexplained_us=unexplained_us,
        begin_us=0,
        gap_us=0,
        is_gap_billed=False,
        boot_us=0,
    )


_ENDINGS = {
    "attempt.finished": Ending.FINISHED,
    "attempt.failed": Ending.FAILED,
    "attempt.fenced": Ending.FENCED,
}
_AGENTS_WORDS = {
    "done": Ending.FINISHED,
    "preempted": Ending.PREEMPTED,
    "asked": Ending.INTERRUPTED,
    "interrupted": Ending.INTERRUPTED,
    "infrastructure": Ending.MACHINE_FAILED,
    "fenced": Ending.FENCED,
}


def _ending(draft: Draft) -> Ending:
    if draft.ended_by == "attempt.leaving":
        return Ending.INTERRUPTED if draft.exit_code == EXIT_INTERRUPTED else Ending.PREEMPTED
    if draft.ended_by is None and draft.agents_ending is not None:
        return _AGENTS_WORDS.get(draft.agents_ending, Ending.FAILED)
    return _ENDINGS.get(draft.ended_by or "", Ending.SILENT)


def _with_tail(draft: Draft, following: Draft | None, marks: tuple[Mark, ...]) -> tuple[tuple[Mark, ...], int]:
    """What came after the last record of an attempt that died: a last mark, and time that nothing explains.

    That it went on is known from steps that something else has recorded (a logged figure, the agent's page of progress, the
    checkpoint that the next attempt began with). How long that took is taken from its own pace, and where it has none, from the
    time of its last event. The agent knows how long the process lived; on one machine nothing lasts longer than until the next
    start.
    """
    if not marks:
        return marks, 0
    last = marks[-1]
    step = max(last.step, draft.seen_step, following.previous_step if following else -1)
    if following is not None and following.generation == draft.generation:
        # A checkpoint that is restored was committed by somebody; of an attempt before the last it is not news.
        step = max(step, following.start_step or 0) if following.restored_from == draft.number else step
    more_us = min(max(0, draft.last_unix_us - draft.marked_unix_us), _SILENCE_US)
    steps = last.step - marks[0].step
    if step > last.step and steps > 0:
        working_us = last.spent_us[Doing.STEP] + last.spent_us[Doing.DATA]
        more_us = max(more_us, working_us * (step - last.step) // steps)
    left_us = None if draft.lasted_us is None else max(0, draft.lasted_us - last.elapsed_us)
    until_next_us = _until(draft, following, last.elapsed_us)
    for limit_us in (left_us, until_next_us):
        more_us = more_us if limit_us is None else min(more_us, limit_us)
    doing = Doing.STEP if step > last.step else _LATEST.get(draft.marked_by, Doing.STEP)
    spent = list(last.spent_us)
    spent[doing] += more_us
    return (*marks, Mark(step, tuple(spent), False)), max(0, (left_us or 0) - more_us)


_LATEST = {"attempt.claimed": Doing.RESTORE, "attempt.started": Doing.PREPARATION}


def _until(draft: Draft, following: Draft | None, elapsed: int) -> int | None:
    """From `elapsed` after this attempt's start to the next one's start, where one clock has seen both."""
    if following is None or draft.boot is None or draft.boot != following.boot:
        return None
    return max(0, following.started_monotonic_us - draft.started_monotonic_us - elapsed)


def _placed(
    record: AttemptRecord, draft: Draft, before: list[AttemptRecord], drafts: list[Draft], notes: list[str]
) -> AttemptRecord:
    """Put an attempt on the run's axis, behind those before it."""
    boot_us = 0
    is_known_machine = any(
        other.machine is not None and other.machine == draft.machine for other in drafts[: len(before)]
    )
    if draft.machine_started_unix_us is not None and not is_known_machine:
        boot_us = max(0, draft.begun_unix_us - draft.machine_started_unix_us)
    if not before:
        return replace(record, begin_us=boot_us, boot_us=boot_us)
    previous, previous_draft = before[-1], drafts[len(before) - 1]
    end_us = previous.begin_us + previous.elapsed_us
    same_clock_us = _until(previous_draft, draft, previous.elapsed_us)
    if same_clock_us is None:
        gap_us = draft.begun_unix_us - boot_us - previous_draft.begun_unix_us - previous.elapsed_us
        if gap_us < 0:
            notes.append(
                f"attempt {draft.number} began {-gap_us / 1e6:.1f} s before attempt {previous.number} ended, by their "
                "machines' clocks: they overlapped or the clocks differ; they are shown one after the other"
            )
    else:
        gap_us = same_clock_us
    gap_us = 0 if previous.ending is Ending.FINISHED else max(0, gap_us)
    same_machine = draft.machine is not None and draft.machine == previous_draft.machine
    return replace(
        record, begin_us=end_us + gap_us + boot_us, boot_us=boot_us, gap_us=gap_us, is_gap_billed=same_machine
    )
