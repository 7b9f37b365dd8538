"""`holdfast sweep-leaks gcp` against the stand-in: instances, disks and addresses past their time, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gcp_parts import FLEET, RUN, allowed, client, compute, order
from gcp_stand_in import GcpStandIn
from gcp_words import Said, stamp
from typer.testing import CliRunner, Result

from holdfast.cli.app import app
from holdfast.provider.gcp import GcpInstances
from holdfast.provider.gcp.words import label_value

ZONE = "us-central1-b"


@pytest.fixture
def cloud() -> Iterator[GcpStandIn]:
    with compute() as cloud:
        yield cloud


@pytest.fixture
def gcp(cloud: GcpStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcpInstances]:
    """Each command makes a client of its own."""
    monkeypatch.setattr("holdfast.provider.gcp.GcpInstances", lambda *_, **__: client(cloud))
    with client(cloud) as gcp:
        yield gcp


def sweep(*words: str, fleet: str = FLEET) -> Result:
    return CliRunner().invoke(app, ["sweep-leaks", "gcp", "--fleet", fleet, "--cloud", "some-project", *words])


def found(*words: str) -> dict[str, Any]:
    done = sweep("--json", *words)
    assert done.exit_code == 0, (done.output, done.exception)
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def machine(cloud: GcpStandIn, gcp: GcpInstances, launch: int, expired_s: int, **changes: Any) -> str:
    expires_unix_s = int(cloud.clock.unix_s()) - expired_s
    made = gcp.create(gcp.request(order(launch, expires_unix_s=expires_unix_s, **changes)))
    return made.id


def labels(cloud: GcpStandIn, fleet: str, expired_s: int | None) -> dict[str, str]:
    own = {"holdfast-fleet": label_value(fleet), "holdfast-run": label_value(RUN)}
    expires = {} if expired_s is None else {"holdfast-expires": str(int(cloud.clock.unix_s()) - expired_s)}
    return own | expires


def lay_about(cloud: GcpStandIn, name: str, fleet: str, expired_s: int | None) -> None:
    """A disk that nothing uses, and an address that is kept."""
    cloud.disks.append(
        {
            "name": f"disk-{name}", "zone": "zones/us-central1-a", "sizeGb": "73",
            "type": "zones/us-central1-a/diskTypes/pd-balanced", "labels": labels(cloud, fleet, expired_s),
            "creationTimestamp": stamp(cloud.clock.unix_s() - 7200),
        }
    )  # fmt: skip
    address = {"name": f"ip-{name}", "region": "regions/us-central1", "status": "RESERVED"}
    cloud.addresses.append(address | {"labels": labels(cloud, fleet, expired_s)})


def test_what_is_past_its_time_is_shown_and_ended_and_nothing_else(cloud: GcpStandIn, gcp: GcpInstances) -> None:
    leak, wanted = machine(cloud, gcp, 1, 3600), machine(cloud, gcp, 2, -3600)
    stopped = machine(cloud, gcp, 3, 7200)
    theirs = machine(cloud, gcp, 4, 3600, fleet="another")
    next(each for each in cloud.made if each["id"] == stopped)["status"] = "TERMINATED"
    for name, fleet, expired_s in (
        ("old", FLEET, 3600), ("fresh", FLEET, 300), ("unsaid", FLEET, None), ("theirs", "another", 3600),
    ):  # fmt: skip
        lay_about(cloud, name, fleet, expired_s)
    shown = found()
    assert {each["id"] for each in shown["machines"]} == {leak, stopped}
    assert {each["id"].rpartition("/")[2]: each["ends"] for each in shown["leftovers"]} == {
        "disk-old": True, "ip-old": True, "disk-unsaid": False, "ip-unsaid": False,
    }  # fmt: skip
    assert shown["leftovers"][0]["usd_h"] == 0.01
    asked = [each.method for each in cloud.asked]
    assert not any(each.endswith((".delete", ".setLabels")) for each in asked)

    done = sweep("--end", "--yes")
    assert done.exit_code == 0, done.output
    assert "2 machines and 2 other things" in done.stderr
    cloud.clock.advance(60)
    cloud._settle()
    assert {each["id"] for each in cloud.instances.values()} == {wanted, theirs}
    loose = {each["name"] for each in cloud.disks if not each.get("users")}
    assert loose == {"disk-fresh", "disk-unsaid", "disk-theirs"}
    assert {each["name"] for each in cloud.addresses} == {"ip-fresh", "ip-unsaid", "ip-theirs"}
    assert found("--region", "europe-west4") == {"machines": [], "leftovers": [], "problems": []}


def test_what_does_not_go_is_said_and_the_rest_goes(cloud: GcpStandIn, gcp: GcpInstances) -> None:
    first, second = machine(cloud, gcp, 1, 3600), machine(cloud, gcp, 2, 3600)
    lay_about(cloud, "old", FLEET, 3600)
    cloud.play("instances.delete", "before", said=Said(403, "forbidden", "it is protected"))
    cloud.play("disks.delete", "before", said=Said(400, "resourceInUseByAnotherResource", "in use"))
    done = sweep("--end", "--yes")
    assert done.exit_code == 1
    assert "1 of 2 machines may not have been ended" in done.stderr
    assert "disk-old" in done.stderr
    cloud.clock.advance(60)
    cloud._settle()
    (left,) = (each["id"] for each in cloud.instances.values())
    assert left in (first, second)
    assert left in done.stderr
    assert cloud.addresses == []
    assert sweep("--end", "--yes").exit_code == 0
    cloud.clock.advance(60)
    cloud._settle()
    assert cloud.instances == {}
    assert cloud.disks == []


def test_a_list_that_is_not_whole_says_so_and_disks_are_looked_for_all_the_same(
    cloud: GcpStandIn, gcp: GcpInstances
) -> None:
    machine(cloud, gcp, 1, 3600, allowed=(allowed(zone="us-central1-a"),))
    lay_about(cloud, "old", FLEET, 3600)
    cloud.forbidden = {"compute.instances.aggregatedList"}
    done = sweep("--end", "--yes")
    assert done.exit_code == 1
    assert "not known: gcp" in done.stderr
    assert cloud.addresses == []
    assert len(cloud.instances) == 1


def test_a_name_that_is_no_label_is_said(cloud: GcpStandIn, gcp: GcpInstances) -> None:
    done = sweep(fleet="x" * 64)
    assert done.exit_code != 0
    assert "too long for a label" in str(done.exception) + done.stderr
