"""What the trainer writes down about its time: exact, in one piece when another thread reads it, and cheap in events."""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import dataclass
from typing import Any

from holdfast.core.events import CollectingSink
from holdfast.ledger.doings import Doing
from holdfast.store.memory import MemoryStore
from holdfast.train.display import display_for
from holdfast.train.machine import describe_machine
from holdfast.train.record import Record
from holdfast.train.stopwatch import Stopwatch


@dataclass
class HandClock:
    now_s: float = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s + 1e9

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def total_s(totals: dict[str, Any]) -> float:
    return float(sum(totals[doing.field] for doing in Doing))


def test_every_moment_belongs_to_one_doing() -> None:
    clock, rng = HandClock(), random.Random(1)
    watch = Stopwatch(clock, 7.0)
    spent = dict.fromkeys(Doing, 0.0) | {Doing.STARTUP: 7.0}
    doing = Doing.STARTUP
    for _ in range(500):
        passed_s = rng.randrange(1000) / 128
        clock.now_s += passed_s
        spent[doing] += passed_s
        if rng.random() < 0.3:
            with watch.during(Doing.STALL):
                clock.now_s += 0.5
                spent[Doing.STALL] += 0.5
        new = rng.choice(list(Doing))
        assert watch.enter(new) is doing
        doing = new
    totals = watch.totals()
    assert {one: totals[one.field] for one in Doing} == {one: round(spent[one], 6) for one in Doing}


def test_the_first_step_is_told_apart() -> None:
    clock = HandClock()
    watch = Stopwatch(clock, 0.0)
    watch.begin_at(40)
    watch.enter(Doing.STEP)
    clock.now_s += 9
    with watch.during(Doing.STALL):
        clock.now_s += 1
    watch.stepped(40)
    assert watch.totals()["first_step_s"] is None
    clock.now_s += 3
    watch.stepped(41)
    clock.now_s += 2
    watch.stepped(42)
    assert (watch.totals()["step"], watch.totals()["first_step_s"], watch.totals()["step_s"]) == (42, 12.0, 14.0)


def test_another_thread_sees_whole_states() -> None:
    """The totals add up to the attempt's age at every moment of a loop that is at full speed."""
    clock = HandClock()
    watch = Stopwatch(clock, 0.0)
    seen: list[float] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            before_s = clock.now_s
            read_s = total_s(watch.totals()) + 1000.0
            seen.append(max(0.0, before_s - read_s, read_s - clock.now_s))

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=look)
        thread.start()
        for number in range(30_000):
            watch.enter(Doing(number % len(Doing)))
            clock.now_s += 0.25
        stop.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert len(seen) > 10
    # One tick of the clock between reading the state and reading the time.
    assert max(seen) <= 0.25


def test_progress_is_recorded_now_and_then_only() -> None:
    """Nothing per step: a million steps are as many events as the time they take asks for."""
    clock = HandClock()
    record = Record(clock, (), display_for(False, clock, {}))
    ledger = record.open(MemoryStore(), 1, 1)
    ledger.close()
    record.ledger = sink = CollectingSink()  # type: ignore[assignment]
    record.restored(0)
    for step in range(1, 102_401):
        record.stopwatch.enter(Doing.DATA)
        record.stopwatch.enter(Doing.STEP)
        clock.now_s += 1 / 1024
        record.stepped(step)
        if step % 1024 == 0:
            record._pulse()
    told = sink.named("progress")
    assert len(sink.events) == len(told) == 3
    assert [event.fields["step"] for event in told] == [30 * 1024, 60 * 1024, 90 * 1024]
    assert all(event.fields["snapshot"] is False for event in told)


def test_what_the_launcher_says_of_the_machine() -> None:
    told = describe_machine(
        {
            "HOLDFAST_MACHINE": "i-0abc", "HOLDFAST_MACHINE_STARTED": "1700000000.5", "HOLDFAST_MARKET": "spot",
            "HOLDFAST_PRICE_PER_HOUR": "0.1234567890123456789", "HOLDFAST_ON_DEMAND_PRICE_PER_HOUR": "cheap",
        }
    )  # fmt: skip
    assert (told["machine"], told["machine_started_unix_s"], told["market"]) == ("i-0abc", 1700000000.5, "spot")
    assert told["price_per_hour"] == "0.1234567890123456789"
    assert told["on_demand_price_per_hour"] is None
    assert describe_machine({})["machine"] == told["boot"]
