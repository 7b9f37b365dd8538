"""The protocol, in a simulated world: whatever is written in whatever order, through a store that misbehaves, whoever is killed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from controlling import Controller, words_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sim import SimMachine, World

from holdfast.core.contract import EXIT_DONE, EXIT_FENCED, EXIT_LIMIT, EXIT_PREEMPTED, EXIT_USAGE
from holdfast.core.launches import Holder, Pulse, holder_key, pulse_key
from holdfast.core.sealed import unseal
from holdfast.notice.base import Notice, NoticeKind


def world_of(seed: int = 0, *, job: bool = True) -> tuple[World, Controller]:
    world = World(seed)
    controller = Controller(world.store)
    if job:
        controller.job()
    return world, controller


def at(world: World, when_s: float, act: object) -> None:
    world.start(when_s, f"controller at {when_s}", act)  # type: ignore[arg-type]


def kinds(world: World, launch: int) -> list[str]:
    return [word.kind for word in words_of(world.store, launch)]


def test_a_life_without_trouble_says_what_it_does_and_how_far_it_is() -> None:
    world, controller = world_of()
    controller.intent(1)
    controller.grant(1, 0, 3600)
    controller.answer(1)
    machine = SimMachine(world, 1, "m", 5.0).begin()
    world.run()
    words = words_of(world.store, 1)
    assert [word.kind for word in words] == ["claimed", "released"]
    assert words[0].attempt == 1
    assert words[1].exit_code == machine.exit_code == EXIT_DONE
    pulse = unseal(world.store.get(pulse_key(1), max_bytes=1 << 20), Pulse, what="pulse")
    assert pulse.kept_step == 600 or pulse.kept_step >= 570
    assert 540 <= pulse.kept_work_s <= 600


def test_a_grant_that_comes_late_is_waited_for_and_one_that_never_comes_ends_the_machine() -> None:
    world, controller = world_of()
    controller.intent(1)
    at(world, 200, lambda: controller.grant(1, 0, 3600))
    late = SimMachine(world, 1, "late", 0.0).begin()
    controller.intent(2)
    never = SimMachine(world, 2, "never", 0.0).begin()
    world.run()
    assert late.exit_code == 0
    assert late.worked[0][0] >= 1200
    assert never.exit_code == EXIT_LIMIT
    assert not never.worked
    assert never.left_s is not None
    assert never.left_s <= never.boot_s + never.boot_limit_s + 65


def test_the_grant_holds_to_the_second_and_renewals_move_it_in_whatever_order_they_come() -> None:
    world, controller = world_of()
    controller.intent(1)
    controller.grant(1, 0, 300)
    # Number 2 is there before number 1, and number 3 is shorter: the longest holds.
    at(world, 100, lambda: controller.grant(1, 2, 900))
    at(world, 130, lambda: controller.grant(1, 1, 600))
    at(world, 700, lambda: controller.grant(1, 3, 700))
    machine = SimMachine(world, 1, "m", 0.0, needs_s=10_000, near=False).begin()
    world.run()
    assert machine.exit_code == EXIT_LIMIT
    assert machine.worked[0][1] <= machine.boot_s + 900 + 60
    assert machine.worked[0][1] >= machine.boot_s + 800
    assert machine.saved_s[-1] == machine.worked[0][1], "the last save is made within the grace"
    stops = [limits.stop_at_s for limits in machine.all_limits]
    assert stops == sorted(stops)


def test_a_machine_that_is_suspended_past_its_grant_or_ignores_its_end_does_nothing_after_it() -> None:
    world, controller = world_of()
    for launch in (1, 2):
        controller.intent(launch)
        controller.grant(launch, 0, 300)
    asleep = SimMachine(world, 1, "asleep", 0.0, needs_s=10_000).begin()
    assert asleep.actor is not None
    asleep.actor.stopped = (1100.0, 9000.0)
    deaf = SimMachine(world, 2, "deaf", 0.0, needs_s=10_000, ignores_stop=True).begin()
    world.run()
    assert asleep.exit_code is deaf.exit_code is None, "the watchdog has ended both"
    assert asleep.worked[0][1] <= 1300
    assert deaf.worked[0][1] <= deaf.boot_s + 360
    assert kinds(world, 1) == kinds(world, 2) == ["claimed"]


def test_who_was_given_up_does_not_work_and_who_is_given_up_while_it_works_stops() -> None:
    world, controller = world_of()
    controller.intent(1)
    controller.grant(1, 0, 3600)
    controller.answer(1, "void")
    void = SimMachine(world, 1, "void", 0.0).begin()
    controller.intent(2)
    controller.grant(2, 0, 3600)
    at(world, 200, lambda: controller.ended(2))
    zombie = SimMachine(world, 2, "zombie", 0.0, near=False).begin()
    world.run()
    assert (void.exit_code, void.worked, kinds(world, 1)) == (EXIT_FENCED, [], [])
    assert zombie.worked[0][1] <= 1000 + 200 + 12 * 6 + 40, "the next list shows it"


@pytest.mark.parametrize("kind", ["stop", "home"])
def test_commands_before_and_after_the_claim(kind: str) -> None:
    world, controller = world_of()
    for launch in (1, 2):
        controller.intent(launch, predecessor=None if launch == 1 else 7)
        controller.grant(launch, 0, 3600)
        at(world, 100, lambda launch=launch: controller.command(launch, 0, kind))  # type: ignore[misc, arg-type]
    working = SimMachine(world, 1, "working", 0.0).begin()
    waiting = SimMachine(world, 2, "waiting", 0.0).begin()
    world.run()
    if kind == "stop":
        assert kinds(world, 1) == ["claimed", "released"]
        assert words_of(world.store, 1)[-1].reasons[:2] == ("told to stop", "said so")
        assert working.worked[0][1] <= 1000 + 100 + 20
        assert (waiting.exit_code, kinds(world, 2)) == (143, ["ready", "released"])
    else:
        assert working.exit_code == 0, "who has claimed is no standby"
        assert (waiting.exit_code, kinds(world, 2)) == (EXIT_DONE, ["ready"])
    assert not waiting.worked


def notice(world: World, kind: NoticeKind, left_s: float | None, name: str = "n") -> Notice:
    now = world.unix_s()
    deadline = None if left_s is None else now + left_s
    return Notice(kind=kind, deadline_unix_s=deadline, source="test:spot", id=name, heard_unix_s=now)


def test_a_standby_is_ready_before_it_is_needed_and_a_withdrawn_notice_does_not_let_it_begin() -> None:
    world, controller = world_of()
    controller.intent(1)
    controller.intent(2, predecessor=1)
    for launch in (1, 2):
        controller.grant(launch, 0, 3600)
    old = SimMachine(world, 1, "old", 0.0, needs_s=800.0).begin()
    new = SimMachine(world, 2, "new", 100.0, near=False).begin()

    def hear(kind: NoticeKind, left_s: float | None, name: str = "n") -> None:
        assert old.life is not None
        old.life.notices.heard(notice(world, kind, left_s, name))

    at(world, 150, lambda: hear(NoticeKind.REBALANCE, None, "advice"))
    at(world, 200, lambda: hear(NoticeKind.PREEMPTION, 30.0))
    at(world, 210, lambda: hear(NoticeKind.WITHDRAWN, None))
    world.run()
    assert kinds(world, 1) == ["claimed", "notice", "notice", "notice", "released"], "the advice still stands"
    assert [word.deadline_s for word in words_of(world.store, 1)] == [None, None, 30, None, None]
    words = words_of(world.store, 2)
    assert [word.kind for word in words] == ["ready", "claimed", "released"]
    assert words[1].attempt == 2
    assert new.prepared_s[0] < 1150
    assert new.worked[0][0] >= old.worked[0][1]


def test_a_deadline_lets_the_standby_begin_only_with_its_grace() -> None:
    world, controller = world_of()
    controller.intent(1)
    controller.intent(2, predecessor=1)
    for launch in (1, 2):
        controller.grant(launch, 0, 3600, grace_s=60)
    old = SimMachine(world, 1, "old", 0.0, killed_at_s=233.0).begin()
    new = SimMachine(world, 2, "new", 50.0).begin()

    def hear() -> None:
        assert old.life is not None
        old.life.notices.heard(notice(world, NoticeKind.PREEMPTION, 30.0))

    at(world, 200, hear)
    world.run()
    assert kinds(world, 1) == ["claimed", "notice"]
    assert 1200 + 30 + 60 <= new.worked[0][0] <= 1200 + 30 + 60 + 15


def test_a_standby_of_a_standby_waits_for_who_really_works() -> None:
    world, controller = world_of()
    controller.intent(1)
    controller.intent(2, predecessor=1)
    controller.intent(3, predecessor=2)
    for launch in (1, 2, 3):
        controller.grant(launch, 0, 3600)
    first = SimMachine(world, 1, "first", 0.0, needs_s=500.0).begin()
    SimMachine(world, 2, "second", 10.0, killed_at_s=100.0).begin()
    at(world, 150, lambda: controller.ended(2))
    third = SimMachine(world, 3, "third", 20.0).begin()
    world.run()
    assert third.worked[0][0] >= first.worked[0][1]
    assert words_of(world.store, 3)[1].attempt == 2


def test_a_standby_that_is_taken_away_itself_says_so_and_does_not_begin() -> None:
    world, controller = world_of()
    controller.intent(2, predecessor=1)
    controller.grant(2, 0, 3600)
    standby = SimMachine(world, 2, "standby", 0.0).begin()

    def hear() -> None:
        assert standby.life is not None
        standby.life.notices.heard(notice(world, NoticeKind.PREEMPTION, 120.0))

    at(world, 60, hear)
    world.run()
    assert (standby.exit_code, standby.worked) == (EXIT_PREEMPTED, [])
    assert kinds(world, 2) == ["ready", "notice", "released"]


def test_without_a_job_or_an_intent_nothing_is_done() -> None:
    world, controller = world_of(job=False)
    nobody = SimMachine(world, 1, "nobody", 0.0).begin()
    controller.intent(2)
    controller.grant(2, 0, 3600)
    idle = SimMachine(world, 2, "idle", 0.0).begin()
    world.run()
    assert nobody.exit_code == idle.exit_code == EXIT_USAGE
    assert kinds(world, 1) == []
    assert kinds(world, 2) == ["released"]


@dataclass(frozen=True)
class Scenario:
    """Three launches at most, the later ones standbys of the first, and whatever may happen to them."""

    seed: int
    rate: float
    boots: tuple[float, ...]
    twin: float | None
    """A second machine of the first launch boots then."""
    grants: tuple[tuple[int, float, int, int], ...]
    """Launch, when, part, lifetime."""
    answers: tuple[tuple[int, float, str], ...]
    commands: tuple[tuple[int, float, str], ...]
    ended: tuple[tuple[int, float], ...]
    notices: tuple[tuple[int, float, float | None], ...]
    kills: tuple[tuple[int, float], ...]
    stops: tuple[tuple[int, float, float], ...]
    near: bool


moments = st.floats(0, 900).map(lambda value: round(value, 1))
launches = st.integers(1, 3)
scenarios = st.builds(
    Scenario,
    seed=st.integers(0, 1 << 16),
    rate=st.sampled_from((0.0, 0.1, 0.4, 0.7)),
    boots=st.lists(st.floats(0, 200).map(lambda value: round(value, 1)), min_size=1, max_size=3).map(tuple),
    twin=st.none() | moments,
    grants=st.lists(
        st.tuples(launches, moments, st.integers(0, 4), st.integers(1, 40).map(lambda k: 50 * k)), max_size=8
    ).map(tuple),
    answers=st.lists(st.tuples(launches, moments, st.sampled_from(("machine", "machine", "void"))), max_size=3).map(
        tuple
    ),
    commands=st.lists(st.tuples(launches, moments, st.sampled_from(("stop", "home"))), max_size=2).map(tuple),
    ended=st.lists(st.tuples(launches, moments), max_size=1).map(tuple),
    notices=st.lists(st.tuples(launches, moments, st.none() | st.floats(5, 120)), max_size=3).map(tuple),
    kills=st.lists(st.tuples(launches, moments), max_size=1).map(tuple),
    stops=st.lists(st.tuples(launches, moments, st.floats(10, 3000)), max_size=1).map(tuple),
    near=st.booleans(),
)


def play(scenario: Scenario) -> tuple[World, dict[str, SimMachine]]:
    world, controller = world_of(scenario.seed)
    machines: dict[str, SimMachine] = {}
    boots = [(launch, f"m{launch}", boot) for launch, boot in enumerate(scenario.boots, start=1)]
    boots += [] if scenario.twin is None else [(1, "twin", scenario.twin)]
    for launch in range(1, len(scenario.boots) + 1):
        controller.intent(launch, predecessor=None if launch == 1 else launch - 1)
    for launch, name, boot in boots:
        machines[name] = SimMachine(
            world, launch, name, boot, fault_seed=scenario.seed + len(machines), fault_rate=scenario.rate, near=scenario.near,
            needs_s=400.0, boot_limit_s=600.0,
        ).begin()  # fmt: skip
    for number, (launch, when, part, lifetime) in enumerate(scenario.grants):
        world.start(when, f"grant {number}", lambda a=launch, b=part, c=lifetime: controller.grant(a, b, c))  # type: ignore[misc]
    for launch, when, outcome in scenario.answers:
        world.start(when, "answer", lambda a=launch, b=outcome: controller.answer(a, b))  # type: ignore[misc]
    for part, (launch, when, kind) in enumerate(scenario.commands):
        world.start(when, "command", lambda a=launch, b=part, c=kind: controller.command(a, b, c))  # type: ignore[misc]
    for launch, when in scenario.ended:
        world.start(when, "ended", lambda a=launch: controller.ended(a))  # type: ignore[misc]
    for number, (launch, when, left_s) in enumerate(scenario.notices):
        machine = machines.get(f"m{launch}")
        if machine is not None:

            def hear(machine: SimMachine = machine, left_s: float | None = left_s, number: int = number) -> None:
                if machine.life is not None:
                    kind = NoticeKind.REBALANCE if left_s is None else NoticeKind.PREEMPTION
                    machine.life.notices.heard(notice(world, kind, left_s, str(number)))

            world.start(when, "notice", hear)
            if left_s is not None:
                machine.killed_at_s = min(machine.killed_at_s, when + left_s)
    for launch, when in scenario.kills:
        if f"m{launch}" in machines:
            machines[f"m{launch}"].killed_at_s = min(machines[f"m{launch}"].killed_at_s, when)
    for launch, when, lasts in scenario.stops:
        actor = machines[f"m{launch}"].actor if f"m{launch}" in machines else None
        if actor is not None:
            actor.stopped = (1000 + when, 1000 + when + lasts)
    world.run()
    return world, machines


def check(scenario: Scenario, world: World, machines: dict[str, SimMachine]) -> None:
    ended_at = dict(reversed([(launch, 1000 + when) for launch, when in scenario.ended]))
    for machine in machines.values():
        granted = {
            part: (when, lifetime)
            for launch, when, part, lifetime in reversed(scenario.grants)
            if launch == machine.launch
        }
        # Put-if-absent: of two grants with one number the first is the one that counts.
        first: dict[int, tuple[float, int]] = {}
        for launch, when, part, lifetime in sorted(scenario.grants, key=lambda each: each[1]):
            if launch == machine.launch:
                first.setdefault(part, (when, lifetime))
        assert set(first) == set(granted)
        for began_s, until_s in machine.worked:
            heard = [lifetime for when, lifetime in first.values() if 1000 + when <= began_s]
            assert heard, "no machine works without a grant"
            longest = max(lifetime for when, lifetime in first.values() if 1000 + when <= until_s)
            assert until_s <= machine.boot_s + longest + 60, "a grant is the end"
        if machine.left_s is not None and not machine.worked:
            # Also who never works is gone by then, its last word included.
            ends = [
                machine.boot_s + machine.boot_limit_s + 40,
                *(machine.boot_s + life + 60 for _, life in first.values()),
            ]
            suspended = max((lasts for launch, _, lasts in scenario.stops if machine.name == f"m{launch}"), default=0)
            assert machine.left_s <= max(ends) + 65 + suspended
    for launch in range(1, len(scenario.boots) + 1):
        words = words_of(world.store, launch)
        claims = [word for word in words if word.kind == "claimed"]
        here = [machine for machine in machines.values() if machine.launch == launch]
        assert len(claims) <= 1
        assert sum(bool(machine.worked) for machine in here) <= 1, "one machine works for a launch"
        for machine in here:
            if machine.worked:
                assert claims
                assert claims[0].machine == machine.name
                holder = unseal(world.store.get(holder_key(launch), max_bytes=1 << 20), Holder, what="holder")
                assert holder.machine == machine.name
    for old, new in itertools.combinations(sorted(scenario_machines(machines)), 2):
        before, after = machines[f"m{old}"], machines[f"m{new}"]
        holders = [machine for machine in machines.values() if machine.launch == old and machine.worked]
        if not holders or not after.worked:
            continue
        before = holders[0]
        # Handover, not theft: unless the controller has said that it is over, or the provider had taken it (a suspended machine
        # cannot say anything), nothing is saved by the old one after the new one has begun.
        over = ended_at.get(old, float("inf")) <= after.worked[0][0]
        if not over:
            assert all(moment <= after.worked[0][0] for moment in before.saved_s)


def scenario_machines(machines: dict[str, SimMachine]) -> list[int]:
    return [machine.launch for name, machine in machines.items() if name.startswith("m")]


QUIET = Scenario(1, 0.0, (0.0, 10.0), None, ((1, 0.0, 0, 2000), (2, 0.0, 0, 2000)), (), (), (), (), (), (), True)


@settings(max_examples=100)
@given(scenarios)
@example(QUIET)
def test_whatever_is_written_whenever_through_whatever_store(scenario: Scenario) -> None:
    check(scenario, *play(scenario))


@pytest.mark.long
@settings(max_examples=1500)
@given(scenarios)
def test_whatever_is_written_whenever_many_times(scenario: Scenario) -> None:
    check(scenario, *play(scenario))


@pytest.mark.parametrize("seed", range(6))
def test_of_two_machines_of_one_launch_exactly_one_works(seed: int) -> None:
    world, controller = world_of(seed)
    controller.intent(1)
    controller.grant(1, 0, 3000)
    twins = [
        SimMachine(
            world, 1, name, 0.1 * number, fault_seed=seed * 2 + number, fault_rate=0.4, needs_s=100.0, near=False,
            boot_limit_s=2000.0,
        ).begin()
        for number, name in enumerate(("one", "other"))
    ]  # fmt: skip
    world.run()
    assert sorted(bool(machine.worked) for machine in twins) == [False, True]
    assert sorted(machine.exit_code or 0 for machine in twins) == [EXIT_DONE, EXIT_FENCED]
