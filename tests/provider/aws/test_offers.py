"""Which pools are offered, at which prices, and why others are not; whether an order can be carried out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from aws_parts import allowed, order
from ec2_front import Fault, Front, refusal

from holdfast.core.errors import ProviderError, UsageError
from holdfast.provider.aws import AwsInstances
from holdfast.provider.aws.preflight import quota_of
from holdfast.provider.base import Check, MachineSpec, Wanted

Connect = Callable[..., AwsInstances]


def test_accelerators_are_found_by_name_count_and_memory(front: Front, connect: Connect) -> None:
    front.prices |= {"p4d.24xlarge": "21.957642", "p4de.24xlarge": "27.44705", "g4dn.xlarge": "0.526"}
    cloud = connect()
    named = ("p4d.24xlarge", "p4de.24xlarge", "g4dn.xlarge", "g4dn.8xlarge", "c5.large")
    survey = cloud.survey(Wanted(accelerators=(("A100", 8), ("T4", 1)), memory_gib=100, instance_types=named))
    types = {offer.pool.instance_type for offer in survey.offers}
    assert types == {"p4d.24xlarge", "p4de.24xlarge"}
    big = cloud.offers(Wanted(accelerators=(("A100-80GB", 8),), instance_types=named))
    assert {offer.pool.instance_type for offer in big} == {"p4de.24xlarge"}
    spot = [offer for offer in big if offer.pool.market == "spot"]
    assert {(offer.microusd_h, offer.on_demand_microusd_h) for offer in spot} == {(10, 27_447_050)}
    assert {offer.pool.zone for offer in spot} == {o.pool.zone for o in big if o.pool.market == "on-demand"}
    # T4 machines with more memory than asked for have no price here: they are left out aloud.
    assert any("g4dn.8xlarge" in reason and "table of prices" in reason for reason in survey.left_out)
    one = cloud.offers(Wanted(instance_types=("g4dn.xlarge",), zones=("us-east-1a",)))
    assert {offer.pool.name for offer in one} == {
        f"aws/us-east-1/us-east-1a/g4dn.xlarge/{m}" for m in ("spot", "on-demand")
    }


@pytest.mark.long
def test_all_types_of_a_region_are_looked_through(front: Front, connect: Connect) -> None:
    """Without names: no burstable, bare-metal, or needlessly accelerated ones."""
    front.prices |= {"p4d.24xlarge": "21.957642", "m6g.metal": "2.464", "p3dn.24xlarge": "31.212"}
    cloud = connect()
    found = {offer.pool.instance_type for offer in cloud.offers(Wanted(accelerators=(("A100", 8),)))}
    assert found == {"p4d.24xlarge"}
    found = {offer.pool.instance_type for offer in cloud.offers(Wanted(accelerators=(("V100", 8),)))}
    assert found == {"p3dn.24xlarge"}
    found = {offer.pool.instance_type for offer in cloud.offers(Wanted(cpus=2))}
    assert found == {"c5.large", "m5.large", "m6g.large"}


def test_no_price_is_made_up(front: Front, connect: Connect) -> None:
    """The list of prices is out of reach: the user's table holds, and what is not in it is left out with the reason."""
    denied = Fault(answer=refusal("AccessDeniedException", "no pricing", 403))
    front.plan = lambda call, repeat: denied if call.service == "pricing" else None
    wanted = Wanted(instance_types=("c5.large", "m5.large"))
    cloud = connect(prices={"us-east-1": {"c5.large": "0.0850004"}})
    survey = cloud.survey(wanted)
    assert {(offer.pool.instance_type, offer.on_demand_microusd_h) for offer in survey.offers} == {("c5.large", 85_001)}
    (reason,) = survey.left_out
    assert "m5.large" in reason
    assert "cannot be asked" in reason
    assert connect().offers(wanted) == []
    with pytest.raises(UsageError, match="not a price"):
        connect(prices={"us-east-1": {"c5.large": "cheap"}}).offers(wanted)
    with pytest.raises(ProviderError):
        cloud.extras_microusd_h(MachineSpec(), "us-east-1")
    with pytest.raises(UsageError, match="eu-west-1"):
        cloud.offers(Wanted(regions=("eu-west-1",)))
    known = connect(prices={"us-east-1": {"gp3": 0.0672, "address": 0.005}})
    assert known.extras_microusd_h(MachineSpec(disk_gib=100), "us-east-1") == 15_000
    assert known.extras_microusd_h(MachineSpec(disk_gib=100, network={"public_address": False}), "us-east-1") == 10_000


def test_half_a_market_is_an_error(front: Front, connect: Connect) -> None:
    throttled = Fault(answer=refusal("RequestLimitExceeded", "slowly", 503))
    front.plan = lambda call, repeat: throttled if call.region == "us-west-2" else None
    with pytest.raises(ProviderError, match="us-west-2"):
        connect(regions=["us-east-1", "us-west-2"]).offers(Wanted(instance_types=("c5.large",)))


@pytest.mark.parametrize(
    ("kind", "on_demand", "spot"),
    [
        ("c5.large", "L-1216C47A", "L-34B43A08"),
        ("is4gen.medium", "L-1216C47A", "L-34B43A08"),
        ("g5.xlarge", "L-DB2E81BA", "L-3819A6DF"),
        ("gr6.4xlarge", "L-DB2E81BA", "L-3819A6DF"),
        ("p4d.24xlarge", "L-417A185B", "L-7212CCBC"),
        ("p5e.48xlarge", "L-417A185B", "L-C4BD4855"),
        ("p6-b200.48xlarge", "L-417A185B", None),
        ("trn1.32xlarge", "L-2C3B7624", "L-6B0D517C"),
        ("inf2.xlarge", "L-1945791B", "L-B5D1601B"),
        ("u-6tb1.metal", None, None),
        ("hpc7g.4xlarge", None, None),
    ],
)
def test_each_type_counts_against_its_quota(kind: str, on_demand: str | None, spot: str | None) -> None:
    assert (quota_of(kind, "on-demand"), quota_of(kind, "spot")) == (on_demand, spot)


def named(checks: list[Check], name: str) -> Check:
    return next(each for each in checks if each.name.startswith(name))


def test_a_preflight_names_what_is_wrong_and_what_to_do(front: Front, connect: Connect) -> None:
    cloud = connect(run_url="s3://no-such-bucket-anywhere/runs/gpt")
    fine = cloud.preflight(order("f"))
    assert [each for each in fine if each.ok is False and each.name != "bucket"] == []
    assert named(fine, "bucket").ok is False
    front.quotas["L-34B43A08"] = 0
    spec = MachineSpec(disk_gib=20, role="nobody", network={"subnets": {"us-east-1a": "subnet-0123456789abcdef0"}})
    denied = Fault(answer=refusal("UnauthorizedOperation", "You are not authorized", 403))
    front.plan = lambda call, repeat: denied if "DryRun" in call.parameters and call.action == "CreateFleet" else None
    checks = cloud.preflight(order("f", spec=spec))
    for name, fix in [
        ("spot quota", "--quota-code L-34B43A08 --desired-value 2"),
        ("network", "aws ec2 describe-subnets"),
        ("role", "create-instance-profile --instance-profile-name nobody"),
        ("right to CreateFleet", "controller_policy"),
    ]:
        assert named(checks, name).ok is False, name
        assert fix in named(checks, name).fix
    assert all(each.fix for each in checks if each.ok is False)
    wrong = cloud.preflight(
        order("f", allowed=(allowed("m6g.large"),), spec=MachineSpec(disk_gib=20, image="ami-0123456789abcdef0"))
    )
    assert named(wrong, "image").ok is False
    # A dry run's token is never the launch's, and nothing was made.
    tokens = {call.parameters["ClientToken"] for call in front.log if call.parameters.get("DryRun") == "true"}
    assert tokens
    assert order("f").token not in tokens
    assert cloud.machines("f") == []


def test_without_credentials_the_rest_is_not_asked(front: Front, connect: Connect) -> None:
    front.plan = lambda call, repeat: Fault(answer=refusal("ExpiredToken", "expired", 403))
    (only,) = connect().preflight(order("f"))
    assert (only.name, only.ok) == ("credentials", False)
    assert "aws sso login" in only.fix
