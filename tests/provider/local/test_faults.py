"""What the cloud's API does wrong is what its configuration says, and its client says what may have happened."""

from __future__ import annotations

import time
from typing import Any

import pytest
from rehearsal import ON_DEMAND, SPOT, Rehearse
from waiting import eventually

from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError
from holdfast.core.failures import Failure
from holdfast.provider.base import Wanted

_SLEEP = "sleep 900"


@pytest.mark.parametrize(
    ("word", "failure"), [("throttle", Failure.THROTTLED), ("no-capacity", Failure.NO_CAPACITY)], ids=str
)
def test_a_launch_that_fails_makes_nothing(rehearse: Rehearse, word: str, failure: Failure) -> None:
    rehearsal = rehearse(faults={"script": {"create": [word]}, "retry_after_s": 7})
    order = rehearsal.order(_SLEEP)
    with pytest.raises(LaunchFailed) as refused:
        rehearsal.cloud.create(rehearsal.cloud.request(order))
    assert refused.value.failure is failure
    assert refused.value.retry_after_s == (7 if word == "throttle" else 0)
    assert rehearsal.cloud.machines("fleet") == []
    assert rehearsal.cloud.create(rehearsal.cloud.request(order)).token == order.token


def test_unknown_outcomes_become_known_by_token_or_list(rehearse: Rehearse) -> None:
    rehearsal = rehearse(faults={"script": {"create": ["error", "lost", "late"]}, "late_s": 0.3})
    cloud = rehearsal.cloud
    nothing, lost, late = (cloud.request(rehearsal.order(_SLEEP)) for _ in range(3))
    for request in (nothing, lost, late):
        with pytest.raises(OutcomeUnknown):
            cloud.create(request)
    assert [machine.token for machine in cloud.machines("fleet")] == [lost["token"]]
    with pytest.raises(OutcomeUnknown, match="RequestInProgress"):
        cloud.create(late)
    eventually(lambda: len(cloud.machines("fleet")) == 2)
    assert cloud.create(lost).token == lost["token"]
    assert cloud.create(late).token == late["token"]
    assert cloud.create(nothing).token == nothing["token"]
    assert len(cloud.machines("fleet")) == 3


def test_a_late_launch_may_find_no_capacity_any_more(rehearse: Rehearse) -> None:
    rehearsal = rehearse(faults={"script": {"create": ["late"]}, "late_s": 0.2})
    late = rehearsal.cloud.request(rehearsal.order(_SLEEP))
    with pytest.raises(OutcomeUnknown):
        rehearsal.cloud.create(late)
    rehearsal.cloud.set_pool(SPOT, capacity=0)
    eventually(lambda: rehearsal.entries("refused"))
    assert rehearsal.cloud.machines("fleet") == []
    with pytest.raises(LaunchFailed):
        rehearsal.cloud.create(late)


def test_a_provider_that_forgets_tokens_makes_two(rehearse: Rehearse) -> None:
    rehearsal = rehearse(faults={"tokens": "ignored"})
    assert not rehearsal.cloud.guarantees.honours_tokens
    request = rehearsal.cloud.request(rehearsal.order(_SLEEP))
    assert rehearsal.cloud.create(request).id != rehearsal.cloud.create(request).id


def test_a_list_is_as_old_as_it_is_said_to_be(rehearse: Rehearse) -> None:
    rehearsal = rehearse(faults={"list_delay_s": 0.5}, speed=10)
    assert rehearsal.cloud.guarantees.list_delay_s == 5
    before_s = time.monotonic()
    machine = rehearsal.launch(_SLEEP)
    listed = rehearsal.cloud.machines("fleet")
    assert listed == [] or time.monotonic() - before_s > 0.5
    eventually(lambda: rehearsal.cloud.machines("fleet"))
    assert time.monotonic() - before_s >= 0.5
    rehearsal.cloud.terminate([machine])
    eventually(lambda: rehearsal.entries("death"))
    died_s = rehearsal.entries("death")[0]["real_s"]
    state = rehearsal.listed(machine).state
    assert state != "gone" or time.monotonic() - died_s >= 0.5
    assert rehearsal.gone(machine).ended_by == "owner"


def test_lists_and_ends_that_fail(rehearse: Rehearse) -> None:
    faults: dict[str, Any] = {"list": ["error", "throttle", "lost"], "terminate": ["ignored", "throttle", "lost"]}
    rehearsal = rehearse(faults={"script": faults})
    machine = rehearsal.launch(_SLEEP)
    for _ in faults["list"]:
        with pytest.raises(ProviderError):
            rehearsal.cloud.machines("fleet")
    assert rehearsal.listed(machine).state in ("pending", "running")
    rehearsal.cloud.terminate([machine])
    assert rehearsal.listed(machine).state in ("pending", "running")
    with pytest.raises(ProviderError):
        rehearsal.cloud.terminate([machine])
    assert rehearsal.listed(machine).state in ("pending", "running")
    with pytest.raises(ProviderError):
        rehearsal.cloud.terminate([machine])  # carried out, and the answer is lost
    assert rehearsal.gone(machine).ended_by == "owner"


def test_quotas_and_capacity(rehearse: Rehearse) -> None:
    pools = [{"name": SPOT, "capacity": 1, "price": 0.3}, {"name": ON_DEMAND, "capacity": 5, "price": 1}]
    rehearsal = rehearse(pools=pools, quotas={"on-demand": 0})
    rehearsal.launch(_SLEEP)
    available = {offer.pool.name: offer.available for offer in rehearsal.cloud.offers(Wanted())}
    assert available == {SPOT: False, ON_DEMAND: True}
    for pool, failure in ((SPOT, Failure.NO_CAPACITY), (ON_DEMAND, Failure.NO_QUOTA)):
        with pytest.raises(LaunchFailed) as refused:
            rehearsal.launch(_SLEEP, pool=pool)
        assert refused.value.failure is failure


def test_chances_come_from_the_seed(rehearse: Rehearse) -> None:
    outcomes: list[list[str]] = []
    for _ in range(2):
        rehearsal = rehearse(seed=3, faults={"create": {"throttle": 0.3, "error": 0.3}})
        outcomes.append([])
        for _ in range(12):
            try:
                rehearsal.launch("true")
                outcomes[-1].append("ok")
            except (LaunchFailed, OutcomeUnknown) as error:
                outcomes[-1].append(type(error).__name__)
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0]) == {"ok", "LaunchFailed", "OutcomeUnknown"}


def test_what_is_left_over_is_billed_until_it_is_removed(rehearse: Rehearse) -> None:
    rehearsal = rehearse(
        speed=3600,
        leftovers={"after": ["shutdown"]},
        billing={"minimum_s": 0, "disk_per_gib_h": "0.01", "address_per_h": "0.005"},
    )
    cloud, spec = rehearsal.cloud, rehearsal.order("").spec
    order = rehearsal.order("shutdown")
    spec = type(spec)(disk_gib=10, network={"address": True})
    left = rehearsal.launch("shutdown", spec=spec)
    clean = rehearsal.launch(_SLEEP, spec=spec)
    rehearsal.gone(left)
    cloud.terminate([clean])
    rehearsal.gone(clean)
    leftovers = cloud.leftovers("fleet")
    assert {(each.kind, each.microusd_h) for each in leftovers} == {("volume", 100_000), ("address", 5_000)}
    assert all(each.expires_unix_s == order.expires_unix_s and each.run_id == "run" for each in leftovers)
    assert cloud.leftovers("another") == []
    assert not cloud.bill(rehearsal.listed(left)).final
    assert cloud.bill(rehearsal.listed(clean)).final
    for _ in range(2):
        cloud.remove(leftovers)
    assert cloud.leftovers("fleet") == []
    last = cloud.bill(rehearsal.listed(left))
    assert last.final
    assert last.microusd == cloud.invoice()["machines"][left.id]["total_microusd"]
