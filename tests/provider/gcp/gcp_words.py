"""What Compute Engine's answers are made of: operations, errors, filters, times; and the faults that can be played."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from holdfast.testing.loopback import Answer

__all__ = ["Fault", "Operation", "Said", "error_answer", "matches", "stamp", "unix_s_of", "zone_of"]

_EXPRESSION = re.compile(r'\(?([\w.-]+) (=|eq) "([^"]*)"\)?')


class Said(Exception):
    """An error as an answer of HTTP."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s


@dataclass
class Operation:
    id: int
    kind: str
    zone: str
    target: str
    target_id: str
    at_s: float
    ends_s: float
    request_id: str | None = None
    error: dict[str, Any] | None = None
    settle: Callable[[], None] | None = None


@dataclass
class Fault:
    """Played on the next requests of a method."""

    how: str
    """`before`, `after`, `late`: 503, and not carried out, or carried out, or carried out when nobody expects it any more.
    `lost`: carried out, and no answer. `dropped`: neither.
    """
    times: int = 1
    said: Said | None = None


def matches(resource: dict[str, Any], filter: str | None) -> bool:
    """Expressions as the description has them: several with `=` in parentheses, or one with `eq` and a regular expression."""
    if not filter:
        return True
    found = _EXPRESSION.findall(filter)
    if " ".join(each.group(0) for each in _EXPRESSION.finditer(filter)) != filter:
        raise Said(400, "invalid", f"Invalid value for field 'filter': {filter!r}")
    if len(found) > 1 and any(how == "eq" for _, how, _ in found):
        raise Said(400, "invalid", "regular expressions cannot be combined")
    return all(_matches_one(resource, *each) for each in found)


def _matches_one(resource: dict[str, Any], name: str, how: str, wanted: str) -> bool:
    value: Any = resource
    for part in name.split(".", 1):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return False
    return re.fullmatch(wanted, value) is not None if how == "eq" else value == wanted


def error_answer(said: Said) -> Answer:
    error = {
        "code": said.status,
        "message": str(said),
        "errors": [{"domain": "global", "reason": said.reason, "message": str(said)}],
    }
    headers = [("Content-Type", "application/json")]
    if said.retry_after_s is not None:
        headers.append(("Retry-After", str(said.retry_after_s)))
    return Answer(said.status, tuple(headers), json.dumps({"error": error}).encode())


def stamp(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")


def unix_s_of(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def zone_of(resource: dict[str, Any]) -> str:
    return str(resource["zone"].rpartition("/")[2])
