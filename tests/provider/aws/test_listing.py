"""What AWS tells of machines, and what follows from it: ends and whose they were, bills, what is left over, several regions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction

import pytest
from aws_parts import allowed, order
from ec2_front import Call, Fault, Front, refusal
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import ProviderError
from holdfast.core.ids import random_token
from holdfast.core.launches import Pool
from holdfast.provider.aws import AwsInstances
from holdfast.provider.aws.bill import bill_of, spot_microusd
from holdfast.provider.aws.machines import machine_of
from holdfast.provider.base import Machine

Connect = Callable[..., AwsInstances]


@pytest.fixture
def fleet() -> str:
    return f"fleet-{random_token()[:12]}"


LAUNCHED = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)


def told(state: str, reason: str = "", code: str = "", market: str = "spot") -> Machine:
    tags = [{"Key": f"holdfast:{key}", "Value": value} for key, value in (("launch", "7"), ("ceiling", "90"))]
    return machine_of(
        {
            "InstanceId": "i-1",
            "InstanceType": "c5.large",
            "State": {"Name": state},
            "Placement": {"AvailabilityZone": "us-east-1a"},
            "LaunchTime": LAUNCHED,
            "Tags": tags,
            **({"InstanceLifecycle": "spot"} if market == "spot" else {}),
            "StateTransitionReason": reason,
            "StateReason": {"Code": code},
        },
        "us-east-1",
        None,
        ("instance-terminated-no-capacity", LAUNCHED.timestamp() + 50) if reason == "asked" else None,
    )


@pytest.mark.parametrize(
    ("state", "reason", "code", "shown", "by", "gone_s"),
    [
        ("pending", "", "", "pending", None, None),
        ("running", "", "", "running", None, None),
        ("stopped", "User initiated (2026-11-21 10:01:00 GMT)", "Client.UserInitiatedShutdown", "running", None, None),
        ("shutting-down", "", "Server.SpotInstanceTermination", "ending", "provider", None),
        ("terminated", "Server.SpotInstanceTermination", "Server.SpotInstanceTermination", "gone", "provider", None),
        ("terminated", "asked", "", "gone", "provider", 50),
        ("terminated", "asked", "Client.UserInitiatedShutdown", "gone", "owner", 50),
        ("terminated", "User initiated (2026-11-21 10:01:00 GMT)", "Client.UserInitiatedShutdown", "gone", "owner", 60),
        ("terminated", "User initiated (2026-11-21 09:59:59 GMT)", "Client.UserInitiatedShutdown", "gone", "owner", 0),
        ("terminated", "", "Client.InstanceInitiatedShutdown", "gone", "itself", None),
        ("terminated", "", "Server.InternalError", "gone", "provider", None),
        ("terminated", "", "Client.VolumeLimitExceeded", "gone", None, None),
    ],
)
def test_how_it_ended_and_by_whom(
    state: str, reason: str, code: str, shown: str, by: str | None, gone_s: float | None
) -> None:
    machine = told(state, reason, code)
    gone = None if machine.gone_unix_s is None else machine.gone_unix_s - machine.created_unix_s
    assert (machine.state, machine.ended_by, gone, machine.launch, machine.microusd_h) == (shown, by, gone_s, 7, 90)


def test_a_list_is_whole_or_an_error(front: Front, connect: Connect, fleet: str) -> None:
    """A region that does not answer must not look like one without machines; wildcards in names stand for themselves."""
    cloud = connect(regions=["us-east-1", "us-west-2"])
    here = cloud.create(cloud.request(order(fleet)))
    there = cloud.create(cloud.request(order(fleet, 2, allowed=(allowed(zone="us-west-2a", market="on-demand"),))))
    found = {each.id: each for each in cloud.machines(fleet)}
    assert set(found) == {here.id, there.id}
    assert (found[here.id].microusd_h, found[there.id].microusd_h) == (10, 85_000)
    assert cloud.machines("fleet-*") == []
    front.plan = lambda call, repeat: (
        Fault(answer=refusal("UnauthorizedOperation", "no", 403)) if call.region == "us-west-2" else None
    )
    with pytest.raises(ProviderError, match="us-west-2"):
        cloud.machines(fleet)
    front.plan = lambda call, repeat: None
    cloud.terminate(list(found.values()))
    assert {each.state for each in cloud.machines(fleet)} == {"gone"}


def test_ending_many_ends_each_though_one_is_unknown(front: Front, connect: Connect, fleet: str) -> None:
    cloud = connect()
    several = [cloud.create(cloud.request(order(fleet, number))) for number in range(1, 4)]
    cloud.terminate([several[0], replace(several[0], id="i-0123456789abcdef0"), *several[1:]])
    assert {each.state for each in cloud.machines(fleet)} == {"gone"}
    front.plan = lambda call, repeat: Fault(answer=refusal("OperationNotPermitted", "termination protection"))
    with pytest.raises(ProviderError, match="termination protection"):
        cloud.terminate(several)


def test_what_is_left_over_is_found_priced_and_removed(front: Front, connect: Connect, fleet: str) -> None:
    front.prices |= {"gp3": "0.08", "address": "0.005"}
    cloud = connect()
    tags = [{"Key": "holdfast:fleet", "Value": fleet}, {"Key": "holdfast:expires", "Value": "77"}]

    def make(operation: str, resource: str, **parameters: object) -> dict[str, object]:
        specification = [{"ResourceType": resource, "Tags": tags}]
        return cloud.account.ask("ec2", "us-east-1", operation, TagSpecifications=specification, **parameters)

    subnet = cloud.account.ask("ec2", "us-east-1", "DescribeSubnets")["Subnets"][0]["SubnetId"]
    make("CreateVolume", "volume", AvailabilityZone="us-east-1a", Size=672, VolumeType="gp3")
    make("CreateNetworkInterface", "network-interface", SubnetId=subnet)
    make("AllocateAddress", "elastic-ip", Domain="vpc")
    make("CreateLaunchTemplate", "launch-template", LaunchTemplateName=fleet, LaunchTemplateData={"ImageId": "ami-1"})
    found = cloud.leftovers(fleet)
    prices = {each.kind: each.microusd_h for each in found}
    assert prices == {"volume": 80_000, "network-interface": 0, "address": 5_000, "launch-template": 0}
    assert {each.expires_unix_s for each in found} == {77}
    front.prices.clear()
    assert sum(each.microusd_h for each in connect().leftovers(fleet)) == 0
    refused = Fault(answer=refusal("VolumeInUse", "busy"))
    front.plan = lambda call, repeat: refused if call.action == "DeleteVolume" and repeat == 0 else None
    with pytest.raises(ProviderError, match="VolumeInUse"):
        cloud.remove(found)
    assert [each.kind for each in cloud.leftovers(fleet)] == ["volume"]
    cloud.remove(found)
    assert cloud.leftovers(fleet) == []


@given(
    st.lists(st.tuples(st.integers(-9_000, 9_000), st.integers(0, 10**7)), min_size=1, max_size=8),
    st.integers(60, 20_000),
)
def test_spot_is_billed_by_the_price_at_the_beginning_of_each_hour(
    changes: list[tuple[int, int]], billed_s: int
) -> None:
    """Against a count second by second."""
    history = [(float(since), price) for since, price in sorted(changes)]
    total, price = 0, 0
    for second in range(billed_s):
        if second % 3600 == 0:
            price = ([each[1] for each in history if each[0] <= second] or [history[0][1]])[-1]
        total += price
    assert spot_microusd(history, 0.0, billed_s) == Fraction(total, 3600)


@pytest.mark.parametrize(
    ("market", "by", "seconds", "alone"),
    [
        ("spot", "owner", 600, 600 * 50_000),
        ("spot", "provider", 600, 0),
        ("spot", "provider", 3601, 3600 * 50_000 + 70_000),
        ("spot", "itself", 5, 60 * 50_000),
        ("on-demand", "owner", 3600, 3600 * 85_000),
        ("on-demand", "provider", 600, 600 * 85_000),
    ],
)
def test_a_bill_has_the_machine_its_disk_and_its_address(
    front: Front, connect: Connect, market: str, by: str, seconds: int, alone: int
) -> None:
    front.prices |= {"gp3": "0.0672", "address": "0.005"}
    begin = LAUNCHED.timestamp()

    def history(call: Call, body: bytes) -> bytes:
        if call.action != "DescribeSpotPriceHistory":
            return body
        changes = [(LAUNCHED, "0.05"), (datetime.fromtimestamp(begin + 3600, UTC), "0.07")]
        items = "".join(
            f"<item><instanceType>c5.large</instanceType><availabilityZone>us-east-1a</availabilityZone>"
            f"<spotPrice>{price}</spotPrice><timestamp>{when:%Y-%m-%dT%H:%M:%SZ}</timestamp></item>"
            for when, price in changes
        )
        inside = f"<spotPriceHistorySet>{items}</spotPriceHistorySet>".encode()
        return re.sub(rb"<spotPriceHistorySet>.*</spotPriceHistorySet>", inside, body, flags=re.DOTALL)

    front.rewrite = history
    cloud = connect()
    pool = Pool("aws", "us-east-1", "us-east-1a", "c5.large", "spot" if market == "spot" else "on-demand")
    machine = replace(told("terminated"), pool=pool, ended_by=by, gone_unix_s=begin + seconds)  # type: ignore[arg-type]
    billed_s = max(seconds, 60)
    whole = Fraction(alone + billed_s * (10_000 + 5_000), 3600)
    bill = bill_of(machine, "gp3:100+address", cloud._prices, begin + 9999)
    assert (bill.billed_s, bill.final) == (billed_s, True)
    assert 0 <= bill.microusd - whole < 1
    running = bill_of(
        replace(machine, state="running", gone_unix_s=None, ended_by=None), "", cloud._prices, begin + 7200
    )
    assert (running.billed_s, running.final) == (7200, False)
