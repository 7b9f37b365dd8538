"""`holdfast sweep-leaks aws` against moto: machines, volumes, addresses, interfaces, templates past their time, and no others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from aws_parts import allowed, order
from ec2_front import Call, Fault, Front, refusal
from typer.testing import CliRunner, Result

from holdfast.cli.app import app
from holdfast.core.ids import random_token
from holdfast.provider.aws import AwsInstances

Connect = Callable[..., AwsInstances]
REGION = "us-east-1"


@pytest.fixture
def fleet() -> str:
    return f"fleet-{random_token()[:12]}"


@pytest.fixture(autouse=True)
def _at_the_front(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds it as it finds AWS: by the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", front.endpoint)


def sweep(fleet: str, *words: str) -> Result:
    return CliRunner().invoke(app, ["sweep-leaks", "aws", "--fleet", fleet, *words])


def found(fleet: str, *words: str) -> dict[str, Any]:
    done = sweep(fleet, "--json", *words)
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


class Account:
    """What lies about."""

    def __init__(self, cloud: AwsInstances) -> None:
        self.cloud = cloud

    def machine(self, fleet: str, launch: int, expired_s: int) -> str:
        """The expiry moves as at a renewal: nobody launches what has expired already."""
        machine = self.cloud.create(self.cloud.request(order(fleet, launch, allowed=(allowed(market="on-demand"),))))
        self.cloud.extend(machine, int(time.time()) - expired_s)
        return machine.id

    def things(self, fleet: str, expired_s: int | None) -> dict[str, str]:
        """One of each kind that can be left behind."""
        tags = [{"Key": "holdfast:fleet", "Value": fleet}]
        if expired_s is not None:
            tags.append({"Key": "holdfast:expires", "Value": str(int(time.time()) - expired_s)})

        def make(operation: str, resource: str, **parameters: Any) -> dict[str, Any]:
            specification = [{"ResourceType": resource, "Tags": tags}]
            made: dict[str, Any] = self.cloud.account.ask(
                "ec2", REGION, operation, TagSpecifications=specification, **parameters
            )
            return made

        subnet = self.cloud.account.ask("ec2", REGION, "DescribeSubnets")["Subnets"][0]["SubnetId"]
        volume = make("CreateVolume", "volume", AvailabilityZone="us-east-1a", Size=8, VolumeType="gp3")
        interface = make("CreateNetworkInterface", "network-interface", SubnetId=subnet)
        address = make("AllocateAddress", "elastic-ip", Domain="vpc")
        name = f"{fleet}-{random_token()[:6]}"
        data = {"ImageId": "ami-1"}
        template = make("CreateLaunchTemplate", "launch-template", LaunchTemplateName=name, LaunchTemplateData=data)
        return {
            "volume": volume["VolumeId"],
            "network-interface": interface["NetworkInterface"]["NetworkInterfaceId"],
            "address": address["AllocationId"],
            "launch-template": template["LaunchTemplate"]["LaunchTemplateId"],
        }

    def left(self, fleet: str) -> set[str]:
        return {each.id for each in self.cloud.leftovers(fleet)}

    def alive(self, fleet: str) -> set[str]:
        return {each.id for each in self.cloud.machines(fleet) if each.state in ("pending", "running")}


def test_what_is_past_its_time_is_shown_and_ended_and_nothing_else(front: Front, connect: Connect, fleet: str) -> None:
    account, theirs = Account(connect()), f"{fleet}-b"
    leak, wanted = account.machine(fleet, 1, 3600), account.machine(fleet, 2, -3600)
    other = account.machine(theirs, 1, 3600)
    old, fresh, unsaid = (account.things(fleet, expired_s) for expired_s in (3600, 300, None))
    others = account.things(theirs, 3600)
    shown = found(fleet, "--region", REGION)
    assert [(each["id"], each["ends"]) for each in shown["machines"]] == [(leak, True)]
    assert {each["id"]: each["ends"] for each in shown["leftovers"]} == {
        **dict.fromkeys(old.values(), True), **dict.fromkeys(unsaid.values(), False),
    }  # fmt: skip
    assert account.alive(fleet) == {leak, wanted}
    assert "it does not say: not ended" in sweep(fleet, "--region", REGION).output

    front.forget()
    done = sweep(fleet, "--region", REGION, "--end", "--yes")
    assert done.exit_code == 0, done.output
    assert "1 machines and 4 other things" in done.stderr
    assert account.alive(fleet) == {wanted}
    assert account.alive(theirs) == {other}
    assert account.left(fleet) == {*fresh.values(), *unsaid.values()}
    assert account.left(theirs) == set(others.values())
    ended = {
        value
        for call in front.log
        if call.action.startswith(("Terminate", "Delete", "Release"))
        for key, value in call.parameters.items()
        if "Id" in key
    }
    assert ended == {leak, *old.values()}, "what was shown, and no request about anything else"
    found(fleet, "--region", REGION, "--end", "--yes")
    assert account.left(fleet) == {*fresh.values(), *unsaid.values()}
    account.cloud.terminate([each for name in (fleet, theirs) for each in account.cloud.machines(name)])


def test_what_does_not_go_is_said_and_the_rest_goes(front: Front, connect: Connect, fleet: str) -> None:
    """A machine that is protected, a volume in use: AWS refuses a whole call for one of them."""
    account = Account(connect())
    guarded, *leaks = (account.machine(fleet, number, 3600) for number in (1, 2, 3))
    things = account.things(fleet, 3600)

    def plan(call: Call, repeat: int) -> Fault | None:
        if call.action == "TerminateInstances" and guarded in call.parameters.values():
            return Fault(answer=refusal("OperationNotPermitted", "it has termination protection"))
        if call.action == "DeleteVolume":
            return Fault(answer=refusal("VolumeInUse", "busy"))
        return None

    front.plan = plan
    done = sweep(fleet, "--region", REGION, "--end", "--yes")
    assert done.exit_code == 1
    assert guarded in done.stderr
    assert "termination protection" in done.stderr
    assert "VolumeInUse" in done.stderr
    assert not any(f"{each}:" in done.stderr for each in leaks)
    assert account.alive(fleet) == {guarded}
    assert account.left(fleet) == {things["volume"]}
    front.plan = lambda call, repeat: None
    assert sweep(fleet, "--region", REGION, "--end", "--yes").exit_code == 0
    assert account.alive(fleet) == account.left(fleet) == set()


def test_a_region_that_does_not_answer_hides_no_other(
    front: Front, connect: Connect, fleet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --region all are looked at that the account has; prices that cannot be read hide no machine."""
    account = Account(connect())
    leak = account.machine(fleet, 1, 3600)
    three = ("eu-west-1", REGION, "us-west-2")

    def fewer(call: Call, body: bytes) -> bytes:
        if call.action != "DescribeRegions":
            return body
        items = "".join(f"<item><regionName>{each}</regionName></item>" for each in three)
        return f"<DescribeRegionsResponse><regionInfo>{items}</regionInfo></DescribeRegionsResponse>".encode()

    def plan(call: Call, repeat: int) -> Fault | None:
        if call.region == "eu-west-1" and call.action == "DescribeInstances":
            return Fault(answer=refusal("UnauthorizedOperation", "an SCP says no", 403))
        if call.action in ("DescribeSpotPriceHistory", "GetProducts"):
            return Fault(answer=refusal("UnauthorizedOperation", "no prices", 403))
        return None

    front.rewrite, front.plan = fewer, plan
    done = sweep(fleet, "--end", "--yes")
    assert done.exit_code == 1
    assert "not known: aws/eu-west-1" in done.stderr
    assert leak in done.output
    assert account.alive(fleet) == set()
    assert {call.region for call in front.calls("DescribeVolumes")} == set(three)


def test_it_is_refused_when_the_regions_cannot_be_listed(front: Front, fleet: str) -> None:
    front.plan = lambda call, repeat: Fault(answer=refusal("AuthFailure", "who are you", 401))
    done = sweep(fleet)
    assert "AuthFailure" in str(done.exception)
