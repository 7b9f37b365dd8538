"""Points in time as providers write them: ISO 8601, the date of mail and HTTP, Unix seconds.

Everything becomes Unix seconds by this machine's clock. Providers state deadlines by their own clock; where the two disagree, the
`Date` of the answer that carried the deadline shows by how much.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["clock_skew_s", "parse_time_unix_s"]

_TRUSTED_S = 3.0
"""`Date` has a resolution of one second and the answer takes a moment: smaller differences are no skew."""
_MAX_CHARACTERS = 64


def parse_time_unix_s(text: object) -> float | None:
    """Unix seconds, or None when `text` is no point in time. A time without a zone is UTC."""
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
        return None
    stripped = text.strip()
    for parse in (_unix, datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = parse(stripped)
            moment = found if found.tzinfo else found.replace(tzinfo=UTC)
            return moment.timestamp()
        except (ValueError, TypeError, OverflowError, IndexError, OSError):
            continue
    return None


def _unix(text: str) -> datetime:
    seconds = float(text)
    # "20260101" is a date, not a second of the year 1970.
    if not math.isfinite(seconds) or seconds < 1e9:
        raise ValueError(text)
    return datetime.fromtimestamp(seconds, UTC)


def clock_skew_s(http_date: str | None, now_unix_s: float) -> float:
    """By how much this machine's clock is ahead of the server's that sent `http_date`; 0 when it cannot be told or is small."""
    server_unix_s = parse_time_unix_s(http_date)
    if server_unix_s is None:
        return 0.0
    ahead_s = now_unix_s - server_unix_s
    return ahead_s if abs(ahead_s) > _TRUSTED_S else 0.0
