"""Two controllers count the same money at the same moment: what is set aside in all never passes the cap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fleet_world import World
from imagined import Fuse, GivenUp

from holdfast.core.clock import Clock
from holdfast.core.ids import seeded_tokens
from holdfast.core.launches import grant_key, reservation_key
from holdfast.fleet.instructions import Give
from holdfast.fleet.money import as_grant, budget_of
from holdfast.fleet.records import RunRecords
from holdfast.fleet.view import Metered, RunView, see


class Between(Fuse):
    """In the middle of a controller's work, before each of these requests, something else happens."""

    def __init__(self, happens: Callable[[], None], every: int, offset: int) -> None:
        super().__init__()
        self._happens, self._every, self._offset = happens, every, offset
        self._busy = False

    def around(self, call: Callable[[], Any]) -> Any:
        self.count += 1
        if not self._busy and self.count % self._every == self._offset:
            self._busy = True
            try:
                self._happens()
            finally:
                self._busy = False
        return super().around(call)


def set_aside_microusd(world: World) -> int:
    """By what stands in the store, and what machines have cost to this moment."""
    clock: Clock = world.clock
    view = RunView()
    for event in RunRecords(world.store, clock=clock, tokens=seeded_tokens(0)).read():
        view = see(view, event)
    for machine in world.cloud.machines_:
        if view.of(machine.launch).ended is None:
            end_s = machine.gone_s if machine.gone_s is not None else world.cloud.now_s
            billed_s = max(60, end_s - machine.created_s)
            view = see(view, Metered(machine.launch, billed_s, world.cloud.true_bill(machine)))
    return budget_of(view).reserved_microusd


@pytest.mark.parametrize("offset", [0, 2])
def test_another_controller_acts_between_any_two_requests(offset: int) -> None:
    """Money for one machine and a little more: renewals and a replacement both want the rest."""
    cap = 1_600_000
    world = World(budget_microusd=cap, work_s=3000)
    other = world.controller()
    fuse = Between(lambda: check(other.step()), 5, offset)
    first = world.controller(fuse)

    def check(over: object) -> None:
        assert set_aside_microusd(world) <= cap, world.story()

    over = None
    for turn in range(600):
        machine = world.working()
        if machine is not None and turn % 40 == 30 and machine.told_at_s is None:
            world.cloud.preempt(machine, 120)
        over = first.step()
        check(over)
        world.check()
        if over is not None:
            break
        world.cloud.advance(10)
    assert over is not None, world.story()
    assert over.outcome in ("done", "budget"), over
    world.abandon(1200)
    world.check_end(booked=False)
    assert sum(event.name == "launch.granted" for event in world.sink.events) >= 3


def test_who_counted_without_the_newest_reservation_gives_nothing() -> None:
    """Both have decided, on the same knowledge, to give something else; only one of them can, the other one counts again."""
    world = World(budget_microusd=9_000_000)
    first, other = world.controller(), world.controller()
    for _ in range(20):
        assert first.step() is None
        assert other.step() is None
        world.cloud.advance(10)
    (launch,) = first.view.launches
    grant = as_grant(launch.grants[0])
    longer = [Give(part=part, grant=replace(grant, lifetime_s=grant.lifetime_s + part), reasons=()) for part in (1, 2)]
    first._give(longer[0])
    other._give(longer[1])
    given = {entry.key for entry in world.store.list("control/") if "/grant-" in entry.key}
    assert given == {grant_key(1, 0), grant_key(1, 1)}
    assert other.view.reserved(1, 1) is not None
    assert other.view.reserved(1, 2) is None
    other._give(longer[1])
    assert other.view.reserved(1, 2) is not None


def test_what_was_set_aside_and_not_given_is_given_by_the_next_controller() -> None:
    world = World(budget_microusd=9_000_000)
    dies_at = reservation_key(1)

    class DiesAfterReserving(Fuse):
        def around(self, call: Callable[[], Any]) -> Any:
            result = super().around(call)
            if any(entry.key == dies_at for entry in world.store.list("control/reserved/")):
                raise GivenUp
            return result

    with pytest.raises(GivenUp):
        world.controller(DiesAfterReserving()).step()
    assert [entry.key for entry in world.store.list("control/") if "/grant-" in entry.key] == []
    over = world.play()
    assert over.outcome == "done"
    (first, *_) = [entry.key for entry in world.store.list("control/") if "/grant-" in entry.key]
    assert first == grant_key(1, 0)
    world.check_end()
