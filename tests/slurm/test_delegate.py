"""A real Slurm behind `SlurmDelegate`: one job for one token, preempted, requeued by Slurm, resumed and done.

The cluster keeps no accounts, as many do not, and forgets what has ended as soon as it may.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, eventually, slurm, why_not_here

from holdfast.core.errors import LaunchFailed, OutcomeUnknown
from holdfast.core.ids import random_token
from holdfast.provider.base import DelegateJob, DelegateStatus
from holdfast.provider.slurm import SlurmDelegate
from holdfast.testing.clock import ManualClock

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here())),
]

GRACE_S = 8
PACE_S = "0.15"


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its grace time is the fixture's parameter."""
    more = "SlurmctldParameters=preempt_send_user_signal\nMinJobAge=2"
    with slurm(tmp_path_factory.mktemp("s"), grace_s=getattr(request, "param", GRACE_S), more=more) as cluster:
        yield cluster


def delegate(cluster: Cluster, **options: Any) -> SlurmDelegate:
    return SlurmDelegate(cluster.folder / "jobs", **({"environment": cluster.environment} | options))


def job(cluster: Cluster, *command: str, **changes: Any) -> DelegateJob:
    usual: dict[str, Any] = {
        "token": random_token(), "name": "gpt", "run_url": str(cluster.folder / "run"), "command": command,
        "options": {"partition": "low"}, "time_limit_s": 600,
    }  # fmt: skip
    return DelegateJob(**(usual | changes))


def training(cluster: Cluster) -> tuple[str, ...]:
    program = str(Path(__file__).parent / "training.py")
    return sys.executable, program, str(cluster.folder / "run"), str(cluster.folder / "result"), PACE_S


def wait_for(slurm: SlurmDelegate, id: str, *states: str) -> DelegateStatus:
    eventually(lambda: slurm.status(id).state in states, lambda: f"{slurm.status(id)}\n{slurm.evidence(id)}")
    return slurm.status(id)


@pytest.mark.parametrize(
    ("cluster", "grace"), [(GRACE_S, True), (0, False)], ids=["SIGUSR1", "SIGTERM"], indirect=["cluster"]
)
def test_preempted_requeued_by_slurm_resumed_and_done(cluster: Cluster, grace: bool) -> None:
    options = {"partition": "low"} | ({"grace_s": str(GRACE_S)} if grace else {})
    slurm = delegate(cluster)
    trains = job(cluster, *training(cluster), options=options, max_requeues=3)
    id = slurm.submit(trains)
    output = cluster.folder / "jobs" / trains.token / "output"
    eventually(
        lambda: output.exists() and "at step 10\n" in output.read_text(),
        lambda: f"{slurm.evidence(id)}{cluster.said()}",
    )
    assert slurm.status(id).state == "running"
    urgent = cluster.folder / "high.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    cluster.wait_until(cluster.submit(urgent, "--partition=high"), "COMPLETED")
    assert wait_for(slurm, id, "requeued").restarts == 1
    assert slurm.submit(trains) == id
    said = output.read_text()
    assert ("notice from slurm:SIGUSR1" in said) == grace
    assert "with exit code 75" in said
    assert any("Restarts=1" in line for line in slurm.evidence(id))
    assert any(line.startswith("ended-") and line.endswith(": 75") for line in slurm.evidence(id))
    cluster.start_now(int(id))
    done = wait_for(slurm, id, "done")
    assert (done.exit_code, done.restarts) == (0, 1)
    assert "attempt 2 resumes at step" in output.read_text()
    assert (cluster.folder / "result").exists()
    # Slurm forgets it, and its own note remains.
    eventually(lambda: "forgotten" in slurm.status(id).said, cluster.said)
    done = slurm.status(id)
    assert (done.state, done.exit_code, done.restarts) == ("done", 0, 1)
    assert slurm.submit(trains) == id
    slurm.cancel(id)


def test_a_lost_answer_of_sbatch_makes_no_second_job(cluster: Cluster) -> None:
    """Slurm has taken the job, and the caller hears nothing; neither it nor another one on its behalf submits again."""
    folder = cluster.folder / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text('#!/bin/sh\n/usr/bin/env PATH="$REAL" sbatch "$@" > /dev/null\nexec sleep 600\n')
    (folder / "sbatch").chmod(0o755)
    real = os.environ["PATH"]
    losing = delegate(
        cluster, environment=cluster.environment | {"PATH": f"{folder}:{real}", "REAL": real}, timeout_s=5.0
    )
    sleeps = job(cluster, "sleep", "600")
    # Commands are looked for where this process looks.
    os.environ["PATH"] = f"{folder}:{real}"
    try:
        with pytest.raises(OutcomeUnknown, match="submit it again"):
            losing.submit(sleeps)
    finally:
        os.environ["PATH"] = real
    ids = cluster.call("squeue", "--noheader", "--format=%i").split()
    assert len(ids) == 1
    for again in (losing, delegate(cluster)):
        assert again.submit(sleeps) == ids[0]
    assert cluster.call("squeue", "--noheader", "--format=%i").split() == ids
    slurm = delegate(cluster)
    wait_for(slurm, ids[0], "running")
    slurm.cancel(ids[0])
    assert wait_for(slurm, ids[0], "cancelled", "gone").state in ("cancelled", "gone")
    slurm.cancel(ids[0])


def test_who_has_asked_without_an_answer_waits_before_it_asks_again(cluster: Cluster) -> None:
    """The request may still be on its way: absence from the queue is no evidence yet."""
    clock = ManualClock()
    slurm = delegate(cluster, clock=clock)
    sleeps = job(cluster, "true")
    folder = cluster.folder / "jobs" / sleeps.token
    folder.mkdir(parents=True)
    (folder / "asked").write_text(str(clock.unix_s()))
    with pytest.raises(OutcomeUnknown, match="no list yet"):
        slurm.submit(sleeps)
    clock.advance(121)
    assert slurm.submit(sleeps).isdigit()


def test_refusals_and_preflights_are_slurms_own(cluster: Cluster) -> None:
    slurm = delegate(cluster)
    wrong = job(cluster, "true", options={"partition": "nowhere"})
    with pytest.raises(LaunchFailed, match="nvalid partition"):
        slurm.submit(wrong)
    lines = {check.name: check for check in slurm.preflight(wrong)}
    assert lines["job"].ok is False
    assert lines["bound"].ok is None
    lines = {check.name: check for check in slurm.preflight(job(cluster, "true", max_requeues=1))}
    assert lines["job"].ok, lines["job"].said
    assert lines["bound"].ok
    assert "SIGUSR1" in lines["requeue"].said
    assert cluster.call("squeue", "--noheader") == ""
    unknown = slurm.status("999999")
    assert (unknown.state, unknown.exit_code) == ("gone", None)
    slurm.cancel("999999")


def test_two_jobs_of_one_token_never_run_at_once(cluster: Cluster) -> None:
    """Should all else fail (a folder that was lost), Slurm itself keeps the second one waiting."""
    sleeps = job(cluster, "sleep", "600")
    first = delegate(cluster).submit(sleeps)
    wait_for(delegate(cluster), first, "running")
    script = cluster.folder / "jobs" / sleeps.token / "job.sh"
    name = cluster.job(int(first))["JobName"]
    second = cluster.submit(script, f"--job-name={name}", "--dependency=singleton", "--partition=low")
    eventually(lambda: cluster.job(second)["Reason"] == "Dependency", lambda: str(cluster.job(second)))
    for number in (int(first), second):
        cluster.call("scancel", str(number))
