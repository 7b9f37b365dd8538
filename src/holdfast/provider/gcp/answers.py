"""What GCP's errors mean, as `core.failures.Failure`. Pure.

An insert is refused twice over: at once by HTTP (a wrong request, missing rights, too many requests), or minutes later in the
operation's `error` (no capacity, no quota). Both come here as a `Refusal`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.failures import Failure

__all__ = ["Refusal", "failure_of", "refusal_of_body", "refusal_of_operation"]

_CAPACITY = ("RESOURCE_POOL_EXHAUSTED", "STOCKOUT", "DOES_NOT_HAVE_ENOUGH_RESOURCES")
_THROTTLED = (
    "RATELIMITEXCEEDED", "RATE_LIMIT_EXCEEDED", "OPERATION_RATE_EXCEEDED", "CONCURRENT_OPERATIONS_QUOTA_EXCEEDED",
)  # fmt: skip
_QUOTA = ("QUOTA_EXCEEDED", "QUOTAEXCEEDED", "QUOTA_LIMIT")
_RIGHTS = ("PERMISSION", "FORBIDDEN", "ACCESSNOTCONFIGURED", "SERVICE_DISABLED", "UNAUTHORIZED", "UNAUTHENTICATED")
_WRONG = (
    "INVALID", "UNSUPPORTED", "NOT_FOUND", "NOTFOUND", "BADREQUEST", "REQUIRED", "CONDITION_NOT_MET", "CONDITIONNOTMET",
)  # fmt: skip
_IN_ORDER = (
    (_CAPACITY, Failure.NO_CAPACITY),
    (_THROTTLED, Failure.THROTTLED),
    (_QUOTA, Failure.QUOTA),
    (_RIGHTS, Failure.NO_PERMISSION),
    (_WRONG, Failure.BAD_REQUEST),
)
_BY_STATUS = {
    400: Failure.BAD_REQUEST, 401: Failure.NO_PERMISSION, 403: Failure.NO_PERMISSION, 404: Failure.BAD_REQUEST,
    412: Failure.BAD_REQUEST, 429: Failure.THROTTLED,
}  # fmt: skip
_LIMIT = re.compile(r"Limit: ([0-9.]+?)\.?(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error in GCP's words."""

    status: int
    """HTTP; 0 where an operation has failed."""
    codes: tuple[str, ...]
    said: str
    quota_limit: float | None = None
    retry_after_s: int = 0

    @property
    def is_absence(self) -> bool:
        return self.status == 404

    @property
    def is_duplicate(self) -> bool:
        return self.status == 409 or any("ALREADY" in code.upper() for code in self.codes)

    def __str__(self) -> str:
        named = f"{self.status} " if self.status else ""
        return f"{named}{', '.join(self.codes)}: {self.said}"


def failure_of(refusal: Refusal) -> Failure | None:
    """None: nothing definite, so what was asked for may have happened."""
    if refusal.status == 401:  # its reason is "required", as that of a missing field
        return Failure.NO_PERMISSION
    for words, failure in _IN_ORDER:
        if any(word in code.upper() for code in refusal.codes for word in words):
            if failure is Failure.QUOTA and refusal.quota_limit == 0:
                return Failure.NO_QUOTA
            return failure
    if refusal.status in _BY_STATUS:
        return _BY_STATUS[refusal.status]
    return Failure.ERROR if refusal.status == 0 else None


def refusal_of_body(status: int, body: bytes, retry_after: str | None = None) -> Refusal:
    """Of an HTTP answer above 299."""
    codes: list[str] = []
    said = body.decode(errors="replace").strip()[:300]
    try:
        error = json.loads(body)["error"]
        said = str(error.get("message", said))
        codes = [str(each["reason"]) for each in error.get("errors", []) if each.get("reason")]
        details = [
            str(each["reason"]) for each in error.get("details", []) if isinstance(each, dict) and each.get("reason")
        ]
        codes += [error["status"], *details] if error.get("status") else details
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return Refusal(status, tuple(dict.fromkeys(codes)), said, _limit(said), _seconds(retry_after))


def refusal_of_operation(operation: Mapping[str, Any]) -> Refusal | None:
    """None: it has succeeded."""
    errors = (operation.get("error") or {}).get("errors") or []
    if not errors:
        status = int(operation.get("httpErrorStatusCode") or 0)
        return Refusal(status, (), str(operation.get("httpErrorMessage", ""))) if status else None
    said = "; ".join(str(each.get("message", "")) for each in errors)
    quotas = [
        detail["quotaInfo"] for each in errors for detail in each.get("errorDetails", []) if "quotaInfo" in detail
    ]
    limits = [float(quota["limit"]) for quota in quotas if "limit" in quota]
    codes = tuple(str(each.get("code", "")) for each in errors)
    return Refusal(0, codes, said, min(limits) if limits else _limit(said))


def _limit(said: str) -> float | None:
    found = _LIMIT.search(said)
    return float(found[1]) if found else None


def _seconds(retry_after: str | None) -> int:
    return int(retry_after) if retry_after and retry_after.strip().isdigit() else 0
