"""The events of one attempt, sorted into what a timeline needs. Nothing is concluded here, and nothing in an event is trusted.

Bounded by the events that holdfast itself records: logged figures only leave the newest step and time behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from holdfast.core.events import Event
from holdfast.ledger.doings import Doing
from holdfast.ledger.marks import Mark, Save
from holdfast.ledger.read import Recorded

__all__ = ["Draft", "drafts_of"]

_ENDS = ("attempt.finished", "attempt.leaving", "attempt.failed", "attempt.fenced")
_MAX_US = 100 * 366 * 86400 * 1_000_000
"""A century; what is longer is no record of a training."""

_MAX_COUNT = 1 << 62


@dataclass(slots=True)
class Draft:
    """Times in microseconds; `unix` is the wall clock of the attempt's machine, which may jump."""

    number: int
    node: str | None = None
    """The writer whose record counts: the first that tells where time went."""
    generation: int = 0
    machine: str | None = None
    boot: str | None = None
    market: str | None = None
    price_per_hour: Decimal | None = None
    on_demand_price_per_hour: Decimal | None = None
    machine_started_unix_us: int | None = None
    begun_unix_us: int = 0
    started_monotonic_us: int = 0
    start_step: int | None = None
    previous_step: int = -1
    restored_from: int | None = None
    """The attempt that made the checkpoint."""
    marks: list[Mark] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    failed_saves: int = 0
    fell_back: int = 0
    first_step_us: int | None = None
    seen_step: int = 0
    last_unix_us: int = 0
    marked_unix_us: int = 0
    marked_by: str = ""
    ended_by: str | None = None
    exit_code: int | None = None
    notice_to_durable_us: int | None = None
    lasted_us: int | None = None
    """By the agent's account."""
    agents_ending: str | None = None

    def take(self, node: str, event: Event) -> None:
        """Events of the attempt's own writers, in their order."""
        fields = event.fields
        tells_time = Doing.STEP.field in fields
        if self.node is None and tells_time:
            self.node = node
            self._begin(event)
        if node != self.node:
            return
        unix_us = _us(event.unix_s)
        self.last_unix_us = unix_us
        self.seen_step = max(self.seen_step, _count(fields.get("step")))
        if tells_time:
            self.marks.append(_mark(event))
            self.marked_unix_us, self.marked_by = unix_us, event.name
            if fields.get("first_step_s") is not None:
                self.first_step_us = _us(fields["first_step_s"])
        self._note(event)

    def _begin(self, event: Event) -> None:
        """From the first event that tells where time went, whatever it is."""
        age_us = _mark(event).elapsed_us
        self.begun_unix_us = _us(event.unix_s) - age_us
        self.started_monotonic_us = _us(event.fields.get("monotonic_s")) - age_us

    def _note(self, event: Event) -> None:
        fields = event.fields
        match event.name:
            case "attempt.claimed":
                self.generation = _count(fields.get("generation"))
                self.machine, self.boot = _text(fields.get("machine")), _text(fields.get("boot"))
                self.market = _text(fields.get("market"))
                self.price_per_hour = _dollars(fields.get("price_per_hour"))
                self.on_demand_price_per_hour = _dollars(fields.get("on_demand_price_per_hour"))
                if fields.get("machine_started_unix_s") is not None:
                    self.machine_started_unix_us = _us(fields["machine_started_unix_s"])
            case "attempt.started":
                self.start_step = _count(fields.get("step"))
                previous = fields.get("previous_step")
                self.previous_step = _count(previous) if isinstance(previous, int) and previous >= 0 else -1
                self.restored_from = _attempt_of(fields.get("restored"))
            case "save.committed":
                self.saves.append(_save(fields))
            case "save.failed":
                self.failed_saves += 1
            case "restore.fell_back":
                self.fell_back += 1
            case name if name in _ENDS:
                self.ended_by = name
                self.exit_code = _count(fields.get("code"))
                if fields.get("notice_to_durable_s") is not None:
                    self.notice_to_durable_us = _us(fields["notice_to_durable_s"])


def drafts_of(events: Iterable[Recorded]) -> list[Draft]:
    """One per attempt that said something, in order. Of each writer, an event that comes a second time is passed over."""
    drafts: dict[int, Draft] = {}
    newest: dict[tuple[int, str], tuple[int, int]] = {}
    ended: list[dict[str, Any]] = []
    for recorded in events:
        writer, place = (recorded.attempt, recorded.node), (recorded.segment, recorded.line)
        if place <= newest.get(writer, (-1, -1)):
            continue
        newest[writer] = place
        if recorded.event.name == "attempt.ended":
            ended.append(recorded.event.fields)
        else:
            drafts.setdefault(recorded.attempt, Draft(recorded.attempt)).take(recorded.node, recorded.event)
    for fields in ended:
        _take_agents_word(drafts, fields)
    return [drafts[number] for number in sorted(drafts) if drafts[number].marks]


def _take_agents_word(drafts: dict[int, Draft], fields: dict[str, Any]) -> None:
    """`attempt.ended`, from the process that started the attempt: how long it lived, and why it ended."""
    progress = fields.get("progress")
    draft = drafts.get(_count(progress.get("attempt"))) if isinstance(progress, dict) else None
    if draft is not None:
        draft.lasted_us = _us(fields.get("lasted_s"))
        draft.agents_ending = _text(fields.get("ending"))
        draft.seen_step = max(draft.seen_step, _count(progress.get("step")) if isinstance(progress, dict) else 0)


def _mark(event: Event) -> Mark:
    spent = tuple(_us(event.fields.get(doing.field)) for doing in Doing)
    return Mark(_count(event.fields.get("step")), spent, event.fields.get("snapshot") is True)


def _save(fields: dict[str, Any]) -> Save:
    return Save(
        step=_count(fields.get("step")),
        reason=_text(fields.get("reason")) or "",
        stall_us=_us(fields.get("stall_s")),
        durable_us=_us(fields.get("durable_s")),
        total_bytes=_count(fields.get("total_bytes")),
        sent_bytes=_count(fields.get("sent_bytes")),
        deduplicated_bytes=_count(fields.get("deduplicated_bytes")),
    )


def _attempt_of(checkpoint: object) -> int | None:
    """Checkpoints are named `<seq>-<attempt>-<nonce>`."""
    parts = checkpoint.split("-") if isinstance(checkpoint, str) else []
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else None


def _us(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_US:
        return 0
    return min(round(value * 1_000_000), _MAX_US)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT else 0


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _dollars(value: object) -> Decimal | None:
    try:
        price = Decimal(value) if isinstance(value, str) else None
    except InvalidOperation:
        return None
    return price if price is not None and price.is_finite() and 0 <= price < 1_000_000 else None
