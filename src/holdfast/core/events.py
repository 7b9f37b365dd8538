"""Where any floor reports what happened. The ledger keeps events; tests collect them; nothing below decides by them.

An event is a name, the time, and plain JSON fields. Names are dotted and stable (`save.committed`, `restore.fell_back`), figures
carry their unit in the name (`stall_s`, `sent_bytes`). Secrets never go in: callers pass store URLs that are already redacted.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

__all__ = ["CollectingSink", "Event", "NullSink", "Sink"]


class Event(msgspec.Struct, frozen=True):
    """One thing that happened. `fields` holds JSON values only."""

    name: str
    unix_s: float
    fields: dict[str, Any]


class Sink(Protocol):
    """Takes events. Thread safety: `emit` may be called from any thread and never blocks on the network or raises."""

    def emit(self, event: Event) -> None: ...


class NullSink:
    """Forgets everything."""

    def emit(self, event: Event) -> None:
        return None


class CollectingSink:
    """Keeps events in a list, in order; for tests and for short commands."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]
