"""One launch, one machine: a process that dies at any call, answers that are lost, refusals first and later, two at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from aws_parts import Died, Mortal, allowed, order
from ec2_front import INTERNAL_AFTER, LOST, RESET, STALLED, THROTTLED, Call, Fault, Front, refusal

from holdfast.core.errors import LaunchFailed, OutcomeUnknown, UsageError
from holdfast.core.failures import Failure
from holdfast.core.ids import random_token
from holdfast.provider.aws import AwsInstances
from holdfast.provider.aws.refusals import failure_of
from holdfast.provider.base import Machine

Connect = Callable[..., AwsInstances]
CREATES = ("CreateLaunchTemplate", "CreateFleet")


@pytest.fixture
def fleet() -> str:
    return f"fleet-{random_token()[:12]}"


def at(action: str, fault: Fault, *, times: int = 1) -> Callable[[Call, int], Fault | None]:
    return lambda call, repeat: fault if call.action == action and repeat < times else None


def until_settled(cloud: AwsInstances, front: Front, request: dict[str, Any]) -> Machine:
    """As a controller does: the same request again, while lists come to see."""
    for _ in range(3):
        try:
            return cloud.create(json.loads(json.dumps(request)))
        except OutcomeUnknown:
            front.blind = set()
    raise AssertionError("still unknown")


def one_machine_and_nothing_else(cloud: AwsInstances, front: Front, fleet: str, machine: Machine) -> None:
    front.blind = set()
    assert [each.id for each in cloud.machines(fleet) if each.state != "gone"] == [machine.id]
    assert cloud.leftovers(fleet) == []
    for action in CREATES:
        assert len({json.dumps(call.parameters, sort_keys=True) for call in front.calls(action)}) <= 1


long = pytest.mark.long


@pytest.mark.parametrize(
    ("memory", "blind"),
    [
        ("fleet only", True),
        ("template first", True),
        pytest.param("whole answers", True, marks=long),
        pytest.param("whole answers", False, marks=long),
        pytest.param("fleet only", False, marks=long),
        pytest.param("template first", False, marks=long),
    ],
)
def test_a_process_that_dies_at_any_call_leaves_one_machine(
    front: Front, connect: Connect, mortal: Mortal, fleet: str, memory: str, blind: bool
) -> None:
    """Every call of a launch, before it is sent and after it was answered; then the same request until it is settled."""
    front.repeats_with_instances = memory != "fleet only"
    front.validates_first = memory == "template first"
    cloud = connect()
    request = cloud.request(order(fleet, 1))
    mortal.die_at(-1)
    machine = cloud.create(request)
    calls = mortal.calls
    assert calls >= 5
    one_machine_and_nothing_else(cloud, front, fleet, machine)
    cloud.terminate([machine])
    for number, (call, answered) in enumerate(itertools.product(range(calls), (False, True)), 2):
        request = cloud.request(order(fleet, number))
        front.forget()
        if blind:
            front.blind = {"DescribeInstances", "DescribeLaunchTemplates"}
        mortal.die_at(call, answered=answered)
        with pytest.raises(Died):
            cloud.create(request)
        machine = until_settled(cloud, front, request)
        one_machine_and_nothing_else(cloud, front, fleet, machine)
        assert (machine.launch, machine.token) == (number, request["token"])
        cloud.terminate([machine])


@pytest.mark.parametrize("action", CREATES)
@pytest.mark.parametrize(
    ("fault", "blind"),
    [(LOST, True), (LOST, False), (RESET, True), (INTERNAL_AFTER, True), (INTERNAL_AFTER, False), (STALLED, True)],
    ids=["lost, blind", "lost", "reset", "500 after, blind", "500 after", "stalled"],
)
def test_an_answer_that_does_not_come_is_never_a_second_machine(
    front: Front, connect: Connect, fleet: str, action: str, fault: Fault, blind: bool
) -> None:
    cloud = connect(answer_within_s=3.0 if fault is STALLED else 120.0)
    request = cloud.request(order(fleet))
    front.plan = at(action, fault)
    if blind:
        front.blind = {"DescribeInstances", "DescribeLaunchTemplates"}
    try:
        machine = cloud.create(request)
        assert fault in (LOST, INTERNAL_AFTER)
        assert action == "CreateFleet"
        assert not blind
    except OutcomeUnknown:
        assert action == "CreateFleet"
        machine = until_settled(cloud, front, request)
    except LaunchFailed:
        # Nothing but the template was asked for, so this is settled: there is no machine, and a new launch is free to be made.
        assert action == "CreateLaunchTemplate"
        assert front.calls("CreateFleet") == []
        front.blind = set()
        assert cloud.machines(fleet) == []
        assert cloud.leftovers(fleet) == []
        return
    assert len(front.calls(action)) <= 3
    one_machine_and_nothing_else(cloud, front, fleet, machine)


LATER = {
    "throttled": THROTTLED,
    "no right": Fault(answer=refusal("UnauthorizedOperation", "no", 403)),
    "expired": Fault(answer=refusal("RequestExpired", "the laptop slept")),
    "no subnet": Fault(answer=refusal("InvalidSubnetID.NotFound", "somebody removed it")),
    "mismatch": Fault(answer=refusal("IdempotentParameterMismatch", "as if")),
    "unreachable": RESET,
}


@pytest.mark.parametrize(
    ("action", "why"),
    [
        *(("CreateFleet", why) for why in LATER),
        ("DescribeInstances", "expired"),
        ("DescribeLaunchTemplates", "no right"),
    ],
)
def test_a_refusal_of_a_repeated_call_settles_nothing(
    front: Front, connect: Connect, fleet: str, action: str, why: str
) -> None:
    """The first answer was lost, there is a machine, the list does not show it yet, and now AWS refuses."""
    cloud = connect()
    request = cloud.request(order(fleet))
    front.plan, front.blind = at("CreateFleet", LOST), {"DescribeInstances"}
    with pytest.raises(OutcomeUnknown):
        cloud.create(request)
    front.forget()
    front.plan = at(action, LATER[why])
    with pytest.raises(OutcomeUnknown):
        cloud.create(request)
    front.blind = set()
    one_machine_and_nothing_else(cloud, front, fleet, until_settled(cloud, front, request))


@pytest.mark.parametrize(
    ("code", "said", "failure"),
    [
        ("InsufficientInstanceCapacity", "none", Failure.NO_CAPACITY),
        ("SpotMaxPriceTooLow", "your bid", Failure.NO_CAPACITY),
        ("UnfulfillableCapacity", "none", Failure.NO_CAPACITY),
        ("InsufficientFreeAddressesInSubnet", "none", Failure.NO_CAPACITY),
        ("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded", Failure.QUOTA),
        ("VcpuLimitExceeded", "more vCPU capacity than your current vCPU limit of 32 allows", Failure.QUOTA),
        ("VcpuLimitExceeded", "more vCPU capacity than your current vCPU limit of 0 allows", Failure.NO_QUOTA),
        ("UnauthorizedOperation", "not authorized", Failure.NO_PERMISSION),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", "no", Failure.NO_PERMISSION),
        ("RequestLimitExceeded", "slowly", Failure.THROTTLED),
        ("InvalidParameterValue", "wrong", Failure.BAD_REQUEST),
        ("IdempotentParameterMismatch", "another", Failure.BAD_REQUEST),
        ("InternalError", "ours", Failure.ERROR),
        ("SomethingNew", "?", Failure.ERROR),
    ],
)
def test_each_of_awss_codes_has_its_word(code: str, said: str, failure: Failure) -> None:
    assert failure_of(code, said) is failure


def test_a_fleet_that_answers_with_errors_is_settled(front: Front, connect: Connect, fleet: str) -> None:
    """It answers 200: there is no machine, nothing is left, and a repeated call says the same."""
    cloud = connect()
    for number, code in enumerate(("SpotMaxPriceTooLow", "IdempotentParameterMismatch", "RequestLimitExceeded"), 1):
        request = cloud.request(order(fleet, number))
        front.fleet_errors = [(code, "as it is")]
        for _ in range(2):
            with pytest.raises(LaunchFailed, match=code) as failed:
                cloud.create(request)
            assert failed.value.failure is failure_of(code, "as it is")
            front.fleet_errors = []
    assert cloud.machines(fleet) == []
    assert cloud.leftovers(fleet) == []


@pytest.mark.parametrize("with_instances", [True, False], ids=["whole answer", "fleet only"])
def test_a_recorded_answer_settles_it_while_the_list_is_blind(
    front: Front, connect: Connect, fleet: str, with_instances: bool
) -> None:
    cloud = connect()
    request = cloud.request(order(fleet))
    front.plan, front.blind, front.repeats_with_instances = (
        at("CreateFleet", LOST),
        {"DescribeInstances"},
        with_instances,
    )
    with pytest.raises(OutcomeUnknown):
        cloud.create(request)
    machine = cloud.create(request)
    assert (machine.pool, machine.state) == (allowed().pool, "pending")
    assert bool(front.calls("DescribeFleets")) is not with_instances
    one_machine_and_nothing_else(cloud, front, fleet, machine)


def test_several_pools_fail_as_the_one_that_closes_least(front: Front, connect: Connect, fleet: str) -> None:
    cloud = connect()
    front.fleet_errors = [("UnauthorizedOperation", "no"), ("InsufficientInstanceCapacity", "none")]
    pools = (allowed(), allowed("m5.large"))
    with pytest.raises(LaunchFailed, match=r"c5\.large: Unauth.*m5\.large: Insuff") as failed:
        cloud.create(cloud.request(order(fleet, allowed=pools)))
    assert failed.value.failure is Failure.NO_CAPACITY


@pytest.mark.parametrize("action", CREATES)
def test_the_first_try_is_refused_and_nothing_is_left(front: Front, connect: Connect, fleet: str, action: str) -> None:
    """Sent once, and never again by the SDK; the answer says what to do about it."""
    cloud = connect()
    for number, (code, status) in enumerate([("RequestLimitExceeded", 503), ("UnauthorizedOperation", 403)], 1):
        front.forget()
        front.plan = at(action, Fault(answer=refusal(code, "no", status)), times=99)
        with pytest.raises(LaunchFailed) as failed:
            cloud.create(cloud.request(order(fleet, number)))
        assert failed.value.failure is failure_of(code, "")
        assert failed.value.retry_after_s == (5 if status == 503 else 0)
        assert len(front.calls(action)) == 1
    assert cloud.leftovers(fleet) == []


def test_no_call_goes_out_without_a_token_of_ours(front: Front, connect: Connect, fleet: str) -> None:
    """The SDK would make one up, a new one each time."""
    cloud = connect()
    request = cloud.request(order(fleet))
    cloud.create(request)
    template, asked = front.calls("CreateLaunchTemplate")[0], front.calls("CreateFleet")[0]
    assert asked.parameters["ClientToken"] == request["token"]
    assert template.parameters["ClientToken"] == request["CreateLaunchTemplate"]["ClientToken"] != request["token"]
    front.forget()
    for operation in (*CREATES, "RunInstances"):
        with pytest.raises(UsageError, match="ClientToken"):
            cloud.account.once("ec2", "us-east-1", operation, {})
    assert front.log == []


def test_an_order_that_has_expired_is_not_sent(front: Front, connect: Connect, fleet: str) -> None:
    """AWS may have forgotten the token by then. A machine that was made is found all the same."""
    cloud = connect()
    old = cloud.request(order(fleet, 1, expires_unix_s=1_000_000_000))
    with pytest.raises(LaunchFailed) as failed:
        cloud.create(old)
    assert failed.value.failure is Failure.TIMEOUT
    assert front.calls("CreateFleet") == []
    machine = cloud.create(cloud.request(order(fleet, 2)))
    assert cloud.create({**cloud.request(order(fleet, 2)), "expires_unix_s": 1_000_000_000}).id == machine.id


def test_a_machine_that_is_gone_is_still_the_answer(front: Front, connect: Connect, fleet: str) -> None:
    cloud = connect()
    request = cloud.request(order(fleet))
    machine = cloud.create(request)
    cloud.terminate([machine])
    again = cloud.create(request)
    assert (again.id, again.state, again.ended_by) == (machine.id, "gone", "owner")
    assert len(front.calls("CreateFleet")) == 1


def test_a_template_that_a_crash_left_is_told_of_and_removed(connect: Connect, mortal: Mortal, fleet: str) -> None:
    cloud = connect()
    request = cloud.request(order(fleet))
    mortal.die_at(2, answered=True)
    with pytest.raises(Died):
        cloud.create(request)
    (left,) = cloud.leftovers(fleet)
    assert (left.kind, left.run_id, left.expires_unix_s) == ("launch-template", "run", request["expires_unix_s"])
    cloud.remove([left, replace(left, id="lt-0123456789abcdef0")])
    assert cloud.leftovers(fleet) == []
