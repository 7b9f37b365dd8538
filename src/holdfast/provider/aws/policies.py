"""The rights that are needed and no more, as IAM documents: of the controller, of a machine, and who may be a machine.

A machine reads and writes under its own run's URL. What the controller says there (`launches/`, `control/`) it reads and never
writes: no machine can prolong its own grant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.provider.aws.request import TAG

__all__ = ["controller_policy", "machine_policy", "machine_trust"]

_LOOKS = (
    "ec2:DescribeAddresses",
    "ec2:DescribeFleets",
    "ec2:DescribeImages",
    "ec2:DescribeInstanceTypeOfferings",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeInstances",
    "ec2:DescribeLaunchTemplates",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeRegions",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSpotInstanceRequests",
    "ec2:DescribeSpotPriceHistory",
    "ec2:DescribeSubnets",
    "ec2:DescribeVolumes",
    "pricing:GetProducts",
    "servicequotas:GetAWSDefaultServiceQuota",
    "servicequotas:GetServiceQuota",
)
_BORN = ("fleet", "instance", "launch-template", "network-interface", "spot-instances-request", "volume")
_USED = ("image", "key-pair", "placement-group", "security-group", "subnet")
_SERVICE_ROLES = ("spot.amazonaws.com", "ec2fleet.amazonaws.com")


def controller_policy(
    *,
    fleet: str,
    account: str,
    role: str,
    run_url: str,
    home: str | None = None,
    regions: Sequence[str] = ("*",),
    partition: str = "aws",
) -> dict[str, Any]:
    """What the controller needs. `role` is the machines' role by its name; `run_url` may be a prefix of many runs; `home` is the
    fleet's, where there is one."""
    arn = f"arn:{partition}"
    tagged = {"StringEquals": {f"aws:RequestTag/{TAG}fleet": fleet}}
    ours = {"StringEquals": {f"aws:ResourceTag/{TAG}fleet": fleet}}
    born = [f"{arn}:ec2:{region}:*:{kind}/*" for region in regions for kind in _BORN]
    made = [each for each in born if not each.endswith((":launch-template/*", ":fleet/*"))]
    ec2 = [
        _allow("Look", _LOOKS, ["*"]),
        _allow("Images", ["ssm:GetParameter"], [f"{arn}:ssm:*::parameter/aws/service/*"]),
        _allow("MakeTagged", ["ec2:CreateFleet", "ec2:CreateLaunchTemplate"], born, tagged),
        _allow("LaunchTagged", ["ec2:RunInstances"], made, tagged),
        _allow(
            "LaunchWith",
            ["ec2:RunInstances", "ec2:CreateFleet"],
            [
                *(f"{arn}:ec2:{region}:*:{kind}/*" for region in regions for kind in _USED if kind != "image"),
                *(f"{arn}:ec2:{region}::image/*" for region in regions),
            ],
        ),
        _allow(
            "LaunchFromTemplate",
            ["ec2:RunInstances", "ec2:CreateFleet", "ec2:DeleteLaunchTemplate"],
            [f"{arn}:ec2:{region}:*:launch-template/*" for region in regions],
            ours,
        ),
        {
            "Sid": "OnlyTokensForMetadata",
            "Effect": "Deny",
            "Action": "ec2:RunInstances",
            "Resource": [f"{arn}:ec2:*:*:instance/*"],
            "Condition": {"StringNotEquals": {"ec2:MetadataHttpTokens": "required"}},
        },
        _allow(
            "TagAtBirth",
            ["ec2:CreateTags"],
            born,
            {
                "StringEquals": {
                    "ec2:CreateAction": ["CreateFleet", "CreateLaunchTemplate", "RunInstances"],
                    f"aws:RequestTag/{TAG}fleet": fleet,
                }
            },
        ),
        _allow(
            "Extend",
            ["ec2:CreateTags"],
            made,
            {**ours, "ForAllValues:StringEquals": {"aws:TagKeys": [f"{TAG}expires"]}},
        ),
        _allow(
            "EndOurs",
            ["ec2:TerminateInstances", "ec2:DeleteVolume", "ec2:DeleteNetworkInterface", "ec2:ReleaseAddress"],
            ["*"],
            ours,
        ),
    ]
    stored = [*_whole_prefix(arn, run_url), *([] if home is None else _whole_prefix(arn, home, "Home"))]
    return _document([*ec2, *_roles(arn, account, role), *stored])


def machine_policy(
    *, run_url: str, readable: Sequence[str] = (), home: str | None = None, partition: str = "aws"
) -> dict[str, Any]:
    """What a machine needs: its own run's prefix, without the controller's words. `readable`: URLs that it copies files from
    (`file_mounts`), each a folder or one object. `home`: of its fleet, in whose inbox it leaves word."""
    arn = f"arn:{partition}"
    bucket, prefix = _bucket_and_prefix(run_url)
    words = [f"{arn}:s3:::{bucket}/{prefix}{folder}/*" for folder in ("launches", "control")]
    writes = ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:PutObject"]
    denied = {"Sid": "ControllersWords", "Effect": "Deny", "Action": writes, "Resource": words}
    reads = [each for number, url in enumerate(readable, 1) for each in _reading(arn, number, url)]
    rings = [] if home is None else [_ringing(arn, home)]
    return _document([*_whole_prefix(arn, run_url), *reads, *rings, denied])


def _ringing(arn: str, home: str) -> dict[str, Any]:
    bucket, prefix = _bucket_and_prefix(home)
    return _allow("Inbox", ["s3:PutObject"], [f"{arn}:s3:::{bucket}/{prefix}inbox/*"])


def _reading(arn: str, number: int, url: str) -> list[dict[str, Any]]:
    bucket, prefix = _bucket_and_prefix(url)
    objects = [f"{arn}:s3:::{bucket}/{prefix}*", *([f"{arn}:s3:::{bucket}/{prefix[:-1]}"] if prefix else [])]
    return [
        _allow(f"Read{number}", ["s3:GetObject"], objects),
        _allow(
            f"ReadList{number}",
            ["s3:ListBucket"],
            [f"{arn}:s3:::{bucket}"],
            {"StringLike": {"s3:prefix": [f"{prefix}*"]}},
        ),
    ]


def machine_trust() -> dict[str, Any]:
    """Who may be the machines' role: EC2 instances."""
    principal = {"Service": "ec2.amazonaws.com"}
    return _document([{"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}])


def _roles(arn: str, account: str, role: str) -> list[dict[str, Any]]:
    whose = f"{arn}:iam::{account}"
    to_ec2 = {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    services = {"StringEquals": {"iam:AWSServiceName": list(_SERVICE_ROLES)}}
    return [
        _allow("GiveRole", ["iam:PassRole"], [f"{whose}:role/{role}"], to_ec2),
        _allow("SeeProfile", ["iam:GetInstanceProfile"], [f"{whose}:instance-profile/*"]),
        _allow("ServiceRoles", ["iam:CreateServiceLinkedRole"], [f"{whose}:role/aws-service-role/*"], services),
    ]


def _whole_prefix(arn: str, run_url: str, what: str = "") -> list[dict[str, Any]]:
    bucket, prefix = _bucket_and_prefix(run_url)
    objects = ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"]
    return [
        _allow(f"{what}Objects", objects, [f"{arn}:s3:::{bucket}/{prefix}*"]),
        _allow(
            f"{what}List", ["s3:ListBucket"], [f"{arn}:s3:::{bucket}"], {"StringLike": {"s3:prefix": [f"{prefix}*"]}}
        ),
        _allow(f"{what}BucketRegion", ["s3:GetBucketLocation"], [f"{arn}:s3:::{bucket}"]),
    ]


def _bucket_and_prefix(run_url: str) -> tuple[str, str]:
    """A prefix that is not empty ends in a slash: `runs/a` must not reach `runs/ab`."""
    bucket, _, prefix = run_url.removeprefix("s3://").partition("/")
    if not run_url.startswith("s3://") or not bucket or set("*?$") & set(run_url):
        raise UsageError(f"not a run's URL on S3: {run_url!r}; written like s3://bucket/runs/gpt")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def _allow(
    sid: str, actions: Sequence[str], resources: Sequence[str], condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    statement: dict[str, Any] = {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": list(resources)}
    return statement if condition is None else {**statement, "Condition": condition}


def _document(statements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": statements}
