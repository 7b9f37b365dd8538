"""What happens at a metadata server, and when: written as Python tuples, or as a JSON file for rehearsals.

[{"at": "10 s", "do": "rebalance"}, {"at": "1 min", "do": "preempt", "lead": "120 s"}, {"at": "70 s", "do": "stall", "for": "5 s"}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.core.config import Duration, parse_duration_s
from holdfast.core.errors import UsageError

__all__ = ["Step", "parse_timeline", "read_timeline"]

_KEYS = ("at", "do", "lead", "for", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that happens `at_s` seconds after the timeline's begin."""

    at_s: float
    do: str
    lead_s: float | None = None
    """Seconds from then to the deadline; None: the cloud's usual."""
    for_s: float | None = None
    """How long a fault lasts; None: until `recover`."""
    id: str | None = None
    """Which event, where there can be several."""


def parse_timeline(entries: Iterable[Step | tuple[Duration, str] | Mapping[str, Any]]) -> list[Step]:
    """Steps in order of time. An entry is a `Step`, `(at, do)`, or a mapping with at, do, lead, for, id.

    Raises UsageError that names the entry.
    """
    return sorted((_parse_step(entry) for entry in entries), key=lambda step: step.at_s)


def read_timeline(path: Path) -> list[Step]:
    """A JSON file that holds a list of mappings. Raises UsageError."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the timeline {str(path)!r}: {error}") from None
    if not isinstance(entries, list):
        raise UsageError(f"the timeline {str(path)!r} is not a JSON list")
    return parse_timeline(entries)


def _parse_step(entry: object) -> Step:
    if isinstance(entry, Step):
        return entry
    if isinstance(entry, tuple) and len(entry) == 2:
        entry = {"at": entry[0], "do": entry[1]}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("do"), str) or set(entry) - set(_KEYS):
        raise UsageError(
            f'not an entry of a timeline: {entry!r}; write {{"at": "10 s", "do": "preempt", "lead": "120 s"}}'
        )
    step = Step(at_s=parse_duration_s(entry.get("at", 0)), do=entry["do"], id=entry.get("id"))
    if "lead" in entry:
        step = replace(step, lead_s=parse_duration_s(entry["lead"]))
    if "for" in entry:
        step = replace(step, for_s=parse_duration_s(entry["for"]))
    return step
