"""The IAM documents, tried by a small evaluator: what a machine and a controller may, and above all what they may not."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from holdfast.core.errors import UsageError
from holdfast.provider.aws.policies import controller_policy, machine_policy, machine_trust

RUN = "s3://bucket/runs/gpt"
OBJECTS = "arn:aws:s3:::bucket/runs/"


def may(policy: dict[str, Any], action: str, resource: str, **facts: str) -> bool:
    """As IAM decides: a deny that holds wins, and nothing is allowed that is not said."""
    effects = {each["Effect"] for each in policy["Statement"] if _holds(each, action, resource, facts)}
    return effects == {"Allow"}


def _holds(statement: dict[str, Any], action: str, resource: str, facts: dict[str, str]) -> bool:
    def some(patterns: Any, value: str) -> bool:
        return any(fnmatchcase(value, each) for each in ([patterns] if isinstance(patterns, str) else patterns))

    for kind, condition in statement.get("Condition", {}).items():
        for key, values in condition.items():
            value = facts.get(key.split("/")[-1].split(":")[-1])
            match = value is not None and some(values, value)
            if match is (kind == "StringNotEquals"):
                return False
    return some(statement["Action"], action) and some(statement["Resource"], resource)


def test_a_machine_reaches_its_own_run_and_never_writes_the_controllers_words() -> None:
    policy = machine_policy(run_url=RUN)
    for key in ("data/1/abc", "heads/00000001.json", "machines/00000001/holder", "events/1-0-1"):
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert may(policy, action, f"{OBJECTS}gpt/{key}")
    for key in ("launches/00000001/answer", "control/00000001/grant-000001"):
        assert may(policy, "s3:GetObject", f"{OBJECTS}gpt/{key}")
        for action in ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
            assert not may(policy, action, f"{OBJECTS}gpt/{key}")
    for other in ("gpt2/data/1/abc", "other/heads/00000001.json"):
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert not may(policy, action, f"{OBJECTS}{other}")
    assert may(policy, "s3:ListBucket", "arn:aws:s3:::bucket", prefix="runs/gpt/heads/")
    for prefix in ("", "runs/", "runs/gpt2/"):
        assert not may(policy, "s3:ListBucket", "arn:aws:s3:::bucket", prefix=prefix)
    for action in ("ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"):
        assert not may(policy, action, "*")
    assert machine_trust()["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}


def test_a_machine_reads_the_files_that_it_copies_and_nothing_beside_them() -> None:
    policy = machine_policy(run_url=RUN, readable=["s3://data/sets/pile", "s3://whole"])
    for key in ("data/sets/pile", "data/sets/pile/part-1", "whole/x"):
        assert may(policy, "s3:GetObject", f"arn:aws:s3:::{key}")
        assert not may(policy, "s3:PutObject", f"arn:aws:s3:::{key}")
    assert not may(policy, "s3:GetObject", "arn:aws:s3:::data/sets/pile2/part-1")
    assert may(policy, "s3:ListBucket", "arn:aws:s3:::data", prefix="sets/pile/")
    assert not may(policy, "s3:ListBucket", "arn:aws:s3:::data", prefix="sets/")
    assert may(policy, "s3:ListBucket", "arn:aws:s3:::whole", prefix="")


def test_a_controller_makes_and_ends_what_carries_its_fleets_tag() -> None:
    policy = controller_policy(
        fleet="team-a", account="123456789012", role="trainer", run_url=RUN, regions=["us-east-1"]
    )
    ec2 = "arn:aws:ec2:us-east-1:123456789012"
    machine, required = f"{ec2}:instance/i-1", "required"
    assert may(policy, "ec2:RunInstances", machine, fleet="team-a", MetadataHttpTokens=required)
    assert not may(policy, "ec2:RunInstances", machine, fleet="team-a", MetadataHttpTokens="optional")
    assert not may(policy, "ec2:RunInstances", machine, fleet="team-b", MetadataHttpTokens=required)
    assert not may(policy, "ec2:RunInstances", machine, MetadataHttpTokens=required)
    assert not may(
        policy, "ec2:RunInstances", "arn:aws:ec2:eu-west-1:1:instance/i-1", fleet="team-a", MetadataHttpTokens=required
    )
    for resource in (f"{ec2}:subnet/subnet-1", f"{ec2}:security-group/sg-1", "arn:aws:ec2:us-east-1::image/ami-1"):
        assert may(policy, "ec2:RunInstances", resource)
    for resource in ("volume/v", "network-interface/n", "spot-instances-request/s"):
        assert may(policy, "ec2:RunInstances", f"{ec2}:{resource}", fleet="team-a")
    for action in ("ec2:CreateFleet", "ec2:CreateLaunchTemplate"):
        assert may(policy, action, f"{ec2}:{'fleet' if 'Fleet' in action else 'launch-template'}/x", fleet="team-a")
    assert may(policy, "ec2:CreateTags", machine, fleet="team-a", CreateAction="RunInstances")
    for resource in ("instance/i-1", "volume/v", "network-interface/n"):
        assert may(policy, "ec2:CreateTags", f"{ec2}:{resource}", fleet="team-a", TagKeys="holdfast:expires")
        assert not may(policy, "ec2:CreateTags", f"{ec2}:{resource}", fleet="team-b", TagKeys="holdfast:expires")
        assert not may(policy, "ec2:CreateTags", f"{ec2}:{resource}", fleet="team-a", TagKeys="holdfast:fleet")
    for action in ("ec2:TerminateInstances", "ec2:DeleteVolume", "ec2:ReleaseAddress", "ec2:DeleteNetworkInterface"):
        assert may(policy, action, f"{ec2}:x/y", fleet="team-a")
        assert not may(policy, action, f"{ec2}:x/y", fleet="team-b")
    role = "arn:aws:iam::123456789012:role/"
    assert may(policy, "iam:PassRole", f"{role}trainer", PassedToService="ec2.amazonaws.com")
    assert not may(policy, "iam:PassRole", f"{role}admin", PassedToService="ec2.amazonaws.com")
    assert not may(policy, "iam:PassRole", f"{role}trainer", PassedToService="lambda.amazonaws.com")
    assert may(policy, "s3:PutObject", f"{OBJECTS}gpt/control/00000001/grant-000001")
    assert not may(policy, "s3:PutObject", f"{OBJECTS}gpt2/heads/1.json")


@pytest.mark.parametrize(
    "url", ["gs://bucket/x", "s3://", "bucket/runs", "s3://bucket/runs/*", "s3://bucket/${aws:username}"]
)
def test_a_url_that_would_open_more_than_it_says_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        machine_policy(run_url=url)


def test_the_page_shows_what_there_is() -> None:
    page = (Path(__file__).parents[3] / "docs" / "aws.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown: dict[str, Any] = {}
    for block in blocks:
        exec(block, shown)
    assert may(shown["machine"], "s3:GetObject", f"{OBJECTS}gpt/heads/00000001.json")
    assert callable(shown["find_out"])


def test_a_machine_leaves_word_in_its_fleets_inbox_and_does_nothing_else_there() -> None:
    policy = machine_policy(run_url=RUN, home="s3://bucket/fleet")
    home = "arn:aws:s3:::bucket/fleet/"
    assert may(policy, "s3:PutObject", f"{home}inbox/run-a.00000001.000000")
    for action in ("s3:GetObject", "s3:DeleteObject"):
        assert not may(policy, action, f"{home}inbox/run-a.00000001.000000")
    for key in ("runs/run-a", "over/run-a", "controllers/c", "inboxes/x"):
        assert not may(policy, "s3:PutObject", home + key)
    assert not may(machine_policy(run_url=RUN), "s3:PutObject", f"{home}inbox/run-a.00000001.000000")
    controller = controller_policy(
        fleet="team-a", account="123456789012", role="trainer", run_url=RUN, home="s3://bucket/fleet"
    )
    for key in ("runs/run-a", "over/run-a", "controllers/c", "inbox/x"):
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert may(controller, action, home + key)
    assert may(controller, "s3:ListBucket", "arn:aws:s3:::bucket", prefix="fleet/inbox/")
    sids = [each["Sid"] for each in controller["Statement"]]
    assert len(sids) == len(set(sids))
