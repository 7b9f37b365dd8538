"""The script for real projects, against the stand-in: it finds what is not as promised, stays within its cap, and clears up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gcp_stand_in
import pytest
from gcp_guests import Inhabited
from gcp_parts import allowed, client, compute, order
from gcp_stand_in import GcpStandIn
from gcp_words import Said
from typer.testing import CliRunner

from holdfast.cli.app import app
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.provider.base import MachineSpec, Wanted
from holdfast.provider.conformance import Finding, carry_out
from holdfast.provider.gcp import GcpInstances, controller_role
from holdfast.provider.gcp.calls import Calls
from holdfast.provider.gcp.conformance import MORE_PERMISSIONS, conformance, plan
from holdfast.testing.clock import ManualClock

FLEET = "conformance-1"
WANTED = Wanted(instance_types=("n1-standard-8",), zones=("us-central1-b",))
GIVE_UP_S = 120.0


class Died(BaseException):
    """The process ends here."""


@pytest.fixture
def cloud() -> Iterator[Inhabited]:
    with compute(kind=Inhabited) as cloud:
        assert isinstance(cloud, Inhabited)
        cloud.list_delay_s = 20.0
        yield cloud


@pytest.fixture
def gcp(cloud: Inhabited) -> Iterator[GcpInstances]:
    with client(cloud) as gcp:
        yield gcp


def run(gcp: GcpInstances, **changes: Any) -> dict[str, Finding]:
    usual: dict[str, Any] = {"cap_microusd": 2_000_000, "wanted": WANTED, "spec": MachineSpec(disk_gib=50)}
    heard: list[Finding] = []
    found = conformance(gcp, fleet=FLEET, say=heard.append, **(usual | changes))
    assert heard == found
    return {each.name: each for each in found}


def nothing_is_left(cloud: GcpStandIn) -> None:
    cloud.clock.advance(600)
    cloud._settle()
    assert cloud.instances == {}
    assert cloud.disks == []


def test_a_cloud_that_keeps_its_promises_passes(cloud: Inhabited, gcp: GcpInstances) -> None:
    found = run(gcp)
    assert {name for name, each in found.items() if each.ok is not True} == set(), found
    assert {"preempted: GCP says so", "maxRunDuration ends it", "a guest's shutdown is seen", "nothing is left"} <= set(
        found
    )
    assert found["it is in the list by its tags"].said.startswith("2"), "s after the call began"
    assert "preempted" in found["preempted: GCP says so"].said
    assert "TERMINATE_ON_HOST_MAINTENANCE TRUE" in found["a preemption is announced in the metadata"].said
    assert len(cloud.made) == 4
    assert all(each["labels"]["holdfast-fleet"] == FLEET for each in cloud.made)
    lives = {int(each["scheduling"]["maxRunDuration"]["seconds"]) for each in cloud.made}
    assert lives == {120, 1200}, "GCP ends each of them, whatever becomes of this process"
    nothing_is_left(cloud)


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("forgets tokens", {"GCP to its request id with another machine"}),
        ("keeps lives", {"maxRunDuration ends it", "its disk is gone with it"}),
        ("keeps disks", {"its disk is gone with it"}),
        ("lists late", {"it is in the list by its tags"}),
        ("no console", set()),
        ("another image", {"the image has Python 3.11, pip and gcloud"}),
        ("guests run on", {"a guest's shutdown is seen"}),
        ("no events", set()),
    ],
)
def test_what_is_not_as_promised_is_found_out(
    cloud: Inhabited, gcp: GcpInstances, monkeypatch: pytest.MonkeyPatch, fault: str, names: set[str]
) -> None:
    unknown: set[str] = set()
    match fault:
        case "forgets tokens":
            monkeypatch.setattr(gcp_stand_in, "_REQUEST_IDS_S", 0.0)
        case "keeps lives":
            cloud.ends_lives = False
        case "keeps disks":
            cloud.deletes_disks = False
        case "lists late":
            cloud.list_delay_s = 90.0
        case "no console":
            cloud.forbidden = {"compute.instances.getSerialPortOutput"}
            unknown = {
                "the image has Python 3.11, pip and gcloud", "it listens to its metadata",
                "a preemption is announced in the metadata",
            }  # fmt: skip
        case "another image":
            cloud.image_has = "holdfast-python False\nholdfast-pip True\nholdfast-looked\n"
        case "guests run on":
            cloud.stops_guests = False
        case "no events":
            cloud.forbidden = {"compute.instances.simulateMaintenanceEvent"}
            unknown = {"a preemption can be simulated"}
    found = run(gcp)
    assert {name for name, each in found.items() if each.ok is False} == names
    assert {name for name, each in found.items() if each.ok is None} == unknown
    assert found["nothing is left"].ok is True
    nothing_is_left(cloud)


def test_nothing_is_asked_for_beyond_the_cap_or_over_others(cloud: Inhabited, gcp: GcpInstances) -> None:
    with pytest.raises(UsageError, match="the cap is"):
        run(gcp, cap_microusd=100_000)
    with pytest.raises(UsageError, match="no spot offer"):
        run(gcp, wanted=Wanted(instance_types=("no-such-1",)))
    worst = plan(gcp, fleet=FLEET, cap_microusd=10**9, wanted=WANTED, spec=MachineSpec(disk_gib=50)).worst_microusd
    assert worst == -(-7 * (380_000 + 6_850 + 5_000) * 1200 // 3600), "seven machines, on demand, for twenty minutes"
    with pytest.raises(UsageError, match="the cap is"):
        run(gcp, cap_microusd=worst - 1)
    theirs = gcp.create(gcp.request(order(fleet=FLEET, allowed=(allowed("n1-standard-8"),))))
    with pytest.raises(UsageError, match="nobody has used"):
        run(gcp)
    assert len(cloud.made) == 1
    gcp.terminate([theirs])


def test_it_stops_at_a_failed_preflight(cloud: Inhabited, gcp: GcpInstances) -> None:
    cloud.quotas["PREEMPTIBLE_CPUS"] = (4, 0)
    found = run(gcp)
    assert "preflight: quota PREEMPTIBLE_CPUS in us-central1" in {
        name for name, each in found.items() if each.ok is False
    }
    assert cloud.made == []


def test_a_zone_without_capacity_ends_it_with_nothing(cloud: Inhabited, gcp: GcpInstances) -> None:
    cloud.failing = {"us-central1-b": {"code": "ZONE_RESOURCE_POOL_EXHAUSTED", "message": "none"}}
    found = run(gcp)
    assert found["a machine is made"].ok is False
    assert "maxRunDuration ends it" not in found
    nothing_is_left(cloud)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, HoldfastError])
def test_stopped_between_any_two_calls_it_ends_everything(
    monkeypatch: pytest.MonkeyPatch, before: bool, error: type[BaseException]
) -> None:
    """Ctrl-C, or an error, at every call of the script; also when an insert was sent and its answer was never read."""
    through, survived, stopped = Calls.call, False, 0
    stride = 1 if os.environ.get("HOLDFAST_TEST_SCALE") == "long" else 24
    for number in range(stride // 2, 1000, stride):
        left = [number]

        def call(self: Calls, api: str, method: str, *, left: list[int] = left, **given: Any) -> Any:
            left[0] -= 1
            if before and left[0] == -1:
                raise error
            answer = through(self, api, method, **given)
            if left[0] == -1:
                raise error
            return answer

        with compute(kind=Inhabited) as cloud, client(cloud) as gcp:
            assert isinstance(cloud, Inhabited)
            cloud.list_delay_s = 50.0
            heard: list[Finding] = []
            script = plan(gcp, fleet=FLEET, cap_microusd=10**9, wanted=WANTED, spec=MachineSpec(disk_gib=50))
            monkeypatch.setattr(Calls, "call", call)
            try:
                carry_out(script, heard.append)
            except error:
                stopped += 1
            monkeypatch.setattr(Calls, "call", through)
            survived = left[0] > -1
            assert heard[-1].name == "nothing is left"
            nothing_is_left(cloud)
        if survived:
            break
    assert survived
    assert stopped > 5


@pytest.mark.parametrize("how", ["lost", "late", "after"])
def test_an_insert_whose_answer_is_lost_is_ended_when_it_comes(cloud: Inhabited, gcp: GcpInstances, how: str) -> None:
    """The list is blind for a while; then it shows a machine that nobody was told of."""
    cloud.list_delay_s = 50.0
    cloud.play("instances.insert", how, times=2)
    cloud.play("instances.get", "before", times=1)
    found = run(gcp)
    assert found["a machine is made"].ok is False
    assert found["nothing is left"].ok is True
    nothing_is_left(cloud)


def test_a_provider_that_does_not_answer_is_asked_until_it_does(cloud: Inhabited, gcp: GcpInstances) -> None:
    for method in ("instances.aggregatedList", "instances.delete", "disks.aggregatedList"):
        cloud.play(method, "before", times=3, said=Said(503, "backendError", "down"))
    cloud.play("instances.get", "before", said=Said(403, "forbidden", "no"))
    with pytest.raises(HoldfastError):
        run(gcp)
    nothing_is_left(cloud)


def test_who_runs_it_needs_these_rights_beside_the_controllers() -> None:
    page = (Path(__file__).parents[3] / "docs/gcp.md").read_text()
    for each in MORE_PERMISSIONS:
        assert each not in controller_role()["includedPermissions"]
        assert each in page


# ---- the command

ARGUMENTS = ["conformance", "gcp", "--region", "us-central1", "--zone", "us-central1-b", "--type", "n1-standard-8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*ARGUMENTS], "no terminal to ask on; add --yes"),
        ([*ARGUMENTS, "--max-cost", "0.10"], "the cap is $0.1000"),
        ([*ARGUMENTS, "--max-cost", "lots"], "not an amount"),
        ([*ARGUMENTS, "--market", "cheap"], "there are spot and on-demand"),
        ([*ARGUMENTS, "--security-group", "sg-1"], "of aws"),
        ([*ARGUMENTS, "--subnet", "x"], "ZONE=SUBNET"),
        (["conformance", "azure", *ARGUMENTS[2:]], "there are scripts for aws and gcp"),
        (["conformance", "aws", *ARGUMENTS[2:]], "aws needs --subnet"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_launched(
    cloud: Inhabited, gcp: GcpInstances, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("holdfast.provider.gcp.GcpInstances", lambda *_, **__: gcp)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UsageError), done.output
    assert said in str(done.exception)
    assert cloud.made == []


DRIVER = """
import sys
sys.path.insert(0, {here!r})
import holdfast.provider.gcp as gcp
from google.auth.credentials import AnonymousCredentials
from gcp_parts import PRICES
from holdfast.cli.app import main
real, endpoints = gcp.GcpInstances, {endpoints!r}
gcp.GcpInstances = lambda project, **options: real(
    "some-project", prices=PRICES, credentials=AnonymousCredentials(), endpoints=endpoints
)
sys.argv = ["holdfast", *{arguments!r}]
main()
"""


@pytest.fixture
def passing() -> Iterator[ManualClock]:
    """The stand-in's time runs ten times as fast as that of the process which asks it."""
    clock, ended = ManualClock(time.time()), threading.Event()

    def run() -> None:
        while not ended.wait(0.05):
            clock.advance(0.5)

    thread = threading.Thread(target=run)
    thread.start()
    yield clock
    ended.set()
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_command_is_stopped_twice_and_ends_what_it_has_launched(passing: ManualClock, number: int) -> None:
    with compute(passing, kind=Inhabited) as cloud:
        program = DRIVER.format(
            here=str(Path(__file__).parent), endpoints=cloud.endpoints, arguments=[*ARGUMENTS, "--yes"]
        )
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            timer = threading.Timer(GIVE_UP_S, process.kill)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ok: a machine is made"):
                    break
            process.send_signal(number)
            while not any(each.method == "compute.instances.delete" for each in list(cloud.asked)):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate()
            timer.cancel()
        assert process.returncode == 130, err
        assert "costs at most $0.9" in err
        assert "is being ended; that takes a minute" in err
        assert "ok: nothing is left" in out
        nothing_is_left(cloud)
        assert 1 <= len(cloud.made) <= 2
