"""A real Slurm preempts a training, requeues it, and it ends bit by bit as the same script does that nobody has interrupted.

The batch scripts are those of docs/slurm.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import GIVE_UP_S, Cluster, eventually, slurm, why_not_here

from holdfast.checkpoint.heads import read_truth
from holdfast.core.contract import EXIT_PREEMPTED
from holdfast.store.local import LocalStore

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here())),
]

GRACE_S = 8
EARLY = "SlurmctldParameters=preempt_send_user_signal"
BY_ITSELF = """code=$?
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""
PACE_S = "0.15"
"""All steps together take longer than it takes to preempt, and than a grace time."""


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("r")
    command = [sys.executable, str(training()), str(folder / "run"), str(folder / "result")]
    subprocess.run(command, check=True, timeout=GIVE_UP_S)
    return (folder / "result").read_text()


def training() -> Path:
    return Path(__file__).parent / "training.py"


class Job:
    """A low-priority job that trains, and what became of it."""

    def __init__(self, cluster: Cluster, script: str, *options: str) -> None:
        self.cluster, self.run, self.result = cluster, cluster.folder / "run", cluster.folder / "result"
        train = f"{sys.executable} {training()} {self.run} {self.result} {PACE_S}"
        agent = f"{sys.executable} -m holdfast run --run {self.run} --"
        path = cluster.folder / "low.sh"
        path.write_text("#!/bin/bash\n" + script.replace("AGENT", agent).replace("TRAIN", train))
        self.number = cluster.submit(path, "--open-mode=append", *options)

    @property
    def said(self) -> str:
        return self.cluster.output(self.number)

    def preempt(self) -> None:
        """By a high-priority job; returns when that has ended."""
        eventually(lambda: "at step 10\n" in self.said, lambda: f"{self.said}\n{self.cluster.said()}")
        urgent = self.cluster.folder / "high.sh"
        urgent.write_text("#!/bin/sh\nsleep 1\n")
        self.cluster.wait_until(self.cluster.submit(urgent, "--partition=high"), "COMPLETED")

    def assert_exact(self, reference: str) -> None:
        """It waits in the queue with nothing lost, and when its turn comes it goes on from there to the same end."""
        self.cluster.wait_until(self.number, "PENDING")
        assert self.cluster.job(self.number)["Restarts"] == "1"
        head = read_truth(LocalStore(self.run)).head
        assert head is not None
        saved = head.checkpoints[-1].step
        assert f"leaving at step {saved} with exit code {EXIT_PREEMPTED}; start" in self.said
        assert not self.result.exists()
        self.cluster.start_now(self.number)
        self.cluster.wait_until(self.number, "COMPLETED")
        assert f"attempt 2 resumes at step {saved} " in self.said
        assert self.result.read_text() == reference

    def assert_used_the_grace(self) -> None:
        """It heard SIGUSR1 when the grace time began, and trained on."""
        assert "notice from slurm:SIGUSR1: termination" in self.said
        heard = self.said.index("notice from slurm:SIGUSR1")
        steps = re.findall(r"at step (\d+)\n", self.said[heard:])
        assert "train on: " in self.said, self.said
        assert len(steps) > 1


@pytest.mark.parametrize("script", ["exec TRAIN\n", "exec AGENT TRAIN\n"], ids=["alone", "agent"])
def test_sigterm_at_once(reference: str, tmp_path_factory: pytest.TempPathFactory, script: str) -> None:
    """Without a grace time SIGTERM is the only word; Slurm requeues what it has preempted, whatever the exit code is."""
    with slurm(tmp_path_factory.mktemp("s")) as cluster:
        job = Job(cluster, script)
        job.preempt()
        job.assert_exact(reference)


@pytest.mark.parametrize("script", ["srun TRAIN\n", "srun AGENT TRAIN\n"], ids=["alone", "agent"])
def test_sigusr1_when_the_grace_time_begins(
    reference: str, tmp_path_factory: pytest.TempPathFactory, script: str
) -> None:
    """It has ended before Slurm ends it, so the batch script puts it back into the queue."""
    with slurm(tmp_path_factory.mktemp("s"), grace_s=GRACE_S, more=EARLY) as cluster:
        notice = f"export HOLDFAST_NOTICE=slurm:{GRACE_S}s\n"
        job = Job(cluster, notice + script + BY_ITSELF, f"--signal=USR1@{GRACE_S}")
        job.preempt()
        job.assert_exact(reference)
        job.assert_used_the_grace()


@pytest.mark.parametrize("requeues", [True, False], ids=["RequeueExit", "nobody"])
def test_who_requeues_what_ends_by_itself(
    reference: str, tmp_path_factory: pytest.TempPathFactory, requeues: bool
) -> None:
    """The cluster's RequeueExit=75, where it is set; where neither that nor the script does it, the job has failed."""
    more = f"{EARLY}\nRequeueExit={EXIT_PREEMPTED}" if requeues else EARLY
    with slurm(tmp_path_factory.mktemp("s"), grace_s=GRACE_S, more=more) as cluster:
        notice = f"export HOLDFAST_NOTICE=slurm:{GRACE_S}s\n"
        job = Job(cluster, f"{notice}exec TRAIN\n", f"--signal=B:USR1@{GRACE_S}")
        job.preempt()
        if requeues:
            job.assert_exact(reference)
        else:
            cluster.wait_until(job.number, "FAILED")
            assert cluster.job(job.number)["ExitCode"] == f"{EXIT_PREEMPTED}:0"
        job.assert_used_the_grace()
