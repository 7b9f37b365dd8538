"""Time and money add up, whatever happens to a run: attempts die anywhere, clocks jump, records come twice or never."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lives import World, s

from holdfast.cli.report_picture import slices_of
from holdfast.ledger.cost import Prices, rate_of, shares
from holdfast.ledger.doings import Doing
from holdfast.ledger.goodput import Account, Bucket, accounts_of
from holdfast.ledger.read import Recorded, read_events
from holdfast.ledger.report import Report, report_of
from holdfast.ledger.savings import waterfall_of
from holdfast.ledger.timeline import Timeline, timeline_of
from holdfast.store.memory import MemoryStore

FAR = 4_000_000_000.0


def timeline(world: World) -> Timeline:
    return timeline_of(read_events(world.store), now_unix_s=FAR)


# ---- any run at all

DURATIONS = st.integers(1, 90_000_000)
DOINGS = st.one_of(
    st.tuples(st.just("step"), DURATIONS, st.integers(0, 5_000_000), st.booleans()),
    st.tuples(st.just("save"), st.integers(0, 3_000_000), st.booleans()),
    st.tuples(st.just("evaluate"), DURATIONS),
    st.tuples(st.just("pulse")),
    st.tuples(st.just("jump"), st.integers(-(10**10), 10**10)),
)


@dataclass(frozen=True)
class Attempt:
    machine: str
    gap_us: int
    skew_us: int
    startup_us: int
    restore_us: int
    prep_us: int
    back: int
    is_heard: bool
    doings: list[tuple[Any, ...]]
    end: str
    after_us: int
    facts: dict[str, Any]


ATTEMPTS = st.builds(
    Attempt,
    machine=st.sampled_from(["a", "b", "c"]),
    gap_us=st.integers(0, 10**10),
    skew_us=st.integers(-(10**10), 10**10),
    startup_us=DURATIONS,
    restore_us=DURATIONS,
    prep_us=st.integers(0, 10_000_000),
    back=st.sampled_from([0, 0, 0, 1, 2]),
    is_heard=st.booleans(),
    doings=st.lists(DOINGS, max_size=14),
    end=st.sampled_from(["die", "die", "leave", "fail", "fence", "interrupt", "finish"]),
    after_us=st.integers(0, 3_000_000),
    facts=st.fixed_dictionaries(
        {
            "market": st.sampled_from(["spot", "on-demand", None]),
            "price_per_hour": st.sampled_from(["1.10", "0.333333333", "0", "3.67"]),
            "on_demand_price_per_hour": st.sampled_from(["3.67", "0.1"]),
        }
    ),
)


def live(attempts: list[Attempt], *, with_agent: bool) -> World:
    world = World(MemoryStore(), with_agent=with_agent)
    for plan in attempts:
        world.skew_us = plan.skew_us
        world.begin(
            machine=plan.machine, gap_us=plan.gap_us, startup_us=plan.startup_us, restore_us=plan.restore_us,
            prep_us=plan.prep_us, back=min(plan.back, len(world.saved_steps)), is_heard=plan.is_heard, facts=plan.facts,
        )  # fmt: skip
        for name, *arguments in plan.doings:
            match name:
                case "step":
                    world.do_step(arguments[0], arguments[1], logs=arguments[2])
                case "save":
                    world.save(arguments[0], commits=arguments[1])
                case "evaluate":
                    world.spend(Doing.EVALUATION, arguments[0])
                case "pulse":
                    world.pulse()
                case "jump":
                    world.jump(arguments[0])
        world.end(plan.end, after_us=plan.after_us)  # type: ignore[arg-type]
    return world


@settings(max_examples=300)
@given(st.lists(ATTEMPTS, min_size=1, max_size=6), st.booleans())
def test_it_all_adds_up(attempts: list[Attempt], with_agent: bool) -> None:
    world = live(attempts, with_agent=with_agent)
    seen = timeline(world)
    accounts = accounts_of(seen)
    recorded = [life for life in world.lives if life.segments]
    assert [account.attempt.number for account in accounts] == [life.number for life in recorded]
    _time_adds_up(accounts)
    _money_adds_up(accounts, Prices())
    _money_adds_up(accounts, Prices(spot=Decimal("0.7"), on_demand=Decimal("2.345678")))
    _pictures_add_up(accounts)
    report_of("memory://run", seen, Prices())


def _time_adds_up(accounts: tuple[Account, ...]) -> None:
    end_us = 0
    for account in accounts:
        attempt = account.attempt
        assert min(account.buckets.values()) >= 0
        assert account.queue_wait_us >= 0
        billed_gap_us = attempt.gap_us if attempt.is_gap_billed else 0
        assert account.billed_us == attempt.elapsed_us + attempt.boot_us + billed_gap_us
        assert 0 <= account.buckets[Bucket.USEFUL] <= account.billed_us <= account.wall_us
        # On the run's axis attempts come one after the other, and what is between them is accounted for.
        assert attempt.begin_us - attempt.boot_us - attempt.gap_us == end_us
        end_us = attempt.begin_us + attempt.elapsed_us
    assert sum(account.wall_us for account in accounts) == end_us


def _money_adds_up(accounts: tuple[Account, ...], prices: Prices) -> None:
    rates = [rate for account in accounts if (rate := rate_of(account.attempt, prices)) is not None]
    assert len(rates) == len(accounts)
    waterfall = waterfall_of(accounts, rates)
    assert waterfall is not None
    exact = sum(rate.paid * account.billed_us / 3_600_000_000 for rate, account in zip(rates, accounts, strict=True))
    assert abs(Fraction(waterfall.paid) - exact) <= Fraction(len(accounts), 2)
    assert waterfall.actual == waterfall.on_demand - waterfall.paid
    eaten = waterfall.lost_work + waterfall.restarts + waterfall.checkpointing + waterfall.idle
    assert waterfall.theoretical - eaten == waterfall.actual
    assert min(waterfall.lost_work, waterfall.restarts, waterfall.checkpointing, waterfall.idle) >= 0


def _pictures_add_up(accounts: tuple[Account, ...]) -> None:
    for account in accounts:
        for finest_us in (0, 10**8):
            drawn = dict.fromkeys(Bucket, 0)
            at_us = account.attempt.begin_us + account.attempt.elapsed_us - account.billed_us
            for one in slices_of(account, finest_us):
                assert one.begin_us == at_us
                at_us += one.length_us
                for bucket, length_us in one.parts:
                    drawn[bucket] += length_us
            assert drawn == account.buckets


@settings(max_examples=300)
@given(st.lists(ATTEMPTS, min_size=1, max_size=6), st.booleans())
def test_lost_work_is_what_was_computed_again(attempts: list[Attempt], with_agent: bool) -> None:
    """Step by step: the truth says which steps of which attempt some later attempt began before."""
    world = live(attempts, with_agent=with_agent)
    accounts = accounts_of(timeline(world))
    for account in accounts:
        life = world.lives[account.attempt.number - 1]
        if account.attempt.start_step is None:
            continue
        later_unknown = any(not other.segments for other in world.lives[life.number :])
        if later_unknown:
            # An attempt that died before it could record anything has computed nothing either, as far as is known.
            continue
        assert account.attempt.reached_step == world.computed(life).stop - 1
        assert account.lost_steps == len(world.lost(life))
        if life.ended != "die":
            kept = [step for step in world.computed(life) if step not in set(world.lost(life))]
            kept_us = sum(life.step_us[step] for step in kept)
            startup_us = account.buckets[Bucket.STARTUP] if kept else 0
            if life.start_step + len(kept) in world.saved_steps or len(kept) == len(life.step_us) or not kept:
                assert account.buckets[Bucket.USEFUL] + startup_us == kept_us


@settings(max_examples=100)
@given(st.lists(ATTEMPTS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_what_comes_twice_counts_once(attempts: list[Attempt], rng: Any) -> None:
    world = live(attempts, with_agent=True)
    once = list(read_events(world.store))
    segments: dict[tuple[int, str, int], list[Recorded]] = {}
    for recorded in once:
        segments.setdefault((recorded.attempt, recorded.node, recorded.segment), []).append(recorded)
    twice = [one for events in segments.values() for one in events * rng.choice([1, 2, 3])]
    assert timeline_of(twice, now_unix_s=FAR) == timeline_of(once, now_unix_s=FAR)


@given(st.lists(st.integers(0, 10**13), max_size=12), st.decimals(0, 100, places=9))
def test_parts_of_a_cost_make_the_whole(parts_us: list[int], price: Decimal) -> None:
    rate = Fraction(price) * 1_000_000
    costs = shares(parts_us, rate)
    assert sum(costs) == round(rate * sum(parts_us) / 3_600_000_000)
    assert all(cost >= 0 for cost in costs)
    exact = [rate * part / 3_600_000_000 for part in parts_us]
    assert all(abs(cost - part) <= 1 for cost, part in zip(costs, exact, strict=True))


# ---- a small run, added up by hand


def by_hand() -> World:
    """Two machines. The first dies 3 steps after its save; the second is told to go; the third attempt finishes on its machine."""
    world = World(MemoryStore())
    spot = {"market": "spot", "price_per_hour": "1.80", "on_demand_price_per_hour": "3.60"}
    world.begin(machine="a", startup_us=10_000_000, restore_us=999_000, prep_us=2_000_000, facts=spot)
    for step in range(10):
        world.do_step(21_000_000 if step == 0 else 1_000_000, 500_000)
    world.save(400_000)
    for _ in range(3):
        world.do_step(1_000_000, 500_000)
    world.pulse()
    world.do_step(1_000_000, 500_000)
    world.end("die")

    world.begin(machine="b", gap_us=100_000_000, startup_us=12_000_000, restore_us=4_999_000, facts=spot)
    for _ in range(6):
        world.do_step(1_000_000, 500_000)
    world.spend(Doing.EVALUATION, 7_000_000)
    world.end("leave")

    world.begin(machine="b", gap_us=5_000_000, startup_us=11_000_000, restore_us=2_999_000, facts=spot)
    for _ in range(4):
        world.do_step(1_000_000, 500_000)
    world.save(600_000)
    world.end("finish")
    return world


def test_by_hand() -> None:
    accounts = accounts_of(timeline(by_hand()))
    first, second, third = ({bucket: us / 1e6 for bucket, us in one.buckets.items() if us} for one in accounts)
    # The first step took 20 s more than the others. Steps 11 to 13, each with half a second of waiting, were lost; step 14 and its
    # 1.5 s were never recorded.
    assert first == {
        Bucket.USEFUL: 10.0, Bucket.DATA: 5.0, Bucket.SAVE: 0.4, Bucket.INITIALISATION: 10.0, Bucket.RESTORE: 1.0,
        Bucket.PREPARATION: 2.0, Bucket.STARTUP: 20.0, Bucket.LOST: 4.5,
    }  # fmt: skip
    assert accounts[0].attempt.end_is_assumed
    assert [one.lost_steps for one in accounts] == [3, 0, 0]
    assert second == {
        Bucket.USEFUL: 6.0, Bucket.DATA: 3.0, Bucket.EVALUATION: 7.0, Bucket.SAVE: 0.03, Bucket.INITIALISATION: 12.0,
        Bucket.RESTORE: 5.0,
    }  # fmt: skip
    # The machine stayed, so the five seconds between were paid for.
    assert third == {
        Bucket.USEFUL: 4.0, Bucket.DATA: 2.0, Bucket.SAVE: 0.6, Bucket.INITIALISATION: 11.0, Bucket.RESTORE: 3.0,
        Bucket.RECOVERY: 5.0,
    }  # fmt: skip
    assert [one.billed_us for one in accounts] == [52_900_000, 33_030_000, 25_600_000]
    # 100 s, and what the first machine did after its last word, 1.5 s.
    assert [one.queue_wait_us for one in accounts] == [0, 101_500_000, 0]


def test_dollars_by_hand() -> None:
    made = report_of("memory://run", timeline(by_hand()), Prices())
    # $1.80 an hour is 500 micro-dollars a second; on demand it is twice that.
    assert made.total.cost_usd == 0.055765
    assert made.savings is not None
    # Work: 20 s useful, 10 s of data, 7 s of evaluation, and one start of 33 s.
    assert made.savings.on_demand_usd == 0.07
    assert made.savings.theoretical_usd == 0.035
    assert made.savings.lost_work_usd == 0.00225
    assert made.savings.restarts_usd == 0.018
    assert made.savings.checkpointing_usd == 0.000515
    assert made.savings.idle_usd == 0.0
    assert made.savings.actual_usd == 0.014235
    assert [attempt.interruption_usd for attempt in made.attempts] == [0.01075, 0.0095, None]
    assert made.restarts.by_cause == {"died without a word": 1, "preempted": 1}
    assert made.restarts.lost_steps_each == 1.5
    assert made.total.saves.count == 3
    assert made.total.saves.notice_to_durable_s == 1.25
    assert _sums_to(made)


def _sums_to(made: Report) -> bool:
    figures = [made.total, *(attempt.figures for attempt in made.attempts)]
    return all(
        sum(Decimal(repr(seconds)) for seconds in one.buckets_s.values()) == Decimal(repr(one.billed_s))
        for one in figures
    )


def test_an_evaluation_that_was_cut_short_is_lost_though_no_step_is() -> None:
    world = World(MemoryStore())
    world.begin(machine="a")
    for _ in range(3):
        world.do_step(1_000_000)
    world.spend(Doing.EVALUATION, 4_000_000)
    world.save(0)
    world.spend(Doing.EVALUATION, 9_000_000)
    world.pulse()
    world.end("die")
    world.begin(machine="a")
    world.end("finish")
    first, _ = accounts_of(timeline(world))
    assert (first.lost_steps, first.buckets[Bucket.LOST]) == (0, 9_000_000)
    assert (first.buckets[Bucket.EVALUATION], first.buckets[Bucket.USEFUL]) == (4_000_000, 3_000_000)


# ---- what is not recorded


def test_the_agent_knows_what_a_dead_trainer_did() -> None:
    world = World(MemoryStore(), with_agent=True)
    world.begin(machine="a")
    for _ in range(10):
        world.do_step(1_000_000)
    world.save(0)
    for _ in range(5):
        world.do_step(1_000_000)
    world.end("die", after_us=200_000)
    world.begin(machine="a", gap_us=3_000_000)
    world.do_step(1_000_000)
    world.end("finish")
    first, second = accounts_of(timeline(world))
    assert first.attempt.reached_step == 15
    assert (first.lost_steps, first.buckets[Bucket.LOST]) == (5, 5_000_000)
    assert first.buckets[Bucket.IDLE] == 200_000
    assert first.billed_us == 15_000_000 + 6_001_000 + 200_000
    assert not first.attempt.end_is_assumed
    assert second.buckets[Bucket.RECOVERY] == 3_000_000


def test_where_an_attempt_began_may_not_be_known() -> None:
    world = World(MemoryStore(), with_agent=True)
    world.begin(machine="a")
    for _ in range(9):
        world.do_step(1_000_000)
    world.save(0)
    world.end("fail")
    world.begin(machine="a", is_heard=False)
    world.life.events.pop()
    world.flush()
    for _ in range(4):
        world.do_step(1_000_000)
    world.end("die")
    world.begin(machine="a")
    world.end("finish")
    seen = timeline(world)
    _, second, _ = accounts_of(seen)
    assert (second.attempt.start_step, second.attempt.reached_step, second.lost_steps) == (9, 13, 4)
    assert "attempt 2 did not record where it began: taken to be step 9" in seen.notes


@pytest.mark.parametrize("jump_us", [-(10**12), 10**12])
def test_a_clock_that_jumps_makes_no_time(jump_us: int) -> None:
    """On one machine the monotonic clock counts; between machines, what would be negative is nothing."""
    world = World(MemoryStore())
    world.begin(machine="a")
    world.do_step(1_000_000)
    world.save(0)
    world.jump(jump_us)
    world.do_step(1_000_000, logs=True)
    world.pulse()
    world.end("die")
    world.begin(machine="a", gap_us=7_000_000)
    world.save(0)
    world.end("leave")
    world.skew_us = -(10**13)
    world.begin(machine="b", gap_us=50_000_000)
    world.end("finish")
    seen = timeline(world)
    first, second, third = accounts_of(seen)
    assert second.buckets[Bucket.RECOVERY] == 7_000_000
    assert third.queue_wait_us == 0
    assert any("attempt 3 began" in note for note in seen.notes)
    assert first.billed_us < 60_000_000


def test_a_machine_costs_from_its_start_on() -> None:
    world = World(MemoryStore())
    started = {"machine_started_unix_s": s(world.now_us)}
    world.begin(machine="a", gap_us=40_000_000, facts=started)
    world.do_step(1_000_000)
    world.end("leave")
    world.begin(machine="a", gap_us=1_000_000, facts=started)
    world.end("leave")
    later = {"machine_started_unix_s": s(world.now_us + 30_000_000)}
    world.begin(machine="b", gap_us=100_000_000, facts=later)
    world.end("finish")
    first, second, third = accounts_of(timeline(world))
    assert first.buckets[Bucket.INITIALISATION] == 44_000_000
    assert second.attempt.boot_us == 0
    assert (third.buckets[Bucket.RECOVERY], third.queue_wait_us) == (70_000_000, 30_000_000)


def test_a_new_generation_loses_nothing() -> None:
    world = World(MemoryStore())
    world.begin(machine="a")
    world.do_step(1_000_000)
    world.save(0)
    world.end("leave")
    world.saved_steps.clear()
    world.begin(machine="a", facts={"generation": 2})
    world.do_step(1_000_000)
    world.end("finish")
    assert [one.lost_steps for one in accounts_of(timeline(world))] == [0, 0]


def test_running_is_not_dead() -> None:
    world = World(MemoryStore())
    world.begin(machine="a")
    world.do_step(1_000_000)
    world.pulse()
    for later_s, ending in ((30.0, "running"), (300.0, "died without a word")):
        seen = timeline_of(read_events(world.store), now_unix_s=world.now_us / 1e6 + later_s)
        assert seen.attempts[0].ending == ending
        assert bool(seen.notes) == (ending != "running")


@pytest.mark.parametrize(
    "value",
    [None, True, "x", [], {}, -1, float("inf"), 10**400, -(10**400), 2.0**70],
    ids=lambda value: repr(value)[:9],
)
def test_nonsense_in_an_event_is_no_reason_to_fail(value: Any) -> None:
    import msgspec

    world = World(MemoryStore())
    world.begin(machine="a")
    world.do_step(1_000_000)
    world.save(0)
    fields = {doing.field: value for doing in Doing} | dict.fromkeys(
        ["step", "previous_step", "restored", "generation", "machine", "boot", "price_per_hour", "code", "first_step_s",
         "stall_s", "durable_s", "sent_bytes", "monotonic_s", "machine_started_unix_s", "lasted_s", "progress", "ending"], value,
    )  # fmt: skip
    names = ["attempt.claimed", "attempt.started", "progress", "save.committed", "attempt.ended", "attempt.leaving"]
    seen = list(read_events(world.store))
    for number, name in enumerate(names):
        event = msgspec.structs.replace(seen[0].event, name=name, fields=fields)
        seen.append(Recorded(1, "0", event, 9, number))
    made = report_of("memory://run", timeline_of(seen, now_unix_s=FAR), Prices())
    assert made.total.goodput is not None
    assert 0 <= made.total.goodput <= 1
