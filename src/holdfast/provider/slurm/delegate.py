"""Jobs of Slurm, through its own commands. See `provider.base.Delegate`, and docs/slurm.md.

    <folder>/<token>/job.sh          the batch script
    <folder>/<token>/asked           sbatch is being called, since then: made by one caller only
    <folder>/<token>/id              what it has answered
    <folder>/<token>/started-…, ended-…, output      by the job itself

A job is found again by its comment and name in squeue and sacct, and by what its folder says: Slurm forgets jobs that have ended
within minutes, and not every cluster has accounting. The folder is on a file system that every node sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError, UsageError
from holdfast.core.failures import Failure
from holdfast.provider.base import Check, DelegateJob, DelegateStatus
from holdfast.provider.slurm.script import CANCELLED, ENDED, STARTED, batch_script
from holdfast.provider.slurm.words import (
    bound_of,
    comment_of,
    fields_of,
    grace_of,
    is_definite,
    is_unknown_job,
    job_name,
    options_of,
    state_of,
)

__all__ = ["SlurmDelegate"]

_SEEN_AFTER_S = 120.0
"""A request to submit that Slurm still works on may not be seen in any list for so long: MessageTimeout, and some."""
_SHOWN = (
    "JobState", "Reason", "Restarts", "ExitCode", "RunTime", "TimeLimit", "SubmitTime", "StartTime", "EndTime",
    "PreemptTime", "NodeList",
)  # fmt: skip


class SlurmDelegate:
    """Implements `provider.base.Delegate`.

    Thread safety: every method, and several processes may use one folder.
    """

    name = "slurm"

    def __init__(
        self,
        folder: str | Path,
        *,
        agent: Sequence[str] = (sys.executable, "-m", "holdfast"),
        clock: Clock | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """`agent`: how holdfast is started on the nodes. `environment`: of Slurm's commands, and so of jobs; None: this
        process's.
        """
        self._folder, self._agent, self._timeout_s = Path(folder).absolute(), tuple(agent), timeout_s
        self._clock: Clock = clock or SystemClock()
        given = os.environ if environment is None else environment
        # A job is not told of whatever run or job its submitter belongs to.
        self._environment = {
            name: value
            for name, value in given.items()
            if not name.startswith("HOLDFAST_") and (not name.startswith("SLURM_") or name == "SLURM_CONF")
        }

    def submit(self, job: DelegateJob) -> str:
        """LaunchFailed: Slurm refuses it. OutcomeUnknown: no answer; the same job again finds what came of it."""
        folder = self._folder / job.token
        options = options_of(job, f"{folder}/output")
        folder.mkdir(parents=True, exist_ok=True)
        if (known := self._find(job)) is not None:
            return known
        self._ask_once(folder)
        script = folder / "job.sh"
        script.write_text(self._script(job, folder))
        done = self._call("sbatch", "--parsable", *options, str(script))
        answered = re.match(r"(\d+)(;.*)?$", done.stdout.strip())
        if done.returncode == 0 and answered is not None:
            _write(folder / "id", answered[1])
            return answered[1]
        if is_definite(done.stderr):
            (folder / "asked").unlink(missing_ok=True)
            raise LaunchFailed(f"Slurm does not take the job {job.name}: {done.stderr.strip()}", Failure.BAD_REQUEST)
        said = done.stderr.strip() or "nothing"
        raise OutcomeUnknown(f"sbatch has not told what became of {job.name} (it said: {said}); submit it again")

    def status(self, id: str) -> DelegateStatus:
        shown = self._shown(id)
        if shown is not None:
            return state_of(id, shown["JobState"], shown.get("ExitCode", ""), int(shown.get("Restarts", "0")))
        lines = self._accounted("--jobs", id, "--duplicates")
        if lines:
            _, word, exit_code = lines[-1].split("|")
            return state_of(id, word, exit_code, len(lines) - 1)
        notes = self._notes(id)
        if ENDED in notes:
            restarts, text = notes[ENDED]
            code = int(text) if text.isdigit() else None
            said = f"Slurm has forgotten it; its last start ended with {text}"
            state: Literal["done", "failed"] = "done" if code == 0 else "failed"
            return DelegateStatus(id=id, state=state, restarts=restarts, exit_code=code, said=said)
        restarts = notes[STARTED][0] if STARTED in notes else 0
        return DelegateStatus(
            id=id, state="gone", restarts=restarts, exit_code=None, said="Slurm does not know it any more"
        )

    def cancel(self, id: str) -> None:
        """SIGTERM, Slurm's KillWait, SIGKILL: the agent saves once more."""
        for path in self._folder.glob("*/id"):
            if path.read_text().strip() == id:
                (path.parent / CANCELLED).touch()
        done = self._call("scancel", id)
        if done.returncode != 0 and not is_unknown_job(done.stderr):
            raise ProviderError(f"Slurm: job {id} may not have been cancelled: {done.stderr.strip()}")

    def evidence(self, id: str) -> list[str]:
        shown = self._shown(id) or {}
        lines = [f"{name}={shown[name]}" for name in _SHOWN if shown.get(name) not in (None, "", "(null)", "None")]
        lines += [f"sacct: {line}" for line in self._accounted("--jobs", id, "--duplicates")]
        for path in sorted(self._folder.glob(f"*/*-{id}-*")):
            lines.append(f"{path.name}: {path.read_text().strip()}")
        return lines

    def preflight(self, job: DelegateJob) -> list[Check]:
        try:
            options = options_of(job, "/dev/null")
        except UsageError as error:
            return [Check(name="job", ok=False, said=str(error), fix="change the job file")]
        try:
            ping = self._call("scontrol", "ping")
            if ping.returncode != 0:
                said = (ping.stdout + ping.stderr).strip()
                return [
                    Check(name="slurm", ok=False, said=said, fix="scontrol ping, and ask those who run the cluster")
                ]
            self._folder.mkdir(parents=True, exist_ok=True)
            script = self._folder / f".preflight-{os.getpid()}.sh"
            script.write_text(self._script(job, self._folder))
            try:
                tested = self._call("sbatch", "--test-only", *options, str(script))
            finally:
                script.unlink(missing_ok=True)
            settings = self._call("scontrol", "show", "config").stdout
        except ProviderError as error:
            return [Check(name="slurm", ok=False, said=str(error), fix="run it where Slurm's commands are")]
        fits = tested.returncode == 0
        bound = bound_of(job)
        return [
            Check(name="slurm", ok=True, said=ping.stdout.strip()),
            Check(name="job", ok=fits, said=tested.stderr.strip(), fix="" if fits else "change resources, or options of Slurm"),
            _requeue_check(settings),
            Check(name="bound", ok=True if bound.hard else None, said=bound.said,
                  fix="" if bound.hard else "give max_duration and a limit of restarts"),
            Check(name="folder", ok=None, said=f"{self._folder} must be seen by every node", fix=f"srun ls {self._folder}"),
        ]  # fmt: skip

    def _script(self, job: DelegateJob, folder: Path) -> str:
        return batch_script(
            folder=folder, command=job.command, agent=self._agent, run_url=job.run_url, environment=job.environment,
            workdir=job.workdir, nodes=job.nodes, max_requeues=job.max_requeues, grace_s=grace_of(job.options),
        )  # fmt: skip

    def _find(self, job: DelegateJob) -> str | None:
        """The job of this token, if there is or was one. ProviderError when Slurm cannot be asked."""
        folder = self._folder / job.token
        if (folder / "id").exists():
            return (folder / "id").read_text().strip()
        if started := sorted(folder.glob(f"{STARTED}-*")):
            return started[0].name.split("-")[1]
        done = self._call("squeue", "--noheader", "--states=all", f"--name={job_name(job)}", "--format=%i|%k")
        if done.returncode != 0:
            raise OutcomeUnknown(f"squeue does not tell whether {job.name} was submitted before: {done.stderr.strip()}")
        found = [line.partition("|") for line in done.stdout.split()]
        ids = [int(id) for id, _, comment in found if comment == comment_of(job)]
        ids = ids or [
            int(line.partition("|")[0]) for line in self._accounted("--name", job_name(job), "--starttime=now-30days")
        ]
        if not ids:
            return None
        _write(folder / "id", str(min(ids)))
        return str(min(ids))

    def _ask_once(self, folder: Path) -> None:
        """One caller at a time. OutcomeUnknown while an earlier call may still come through."""
        mark, now_s = folder / "asked", self._clock.unix_s()
        try:
            descriptor = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            text = mark.read_text().strip()
            asked_s = float(text) if text else now_s
            if now_s - asked_s < _SEEN_AFTER_S:
                raise OutcomeUnknown(
                    f"sbatch was called {now_s - asked_s:.0f} s ago without an answer, and the job is in no list yet; "
                    f"submit it again in {_SEEN_AFTER_S:.0f} s"
                ) from None
            _write(mark, str(now_s))
            return
        with os.fdopen(descriptor, "w") as file:
            file.write(str(now_s))

    def _shown(self, id: str) -> dict[str, str] | None:
        """None: Slurm's controller has forgotten it. ProviderError when it cannot be asked."""
        done = self._call("scontrol", "show", "job", "--oneliner", id)
        if done.returncode == 0:
            return fields_of(done.stdout)
        if is_unknown_job(done.stderr + done.stdout):
            return None
        raise ProviderError(f"Slurm: job {id} could not be asked for: {done.stderr.strip()}")

    def _accounted(self, *options: str) -> list[str]:
        """`id|state|exit code`, one line for each start. Empty where the cluster keeps no accounts."""
        form = "--format=JobIDRaw,State,ExitCode"
        done = self._call("sacct", "--noheader", "--parsable2", "--allocations", form, *options)
        return done.stdout.split("\n")[:-1] if done.returncode == 0 else []

    def _notes(self, id: str) -> dict[str, tuple[int, str]]:
        """By kind: the last start's number, and what it noted."""
        notes: dict[str, tuple[int, str]] = {}
        for path in self._folder.glob(f"*/*-{id}-*"):
            kind, _, restarts = path.name.split("-")
            notes[kind] = max(notes.get(kind, (-1, "")), (int(restarts), path.read_text().strip()))
        return notes

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """ProviderError: the command is not there. One that hangs is ended, and has not answered."""
        try:
            return subprocess.run(
                command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                timeout=self._timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(
                command, 124, "", f"{command[0]} timed out after {self._timeout_s:.0f} s"
            )
        except OSError as error:
            raise ProviderError(f"Slurm's {command[0]} cannot be run here: {error}") from error


def _write(path: Path, text: str) -> None:
    """Whole, or as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _requeue_check(settings: str) -> Check:
    """Whether the cluster lets jobs be requeued, and how much notice there is."""
    pairs = (line.partition("=") for line in settings.splitlines())
    values = {name.strip(): value.strip() for name, _, value in pairs}
    if values.get("JobRequeue", "1") == "0":
        return Check(name="requeue", ok=True, said="JobRequeue=0: only because of --requeue jobs come back here")
    early = "preempt_send_user_signal" in values.get("SlurmctldParameters", "")
    said = f"preemption: {values.get('PreemptMode', 'unknown')}, KillWait {values.get('KillWait', 'unknown')}"
    said += ", SIGUSR1 at the beginning of a grace time" if early else ", no word before SIGTERM"
    return Check(name="requeue", ok=True, said=said)
