"""Hours of the week in which a job may start or run, in UTC, and how much of the time until a deadline they leave.

    "mon-fri 20:00-06:00, sat, sun" → pieces of the week → is it open, for how long; when does it open; how much room is left

The figures are lower bounds that hold for every rhythm of a policy that is asked at least once per tick: of a piece, up to a tick
less one second is lost at either end, because a job is asked a little after it opens, and may not begin a tick that would reach
over its end. A bound that holds stays one as time goes on: it never drops faster than time is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Ints

__all__ = ["ALWAYS", "NEVER_S", "WEEK_S", "Weekly", "parse_weekly"]

WEEK_S, _DAY_S = 7 * 86400, 86400
_MONDAY_S = 3 * _DAY_S
"""1970-01-01 was a Thursday: so long after a Monday."""
NEVER_S = 1 << 40
"""Longer than any job."""
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORMS = 'hours are written in UTC like "22:00-06:00", "mon-fri 20:00-08:00" or "sat", several with commas'
_PART = re.compile(
    r"(?:(?P<first>[a-z]{3,9})(?:\s*-\s*(?P<last>[a-z]{3,9}))?)?"
    r"\s*(?:(?P<from>\d{1,2}:\d\d)\s*-\s*(?P<to>\d{1,2}:\d\d))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Weekly:
    """Pieces of the week, which begin again every Monday at 00:00 UTC.

    Invariant: sorted, apart from each other, each begins within the week; the last may reach into the next one.
    """

    pieces: tuple[tuple[int, int], ...]
    """Begin and end in seconds since Monday 00:00."""
    text: str = ""
    """As the user wrote it."""

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, int]], text: str = "") -> Weekly:
        """From pieces in any order, that may overlap, touch, and reach over the week's end."""
        cut = [(begin, min(end, WEEK_S)) for begin, end in pieces]
        cut += [(0, end - WEEK_S) for _, end in pieces if end > WEEK_S]
        joined: list[tuple[int, int]] = []
        for begin, end in sorted(cut):
            if joined and begin <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((begin, end))
        if len(joined) > 1 and joined[0][0] == 0 and joined[-1][1] == WEEK_S:
            joined[-1] = (joined[-1][0], WEEK_S + joined.pop(0)[1])
        if not joined or any(not 0 <= begin < end <= begin + WEEK_S for begin, end in joined):
            raise UsageError(f"no such hours: {text or joined}; {_FORMS}")
        return cls(tuple(joined), text)

    @property
    def always(self) -> bool:
        return self.pieces == ((0, WEEK_S),)

    @property
    def open_share(self) -> float:
        """Of the week."""
        return sum(end - begin for begin, end in self.pieces) / WEEK_S

    def open_for_s(self, utc_s: Ints) -> Ints:
        """How long it stays open from this moment; 0 where it is closed."""
        if self.always:
            return np.full(utc_s.shape, NEVER_S, np.int64)
        begins, ends = self._columns()
        at = (utc_s + _MONDAY_S) % WEEK_S
        piece = np.searchsorted(begins, at, "right") - 1
        # Before the first piece of a week, the last one of the week before may still be open.
        return np.maximum(ends[piece] - WEEK_S * (piece < 0) - at, 0)

    def wait_s(self, utc_s: Ints, tick_s: int) -> Ints:
        """How long somebody who looks at this moment, and then every tick, waits at most until it finds it open."""
        if self.always:
            return np.zeros(utc_s.shape, np.int64)
        # A piece that is shorter than a tick can be missed.
        begins = np.array([begin for begin, end in self.pieces if end - begin >= tick_s], np.int64)
        if not len(begins):
            return np.where(self.open_for_s(utc_s) > 0, 0, NEVER_S)
        at = (utc_s + _MONDAY_S) % WEEK_S
        coming = np.append(begins, begins[0] + WEEK_S)[np.searchsorted(begins, at, "left")]
        return np.where(self.open_for_s(utc_s) > 0, 0, coming - at + tick_s - 1)

    def room_s(self, utc_s: Ints, until_s: Ints, tick_s: int, start_s: int) -> Ints:
        """Time until `until_s` that can surely be used, if everything stops while it is closed, and every later opening costs
        a start of `start_s`; what is open now is counted without one."""
        if self.always:
            return until_s - utc_s
        edge_s = tick_s - 1
        begins, ends = self._columns()
        usable = np.maximum(ends - begins - 2 * edge_s - start_s, 0)
        sums = np.append(0, np.cumsum(usable))

        def before(moment: Ints) -> tuple[Ints, Ints, Ints]:
            """Of all pieces that begin before: what they sum up to, which one is the last, and when it begins."""
            week, at = np.divmod(moment + _MONDAY_S, WEEK_S)
            count = np.searchsorted(begins, at, "left")
            last = count - 1
            return week * sums[-1] + sums[count], last, moment - at + begins[last] - WEEK_S * (last < 0)

        here = np.clip(np.minimum(self.open_for_s(utc_s) - edge_s, until_s - utc_s), 0, None)
        total, last, begin = before(until_s)
        later = total - before(utc_s + 1)[0]
        # The last piece may reach over the end.
        reaches = np.minimum(begin + (ends - begins)[last] - edge_s, until_s) - (begin + edge_s) - start_s
        later += np.where(begin > utc_s, np.maximum(reaches, 0) - usable[last], 0)
        room: Ints = here + np.where(until_s > utc_s, later, 0)
        return room

    def _columns(self) -> tuple[Ints, Ints]:
        columns = np.array(self.pieces, np.int64).T
        return columns[0], columns[1]


ALWAYS = Weekly(((0, WEEK_S),), "always")


def parse_weekly(value: object) -> Weekly:
    """Hours as a user writes them: a text, or a list of texts. UsageError that shows the forms."""
    given = value if isinstance(value, (list, tuple)) else [value]
    texts = [text for text in given if isinstance(text, str) and len(text) <= 500]
    if not texts or len(texts) < len(given):
        raise UsageError(f"not hours: {value!r}; {_FORMS}")
    text = ", ".join(texts)
    return Weekly.of([piece for part in text.split(",") for piece in _pieces(part)], text)


def _pieces(part: str) -> list[tuple[int, int]]:
    words = re.sub(r"\s*utc$", "", part.strip().lower())
    found = _PART.fullmatch(words)
    if not words or found is None:
        raise UsageError(f"not hours: {part.strip()!r}; {_FORMS}")
    first = 0 if found["first"] is None else _day(found["first"])
    last = 6 if found["first"] is None else first if found["last"] is None else _day(found["last"])
    begin_s, end_s = (0, _DAY_S) if found["from"] is None else (_clock_s(found["from"]), _clock_s(found["to"]))
    if begin_s in (end_s, _DAY_S):
        raise UsageError(f"not hours: {part.strip()!r} has no length; {_FORMS}")
    # Hours over midnight belong to the day on which they begin.
    length_s = (end_s - begin_s) % _DAY_S or _DAY_S
    days = [(first + each) % 7 for each in range((last - first) % 7 + 1)]
    return [(day * _DAY_S + begin_s, day * _DAY_S + begin_s + length_s) for day in days]


def _day(word: str) -> int:
    names = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    for number, name in enumerate(names):
        if name.startswith(word):
            return number
    raise UsageError(f"not a day: {word!r}; days are {', '.join(_DAYS)}")


def _clock_s(text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if hours * 60 + minutes > 24 * 60 or minutes > 59:
        raise UsageError(f"not a time of day: {text!r}; {_FORMS}")
    return hours * 3600 + minutes * 60
