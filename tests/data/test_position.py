"""The position of the loop: how it moves, and that nothing but a position is read as one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import FormatError, UsageError
from holdfast.data.position import Position


@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_it_moves_and_survives_json(epoch: int, batch: int) -> None:
    position = Position(epoch, batch)
    assert position.after_batch() == Position(epoch, batch + 1)
    assert position.after_batch(7).after_batch(3) == Position(epoch, batch + 2, 0, 10)
    assert position.after_batch(7).next_phase() == Position(epoch, 0, 1)
    assert position.next_epoch() == Position(epoch + 1, 0)
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_a_position_that_counts_no_samples_is_read() -> None:
    assert Position.from_json({"epoch": 1, "batch": 2, "phase": 3}) == Position(1, 2, 3, 0)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        3,
        [],
        {},
        {"epoch": 1},
        {"epoch": 1, "batch": -1},
        {"epoch": 1.0, "batch": 0},
        {"epoch": True, "batch": 0},
        {"epoch": 0, "batch": 0, "more": 1},
    ],
)
def test_anything_else_is_refused(fields: object) -> None:
    with pytest.raises(FormatError, match="not a position"):
        Position.from_json(fields)


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(UsageError, match="epoch"):
        Position(-1, 0)
