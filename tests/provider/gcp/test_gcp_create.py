"""One order, one machine: whatever is lost, refused, late or repeated on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from gcp_parts import FLEET, RUN, allowed, client, compute, order
from gcp_stand_in import GcpStandIn
from gcp_words import Said
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError
from holdfast.core.failures import Failure
from holdfast.provider.base import Machine
from holdfast.provider.gcp.calls import Calls

_HOUR_S = 3600.0
_QUOTA_MESSAGE = "Quota 'PREEMPTIBLE_NVIDIA_T4_GPUS' exceeded.  Limit: {limit} in region us-central1."


class Crash(BaseException):
    """The controller dies here."""


@pytest.fixture
def cloud() -> Iterator[GcpStandIn]:
    with compute() as cloud:
        yield cloud


@pytest.mark.parametrize("late", ["at once", "after the hour of request ids", "when its machine has come and gone"])
def test_a_crash_between_any_two_calls_and_a_repetition_make_one_machine(
    monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    through = Calls.call
    for before in (True, False):
        for number in range(20):
            left = [number]

            def call(
                self: Calls, api: str, method: str, *, left: list[int] = left, before: bool = before, **given: Any
            ) -> Any:
                left[0] -= 1
                if before and left[0] < 0:
                    raise Crash
                answer = through(self, api, method, **given)
                if left[0] < 0:
                    raise Crash
                return answer

            with compute() as cloud, client(cloud) as dies, client(cloud) as comes:
                request = json.dumps(dies.request(order()))
                monkeypatch.setattr(Calls, "call", call)
                try:
                    dies.create(json.loads(request))
                    survived = True
                except Crash:
                    survived = False
                monkeypatch.undo()
                if late != "at once":
                    cloud.clock.advance(2 * _HOUR_S)
                was_there = len(cloud.made)
                if late.startswith("when") and cloud.made:
                    cloud.preempt(cloud.made[0])
                    cloud.clock.advance(60)
                machine = comes.create(json.loads(request))
                assert len(cloud.made) == 1
                assert machine.id == cloud.made[0]["id"]
                if late.startswith("when") and was_there:
                    assert (machine.state, machine.ended_by) == ("gone", "provider")
                else:
                    assert machine.state == "running"
            if survived:
                break
        assert survived
        assert number > 3


_FAULTS = st.tuples(
    st.sampled_from(["zoneOperations.list", "instances.insert", "zoneOperations.get", "instances.get"]),
    st.sampled_from(["before", "after", "late", "lost", "dropped", "429", "400", "403"]),
    st.integers(1, 3),
).filter(lambda fault: fault[:2] != ("instances.get", "403") and (fault[1] != "late" or fault[0] == "instances.insert"))
"""Without the right to look, all that can be said is that there are no rights."""
_SAID = {
    "429": Said(429, "rateLimitExceeded", "slow down", retry_after_s=7),
    "400": Said(400, "invalid", "not so"),
    "403": Said(403, "forbidden", "not you"),
}


@settings(max_examples=40, deadline=None)
@example(rounds=[([("instances.insert", "late", 1)], 0.0, False, None)])
@given(
    rounds=st.lists(
        st.tuples(
            st.lists(_FAULTS, max_size=3),
            st.sampled_from([0.0, 5.0, 300.0, 2 * _HOUR_S]),
            st.booleans(),
            st.sampled_from([None, None, "ZONE_RESOURCE_POOL_EXHAUSTED"]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_nothing_is_launched_twice_and_no_failure_is_a_machine(
    rounds: list[tuple[list[tuple[str, str, int]], float, bool, str | None]],
) -> None:
    """Repeated until there is an answer, through any weather; what was preempted meanwhile is not launched anew."""
    with compute() as cloud, client(cloud, operation_s=30.0) as gcp:
        request = gcp.request(order())
        answer: Machine | LaunchFailed | None = None
        for faults, wait_s, preempt, failing in [*rounds, ([], 0.0, False, None)]:
            cloud.faults.clear()
            cloud.failing = {"us-central1-b": {"code": failing, "message": "none left"}} if failing else {}
            for method, how, times in faults:
                cloud.play(method, "before" if how in _SAID else how, times, _SAID.get(how))
            try:
                answer = gcp.create(request)
            except LaunchFailed as error:
                answer = error
            except OutcomeUnknown:
                cloud.clock.advance(wait_s)
                if preempt and cloud.instances:
                    cloud.preempt(next(iter(cloud.instances.values())))
                continue
            break
        cloud.clock.advance(_HOUR_S / 2)
        cloud._settle()
        assert len(cloud.made) <= 1
        if isinstance(answer, Machine):
            assert [each["id"] for each in cloud.made] == [answer.id]
        else:
            assert isinstance(answer, LaunchFailed)
            assert cloud.made == []
            assert cloud.instances == {}


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ({"code": "ZONE_RESOURCE_POOL_EXHAUSTED", "message": "no resources"}, Failure.NO_CAPACITY),
        ({"code": "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "message": "no resources"}, Failure.NO_CAPACITY),
        ({"code": "QUOTA_EXCEEDED", "message": _QUOTA_MESSAGE.format(limit="4.0")}, Failure.QUOTA),
        ({"code": "QUOTA_EXCEEDED", "message": _QUOTA_MESSAGE.format(limit="0.0")}, Failure.NO_QUOTA),
        (
            {"code": "QUOTA_EXCEEDED", "message": "no", "errorDetails": [{"quotaInfo": {"limit": 0.0, "metricName": "x"}}]},
            Failure.NO_QUOTA,
        ),
        ({"code": "RESOURCE_OPERATION_RATE_EXCEEDED", "message": "too often"}, Failure.THROTTLED),
        ({"code": "PERMISSIONS_ERROR", "message": "no"}, Failure.NO_PERMISSION),
        ({"code": "INVALID_FIELD_VALUE", "message": "no"}, Failure.BAD_REQUEST),
        ({"code": "UNSUPPORTED_OPERATION", "message": "no"}, Failure.BAD_REQUEST),
        ({"code": "INTERNAL_ERROR", "message": "oops"}, Failure.ERROR),
    ],
    ids=lambda value: value["code"] if isinstance(value, dict) else value.name,
)  # fmt: skip
def test_an_operation_that_fails_says_why(cloud: GcpStandIn, error: dict[str, Any], failure: Failure) -> None:
    cloud.failing = {"us-central1-b": error}
    with client(cloud) as gcp:
        request = gcp.request(order())
        for _ in range(2):
            with pytest.raises(LaunchFailed) as failed:
                gcp.create(request)
            assert failed.value.failure is failure
        inserts = [asked for asked in cloud.asked if asked.method == "compute.instances.insert"]
        assert len(inserts) == 1
        # Another zone is another launch.
        elsewhere = order(launch=2, allowed=(allowed(zone="us-central1-a"),))
        assert gcp.create(gcp.request(elsewhere)).pool.zone == "us-central1-a"


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        (Said(429, "rateLimitExceeded", "slow down", retry_after_s=9), Failure.THROTTLED),
        (Said(403, "rateLimitExceeded", "slow down"), Failure.THROTTLED),
        (Said(403, "quotaExceeded", _QUOTA_MESSAGE.format(limit="8.0")), Failure.QUOTA),
        (Said(403, "forbidden", "Required 'compute.instances.create' permission"), Failure.NO_PERMISSION),
        (Said(401, "required", "Login Required"), Failure.NO_PERMISSION),
        (Said(403, "accessNotConfigured", "Compute Engine API has not been used"), Failure.NO_PERMISSION),
        (Said(400, "invalid", "Invalid value for field"), Failure.BAD_REQUEST),
        (Said(412, "conditionNotMet", "Constraint violated"), Failure.BAD_REQUEST),
        (Said(503, "ZONE_RESOURCE_POOL_EXHAUSTED", "none"), Failure.NO_CAPACITY),
    ],
    ids=lambda value: f"{value.status}-{value.reason}" if isinstance(value, Said) else value.name,
)
def test_a_refusal_at_once_says_why(cloud: GcpStandIn, said: Said, failure: Failure) -> None:
    cloud.play("instances.insert", "before", said=said)
    with client(cloud) as gcp:
        with pytest.raises(LaunchFailed) as failed:
            gcp.create(gcp.request(order()))
        assert failed.value.failure is failure
        assert failed.value.retry_after_s == (said.retry_after_s or 0)
        assert gcp.machines(FLEET) == []


def test_a_name_that_somebody_else_has_is_not_ours(cloud: GcpStandIn) -> None:
    with client(cloud) as gcp:
        request = gcp.request(order())
        theirs = json.loads(json.dumps(request))
        theirs["requestId"] = "9f0d5c0e-3d8e-4c4e-8d4e-1a2b3c4d5e6f"
        theirs["body"]["labels"] = {"owner": "somebody"}
        gcp._calls.call(
            "compute", "instances.insert", project=theirs["project"], zone=theirs["zone"],
            requestId=theirs["requestId"], body=theirs["body"],
        )  # fmt: skip
        with pytest.raises(LaunchFailed, match="somebody else's"):
            gcp.create(request)
        assert gcp.machines(FLEET) == []


def test_what_takes_too_long_is_unknown_and_goes_on(cloud: GcpStandIn) -> None:
    cloud.operation_s = 400.0
    with client(cloud, operation_s=100.0) as gcp:
        request = gcp.request(order())
        with pytest.raises(OutcomeUnknown, match="goes on waiting"):
            gcp.create(request)
        assert [machine.state for machine in gcp.machines(FLEET)] == ["pending"]
        cloud.clock.advance(300)
        assert gcp.create(request).state == "running"
        assert len(cloud.made) == 1


def test_what_is_answered_by_an_error_of_theirs_may_still_come(cloud: GcpStandIn) -> None:
    with client(cloud) as gcp:
        request = gcp.request(order())
        cloud.play("instances.insert", "late")
        with pytest.raises(OutcomeUnknown):
            gcp.create(request)
        assert gcp.machines(FLEET) == []
        cloud.clock.advance(100)
        assert len(gcp.machines(FLEET)) == 1
        assert gcp.create(request).id == cloud.made[0]["id"]
        assert len(cloud.made) == 1


def test_a_list_is_whole_or_an_error(cloud: GcpStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with client(cloud) as gcp:
        for launch in range(1, 8):
            gcp.create(gcp.request(order(launch)))
        assert sorted(machine.launch for machine in gcp.machines(FLEET, RUN)) == list(range(1, 8))
        through = GcpStandIn._aggregated

        def partly(self: GcpStandIn, *given: Any, **more: Any) -> dict[str, Any]:
            answer = through(self, *given, **more)
            answer["items"]["zones/europe-west4-a"] = {"warning": {"code": "UNREACHABLE", "message": "europe-west4-a"}}
            return answer

        monkeypatch.setattr(GcpStandIn, "_aggregated", partly)
        with pytest.raises(ProviderError, match="not whole"):
            gcp.machines(FLEET)


def test_how_a_machine_ended_is_known_to_those_who_saw_it_and_to_those_who_did_not(cloud: GcpStandIn) -> None:
    """A deleted instance is in no list; operations say that it was there, and who ended it."""
    with client(cloud) as gcp, client(cloud) as later:
        preempted, ended, runs = (gcp.create(gcp.request(order(launch))) for launch in (1, 2, 3))
        cloud.preempt(cloud.instances["us-central1-b", cloud.made[0]["name"]])
        gcp.terminate([ended])
        cloud.clock.advance(100)
        gone_unix_s = cloud.clock.unix_s() - 100 + cloud.operation_s
        for look in (gcp, gcp, later, later):
            shown = {machine.launch: machine for machine in look.machines(FLEET, RUN)}
            assert {launch: (machine.state, machine.ended_by) for launch, machine in shown.items()} == {
                1: ("gone", "provider"), 2: ("gone", "owner"), 3: ("running", None),
            }  # fmt: skip
            for machine in (preempted, ended, runs):
                assert shown[machine.launch].id == machine.id
                assert shown[machine.launch].token == machine.token
                assert shown[machine.launch].created_unix_s == machine.created_unix_s
            assert shown[1].gone_unix_s == shown[2].gone_unix_s
            assert math.isclose(shown[1].gone_unix_s or 0, gone_unix_s, abs_tol=0.01)
        assert gcp.machines(FLEET, "another") == []
        cloud.clock.advance(25 * _HOUR_S)
        assert [machine.launch for machine in gcp.machines(FLEET, RUN)] == [3]


def test_absence_from_a_list_is_no_end(cloud: GcpStandIn) -> None:
    with client(cloud) as gcp:
        machine = gcp.create(gcp.request(order()))
        assert len(gcp.machines(FLEET)) == 1
        cloud.list_delay_s = 10_000.0
        assert [(each.id, each.state) for each in gcp.machines(FLEET)] == [(machine.id, "running")]


def test_a_guest_that_shuts_down_is_still_billed_for_its_disk(cloud: GcpStandIn) -> None:
    """GCP stops such an instance and keeps it: it is there until somebody deletes it."""
    with client(cloud) as gcp:
        gcp.create(gcp.request(order()))
        cloud.made[0]["status"] = "TERMINATED"
        (machine,) = gcp.machines(FLEET)
        assert (machine.state, machine.ended_by) == ("running", "itself")
        assert not gcp.guarantees.shutdown_terminates
        gcp.terminate([machine])
        cloud.clock.advance(60)
        assert [each.state for each in gcp.machines(FLEET)] == ["gone"]
        assert cloud.instances == {}


def test_ending_is_asked_for_again_until_it_is_answered(cloud: GcpStandIn) -> None:
    with client(cloud) as gcp:
        machines = [gcp.create(gcp.request(order(launch))) for launch in (1, 2)]
        cloud.play("instances.delete", "before")
        with pytest.raises(ProviderError, match="1 of 2"):
            gcp.terminate(machines)
        gcp.terminate(machines)
        cloud.clock.advance(60)
        gcp.terminate(machines)
        assert cloud.instances == {}


def test_labels_that_somebody_else_changes_meanwhile_are_kept(
    cloud: GcpStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(cloud) as gcp:
        machine = gcp.create(gcp.request(order()))
        through = GcpStandIn.compute_instances_get
        others = iter(["one", "two"])

        def meanwhile(self: GcpStandIn, given: dict[str, str], body: None) -> dict[str, Any]:
            found = dict(through(self, given, body))
            if (other := next(others, None)) is not None:
                self.made[0] |= {
                    "labels": self.made[0]["labels"] | {other: "x"},
                    "labelFingerprint": other.ljust(4, "A"),
                }
            return found

        monkeypatch.setattr(GcpStandIn, "compute_instances_get", meanwhile)
        gcp.extend(machine, 1_900_000_000)
        labels = cloud.made[0]["labels"]
        assert {labels["one"], labels["two"]} == {"x"}
        assert labels["holdfast-expires"] == cloud.disks[0]["labels"]["holdfast-expires"] == "1900000000"
        gcp.terminate([machine])
        cloud.clock.advance(60)
        gcp.extend(machine, 1_900_000_001)
