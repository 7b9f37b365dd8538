"""Quantities as people write them: durations and sizes, in arguments, flags, environment variables and job files.

Text goes in and one number in a base unit (seconds, bytes) comes out; the way back, for messages, is text that the
parser reads again. Everything above this floor computes with numbers only, so no unit is ever guessed twice.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from fractions import Fraction

from holdfast.core.errors import UsageError

__all__ = ["Bytes", "Duration", "format_bytes", "format_duration", "parse_bytes", "parse_duration_s"]

Duration = str | int | float | timedelta
"""What `parse_duration_s` takes: `"10 min"`, `"1 h 30 min"`, `600` (seconds), a timedelta."""
Bytes = str | int
"""What `parse_bytes` takes: `"2 GiB"`, `"500 MB"`, `4096` (bytes)."""

_SECONDS_OF: dict[str, Fraction] = {
    **dict.fromkeys(("ms", "millisecond", "milliseconds"), Fraction(1, 1000)),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), Fraction(1)),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), Fraction(60)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), Fraction(3600)),
    **dict.fromkeys(("d", "day", "days"), Fraction(86400)),
    **dict.fromkeys(("w", "week", "weeks"), Fraction(604800)),
}
_DECIMAL_BYTES_OF: dict[str, int] = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15}
_BINARY_PREFIXES = ("Ki", "Mi", "Gi", "Ti", "Pi")
_BYTES_OF: dict[str, int] = {
    **dict.fromkeys(("b", "byte", "bytes"), 1),
    **_DECIMAL_BYTES_OF,
    **{prefix.lower(): 1024**power for power, prefix in enumerate(_BINARY_PREFIXES, start=1)},
    **{prefix.lower() + "b": 1024**power for power, prefix in enumerate(_BINARY_PREFIXES, start=1)},
}
_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_BARE = re.compile(_NUMBER, re.ASCII)
_TERM = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]+)", re.ASCII)
# Longer texts are no quantity; the limit also keeps hostile digit strings away from the big-number arithmetic.
_MAX_CHARACTERS = 80

_DURATION_FORMS = (
    'a duration is written like "90 s", "10 min", "1.5 h", "1 h 30 min" or "2 d"; a bare number is seconds'
)
_BYTES_FORMS = (
    'a size is written like "500 MB" (1 MB = 1000 kB), "2 GiB" (1 GiB = 1024 MiB) or "64 KiB"; a bare number is bytes'
)


def parse_duration_s(value: Duration) -> float:
    """Seconds, never negative. Several terms add up (`"1 h 30 min"`), units are ms, s, min (or m), h, d and w.

    Raises UsageError that shows the accepted forms.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = float(_duration_text_s(value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = _finite(value)
    else:
        raise UsageError(f"not a duration: {value!r}; {_DURATION_FORMS}")
    if not seconds >= 0:
        raise UsageError(f"not a duration: {value!r} is not zero or more; {_DURATION_FORMS}")
    return seconds


def _finite(value: float) -> float:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"not a duration: {value!r} is not finite; {_DURATION_FORMS}")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"not a duration: the number is too large; {_DURATION_FORMS}") from None


def _duration_text_s(text: str) -> Fraction:
    stripped = text.strip()
    if len(stripped) > _MAX_CHARACTERS:
        raise UsageError(f"not a duration: {stripped[:_MAX_CHARACTERS]!r}…; {_DURATION_FORMS}")
    if _BARE.fullmatch(stripped):
        return Fraction(stripped)
    total = Fraction(0)
    position = 0
    while position < len(stripped):
        term = _TERM.match(stripped, position)
        if term is None:
            raise UsageError(f"not a duration: {text!r}; {_DURATION_FORMS}")
        unit_s = _SECONDS_OF.get(term[2].lower())
        if unit_s is None:
            raise UsageError(f"not a duration: {text!r} has the unknown unit {term[2]!r}; {_DURATION_FORMS}")
        total += Fraction(term[1]) * unit_s
        position = term.end()
    if position == 0:
        raise UsageError(f"not a duration: {text!r}; {_DURATION_FORMS}")
    return total


def parse_bytes(value: Bytes) -> int:
    """Whole bytes, never negative; a fraction of a byte is rounded to the nearest.

    kB, MB, GB, TB and PB are powers of 1000; KiB, MiB, GiB, TiB and PiB (or Ki, Mi, …) powers of 1024; case does not
    matter. A single letter ("2G") is refused, because tools disagree about what it means. Raises UsageError that
    shows the accepted forms.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise UsageError(f"not a size: {value} is negative; {_BYTES_FORMS}")
        return value
    if not isinstance(value, str) or len(value.strip()) > _MAX_CHARACTERS:
        raise UsageError(f"not a size: {str(value)[:_MAX_CHARACTERS]!r}; {_BYTES_FORMS}")
    stripped = value.strip()
    if stripped.isascii() and stripped.isdigit():
        return int(stripped)
    term = _TERM.fullmatch(stripped)
    if term is None:
        raise UsageError(f"not a size: {value!r}; {_BYTES_FORMS}")
    unit_bytes = _BYTES_OF.get(term[2].lower())
    if unit_bytes is None:
        raise UsageError(f"not a size: {value!r} has the unknown unit {term[2]!r}; {_BYTES_FORMS}")
    return round(Fraction(term[1]) * unit_bytes)


def format_duration(seconds: float) -> str:
    """Text for people, within one per cent, that `parse_duration_s` reads again.

    Like `"250 ms"`, `"12.5 s"`, `"9 min 6 s"`, `"2 d 3 h"`. Not finite values come out as `"inf s"` and `"nan s"`, so
    that a message about a strange figure never fails to print.
    """
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 60:
        seconds = float(f"{seconds:.3g}")
    if seconds < 1e-6:
        return "0 s"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    resolution_s = 1 if seconds < 3600 else 60 if seconds < 86400 else 3600
    left_s = round(seconds / resolution_s) * resolution_s
    terms: list[str] = []
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left_s = divmod(left_s, unit_s)
        if count:
            terms.append(f"{count} {unit}")
    return " ".join(terms)


def format_bytes(count_bytes: float) -> str:
    """Text for people, in binary units with three digits, that `parse_bytes` reads again: `"512 B"`, `"1.5 GiB"`."""
    if count_bytes < 0:
        return "-" + format_bytes(-count_bytes)
    if count_bytes < 999.5:
        return f"{round(count_bytes)} B"
    value = float(count_bytes)
    for prefix in _BINARY_PREFIXES:
        value /= 1024
        # Three digits of a value that rounds to 1000 or more would need an exponent: the next unit takes it.
        if value < 999.5 or prefix == _BINARY_PREFIXES[-1]:
            break
    return f"{value:.3g} {prefix}B" if value < 999.5 else f"{value:.0f} {prefix}B"
