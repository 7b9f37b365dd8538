"""Traces as others publish them: both signs, counts, gaps, node events, prices; and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.core.errors import FormatError, UsageError
from holdfast.simulate.traces.read import Marks, dollars, priced, read_csv, read_json, read_node_events, read_prices
from holdfast.simulate.traces.trace import Trace, joined

PROBES = """date,availability
2023-02-15 22:00:00,0
2023-02-15 22:03:15,1
2023-02-15 22:06:31,1
2023-02-15 22:16:16,0
2023-02-15 22:19:31,1
"""


def write(folder: Path, text: str, name: str = "us-east-1a.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_probes_become_ticks_and_a_gap_is_bridged_by_the_last_probe(tmp_path: Path) -> None:
    path = write(tmp_path, PROBES)
    trace = read_csv(path, marks=Marks.AVAILABLE, spot="0.9731", on_demand=3.06)
    assert (trace.pools, trace.tick_s, trace.on_demand_microusd_h) == (("us-east-1a",), 196, 3_060_000)
    assert trace.capacity.tolist() == [[0, 1, 1, 1, 1, 0, 1]]
    assert set(trace.microusd_h[0].tolist()) == {973_100}
    taken = read_csv(path, marks=Marks.TAKEN, spot=1, on_demand=3, pool="x")
    assert taken.capacity.tolist() == [[1, 0, 0, 0, 0, 1, 0]]
    assert taken.pools == ("x",)


def test_probes_on_a_given_clock(tmp_path: Path) -> None:
    trace = read_csv(write(tmp_path, PROBES), marks=Marks.AVAILABLE, spot=1, on_demand=3, tick_s=120)
    # 22:00, :02 | :04, :06, ..., :16 | :18 | end at 22:19:31
    assert trace.capacity.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 0]]


def test_counts_decide_for_gangs(tmp_path: Path) -> None:
    path = write(tmp_path, PROBES.replace(",1\n", ",7\n"))
    trace = read_csv(path, marks=Marks.MACHINES, spot=1, on_demand=3)
    assert trace.capacity.tolist() == [[0, 7, 7, 7, 7, 0, 7]]
    assert trace.available(7).any()
    assert not trace.available(8).any()
    with pytest.raises(FormatError, match=r"probe 1 is 7; expected is 1 where at least one machine"):
        read_csv(path, marks=Marks.AVAILABLE, spot=1, on_demand=3)


@pytest.mark.parametrize("marks", [Marks.AVAILABLE, Marks.TAKEN])
def test_json_with_prices_of_its_own(tmp_path: Path, marks: Marks) -> None:
    document = {
        "metadata": {"gap_seconds": 600, "zone": "asia-b", "price_info": {"on_demand_price": 99.1213232}},
        "data": [0, 1, 1, 0],
        "prices": [69.910115776, 69.910115776, 70.0, 70],
    }
    path = write(tmp_path, json.dumps(document), "x.json")
    trace = read_json(path, marks=marks)
    assert trace.capacity.tolist() == [[0, 1, 1, 0] if marks is Marks.AVAILABLE else [1, 0, 0, 1]]
    assert trace.microusd_h.tolist() == [[69_910_116, 69_910_116, 70_000_000, 70_000_000]]
    assert (trace.pools, trace.tick_s, trace.on_demand_microusd_h) == (("asia-b",), 600, 99_121_323)
    flat = read_json(path, marks=marks, spot="1.5", on_demand="2", pool="p")
    assert (flat.microusd_h[0].tolist(), flat.on_demand_microusd_h, flat.pools) == ([1_500_000] * 4, 2_000_000, ("p",))


def test_node_events_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "5000,add,a\n5000,add,b\n20000,remove,a\n29999,add,c\n40000,remove,b\n")
    trace = read_node_events(path, pool="p", tick_s=10, spot=1, on_demand=3)
    assert trace.capacity.tolist() == [[0, 2, 1, 2, 1]]
    longer = read_node_events(path, pool="p", tick_s=10, spot=1, on_demand=3, duration_s=60)
    assert longer.capacity.tolist() == [[0, 2, 1, 2, 1, 1, 1]]


def test_prices_of_several_pools_and_traces_side_by_side(tmp_path: Path) -> None:
    prices = read_prices(write(tmp_path, '{"a": [1.67, 1.6703, "2"], "b": [0.1, 0.2, 0.3]}', "prices.json"))
    one = read_csv(write(tmp_path, PROBES, "a.csv"), marks=Marks.AVAILABLE, spot=1, on_demand=3)
    two = read_csv(write(tmp_path, PROBES, "b.csv"), marks=Marks.TAKEN, spot=1, on_demand=2)
    both = priced(joined([one, two]), prices)
    assert (both.pools, both.ticks, both.on_demand_microusd_h) == (("a", "b"), 3, 2_000_000)
    assert both.microusd_h.tolist() == [[1_670_000, 1_670_300, 2_000_000], [100_000, 200_000, 300_000]]
    assert both.only("b").capacity.tolist() == [[1, 0, 0]]
    with pytest.raises(UsageError, match="no prices for pool a"):
        priced(one, {"b": prices["b"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,availability\n", "fewer than two"),
        ("date,availability\n2023-02-15 22:00:00,0\n", "fewer than two"),
        (PROBES + "2023-02-15 22:00:00,1\n", "line 7: 2023-02-15 22:00:00 is earlier"),
        (PROBES + "yesterday,1\n", "line 7: a date and a whole number"),
        (PROBES + "2023-02-16 22:00:00\n", "line 7"),
        (PROBES + "2023-02-16 22:00:00,0.5\n", "line 7"),
        (PROBES + "2023-02-16 22:00:00+00:00,1\n", "line 7"),
        (PROBES + "2023-02-16 22:00:00,-1\n", "probe 5 is -1"),
        (PROBES + "9023-02-16 22:00:00,1\n", "at most"),
        ("date,availability\n" + "2023-02-15 22:00:00,0\n" * 3, "less than a second apart"),
    ],
)
def test_strange_probes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_csv(write(tmp_path, text), marks=Marks.AVAILABLE, spot=1, on_demand=3)


@pytest.mark.parametrize("content", [b"date,availability\n\xff,0\n", b'date\n"' + b"x" * 200_000])
def test_what_is_not_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="is not CSV"):
        read_csv(path, marks=Marks.AVAILABLE, spot=1, on_demand=3)
    with pytest.raises(FormatError):
        read_node_events(path, pool="p", tick_s=1, spot=1, on_demand=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5,add\n", "line 1"),
        ("5,join,a\n", "line 1"),
        ("5,add,a\n6,add,a\n", "line 2: add a, which is there"),
        ("5,remove,a\n", "line 1: remove a, which is not there"),
        ("5,add,a\n4,add,b\n", "line 2: 4 is earlier"),
        ("", "no events"),
    ],
)
def test_strange_events_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_node_events(write(tmp_path, text), pool="p", tick_s=10, spot=1, on_demand=3)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NEARLY = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries({"gap_seconds": st.just(600) | ANYTHING, "price_info": ANYTHING}),
        "data": st.just([0, 1]) | st.lists(ANYTHING, max_size=2) | ANYTHING,
        "prices": st.just([1.5, 2]) | st.lists(ANYTHING, max_size=2) | ANYTHING,
    }
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ANYTHING | NEARLY)
def test_any_json_is_read_or_refused(tmp_path: Path, document: object) -> None:
    path = write(tmp_path, json.dumps(document), "x.json")
    for read in (
        lambda: read_json(path, marks=Marks.TAKEN, on_demand=3),
        lambda: read_json(path, marks=Marks.MACHINES, spot=1),
        lambda: read_prices(path),
    ):
        try:
            assert isinstance(read(), (Trace, dict))
        except (FormatError, UsageError):
            pass


def test_dollars() -> None:
    assert [dollars(price) for price in (0.1, "0.1", 3.06, 1, "69.9101157")] == [
        100_000,
        100_000,
        3_060_000,
        1_000_000,
        69_910_116,
    ]
    for nonsense in (-1, "x", float("nan"), float("inf"), 1e9):
        with pytest.raises(UsageError):
            dollars(nonsense)
