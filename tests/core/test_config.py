"""Quantities: what people write comes out in base units, what holdfast prints is read again, nonsense is refused."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.core.config import format_bytes, format_duration, parse_bytes, parse_duration_s
from holdfast.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10 min", 600),
        ("90s", 90),
        ("1.5 h", 5400),
        (600, 600),
        ("600", 600),
        ("0.25", 0.25),
        (".5 s", 0.5),
        ("1 h 30 min", 5400),
        ("1h30m", 5400),
        ("  2 Days ", 172800),
        ("1 w", 604800),
        ("250 ms", 0.25),
        ("0.1 s", 0.1),
        (0, 0),
        (timedelta(minutes=2), 120),
    ],
)
def test_durations_people_write(text: str | float | timedelta, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "min", "10 minuets", "-5 s", "1e3 s", "5 s !", "10 min ago", "1,5 h", "٣ min", "9" * 5000, "inf s"),
        *(-1, float("nan"), float("inf"), 10**400, True, None, [600], timedelta(seconds=-1)),
    ],
)
def test_durations_that_are_refused_show_how_it_is_written(text: object) -> None:
    with pytest.raises(UsageError, match='"10 min"'):
        parse_duration_s(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count_bytes"),
    [
        ("2 GiB", 2 * 1024**3),
        ("500MB", 500_000_000),
        (4096, 4096),
        ("4096", 4096),
        ("0.3 kB", 300),
        ("1.1 GiB", 1181116006),
        ("64 kib", 65536),
        ("2Gi", 2 * 1024**3),
        ("12 bytes", 12),
        ("1 PiB", 1024**5),
    ],
)
def test_sizes_people_write(text: str | int, count_bytes: int) -> None:
    assert parse_bytes(text) == count_bytes


@pytest.mark.parametrize(
    "text", ["", "2G", "2 GiBs", -1, "-1 MB", 1.5, True, None, "1.5", "GiB", "1 GiB 2 MiB", "9" * 5000]
)
def test_sizes_that_are_refused_show_how_it_is_written(text: object) -> None:
    with pytest.raises(UsageError, match='"500 MB"'):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.floats(0, 1e10))
@example(59.96)
@example(3599.7)
@example(86399.9)
def test_a_printed_duration_is_read_back_within_one_per_cent_and_prints_the_same_again(seconds: float) -> None:
    printed = format_duration(seconds)
    read = parse_duration_s(printed)
    assert abs(read - seconds) <= max(1e-6, 0.01 * seconds)
    assert format_duration(read) == printed


@given(st.integers(0, 60 * 60))
def test_whole_seconds_within_an_hour_are_printed_exactly(seconds: int) -> None:
    assert parse_duration_s(format_duration(seconds)) == seconds


@given(st.integers(0, 2**70))
@example(1023)
@example(1024**2 - 1)
@example(1000 * 1024**5)
def test_a_printed_size_is_read_back_within_one_per_cent_and_prints_the_same_again(count_bytes: int) -> None:
    printed = format_bytes(count_bytes)
    read = parse_bytes(printed)
    assert abs(read - count_bytes) <= 0.01 * count_bytes
    assert format_bytes(read) == printed


@given(st.integers(0, 10**9), st.sampled_from(["s", "min", "h", "d"]), st.sampled_from(["", " ", "  "]))
def test_spacing_and_case_do_not_change_a_duration(count: int, unit: str, space: str) -> None:
    assert parse_duration_s(f"{count}{space}{unit}") == parse_duration_s(f" {count} {unit.upper()} ")


def test_strange_figures_still_print() -> None:
    assert format_duration(float("inf")) == "inf s"
    assert format_duration(-90) == "-1 min 30 s"
    assert format_duration(0) == "0 s"
    assert format_bytes(-1536) == "-1.5 KiB"
