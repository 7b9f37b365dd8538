"""Random lives of machines, prices and clouds that are killed: what the provider bills, what holdfast computes and what a look
at every single second says are the same, to the millionth of a dollar."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import ON_DEMAND, SPOT

from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError
from holdfast.core.launches import Allowed, Pool, client_token
from holdfast.provider.base import Machine, MachineSpec, Order
from holdfast.testing.clock import ManualClock
from holdfast.testing.cloud import bill
from holdfast.testing.cloud.config import (
    Billing,
    CloudConfig,
    FaultConfig,
    LeftoverConfig,
    NoticeConfig,
    PoolConfig,
    parsed,
)
from holdfast.testing.cloud.tabletop import Tabletop

_START_UNIX_S = 1_000_000
_PRICES = [(0, "0.30"), (400, "0.9"), (1000, "0.123457"), (2500, "2.5")]
_CAPACITY = [(0, 3), (700, 1), (1200, 4)]
_DISK, _ADDRESS = "0.000173", "0.005"


@dataclass
class _Course:
    """One course of things, and the truth beside it."""

    table: Tabletop
    prices: dict[str, list[tuple[int, int]]]
    """Pool → (from which second, price); of two for one second the later holds."""
    faulty: bool = False
    orders: list[Order] = field(default_factory=list)
    born: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)
    """Where the test ends a machine itself."""
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def now_s(self) -> float:
        return self.table.cloud.clock.unix_s() - _START_UNIX_S

    def machines(self) -> list[Machine]:
        return sorted(self.table.cloud.machines("fleet"), key=lambda machine: machine.launch)

    def there(self, draw: random.Random) -> Machine | None:
        there = [machine for machine in self.machines() if machine.state != "gone"]
        return draw.choice(there) if there else None


def _launch(course: _Course, on_demand: bool, ceiling: int, disk_gib: int, address: bool) -> None:
    number = len(course.orders) + 1
    pool = Pool.named(ON_DEMAND if on_demand else SPOT)
    order = Order(
        token=client_token("run", number),
        fleet="fleet",
        run_id="run",
        launch=number,
        allowed=(Allowed(pool=pool, ceiling_microusd_h=ceiling, on_demand_microusd_h=1_000_000),),
        spec=MachineSpec(disk_gib=disk_gib, network={"address": address}),
        user_data="#!/bin/sh\n",
        lifetime_s=3600,
        expires_unix_s=2_000_000,
    )
    course.orders.append(order)
    try:
        machine = course.table.cloud.create(course.table.cloud.request(order))
    except (LaunchFailed, OutcomeUnknown):
        return
    course.born[machine.id] = math.floor(course.now_s)


def _again(course: _Course, draw: random.Random) -> None:
    """A call that was made already never makes a second machine."""
    if course.orders:
        order = draw.choice(course.orders)
        try:
            machine = course.table.cloud.create(course.table.cloud.request(order))
        except (LaunchFailed, OutcomeUnknown):
            return
        assert machine.token == order.token


def _terminate(course: _Course, draw: random.Random) -> None:
    if (machine := course.there(draw)) is not None:
        with suppress(ProviderError):
            course.table.cloud.terminate([machine])
            if not course.faulty:
                course.gone.setdefault(machine.id, math.ceil(course.now_s))


def _finish(course: _Course, draw: random.Random) -> None:
    machine = course.there(draw)
    if machine is not None and machine.id in course.table.running:
        course.gone.setdefault(machine.id, math.ceil(course.now_s))
        course.table.finish(machine.id, draw.choice(["script", "shutdown"]))


def _preempt(course: _Course, draw: random.Random) -> None:
    if (machine := course.there(draw)) is not None:
        course.table.cloud.preempt(machine.id, lead_s=draw.choice([0.0, 0.5, 30.0]))


def _withdraw(course: _Course, draw: random.Random) -> None:
    if (machine := course.there(draw)) is not None:
        course.table.cloud.withdraw(machine.id)


def _launched(course: _Course, draw: random.Random) -> None:
    _launch(course, draw.random() < 0.3, draw.choice(_CEILINGS), draw.randint(1, 99), draw.random() < 0.5)


def _passed(course: _Course, draw: random.Random) -> None:
    course.table.pass_time(draw.uniform(0, draw.choice([4, 60, 400])))


def _priced(course: _Course, draw: random.Random) -> None:
    pool, microusd_h, now = draw.choice([SPOT, SPOT, ON_DEMAND]), draw.randint(0, 4_000_000), math.floor(course.now_s)
    course.prices[pool] = [each for each in course.prices[pool] if each[0] <= now] + [(now, microusd_h)]
    course.table.cloud.set_pool(pool, price=f"{microusd_h / 1e6:.6f}")


def _capacity(course: _Course, draw: random.Random) -> None:
    course.table.cloud.set_pool(SPOT, capacity=draw.randint(0, 5))


def _kill(course: _Course, draw: random.Random) -> None:
    course.table = course.table.killed()


def _remove(course: _Course, draw: random.Random) -> None:
    left = course.table.cloud.leftovers("fleet")
    course.table.cloud.remove(left)
    course.removed.update({each.id: math.ceil(course.now_s) for each in left})


_CEILINGS = [1_000_000, 3_000_000, 5_000_000]
_THINGS: dict[str, tuple[int, Callable[[_Course, random.Random], None]]] = {
    "launch": (7, _launched),
    "pass": (9, _passed),
    "again": (2, _again),
    "terminate": (2, _terminate),
    "finish": (2, _finish),
    "preempt": (2, _preempt),
    "withdraw": (1, _withdraw),
    "price": (2, _priced),
    "capacity": (2, _capacity),
    "kill": (2, _kill),
    "remove": (1, _remove),
}
_ALL_FAULTS = FaultConfig(
    create={"lost": 0.15, "late": 0.15, "error": 0.1, "throttle": 0.05, "no-capacity": 0.05},
    terminate={"ignored": 0.1, "lost": 0.1, "error": 0.1},
    late_s=40.0,
)


@given(
    seed=st.integers(0, 2**32),
    speed=st.sampled_from([1.0, 7.0, 13.5]),
    minimum_s=st.sampled_from([0, 60, 600]),
    free=st.booleans(),
    unit_s=st.sampled_from([1, 3600]),
    after=st.sets(st.sampled_from(["shutdown", "terminated", "preempted"])),
    chance=st.sampled_from([1.0, 0.5, 0.0]),
    faulty=st.booleans(),
)
@settings(max_examples=50)
def test_every_second_is_billed_once(
    seed: int, speed: float, minimum_s: int, free: bool, unit_s: int, after: set[Any], chance: float, faulty: bool
) -> None:
    draw = random.Random(seed)
    config = CloudConfig(
        pools=[
            PoolConfig(name=SPOT, capacity=_CAPACITY, price=[*_PRICES]),
            PoolConfig(name=ON_DEMAND, price="1.00"),
        ],
        seed=seed,
        speed=speed,
        start_unix_s=_START_UNIX_S,
        boot_s=(0.0, 2.0),
        notice=NoticeConfig(lead_s=20, chance=chance, withdrawn=0.3, rebalance=0.3, rebalance_before_s=10),
        billing=Billing(
            minimum_s=minimum_s,
            first_hour_free=free,
            disk_per_gib_h=_DISK,
            address_per_h=_ADDRESS,
            extras_unit_s=unit_s,
        ),
        faults=_ALL_FAULTS if faulty else FaultConfig(),
        leftovers=LeftoverConfig(after=tuple(sorted(after))),
    )
    with tempfile.TemporaryDirectory() as folder:
        first = {SPOT: [(at, round(float(price) * 1e6)) for at, price in _PRICES], ON_DEMAND: [(0, 1_000_000)]}
        course = _Course(Tabletop(Path(folder), config, ManualClock()), first, faulty)
        try:
            weights = [weight for weight, _ in _THINGS.values()]
            for name in draw.choices(list(_THINGS), weights, k=draw.randint(1, 60)):
                _THINGS[name][1](course, draw)
            _check(course, config, after)
        finally:
            course.table.close()


def _check(course: _Course, config: CloudConfig, after: set[str]) -> None:
    until = math.ceil(course.now_s)
    entries = bill.read_log(course.table.folder / "log.jsonl")
    billed = bill.bill(entries, _START_UNIX_S + until)
    machines = course.machines()
    assert set(billed["machines"]) == {machine.id for machine in machines} >= set(course.born)
    assert len({machine.token for machine in machines}) == len(machines)
    for machine in machines:
        born = int(machine.created_unix_s) - _START_UNIX_S
        gone = None if machine.gone_unix_s is None else int(machine.gone_unix_s) - _START_UNIX_S
        assert course.born.get(machine.id, born) == born
        assert gone is not None or machine.id not in course.gone
        if gone is not None and machine.ended_by != "provider":
            assert gone <= course.gone.get(machine.id, gone)
        order = next(order for order in course.orders if order.token == machine.token)
        truth = _truth(course, machine, order, born, until if gone is None else gone, config.billing)
        for kind in ("volume", "address"):
            truth += _extra_truth(course, machine, order, kind, born, gone, until, config.billing, after)
        assert billed["machines"][machine.id]["total_microusd"] == truth
        assert course.table.cloud.bill(machine).microusd == truth
    assert billed["total_microusd"] == sum(each["total_microusd"] for each in billed["machines"].values())


def _truth(course: _Course, machine: Machine, order: Order, born: int, end: int, rules: Billing) -> int:
    """One second after the other."""
    spot, ceiling = machine.pool.market == "spot", order.allowed[0].ceiling_microusd_h
    changes = iter(course.prices[machine.pool.name])
    upcoming: tuple[int, int] | None = next(changes)
    price = 0
    total, second = 0, 0
    while second < end or second < born + rules.minimum_s:
        while upcoming is not None and upcoming[0] <= second and second < max(end, born + 1):
            price, upcoming = upcoming[1], next(changes, None)
        if second >= born:
            total += min(price, ceiling) if spot else price
        second += 1
    if rules.first_hour_free and spot and machine.ended_by == "provider" and end - born < 3600:
        return 0
    return -(-total // 3600)


def _extra_truth(
    course: _Course, machine: Machine, order: Order, kind: str,
    born: int, gone: int | None, until: int, rules: Billing, after: set[str],
) -> int:  # fmt: skip
    if kind == "address" and not order.spec.network["address"]:
        return 0
    rate = 5_000 if kind == "address" else order.spec.disk_gib * 173
    how = {"itself": "shutdown", "owner": "terminated", "provider": "preempted"}
    stays = gone is not None and machine.ended_by is not None and how[machine.ended_by] in after
    name = f"{'ip' if kind == 'address' else 'vol'}-{machine.id[2:]}"
    end = until if gone is None or stays else gone
    end = min(end, course.removed.get(name, end))
    seconds = 0
    for second in range(born, end):
        seconds += rules.extras_unit_s if (second - born) % rules.extras_unit_s == 0 else 0
    return -(-rate * seconds // 3600)


def test_a_price_of_the_second_of_death_is_not_of_its_life(tmp_path: Path) -> None:
    """What is missing to the minimum costs what the last second cost, and a change comes with the second that follows it."""
    pools, billing = [PoolConfig(name=ON_DEMAND, price="1.00")], Billing(disk_per_gib_h=_DISK)
    config = CloudConfig(pools=pools, start_unix_s=_START_UNIX_S, boot_s=0, billing=billing)
    course = _Course(Tabletop(tmp_path, config, ManualClock()), {ON_DEMAND: [(0, 1_000_000), (10, 4_000_000)]})
    _launch(course, True, 4_000_000, 1, False)
    course.table.pass_time(10.0)
    course.table.cloud.set_pool(ON_DEMAND, price=4)
    (machine,) = course.machines()
    course.table.finish(machine.id)
    _check(course, config, set())
    assert course.table.cloud.bill(course.machines()[0]).microusd == -(-60 * 1_000_000 // 3600) + 1  # of the disk
    course.table.close()


def test_the_bill_is_computed_without_holdfast(tmp_path: Path) -> None:
    """By a copy of the file, in a process that cannot import anything but the standard library."""
    config = CloudConfig(pools=[PoolConfig(name=ON_DEMAND, price="3.60")], start_unix_s=_START_UNIX_S)
    course = _Course(Tabletop(tmp_path / "cloud", config, ManualClock()), {})
    _launch(course, True, 4_000_000, 1, False)
    course.table.pass_time(100.0)
    course.table.close()
    alone = tmp_path / "alone.py"
    alone.write_bytes(Path(bill.__file__).read_bytes())
    asked = [sys.executable, "-I", "-S", str(alone), str(course.table.folder), "--until", str(_START_UNIX_S + 100)]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert '"total_microusd": 100000,' in said
    assert subprocess.run(asked[:4], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"pools": []},
        {"pools": [{"name": "aws/here/a/small/spot", "price": 1}]},
        {"pools": [{"name": SPOT, "price": 1}, {"name": SPOT, "price": 1}]},
        {"pools": [{"name": SPOT, "price": 1}], "sped": 2},
        {"pools": [{"name": SPOT, "price": 1}], "speed": 0},
        {"pools": [{"name": SPOT, "price": 1}], "faults": {"create": {"lost": 0.7, "late": 0.7}}},
        {"pools": [{"name": SPOT, "price": 1}], "faults": {"create": {"explode": 0.7}}},
        {"pools": [{"name": SPOT}]},
        {"pools": [{"name": SPOT, "price": -1}]},
        {"pools": [{"name": SPOT, "price": [[5, 1]]}]},
        {"pools": [{"name": SPOT, "price": 1, "capacity": [[0, 1], [0, 2]]}]},
        {"pools": [{"name": SPOT, "price": 1, "trace": {"file": "x.json"}}]},
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any], tmp_path: Path) -> None:
    from holdfast.core.errors import UsageError

    with pytest.raises(UsageError):
        Tabletop(tmp_path, parsed(wrong, CloudConfig), ManualClock())
