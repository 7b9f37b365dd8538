"""Reading a run's events back, and the figures that follow from them. Nothing here is stored: it is computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from holdfast.core.events import Event
from holdfast.ledger.segments import read_pieces
from holdfast.store.base import Store

__all__ = ["Attempt", "Recorded", "Summary", "read_events", "read_metrics", "summarise"]


class Recorded(msgspec.Struct, frozen=True):
    """An event, which attempt's writer recorded it, and where in that writer's record it stands."""

    attempt: int
    node: str
    event: Event
    segment: int = 0
    line: int = 0


def read_events(store: Store, unreadable: Callable[[str], None] = lambda what: None) -> Iterator[Recorded]:
    """Every event of a run once, by attempt, then in the order of each writer.

    A line that cannot be read (the torn end of a segment, say) is left out, and `unreadable` is told: the ledger is a record, not
    the truth. Raises what the store raises.
    """
    for piece in read_pieces(store):
        lines = piece.body.splitlines(keepends=True)
        for number, line in enumerate(lines):
            try:
                event = msgspec.json.decode(line, type=Event)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                torn = number == len(lines) - 1
                unreadable(
                    f"segment {piece.number} of attempt {piece.attempt}, writer {piece.node!r}: "
                    f"{'the last line is torn' if torn else f'line {number + 1} cannot be read'} and is left out"
                )
                continue
            yield Recorded(piece.attempt, piece.node, event, piece.number, number)


def read_metrics(events: Iterable[Recorded], name: str) -> list[tuple[int, float, int]]:
    """(step, value, attempt) of a logged metric, every attempt's own values, in the order in which they were logged."""
    rows = []
    for recorded in events:
        fields = recorded.event.fields
        if recorded.event.name == "metrics" and name in fields.get("values", {}):
            rows.append((int(fields["step"]), float(fields["values"][name]), recorded.attempt))
    return rows


@dataclass(slots=True)
class Attempt:
    """One attempt. `reached_step` is the last step that is known to have been completed; `lost_steps` were computed again later."""

    number: int
    restored_step: int
    reached_step: int
    lost_steps: int = 0
    saves: int = 0
    failed_saves: int = 0
    stall_s: list[float] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)
    sent_bytes: int = 0
    deduplicated_bytes: int = 0
    fell_back: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's attempts in order."""

    attempts: tuple[Attempt, ...]

    @property
    def lost_steps(self) -> int:
        return sum(attempt.lost_steps for attempt in self.attempts)


def summarise(events: Iterable[Recorded]) -> Summary:
    """What each attempt did. Where an agent watched, lost steps are exact; otherwise they count up to the last recorded event."""
    attempts: dict[int, Attempt] = {}
    for recorded in events:
        event, fields = recorded.event, recorded.event.fields
        if event.name == "attempt.started" and "step" in fields:
            attempts[recorded.attempt] = Attempt(recorded.attempt, int(fields["step"]), int(fields["step"]))
            before = attempts.get(recorded.attempt - 1)
            if before is not None:
                before.reached_step = max(before.reached_step, int(fields.get("previous_step", -1)))
                before.lost_steps = max(0, before.reached_step - int(fields["step"]))
        attempt = attempts.get(recorded.attempt)
        if attempt is not None:
            _count(attempt, event)
    return Summary(tuple(attempts[number] for number in sorted(attempts)))


def _count(attempt: Attempt, event: Event) -> None:
    fields = event.fields
    if "step" in fields:
        attempt.reached_step = max(attempt.reached_step, int(fields["step"]))
    if event.name == "save.committed":
        attempt.saves += 1
        attempt.stall_s.append(float(fields["stall_s"]))
        attempt.durable_s.append(float(fields["durable_s"]))
        attempt.sent_bytes += int(fields["sent_bytes"])
        attempt.deduplicated_bytes += int(fields["deduplicated_bytes"])
    elif event.name == "save.failed":
        attempt.failed_saves += 1
    elif event.name == "restore.fell_back":
        attempt.fell_back += 1
