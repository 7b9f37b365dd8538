"""The cloud is killed, and what it had goes on: its machines, their endpoints, its clock, its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rehearsal import ON_DEMAND, Rehearsal, Rehearse
from waiting import eventually

from holdfast.core.errors import FormatError, LaunchFailed, ProviderError
from holdfast.core.failures import Failure
from holdfast.provider.base import Machine
from holdfast.provider.local import LocalCloud

_TICKS = "while :; do echo tick; sleep 0.1; done"


@pytest.mark.parametrize("isolation", ["namespaces", "process"])
def test_machines_outlive_their_cloud(rehearse: Rehearse, isolation: str) -> None:
    rehearsal = rehearse(isolation=isolation, notice={"lead_s": 60}, speed=100, billing={"minimum_s": 0})
    stays, ends, noticed, overdue = (rehearsal.launch(_TICKS) for _ in range(4))
    late = rehearsal.order(_TICKS)
    for machine in (stays, ends, noticed, overdue):
        rehearsal.said(machine, "tick")
    rehearsal.cloud.preempt(noticed.id)
    rehearsal.cloud.preempt(overdue.id, lead_s=0.4)
    rehearsal.cloud.misbehave(late_s=0.4, script={"create": ["late"]})
    with pytest.raises(ProviderError):
        rehearsal.cloud.create(rehearsal.cloud.request(late))
    before_unix_s = rehearsal.cloud.clock.unix_s()
    rehearsal.kill()

    keeper = int((rehearsal.folder / "keepers" / f"{ends.id}.lock").read_text())
    os.kill(keeper, signal.SIGUSR1)
    eventually(lambda: not os.path.exists(f"/proc/{keeper}") or _is_zombie(keeper))
    written = len(rehearsal.cloud.console(stays.id))
    eventually(lambda: len(rehearsal.cloud.console(stays.id)) > written)
    with pytest.raises(LaunchFailed) as refused:
        rehearsal.cloud.create(rehearsal.cloud.request(rehearsal.order("true")))
    assert refused.value.failure is Failure.ERROR
    rehearsal.restart()

    assert rehearsal.cloud.clock.unix_s() >= before_unix_s
    assert rehearsal.gone(overdue).ended_by == "provider"
    assert rehearsal.gone(ends).ended_by == "provider"
    assert rehearsal.listed(stays).state == rehearsal.listed(noticed).state == "running"
    assert "terminate" in _instance_action(rehearsal, noticed)
    with pytest.raises(urllib.error.HTTPError):
        _instance_action(rehearsal, stays)
    eventually(lambda: len(rehearsal.cloud.machines("fleet")) == 5)
    assert [machine.token for machine in rehearsal.cloud.machines("fleet")][-1] == late.token
    rehearsal.cloud.terminate([stays])
    assert rehearsal.gone(stays).ended_by == "owner"
    assert len(rehearsal.entries("birth")) == 5


def test_a_log_that_ends_in_the_middle_of_a_line(rehearse: Rehearse) -> None:
    rehearsal = rehearse()
    first = rehearsal.launch(_TICKS)
    rehearsal.said(first, "tick")
    rehearsal.kill()
    with (rehearsal.folder / "log.jsonl").open("ab") as log:
        log.write(b'{"event":"death","machine":"' + first.id.encode())
    rehearsal.restart()
    assert rehearsal.listed(first).state == "running"
    second = rehearsal.launch("true")
    assert rehearsal.gone(second).ended_by == "itself"
    assert rehearsal.cloud.invoice()["machines"].keys() == {first.id, second.id}


def test_killed_again_and_again_while_machines_come_and_go(rehearse: Rehearse) -> None:
    """At whatever moment: every accepted call is one machine, and none is lost or billed for ever."""
    rehearsal = rehearse(boot_s=[0.0, 0.1], pools=[{"name": ON_DEMAND, "price": 1}])
    launched: list[Machine] = []
    for round in range(3):
        launched += [rehearsal.launch("sleep 0.2", pool=ON_DEMAND) for _ in range(2)]
        if round % 2:
            rehearsal.cloud.terminate(launched[-1:])
        rehearsal.kill()
        rehearsal.restart()
    for machine in launched:
        rehearsal.gone(machine)
    assert len({machine.id for machine in launched}) == 6
    assert sorted(entry["machine"] for entry in rehearsal.entries("death")) == sorted(each.id for each in launched)


def test_one_cloud_per_folder_and_one_address_per_cloud(rehearse: Rehearse) -> None:
    rehearsal = rehearse()
    again = LocalCloud.open(rehearsal.folder)
    assert again.address == rehearsal.cloud.address
    assert (rehearsal.folder / "cloud.json").stat().st_mode & 0o777 == 0o600
    rehearsal.stop()
    assert LocalCloud.running(rehearsal.folder) is None
    rehearsal.restart()
    stranger = LocalCloud(again.address, rehearsal.folder)
    with pytest.raises(ProviderError):
        stranger.machines("fleet")
    (rehearsal.folder / "copy").mkdir()
    (rehearsal.folder / "copy" / "cloud.json").write_text("{}")
    with pytest.raises(FormatError):
        LocalCloud.running(rehearsal.folder / "copy")


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _instance_action(rehearsal: Rehearsal, machine: Machine) -> str:
    (boot,) = [entry for entry in rehearsal.entries("boot") if entry["machine"] == machine.id]
    endpoint = f"http://127.0.0.1:{boot['metadata_port']}/latest"
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/api/token", method="PUT", headers=ttl)) as said:
        token = said.read().decode()
    asked = urllib.request.Request(
        f"{endpoint}/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    with urllib.request.urlopen(asked) as said:
        text: str = said.read().decode()
        return text


def test_several_at_once_start_one_cloud(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from holdfast.provider.local import LocalCloud; "
        "print(LocalCloud.open(Path(sys.argv[1])).address.pid)"
    )
    folder = tmp_path / "cloud"
    asked = [
        subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    pids = {process.communicate()[0].strip() for process in asked}
    cloud = LocalCloud.running(folder)
    assert cloud is not None
    assert pids == {str(cloud.address.pid)}
    cloud.end()


def test_a_cloud_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text('{"pools": []}')
    with pytest.raises(ProviderError, match=r"wrong\.json.*at least one pool"):
        LocalCloud.open(tmp_path / "cloud", tmp_path / "wrong.json")
    (tmp_path / "cloud" / "config.json").write_text('{"pools": [{"name": "local/x/y/z/spot", "price": 1}], "speed": 2}')
    cloud = LocalCloud.open(tmp_path / "cloud")
    assert cloud.speed == 2
    cloud.end()


def test_what_is_nonsense_leaves_no_trace_in_the_log(rehearse: Rehearse) -> None:
    """An entry that cannot be read again would end the cloud for good."""
    rehearsal = rehearse()
    cloud, machine = rehearsal.cloud, rehearsal.launch(_TICKS)
    good = cloud.request(rehearsal.order("true"))
    bad: list[dict[str, Any]] = [
        {**good, "tags": {"holdfast:expires": "soon"}},
        {**good, "disk_gib": -1},
        {**good, "more": 1},
        {**good, "allowed": []},
        {},
    ]
    for request in bad:
        with pytest.raises(LaunchFailed) as refused:
            cloud.create(request)
        assert refused.value.failure is Failure.BAD_REQUEST
    calls: list[Callable[[], None]] = [
        lambda: cloud.set_pool(ON_DEMAND, capacity=-1),
        lambda: cloud.set_pool(ON_DEMAND, price="much"),
        lambda: cloud.set_pool("local/no/such/pool/spot", capacity=1),
        lambda: cloud.preempt("m-none"),
        lambda: cloud.preempt(machine.id, lead_s="soon"),  # type: ignore[arg-type]
        lambda: cloud.misbehave(create={"explode": 1.0}),
        lambda: cloud.misbehave(nonsense=1),
    ]
    for call in calls:
        with pytest.raises(ProviderError):
            call()
    rehearsal.kill()
    rehearsal.restart()
    assert rehearsal.listed(machine).state in ("pending", "running")
