"""The script for real accounts, against moto: it finds what moto does not keep, stays within its cap, and clears up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from aws_parts import order
from ec2_front import Call, Fault, Front, refusal

from holdfast.core.errors import UsageError
from holdfast.core.ids import random_token
from holdfast.provider.aws import AwsInstances
from holdfast.provider.aws.conformance import Finding, conformance
from holdfast.provider.base import MachineSpec, Wanted

Connect = Callable[..., AwsInstances]
WANTED = Wanted(instance_types=("c5.large",), zones=("us-east-1a",))


class Passing:
    """Time passes when somebody waits. After a while, machines that shut themselves down are gone: moto runs no guests."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.when_waiting: Callable[[], None] = lambda: None

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return 1_800_000_000 + self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.when_waiting()


@pytest.fixture
def fleet() -> str:
    return f"fleet-{random_token()[:12]}"


@pytest.fixture
def guests(front: Front, connect: Connect, fleet: str) -> AwsInstances:
    """A cloud whose second machine shuts itself down."""
    front.prices |= {"gp3": "0.08", "address": "0.005"}
    clock = Passing()
    cloud = connect(clock=clock)
    own: set[str] = set()

    def shut_down() -> None:
        for each in cloud.machines(fleet):
            if each.launch == 2 and each.state == "running":
                own.add(each.id)
                cloud.terminate([each])

    def as_itself(call: Call, body: bytes) -> bytes:
        for id in own:
            found = f"<code>Client.UserInitiatedShutdown(?=(?:(?!<stateReason>).)*<instanceId>{id}<)".encode()
            body = re.sub(found, b"<code>Client.InstanceInitiatedShutdown", body, flags=re.DOTALL)
        return body

    clock.when_waiting, front.rewrite = shut_down, as_itself
    return cloud


def run(cloud: AwsInstances, fleet: str, **changes: Any) -> dict[str, Finding]:
    usual: dict[str, Any] = {"cap_microusd": 1_000_000, "wanted": WANTED, "spec": MachineSpec(disk_gib=20)}
    heard: list[Finding] = []
    found = conformance(cloud, fleet=fleet, say=heard.append, **(usual | changes))
    assert heard == found
    return {each.name: each for each in found}


def test_what_an_emulator_does_not_keep_is_found(front: Front, guests: AwsInstances, fleet: str) -> None:
    found = run(guests, fleet)
    broken = {name for name, finding in found.items() if finding.ok is False}
    # moto drops these of a fleet's template, gives its interfaces no tags, and finds a machine at any price.
    assert broken == {
        "metadata wants tokens, two hops away",
        "a shutdown means its end",
        "its network interface has its tags",
        "a ceiling below the price makes no machine",
    }, {name: found[name].said for name in broken}
    for name in (
        "the same request again",
        "it is in the list by its tags",
        "ended by itself: AWS says so",
        "nothing is left",
    ):
        assert found[name].ok is True
    assert found["AWS to its token with another call"].said == "IdempotentParameterMismatch"


def test_a_cloud_that_forgets_tokens_is_found_out(front: Front, guests: AwsInstances, fleet: str) -> None:
    forgotten: dict[Any, Any] = {}
    front._tokens = type("Forgetful", (dict,), {"__setitem__": lambda self, key, value: None})(forgotten)
    found = run(guests, fleet)
    assert found["AWS to its token with another call"].ok is False
    assert found["nothing is left"].ok is True


def test_nothing_is_asked_for_beyond_the_cap_or_over_others(front: Front, guests: AwsInstances, fleet: str) -> None:
    with pytest.raises(UsageError, match="the cap is"):
        run(guests, fleet, cap_microusd=100)
    with pytest.raises(UsageError, match="no spot offer"):
        run(guests, fleet, wanted=Wanted(instance_types=("no-such-1",)))
    machine = guests.create(guests.request(order(fleet)))
    with pytest.raises(UsageError, match="nobody has used"):
        run(guests, fleet)
    guests.terminate([machine])


def test_it_stops_at_a_failed_preflight_and_clears_up_whatever_happens(
    front: Front, guests: AwsInstances, fleet: str
) -> None:
    front.quotas["L-34B43A08"] = 0
    found = run(guests, fleet)
    assert found["preflight: spot quota"].ok is False
    assert front.calls("CreateFleet") == [call for call in front.calls("CreateFleet") if "DryRun" in call.parameters]
    front.quotas.clear()
    front.plan = lambda call, repeat: (
        Fault(answer=refusal("UnauthorizedOperation", "no", 403))
        if call.action == "DescribeInstanceAttribute"
        else None
    )
    with pytest.raises(Exception, match="DescribeInstanceAttribute"):
        run(guests, fleet)
    assert [each for each in guests.machines(fleet) if each.state != "gone"] == []
    assert guests.leftovers(fleet) == []
