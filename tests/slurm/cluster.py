"""A real Slurm of one node on loopback: munged, slurmctld and slurmd with a configuration of their own in one folder.

Each daemon is started in the foreground and stopped by its process id. Nothing of the machine's own Slurm, if it has one, is
read or touched: the configuration names every path and port.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import waiting

__all__ = ["GIVE_UP_S", "Cluster", "eventually", "slurm", "why_not_here"]

GIVE_UP_S = 120.0
"""Only ends a broken test."""
_DAEMONS = ("munged", "slurmctld", "slurmd")
_STOP_S = 20.0

_CONFIGURATION = """
ClusterName=holdfast
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{more}
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=low Nodes=node Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=node PriorityTier=10 PreemptMode=OFF
"""


def why_not_here() -> str | None:
    """Why there can be no Slurm; None where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons must be started as root"
    missing = [name for name in (*_DAEMONS, "sbatch") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} are not installed: scripts/install-slurm.sh"
    return None


eventually = partial(waiting.eventually, give_up_s=GIVE_UP_S, every_s=0.1)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What users have: `sbatch`, `scontrol`, and files in a folder."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, more: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment | dict(more or {}), cwd=self.folder, capture_output=True, text=True, check=False,
            timeout=GIVE_UP_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.said()}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str, **environment: str) -> int:
        """The number of the new job. Its output goes to `<number>.out`."""
        given = ["--parsable", f"--output={self.folder}/%j.out", *options]
        return int(self.call("sbatch", *given, str(script), more=environment))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        words = self.call("scontrol", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def wait_until(self, number: int, *states: str) -> None:
        eventually(
            lambda: self.state(number) in states,
            lambda: f"job {number}: {self.job(number)}\n{self.output(number)}\n{self.said()}",
        )

    def output(self, number: int) -> str:
        path = self.folder / f"{number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_now(self, number: int) -> None:
        """A requeued job waits for two minutes, which a test need not."""
        self.call("scontrol", "update", f"jobid={number}", "StartTime=now")

    def said(self) -> str:
        """The daemons' last words."""
        logs = [self.folder / f"{name}.log" for name in _DAEMONS]
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())


@contextmanager
def slurm(folder: Path, *, grace_s: int = 0, more: str = "") -> Iterator[Cluster]:
    """A cluster while the block runs. `grace_s`: of the partition `low`, whose jobs give way to those of `high`."""
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    controller_port, node_port = _free_ports(2)
    settings = _CONFIGURATION.format(
        folder=folder, host=host, controller_port=controller_port, node_port=node_port, grace_s=grace_s, more=more
    )
    (folder / "slurm.conf").write_text(settings)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    # Jobs get the environment that they are submitted with: none of what other tests have set for themselves.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_", "SLURM_"))}
    environment = plain | {"SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, environment)
    munge_files = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("pid-file", "seed-file", "socket")]
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", *munge_files]
    with (
        _running(cluster, "munged", munged),
        _running(cluster, "slurmctld", ["slurmctld", "-D", "-i"]),
        _running(cluster, "slurmd", ["slurmd", "-D"]),
    ):
        eventually(lambda: _answer(cluster, "sinfo", "-h", "-N", "-o", "%t").startswith("idle"), cluster.said)
        yield cluster


def _answer(cluster: Cluster, *command: str) -> str:
    """Of a daemon that may not be there yet."""
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    return done.stdout


@contextmanager
def _running(cluster: Cluster, name: str, command: list[str]) -> Iterator[None]:
    with (cluster.folder / f"{name}.log").open("ab") as log:
        daemon = subprocess.Popen(command, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        if name == "munged":
            eventually((cluster.folder / "munge.socket").is_socket, cluster.said)
        yield
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
