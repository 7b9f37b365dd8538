"""What every `provider.Instances` must do, as tests: subclass `InstancesConformance` and say how to reach the cloud.

    class TestMyCloud(InstancesConformance):
        @pytest.fixture
        def cloud(self): ...                 # yields Instances on which machines cost nothing: an emulator, a rehearsal

        def allowed(self, cloud): ...        # pools in which a machine can be had now, all on one market

How much is demanded follows from `cloud.guarantees`. Where an emulator does less than its cloud, the class says so with the
attributes below; the test is then skipped with that reason, and the provider's own tests must show it on the requests instead.
Every test works in a fleet of its own and ends what it has launched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest

from holdfast.core.errors import LaunchFailed, OutcomeUnknown, UsageError
from holdfast.core.failures import Failure
from holdfast.core.ids import random_token
from holdfast.core.launches import Allowed, Pool, client_token
from holdfast.provider.base import Instances, Leftover, Machine, MachineSpec, Order, Wanted

__all__ = ["InstancesConformance"]

_SCRIPT = "#!/bin/sh\nexec sleep 900\n"
_MOST_USER_DATA_BYTES = 16 * 1024
_EXPIRES_UNIX_S = 4_000_000_000
_NOWHERE = "nowhere-9z"


class InstancesConformance:
    """The suite. Attributes and the methods without an underscore are for subclasses to set."""

    emulates_tokens = True
    """False: the emulator forgets tokens, whatever the cloud guarantees."""
    emulates_other_requests = True
    """False: the emulator takes the same token with another request."""
    emulates_capacity = True
    """False: the emulator finds a machine in a pool that does not exist."""
    unknown_machine_id = "i-0123456789abcdef0"
    """Looks like a machine of this cloud, and is none."""
    spec = MachineSpec(disk_gib=8)
    give_up_s = 60.0
    poll_s = 0.05

    # What a subclass says of its cloud.

    def allowed(self, cloud: Instances) -> tuple[Allowed, ...]:
        raise NotImplementedError("name at least one pool in which a machine can be had")

    def another_client(self, cloud: Instances) -> Instances:
        """A client that shares no memory with the first: what a second laptop, or a restarted controller, has."""
        return cloud

    def losing_answers(self, cloud: Instances) -> AbstractContextManager[object] | None:
        """While it is open, create calls are carried out and their answers are lost. None: the emulator cannot do it."""
        return None

    def pass_time(self, cloud: Instances, seconds: float) -> None:
        """Let so much of the cloud's time pass."""
        cloud.clock.sleep(seconds)

    # Building blocks.

    @pytest.fixture
    def fleet(self, cloud: Instances) -> Iterator[str]:
        name = f"conformance-{random_token()[:12]}"
        yield name
        cloud.terminate([machine for machine in cloud.machines(name) if machine.state != "gone"])

    def order(self, cloud: Instances, fleet: str, launch: int = 1, **changes: Any) -> Order:
        run_id = changes.pop("run_id", f"run-{fleet[-12:]}")
        usual = Order(
            token=client_token(f"{fleet}/{run_id}", launch),
            fleet=fleet,
            run_id=run_id,
            launch=launch,
            allowed=self.allowed(cloud),
            spec=self.spec,
            user_data=_SCRIPT,
            lifetime_s=3600,
            expires_unix_s=_EXPIRES_UNIX_S,
            tags={"team": "conformance"},
        )
        return replace(usual, **changes)

    def until(self, cloud: Instances, found: Callable[[], bool], what: str) -> None:
        """Wait for it; the list may be as old as the provider says, and a little more."""
        for _ in range(int(self.give_up_s / self.poll_s)):
            if found():
                return
            time.sleep(self.poll_s)
        pytest.fail(f"{cloud.name}: {what}, after {self.give_up_s:.0f} s")

    def living(self, cloud: Instances, fleet: str, run_id: str | None = None) -> list[Machine]:
        return [each for each in cloud.machines(fleet, run_id) if each.state in ("pending", "running")]

    # The request.

    def test_a_request_is_json_and_nothing_but_the_order_goes_into_it(self, cloud: Instances, fleet: str) -> None:
        order = self.order(cloud, fleet)
        request = cloud.request(order)
        assert json.loads(json.dumps(request)) == request
        assert cloud.request(order) == request
        assert self.another_client(cloud).request(order) == request
        assert order.token in json.dumps(request)
        assert cloud.machines(fleet) == []

    def test_whatever_changes_in_the_order_changes_the_request(self, cloud: Instances, fleet: str) -> None:
        order = self.order(cloud, fleet)
        changes: list[dict[str, Any]] = [
            {"token": client_token(fleet, 77)},
            {"fleet": f"{fleet}-b"},
            {"run_id": "another-run"},
            {"launch": 2},
            {"user_data": _SCRIPT + "# another\n"},
            {"expires_unix_s": _EXPIRES_UNIX_S + 60},
            {"tags": {"team": "another"}},
            {"spec": replace(self.spec, disk_gib=self.spec.disk_gib + 1)},
        ]
        if cloud.guarantees.enforces_lifetime:
            changes.append({"lifetime_s": order.lifetime_s + 60})
        written = {json.dumps(cloud.request(replace(order, **change)), sort_keys=True) for change in changes}
        assert len(written | {json.dumps(cloud.request(order), sort_keys=True)}) == len(changes) + 1

    def test_the_request_is_complete(self, cloud: Instances, fleet: str) -> None:
        """Somebody who has only the JSON gets the machine that was ordered."""
        order = self.order(cloud, fleet, launch=7)
        written = json.dumps(cloud.request(order))
        self._is_of(self.another_client(cloud).create(json.loads(written)), order)

    @pytest.mark.parametrize("wrong", ["nothing allowed", "two markets", "another provider", "long user data"])
    def test_what_cannot_be_asked_for_is_a_usage_error(self, cloud: Instances, fleet: str, wrong: str) -> None:
        first = self.allowed(cloud)[0]
        market = "on-demand" if first.pool.market == "spot" else "spot"
        changes: dict[str, dict[str, Any]] = {
            "nothing allowed": {"allowed": ()},
            "two markets": {"allowed": (first, _moved(first, market=market))},
            "another provider": {"allowed": (_moved(first, provider="elsewhere"),)},
            "long user data": {"user_data": "#!/bin/sh\n" + "x" * _MOST_USER_DATA_BYTES},
        }
        with pytest.raises(UsageError):
            cloud.request(self.order(cloud, fleet, **changes[wrong]))

    # Birth.

    def test_a_machine_carries_its_tags_from_birth(self, cloud: Instances, fleet: str) -> None:
        order = self.order(cloud, fleet, launch=3)
        machine = cloud.create(cloud.request(order))
        self._is_of(machine, order)
        if cloud.guarantees.tags_at_birth and not cloud.guarantees.list_delay_s:
            assert [each.id for each in cloud.machines(fleet)] == [machine.id]
        self.until(cloud, lambda: bool(self.living(cloud, fleet)), "a machine that was created is not listed")
        (listed,) = self.living(cloud, fleet)
        self._is_of(listed, order)
        assert listed.id == machine.id
        assert listed.created_unix_s == machine.created_unix_s

    def test_a_list_shows_one_fleet_and_one_run(self, cloud: Instances, fleet: str) -> None:
        runs = {run_id: cloud.create(cloud.request(self.order(cloud, fleet, run_id=run_id))) for run_id in ("a", "b")}
        self.until(cloud, lambda: len(self.living(cloud, fleet)) == 2, "two machines are not listed")
        for run_id, machine in runs.items():
            assert [each.id for each in cloud.machines(fleet, run_id)] == [machine.id]
        assert cloud.machines(f"{fleet}-none") == []
        assert cloud.machines(fleet, "none") == []

    def test_a_pool_that_does_not_exist_gives_no_machine(self, cloud: Instances, fleet: str) -> None:
        if not self.emulates_capacity:
            pytest.skip("the emulator finds a machine anywhere")
        nowhere = _moved(self.allowed(cloud)[0], zone=_NOWHERE)
        with pytest.raises(LaunchFailed) as refused:
            cloud.create(cloud.request(self.order(cloud, fleet, allowed=(nowhere,))))
        assert refused.value.failure in (Failure.BAD_REQUEST, Failure.NO_CAPACITY)
        assert self.living(cloud, fleet) == []

    # Tokens.

    def test_the_same_request_again_is_the_same_machine(self, cloud: Instances, fleet: str) -> None:
        self._needs_tokens(cloud)
        request = cloud.request(self.order(cloud, fleet))
        first = cloud.create(request)
        assert cloud.create(json.loads(json.dumps(request))).id == first.id
        assert self.another_client(cloud).create(request).id == first.id
        self.until(cloud, lambda: bool(self.living(cloud, fleet)), "a machine that was created is not listed")
        self.pass_time(cloud, cloud.guarantees.list_delay_s)
        assert [each.id for each in self.living(cloud, fleet)] == [first.id]

    def test_the_same_request_at_once_is_one_machine(self, cloud: Instances, fleet: str) -> None:
        self._needs_tokens(cloud)
        request, callers = cloud.request(self.order(cloud, fleet)), 4
        barrier = Barrier(callers)

        def call(_: int) -> str | None:
            barrier.wait()
            try:
                return cloud.create(request).id
            except OutcomeUnknown:
                return None  # as when the same call is under way

        with ThreadPoolExecutor(callers) as pool:
            ids = set(pool.map(call, range(callers))) - {None}
        assert len(ids) == 1
        self.until(cloud, lambda: bool(self.living(cloud, fleet)), "a machine that was created is not listed")
        assert {each.id for each in self.living(cloud, fleet)} == ids

    def test_the_same_token_with_another_request_is_refused(self, cloud: Instances, fleet: str) -> None:
        self._needs_tokens(cloud)
        if not self.emulates_other_requests:
            pytest.skip("the emulator takes a token with another request")
        order = self.order(cloud, fleet)
        first = cloud.create(cloud.request(order))
        with pytest.raises(LaunchFailed) as refused:
            cloud.create(cloud.request(replace(order, user_data=_SCRIPT + "# another\n")))
        assert refused.value.failure is Failure.BAD_REQUEST
        self.until(cloud, lambda: bool(self.living(cloud, fleet)), "a machine that was created is not listed")
        assert [each.id for each in self.living(cloud, fleet)] == [first.id]

    def test_a_lost_answer_is_unknown_and_can_be_resolved(self, cloud: Instances, fleet: str) -> None:
        losing = self.losing_answers(cloud)
        if losing is None:
            pytest.skip("the emulator loses no answers")
        request = cloud.request(self.order(cloud, fleet))
        with losing, pytest.raises(OutcomeUnknown):
            cloud.create(request)
        self.until(cloud, lambda: bool(self.living(cloud, fleet)), "a machine whose answer was lost is not listed")
        (found,) = self.living(cloud, fleet)
        assert found.token == self.order(cloud, fleet).token
        if cloud.guarantees.honours_tokens and self.emulates_tokens:
            assert cloud.create(request).id == found.id

    # Death.

    def test_ending_is_repeatable_and_leaves_the_neighbours(self, cloud: Instances, fleet: str) -> None:
        stays, goes = (cloud.create(cloud.request(self.order(cloud, fleet, launch=number))) for number in (1, 2))
        for _ in range(2):
            cloud.terminate([goes])
        self.until(cloud, lambda: self._ids(cloud, fleet) == {stays.id}, "a machine that was ended still runs")
        cloud.terminate([goes])
        cloud.terminate([])
        for each in cloud.machines(fleet):
            if each.id == goes.id and each.state == "gone" and each.gone_unix_s is not None:
                assert each.gone_unix_s >= each.created_unix_s
        assert self._ids(cloud, fleet) == {stays.id}

    def test_what_is_gone_already_is_no_error(self, cloud: Instances, fleet: str) -> None:
        machine = cloud.create(cloud.request(self.order(cloud, fleet)))
        cloud.terminate([replace(machine, id=self.unknown_machine_id)])
        self.until(cloud, lambda: self._ids(cloud, fleet) == {machine.id}, "a machine that was created is not listed")

    def test_what_is_there_is_billed_and_what_is_gone_has_a_last_bill(self, cloud: Instances, fleet: str) -> None:
        machine = cloud.create(cloud.request(self.order(cloud, fleet)))
        first = cloud.bill(machine)
        assert not first.final
        assert first.billed_s >= cloud.guarantees.minimum_s
        cloud.terminate([machine])
        gone: list[Machine] = []

        def is_gone() -> bool:
            gone[:] = [each for each in cloud.machines(fleet) if each.id == machine.id and each.state == "gone"]
            return bool(gone)

        self.until(cloud, is_gone, "a machine that was ended is not shown as gone")
        self.until(cloud, lambda: cloud.bill(gone[0]).final, "the bill of a machine that is gone does not become final")
        last = cloud.bill(gone[0])
        assert last == cloud.bill(gone[0])
        assert last.billed_s >= first.billed_s
        assert last.microusd >= first.microusd

    def test_how_a_machine_is_made_ours_is_told(self, cloud: Instances) -> None:
        facts = cloud.boot_facts
        assert facts.end_command.strip()
        assert facts.folder.startswith("/")
        assert facts.boot_limit_s > 0
        assert json.loads(json.dumps(dict(facts.environment))) == facts.environment

    def test_the_moment_after_which_nobody_wants_it_can_be_moved(self, cloud: Instances, fleet: str) -> None:
        machine = cloud.create(cloud.request(self.order(cloud, fleet)))
        later_unix_s = machine.expires_unix_s + 3600
        cloud.extend(machine, later_unix_s)
        self.until(
            cloud,
            lambda: [each.expires_unix_s for each in self.living(cloud, fleet)] == [later_unix_s],
            "the tag that was moved is not listed",
        )
        (listed,) = self.living(cloud, fleet)
        assert replace(listed, expires_unix_s=machine.expires_unix_s).token == machine.token

    def test_nothing_is_left_over(self, cloud: Instances, fleet: str) -> None:
        assert cloud.leftovers(fleet) == []
        machine = cloud.create(cloud.request(self.order(cloud, fleet)))
        self.until(cloud, lambda: self._ids(cloud, fleet) == {machine.id}, "a machine that was created is not listed")
        cloud.terminate([machine])
        self.until(cloud, lambda: not self._ids(cloud, fleet), "a machine that was ended still runs")
        self.until(cloud, lambda: cloud.leftovers(fleet) == [], "something is left over")
        cloud.remove([])

    def test_leftovers_that_are_gone_are_no_error(self, cloud: Instances) -> None:
        pool = self.allowed(cloud)[0].pool
        gone = Leftover(
            kind="volume", id="vol-0123456789abcdef0", region=pool.region, microusd_h=0, expires_unix_s=0, run_id="none"
        )
        cloud.remove([gone])

    # What is asked before.

    def test_offers_have_what_is_wanted(self, cloud: Instances) -> None:
        pool = self.allowed(cloud)[0].pool
        offers = cloud.offers(Wanted(instance_types=(pool.instance_type,), regions=(pool.region,)))
        assert pool in [offer.pool for offer in offers]
        for offer in offers:
            assert offer.pool.instance_type == pool.instance_type
            assert offer.pool.region == pool.region
            assert offer.microusd_h >= 0
            assert offer.on_demand_microusd_h >= 0
        assert cloud.offers(Wanted(instance_types=("no-such-type-1",))) == []

    def test_a_preflight_looks_and_launches_nothing(self, cloud: Instances, fleet: str) -> None:
        checks = cloud.preflight(self.order(cloud, fleet))
        assert checks
        assert [check for check in checks if check.ok is False] == []
        assert all(check.name and check.said for check in checks)
        assert self.living(cloud, fleet) == []

    def _ids(self, cloud: Instances, fleet: str) -> set[str]:
        return {each.id for each in self.living(cloud, fleet)}

    def _needs_tokens(self, cloud: Instances) -> None:
        if not cloud.guarantees.honours_tokens:
            pytest.skip(f"{cloud.name} does not honour tokens")
        if not self.emulates_tokens:
            pytest.skip("the emulator forgets tokens")

    def _is_of(self, machine: Machine, order: Order) -> None:
        named = (machine.fleet, machine.run_id, machine.launch, machine.token, machine.expires_unix_s)
        assert named == (order.fleet, order.run_id, order.launch, order.token, order.expires_unix_s)
        assert machine.pool in [each.pool for each in order.allowed]
        assert machine.state in ("pending", "running")


def _moved(allowed: Allowed, **changes: Any) -> Allowed:
    pool = allowed.pool
    fields = {name: getattr(pool, name) for name in Pool.__struct_fields__}
    moved = Pool(**{**fields, **changes})
    return Allowed(
        pool=moved, ceiling_microusd_h=allowed.ceiling_microusd_h, on_demand_microusd_h=allowed.on_demand_microusd_h
    )
