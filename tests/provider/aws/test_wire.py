"""What goes over the wire for a launch: moto drops a part of it, so it is read where it arrives."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from aws_parts import EXPIRES_UNIX_S, SCRIPT, allowed, order
from ec2_front import Front

from holdfast.core.errors import UsageError
from holdfast.core.ids import random_token
from holdfast.core.launches import Allowed, Pool
from holdfast.provider.aws import AwsInstances
from holdfast.provider.base import MachineSpec

Connect = Callable[..., AwsInstances]
PREFIX = "LaunchTemplateData"


@pytest.fixture
def fleet() -> str:
    return f"fleet-{random_token()[:12]}"


@pytest.mark.parametrize("market", ["spot", "on-demand"])
def test_a_machine_is_born_as_it_must_be(front: Front, connect: Connect, fleet: str, market: str) -> None:
    cloud = connect()
    pools = tuple(
        allowed(kind, zone, market, ceiling)
        for kind, zone, ceiling in (
            ("c5.large", "us-east-1a", 60_001),
            ("c5.large", "us-east-1b", 60_001),
            ("m6g.large", "us-east-1a", 1_250_000),
        )
    )
    spec = MachineSpec(disk_gib=90, role="trainer", network={"security_groups": ["sg-0a", "sg-0b"]})
    request = cloud.request(order(fleet, allowed=pools, spec=spec))
    front.validates_first = True
    cloud.create(request)
    (template,), (asked,) = front.calls("CreateLaunchTemplate"), front.calls("CreateFleet")
    data = template.under(PREFIX)
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert data["MetadataOptions.HttpTokens"] == "required"
    assert data["MetadataOptions.HttpPutResponseHopLimit"] == "2"
    assert base64.b64decode(data["UserData"]).decode() == SCRIPT
    assert data["IamInstanceProfile.Name"] == "trainer"
    assert [data["SecurityGroupId.1"], data["SecurityGroupId.2"]] == ["sg-0a", "sg-0b"]
    disk = template.under(f"{PREFIX}.BlockDeviceMapping.1")
    assert (disk["Ebs.DeleteOnTermination"], disk["Ebs.VolumeSize"], disk["Ebs.VolumeType"]) == ("true", "90", "gp3")
    assert data["ImageId"].startswith("ami-")
    tags = {
        "team": "vision",
        "holdfast:fleet": fleet,
        "holdfast:run": "run",
        "holdfast:launch": "1",
        "holdfast:token": request["token"],
        "holdfast:expires": str(EXPIRES_UNIX_S),
        "holdfast:ceiling": "1250000",
        "holdfast:extras": "gp3:90+address",
    }
    born = {**tags, "holdfast:request": request["digest"]}
    resources = {"instance", "volume", "network-interface"} | (
        {"spot-instances-request"} if market == "spot" else set()
    )
    assert template.tags(f"{PREFIX}.TagSpecification") == dict.fromkeys(resources, born)
    assert template.tags("TagSpecification") == {"launch-template": tags}
    assert asked.tags("TagSpecification") == {"fleet": tags}
    assert (asked.parameters["Type"], asked.parameters["TargetCapacitySpecification.TotalTargetCapacity"]) == (
        "instant",
        "1",
    )
    assert asked.parameters["TargetCapacitySpecification.DefaultTargetCapacityType"] == market
    overrides = [asked.under(f"LaunchTemplateConfigs.1.Overrides.{number}") for number in (1, 2, 3)]
    places = [(each["InstanceType"], each["AvailabilityZone"]) for each in overrides]
    assert places == [(each.pool.instance_type, each.pool.zone) for each in pools]
    # The third is of another architecture, and brings its own image.
    assert [each.get("ImageId") is None for each in overrides] == [True, True, False]
    assert overrides[2]["ImageId"] != data["ImageId"]
    if market == "spot":
        assert [each["MaxPrice"] for each in overrides] == ["0.060001", "0.060001", "1.25"]
        assert asked.under("SpotOptions") == {
            "AllocationStrategy": "price-capacity-optimized",
            "InstanceInterruptionBehavior": "terminate",
        }
    else:
        assert [float(each["Priority"]) for each in overrides] == [0, 1, 2]
        assert asked.under("OnDemandOptions") == {"AllocationStrategy": "prioritized"}
        assert not any("MaxPrice" in each for each in overrides)


def test_a_subnet_of_ones_own_and_an_address_that_is_asked_for(front: Front, connect: Connect, fleet: str) -> None:
    cloud = connect()
    told = cloud.account.ask("ec2", "us-east-1", "DescribeSubnets")["Subnets"]
    subnets = {each["AvailabilityZone"]: each["SubnetId"] for each in told}
    network = {"subnets": subnets, "security_groups": {"us-east-1": ["sg-0a"]}, "public_address": False}
    spec = MachineSpec(disk_gib=20, network=network)
    front.blind = {"DescribeInstances"}
    machine = cloud.create(cloud.request(order(fleet, allowed=(allowed(zone="us-east-1b"),), spec=spec)))
    assert machine.pool.zone == "us-east-1b"
    assert (
        front.calls("CreateFleet")[0].under("LaunchTemplateConfigs.1.Overrides.1")["SubnetId"] == subnets["us-east-1b"]
    )
    interface = front.calls("CreateLaunchTemplate")[0].under(f"{PREFIX}.NetworkInterface.1")
    assert interface == {
        "DeviceIndex": "0",
        "AssociatePublicIpAddress": "false",
        "DeleteOnTermination": "true",
        "SecurityGroupId.1": "sg-0a",
    }


def test_burstable_machines_never_borrow_at_an_open_price(connect: Connect, fleet: str) -> None:
    cloud = connect()
    request = cloud.request(order(fleet, allowed=(allowed("t3.micro"),)))
    assert request["CreateLaunchTemplate"]["LaunchTemplateData"]["CreditSpecification"] == {"CpuCredits": "standard"}
    with pytest.raises(UsageError, match="burstable"):
        cloud.request(order(fleet, allowed=(allowed("t3.micro"), allowed())))


NOWHERE = Pool("aws", "us-east-1", "us-east-1a", "p9.huge", "spot")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"spec": MachineSpec(disk_gib=1)}, "needs a disk of"),
    ({"spec": MachineSpec(disk_gib=20, disk_type="io2")}, "gp3 or gp2"),
    ({"spec": MachineSpec(disk_gib=20, network={"subnet": "subnet-1"})}, r"network\.subnet;"),
    ({"spec": MachineSpec(disk_gib=20, network={"subnets": {"us-east-1f": "subnet-1"}})}, "no subnet in us-east-1a"),
    ({"spec": MachineSpec(disk_gib=20, network={"security_groups": "sg-1"})}, "list of sg-"),
    ({"spec": MachineSpec(disk_gib=20, image="latest")}, "not an image"),
    ({"spec": MachineSpec(disk_gib=20, image="us-west-2=ami-1")}, "names none in us-east-1"),
    ({"tags": {"holdfast:fleet": "mine"}}, "cannot begin with"),
    ({"tags": {f"k{n}": "v" for n in range(60)}}, "labels"),
    ({"token": "a token"}, "client token"),
    ({"allowed": (Allowed(pool=NOWHERE, ceiling_microusd_h=1, on_demand_microusd_h=1),)}, r"no instance type p9\.huge"),
]


def test_one_region_is_asked_for_and_what_is_not_there_is_refused(connect: Connect, fleet: str) -> None:
    cloud = connect(regions=["us-east-1", "us-west-2"])
    far = allowed(zone="us-west-2a")
    request = cloud.request(order(fleet, allowed=(far, allowed())))
    assert (request["region"], request["pools"]) == ("us-west-2", [["aws/us-west-2/us-west-2a/c5.large/spot", 60_000]])
    for changes, said in WRONG:
        with pytest.raises(UsageError, match=said):
            cloud.request(order(fleet, **changes))


def test_no_secret_of_the_process_is_in_a_request(
    connect: Connect, fleet: str, monkeypatch: pytest.MonkeyPatch, front: Front
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-the-environment")
    cloud = connect()
    request = cloud.request(order(fleet))
    cloud.create(request)
    written: list[Any] = [request, *(call.parameters for call in front.log)]
    assert "canary" not in json.dumps(written)
