"""Can an order be carried out? Looks at credentials, rights, quotas, image, network and role; spends nothing, makes nothing.

Rights are found out by dry runs: AWS checks the call and answers `DryRunOperation` where it would have done it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from holdfast.core.errors import HoldfastError
from holdfast.core.launches import Allowed
from holdfast.provider.aws.account import Account, Refused
from holdfast.provider.aws.facts import Facts
from holdfast.provider.aws.request import in_one_region, subnet_of
from holdfast.provider.base import Check, MachineSpec, Order

__all__ = ["preflight", "quota_of"]

# Service Quotas: on-demand and spot, by the letters of an instance type. Units are vCPUs.
_QUOTAS: Mapping[str, tuple[str, str | None]] = {
    "standard": ("L-1216C47A", "L-34B43A08"),
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "p": ("L-417A185B", "L-7212CCBC"),
    "p5": ("L-417A185B", "L-C4BD4855"),
    "inf": ("L-1945791B", "L-B5D1601B"),
    "trn": ("L-2C3B7624", "L-6B0D517C"),
    "dl": ("L-6E869C2A", "L-85EED4F7"),
    "f": ("L-74FC7D96", "L-88CF9481"),
    "x": ("L-7295265B", "L-E3A00192"),
}
_DRY_RUNS = uuid.UUID("58f4c2e8-30c0-4bb0-9a0f-3f6b3d3a3e5e")
_STANDARD = tuple("acdhimrtz")


def preflight(
    account: Account,
    order: Order,
    facts: Callable[[], Facts],
    request: Callable[[], Mapping[str, Any]],
    run_url: str | None,
) -> list[Check]:
    """Each failure with what to do about it. UsageError for an order that cannot be asked for."""
    pools = in_one_region(order)
    region = pools[0].pool.region
    checks = [_credentials(account, region)]
    if not checks[0].ok:
        return checks
    checks += _image(facts, order, pools)
    checks += _network(account, region, order, pools)
    checks.append(_role(account, region, order.spec))
    checks += _quotas(account, region, pools, facts)
    checks += _rights(account, region, request)
    if run_url is not None and run_url.startswith("s3://"):
        checks.append(_bucket(account, region, run_url))
    return checks


def quota_of(instance_type: str, market: str) -> str | None:
    """The quota's code that this type counts against; None: not known."""
    family = instance_type.split(".")[0].lower()
    letters = re.match(r"[a-z]+", family)
    if letters is None:
        return None
    kind = letters[0]
    if family.startswith("p") and re.match(r"p[5-9]", family):
        group = "p5" if family.startswith("p5") or market == "on-demand" else ""
    elif kind in ("inf", "trn", "dl", "f", "p"):
        group = kind
    elif kind in ("g", "gr", "vt"):
        group = "g"
    elif kind in ("x", "u", "hpc", "mac"):
        group = "x" if kind == "x" else ""
    else:
        group = "standard" if kind.startswith(_STANDARD) else ""
    on_demand, spot = _QUOTAS.get(group, (None, None))
    return spot if market == "spot" else on_demand


def _credentials(account: Account, region: str) -> Check:
    try:
        who = account.ask("sts", region, "GetCallerIdentity")
    except HoldfastError as error:
        return Check(name="credentials", ok=False, said=str(error), fix="aws sso login, or aws configure")
    return Check(name="credentials", ok=True, said=f"{who.get('Arn')} in account {who.get('Account')}")


def _image(facts: Callable[[], Facts], order: Order, pools: Sequence[Allowed]) -> list[Check]:
    try:
        known = facts()
    except HoldfastError as error:
        return [Check(name="image", ok=False, said=str(error), fix="name an image of this region in the job file")]
    checks = []
    for kind, image in known.images.items():
        runs_on = known.types[kind].architectures
        fits = image.architecture in runs_on
        said = f"{image.id} ({image.name or 'without a name'}, {image.architecture}) for {kind}"
        fix = "" if fits else f"name an image for {' or '.join(runs_on)}"
        checks.append(Check(name="image", ok=fits, said=said, fix=fix))
        makers = {each.maker.upper() for each in known.types[kind].accelerators}
        drivers = re.search(r"nvidia|neuron|gpu|deep learning|cuda", image.name, re.IGNORECASE)
        if makers and order.spec.image is not None and not drivers:
            said = f"nothing in the name of {image.id} says that it has drivers for {', '.join(sorted(makers))}"
            checks.append(Check(name="drivers", ok=None, said=said, fix="leave the image out, or look for yourself"))
    return checks


def _network(account: Account, region: str, order: Order, pools: Sequence[Allowed]) -> list[Check]:
    subnets = {subnet: each.pool.zone for each in pools if (subnet := subnet_of(order.spec, each.pool))}
    zones = sorted({each.pool.zone for each in pools})
    filters = (
        [{"Name": "subnet-id", "Values": list(subnets)}]
        if subnets
        else [{"Name": "default-for-az", "Values": ["true"]}, {"Name": "availability-zone", "Values": zones}]
    )
    try:
        told = account.ask_all("ec2", region, "DescribeSubnets", "Subnets", Filters=filters)
    except HoldfastError as error:
        return [Check(name="network", ok=None, said=str(error), fix="give the right ec2:DescribeSubnets")]
    seen = {each["SubnetId"]: each for each in told}
    if not subnets:
        missing = sorted(set(zones) - {each["AvailabilityZone"] for each in told})
        said = f"no default subnet in {', '.join(missing)}" if missing else f"default subnets in {', '.join(zones)}"
        fix = f"aws ec2 create-default-subnet --region {region} --availability-zone {missing[0]}" if missing else ""
        checks = [Check(name="network", ok=not missing, said=said, fix=fix)]
    else:
        checks = [_subnet(name, zone, seen.get(name), region) for name, zone in subnets.items()]
    for each in told:
        if not each.get("AvailableIpAddressCount", 1):
            said = f"{each['SubnetId']} has no free address"
            checks.append(Check(name="network", ok=False, said=said, fix="use another subnet, or a larger one"))
    if order.spec.network.get("public_address") is False:
        said = "no public address: the subnet needs a NAT gateway, or a VPC endpoint for S3"
        checks.append(Check(name="network", ok=None, said=said, fix="aws ec2 describe-vpc-endpoints"))
    return checks


def _subnet(name: str, zone: str, told: Mapping[str, Any] | None, region: str) -> Check:
    if told is None:
        fix = f"aws ec2 describe-subnets --region {region}"
        return Check(name="network", ok=False, said=f"there is no {name} in {region}", fix=fix)
    there = told["AvailabilityZone"]
    fix = "" if there == zone else f"write {there}: {name}"
    return Check(name="network", ok=there == zone, said=f"{name} is in {there}, wanted in {zone}", fix=fix)


def _role(account: Account, region: str, spec: MachineSpec) -> Check:
    if not spec.role:
        said = "no instance profile: the machine has no rights of its own, and must find credentials otherwise"
        return Check(
            name="role", ok=None, said=said, fix="give the machines a role with `machine_policy` (docs/aws.md)"
        )
    name = spec.role.rsplit("/", 1)[-1]
    try:
        told = account.ask("iam", region, "GetInstanceProfile", InstanceProfileName=name)["InstanceProfile"]
    except Refused as error:
        missing = error.code == "NoSuchEntity"
        fix = (
            f"aws iam create-instance-profile --instance-profile-name {name}"
            if missing
            else "give iam:GetInstanceProfile"
        )
        return Check(name="role", ok=False if missing else None, said=str(error), fix=fix)
    except HoldfastError as error:
        return Check(name="role", ok=None, said=str(error), fix="look for yourself: aws iam get-instance-profile")
    roles = [each["RoleName"] for each in told.get("Roles", ())]
    fix = "" if roles else f"aws iam add-role-to-instance-profile --instance-profile-name {name} --role-name ROLE"
    said = f"instance profile {name} with role {', '.join(roles)}" if roles else f"instance profile {name} has no role"
    return Check(name="role", ok=bool(roles), said=said, fix=fix)


def _quotas(account: Account, region: str, pools: Sequence[Allowed], facts: Callable[[], Facts]) -> list[Check]:
    """Limits and not what is in use: another machine may have taken a part of them."""
    needs: dict[str, tuple[int, str]] = {}
    checks = []
    for kind, market in sorted({(each.pool.instance_type, each.pool.market) for each in pools}):
        code = quota_of(kind, market)
        try:
            vcpus = facts().types[kind].vcpus
        except HoldfastError:
            continue
        if code is None:
            said = f"which {market} quota {kind} counts against is not known"
            fix = "look in the console under Service Quotas, EC2"
            checks.append(Check(name=f"{market} quota", ok=None, said=said, fix=fix))
        elif vcpus < needs.get(code, (1 << 30, ""))[0]:
            needs[code] = (vcpus, market)
    return checks + [_quota(account, region, code, *need) for code, need in needs.items()]


def _quota(account: Account, region: str, code: str, vcpus: int, market: str) -> Check:
    asked = {"ServiceCode": "ec2", "QuotaCode": code}
    try:
        try:
            told = account.ask("service-quotas", region, "GetServiceQuota", **asked)
        except Refused as error:
            if error.code != "NoSuchResourceException":
                raise
            told = account.ask("service-quotas", region, "GetAWSDefaultServiceQuota", **asked)
    except HoldfastError as error:
        return Check(name=f"{market} quota", ok=None, said=str(error), fix="give servicequotas:GetServiceQuota")
    quota = told["Quota"]
    enough = quota["Value"] >= vcpus
    said = f"{quota.get('QuotaName', code)} in {region}: {quota['Value']:.0f} vCPUs; the smallest pool needs {vcpus}"
    command = f"aws service-quotas request-service-quota-increase --service-code ec2 --region {region}"
    fix = "" if enough else f"{command} --quota-code {code} --desired-value {vcpus}"
    return Check(name=f"{market} quota", ok=enough, said=said, fix=fix)


def _rights(account: Account, region: str, request: Callable[[], Mapping[str, Any]]) -> list[Check]:
    """The calls of the launch itself, and RunInstances, by whose rights a fleet launches: they include passing the role on."""
    try:
        calls = request()
    except HoldfastError as error:
        return [Check(name="request", ok=False, said=str(error))]
    dry = {
        "CreateLaunchTemplate": calls["CreateLaunchTemplate"],
        "CreateFleet": calls["CreateFleet"],
        "RunInstances": _as_run_instances(calls),
    }
    return [_dry_run(account, region, operation, parameters) for operation, parameters in dry.items()]


def _as_run_instances(calls: Mapping[str, Any]) -> dict[str, Any]:
    """The same machine in the best pool, without a fleet."""
    data = dict(calls["CreateLaunchTemplate"]["LaunchTemplateData"])
    best = dict(calls["CreateFleet"]["LaunchTemplateConfigs"][0]["Overrides"][0])
    market = calls["CreateFleet"]["TargetCapacitySpecification"]["DefaultTargetCapacityType"]
    if market == "spot":
        spot = {"MaxPrice": best["MaxPrice"], "SpotInstanceType": "one-time"}
        data["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": spot}
    if "NetworkInterfaces" in data and "SubnetId" in best:
        data["NetworkInterfaces"] = [{**data["NetworkInterfaces"][0], "SubnetId": best["SubnetId"]}]
    elif "SubnetId" in best:
        data["SubnetId"] = best["SubnetId"]
    else:
        data["Placement"] = {"AvailabilityZone": best["AvailabilityZone"]}
    # The SDK encodes user data of RunInstances by itself; a dry run needs none.
    data.pop("UserData", None)
    return {**data, "InstanceType": best["InstanceType"], "MinCount": 1, "MaxCount": 1, "ClientToken": calls["token"]}


def _dry_run(account: Account, region: str, operation: str, parameters: Mapping[str, Any]) -> Check:
    name = f"right to {operation}"
    try:
        # A token of its own: the launch's must be new when it is used.
        token = str(uuid.uuid5(_DRY_RUNS, parameters["ClientToken"]))
        account.once("ec2", region, operation, {**parameters, "ClientToken": token, "DryRun": True})
    except Refused as error:
        if error.code == "DryRunOperation":
            return Check(name=name, ok=True, said="AWS would do it")
        if error.code == "InvalidLaunchTemplateName.NotFoundException":
            return Check(name=name, ok=None, said="cannot be tried before the launch template is there")
        denied = error.code == "UnauthorizedOperation"
        fix = "compare the rights with `controller_policy` (docs/aws.md)" if denied else "mend what AWS names"
        return Check(name=name, ok=False, said=f"{error.code}: {error.said}", fix=fix)
    except HoldfastError as error:
        return Check(name=name, ok=None, said=str(error))
    return Check(name=name, ok=None, said="a dry run was answered as if it were none")


def _bucket(account: Account, region: str, run_url: str) -> Check:
    bucket = urlsplit(run_url).netloc
    try:
        told = account.ask("s3", region, "GetBucketLocation", Bucket=bucket)
    except Refused as error:
        fix = f"aws s3api get-bucket-location --bucket {bucket}"
        return Check(name="bucket", ok=False if error.code == "NoSuchBucket" else None, said=str(error), fix=fix)
    except HoldfastError as error:
        return Check(name="bucket", ok=None, said=str(error))
    there = told.get("LocationConstraint") or "us-east-1"
    near = there == region
    said = f"{bucket} is in {there}, the machines in {region}"
    fix = "" if near else "every checkpoint is billed as traffic between regions: use a bucket in the machines' region"
    # Slower and dearer, and not impossible.
    return Check(name="bucket", ok=True if near else None, said=said, fix=fix)
