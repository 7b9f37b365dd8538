"""Hours of the week: what is read, against a look at every minute; and the bounds that the deadline hangs on, step by step."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.policy.market.rules_week import ALWAYS, NEVER_S, WEEK_S, Weekly, parse_weekly

HOUR, DAY = 3600, 86400
MONDAY = int(datetime(2026, 11, 16, tzinfo=UTC).timestamp())


def moment(utc_s: int) -> np.ndarray:
    return np.array([utc_s], np.int64)


def is_open(week: Weekly, utc_s: int) -> bool:
    return bool(week.open_for_s(moment(utc_s))[0] > 0)


@pytest.mark.parametrize(
    ("text", "opens", "closed"),
    [
        ("22:00-06:00", [0, 5 * HOUR, 22 * HOUR, 6 * DAY + 23 * HOUR], [6 * HOUR, 12 * HOUR, DAY + 21 * HOUR]),
        ("mon-fri 20:00-08:00", [20 * HOUR, 4 * DAY + 21 * HOUR, 5 * DAY + 7 * HOUR], [0, 5 * DAY + 8 * HOUR, 6 * DAY]),
        ("fri-mon", [0, 4 * DAY, 7 * DAY - 1], [DAY, 4 * DAY - 1]),
        ("Sat , sunday 12:00-24:00 UTC", [5 * DAY, 6 * DAY + 12 * HOUR, 7 * DAY - 1], [6 * DAY, 7 * DAY, 0]),
        ("sun 23:00-01:00", [0, HOUR - 1, 7 * DAY - 1], [HOUR, 6 * DAY + 22 * HOUR]),
    ],
)
def test_hours_as_people_write_them(text: str, opens: list[int], closed: list[int]) -> None:
    week = parse_weekly(text)
    assert all(is_open(week, MONDAY + at) for at in opens)
    assert not any(is_open(week, MONDAY + at) for at in closed)
    assert week.text == text
    assert parse_weekly(text.split(",")).pieces == week.pieces


@pytest.mark.parametrize("text", ["00:00-24:00", "mon-sun", "tue-mon", "08:00-20:00, 20:00-08:00", "sat-thu, fri"])
def test_what_is_always_open_is_known_to_be(text: str) -> None:
    assert parse_weekly(text).always
    assert parse_weekly(text).pieces == ALWAYS.pieces


NO_HOURS = "night|25:00-26:00|10:00|10:00-10:00|24:00-06:00|10:61-11:00|mon-|mon 10|1-2|mo-xx|,"


@pytest.mark.parametrize("text", [*NO_HOURS.split("|"), "", 7, [], ["sat", 3], None, "x" * 999])
def test_what_is_no_hours_is_refused_with_the_forms(text: object) -> None:
    with pytest.raises(UsageError, match=r"hours are written in UTC like|days are"):
        parse_weekly(text)


@st.composite
def weeks(draw: st.DrawFn) -> Weekly:
    luck = random.Random(draw(st.integers(0, 1 << 32)))
    unit_s = luck.choice([60, HOUR, 7])
    longest = luck.choice([HOUR, 12 * HOUR, 3 * DAY])
    pieces = []
    for _ in range(luck.randint(1, 12)):
        begin_s = luck.randrange(0, WEEK_S, unit_s)
        pieces.append((begin_s, begin_s + luck.randint(1, longest)))
    return Weekly.of(pieces)


@given(weeks(), st.integers(MONDAY - WEEK_S, MONDAY + 2 * WEEK_S), st.integers(1, 3 * HOUR))
def test_how_long_it_is_open_and_when_it_opens(week: Weekly, now: int, tick_s: int) -> None:
    assert all(begin < end for begin, end in week.pieces)
    assert sum(end - begin for begin, end in week.pieces) <= WEEK_S

    def inside(utc_s: int) -> bool:
        at = (utc_s - MONDAY) % WEEK_S
        return any(begin <= at < end or begin <= at + WEEK_S < end for begin, end in week.pieces)

    left_s = int(week.open_for_s(moment(now))[0])
    assert inside(now) == (left_s > 0)
    if 0 < left_s < WEEK_S:
        assert inside(now + left_s - 1)
        assert not inside(now + left_s)
    wait_s = int(week.wait_s(moment(now), tick_s)[0])
    if wait_s == NEVER_S:
        assert max(end - begin for begin, end in week.pieces) < tick_s
    elif left_s == 0:
        looks = range(now, now + wait_s + 1, tick_s)
        assert any(inside(look) for look in looks), "somebody who looks every tick has seen it open by then"


@given(weeks(), st.data())
def test_room_never_drops_faster_than_time_is_used(week: Weekly, data: st.DataObject) -> None:
    """The induction step of the deadline's argument, whatever the rhythm of the looks is: what runs uses the time that passes,
    what may not run uses none, and an opening gives back the start that was counted for it, or all of a short piece."""
    tick_s = data.draw(st.sampled_from([1, 60, 1000, HOUR, 5 * HOUR]))
    start_s = data.draw(st.sampled_from([0, 100, 2 * HOUR]))
    edge = data.draw(st.sampled_from([edge for piece in week.pieces for edge in piece]))
    now = MONDAY + edge + data.draw(st.integers(-3 * tick_s, 3 * tick_s))
    until = now + data.draw(st.integers(1, 2 * WEEK_S) | st.integers(1, 5 * tick_s))

    def room(at: int) -> int:
        return int(week.room_s(moment(at), moment(until), tick_s, start_s)[0])

    def runs(at: int) -> bool:
        return int(week.open_for_s(moment(at))[0]) >= tick_s

    for _ in range(10):
        before, ran, step_s = room(now), runs(now), data.draw(st.integers(1, tick_s))
        assert 0 <= before <= until - now
        if now + step_s >= until:
            assert ran or before == 0
            break
        now += step_s
        here_s = min(int(week.open_for_s(moment(now))[0]) - (tick_s - 1), until - now)
        opened_s = min(start_s, here_s) if runs(now) and not ran else 0
        spent_s = min(step_s, before) if ran else 0
        assert room(now) >= before - spent_s + opened_s


def test_room_by_hand() -> None:
    nights = parse_weekly("22:00-06:00")
    noon = MONDAY + 12 * HOUR
    # Two nights of eight hours less a start of an hour each; looked at every ten minutes.
    edges_s = 2 * 599
    room = nights.room_s(moment(noon), moment(noon + 48 * HOUR), 600, HOUR)
    assert room.tolist() == [2 * (7 * HOUR - edges_s)]
    # In the night: what is left of it is counted without a start; the deadline cuts the last one short.
    late = MONDAY + DAY + HOUR
    room = nights.room_s(moment(late), moment(late + 22 * HOUR), 600, HOUR)
    assert room.tolist() == [5 * HOUR - 599 + max(0, HOUR - 599 - HOUR)]
    assert ALWAYS.room_s(moment(0), moment(77), 600, HOUR).tolist() == [77]
    assert nights.wait_s(moment(noon), 600).tolist() == [10 * HOUR + 599]
