"""Capacity and prices over time are what the configuration says, second by second; and who is taken follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rehearsal import SPOT

from holdfast.core.errors import FormatError, LaunchFailed, UsageError
from holdfast.core.launches import Allowed, Pool, client_token
from holdfast.provider.base import MachineSpec, Order
from holdfast.testing.clock import ManualClock
from holdfast.testing.cloud.config import CloudConfig, NoticeConfig, PoolConfig, TraceConfig
from holdfast.testing.cloud.market import UNLIMITED, Market, Steps
from holdfast.testing.cloud.tabletop import Tabletop


@st.composite
def _steps(draw: st.DrawFn) -> Steps:
    later = sorted(draw(st.sets(st.integers(1, 60), max_size=6)))
    values = [draw(st.integers(0, 4)) for _ in range(len(later) + 1)]
    repeat = draw(st.one_of(st.none(), st.integers(later[-1] + 1 if later else 1, 80)))
    return Steps((0, *later), tuple(values), repeat)


def _naive(steps: Steps, second: int) -> int:
    within = second if steps.repeat_s is None else second % steps.repeat_s
    return [value for at, value in zip(steps.at_s, steps.values, strict=True) if at <= within][-1]


@given(steps=_steps(), after=st.integers(0, 200), length=st.integers(0, 200))
def test_schedules_second_by_second(steps: Steps, after: int, length: int) -> None:
    until = after + length
    assert [steps.at(second) for second in range(after, until + 1)] == [
        _naive(steps, second) for second in range(after, until + 1)
    ]
    changes = [
        (second, _naive(steps, second))
        for second in range(after + 1, until + 1)
        if _naive(steps, second) != _naive(steps, second - 1)
    ]
    assert list(steps.changes(after, until)) == changes
    assert set(steps.within(after, until)) == {_naive(steps, second) for second in range(after, until + 1)}


def test_traces_as_others_publish_them(tmp_path: Path) -> None:
    probes = {"metadata": {"gap_seconds": 600}, "data": [1, 1, 0, 1], "prices": [0.5, 0.6, 0.6, 0.6]}
    (tmp_path / "probes.json").write_text(json.dumps(probes))
    dates = ["2024-01-01T00:00:00", "2024-01-01T00:10:00", "2024-01-01T00:20:00"]
    taken = "\n".join(f"{date},{mark}" for date, mark in zip(dates, (0, 1, 0), strict=True))
    (tmp_path / "probes.csv").write_text(f"date,preempted\n{taken}\n")
    config = CloudConfig(
        pools=[
            PoolConfig(name=SPOT, trace=TraceConfig(file="probes.json", marks="available", machines=3, from_s=600)),
            PoolConfig(
                name="local/here/b/small/spot", trace=TraceConfig(file="probes.csv", marks="taken", spot="0.25")
            ),
            PoolConfig(name="local/here/a/small/on-demand", price=2),
        ]
    )
    market = Market.of(config, tmp_path)
    first, second, on_demand = (pool.name for pool in config.pools)
    assert [market.capacity[first].at(at) for at in (0, 599, 600, 1199, 1200, 10**6)] == [3, 3, 0, 0, 3, 3]
    assert [market.microusd_h[first].at(at) for at in (0, 600)] == [600_000, 600_000]
    assert [market.capacity[second].at(at) for at in (0, 600, 1200)] == [1, 0, 1]
    assert market.microusd_h[second].at(0) == 250_000
    assert market.capacity[on_demand].at(0) == UNLIMITED
    for name in (first, second):
        assert market.on_demand_microusd_h(Pool.named(name), 0) == 2_000_000


@pytest.mark.parametrize(
    ("text", "error"),
    [("{}", FormatError), ("no json", FormatError), ('{"metadata": {"gap_seconds": 60}, "data": [2]}', FormatError)],
)
def test_traces_that_are_none(tmp_path: Path, text: str, error: type[Exception]) -> None:
    (tmp_path / "trace.json").write_text(text)
    pool = PoolConfig(name=SPOT, trace=TraceConfig(file="trace.json", marks="available", spot=1))
    with pytest.raises(error):
        Market.of(CloudConfig(pools=[pool]), tmp_path)
    (tmp_path / "trace.csv").write_text("date,x\n")
    with pytest.raises(UsageError):
        Market.of(CloudConfig(pools=[PoolConfig(name=SPOT, trace=TraceConfig(file="trace.csv"))]), tmp_path)


def test_withdrawn_notices_spare_a_machine_until_there_is_room(tmp_path: Path) -> None:
    table, machines = _table(tmp_path, [(0, 2), (100, 1), (300, 2), (500, 1)], NoticeConfig(lead_s=20, withdrawn=1.0))
    table.pass_time(80.5)
    ((taken, what, lead_s),) = table.told
    assert what == "preempt"
    assert taken in machines
    assert lead_s == pytest.approx(20, abs=1)
    table.pass_time(100)
    assert [each[:2] for each in table.told] == [(taken, "preempt"), (taken, "withdraw")]
    assert set(table.running) == set(machines)  # nobody is taken in its place
    table.pass_time(330)
    assert len(table.told) == 4  # the next fall finds them equal again
    table.close()


def test_a_machine_is_not_launched_to_be_taken_at_once(tmp_path: Path) -> None:
    table, _ = _table(tmp_path, [(0, 2), (100, 0), (200, 2)], NoticeConfig(lead_s=20))
    table.pass_time(90)
    with pytest.raises(LaunchFailed):
        _launch(table, 3)
    table.pass_time(20)
    assert table.running == {}
    with pytest.raises(LaunchFailed):
        _launch(table, 4)
    table.pass_time(100)
    assert _launch(table, 5)
    table.close()


def test_advice_comes_before_the_notice_and_the_notice_before_the_end(tmp_path: Path) -> None:
    notice = NoticeConfig(lead_s=20, rebalance=1.0, rebalance_before_s=30)
    table, _ = _table(tmp_path, [(0, 2), (100, 1)], notice)
    seen: list[tuple[float, str]] = []
    for _ in range(120):
        table.pass_time(1)
        seen += [(table.cloud.clock.monotonic_s(), what) for _, what, _ in table.told[len(seen) :]]
    assert [(round(at), what) for at, what in seen] == [(50, "rebalance"), (80, "preempt")]
    assert len(table.running) == 1
    (gone,) = [machine for machine in table.cloud.machines("fleet") if machine.state == "gone"]
    assert gone.gone_unix_s is not None
    assert gone.gone_unix_s - table.world.time.start_unix_s == pytest.approx(100, abs=1)
    table.close()


def _table(folder: Path, capacity: list[tuple[int, int]], notice: NoticeConfig) -> tuple[Tabletop, list[str]]:
    config = CloudConfig(pools=[PoolConfig(name=SPOT, capacity=capacity, price=1)], notice=notice, boot_s=0)
    table = Tabletop(folder, config, ManualClock())
    return table, [_launch(table, number) for number in (1, 2)]


def _launch(table: Tabletop, number: int) -> str:
    pool = Pool.named(SPOT)
    order = Order(
        token=client_token("run", number),
        fleet="fleet",
        run_id="run",
        launch=number,
        allowed=(Allowed(pool=pool, ceiling_microusd_h=2_000_000, on_demand_microusd_h=2_000_000),),
        spec=MachineSpec(),
        user_data="",
        lifetime_s=1,
        expires_unix_s=1,
    )
    return table.cloud.create(table.cloud.request(order)).id
