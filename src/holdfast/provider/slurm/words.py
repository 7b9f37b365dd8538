"""What is said to Slurm and what it says: options, states, errors. Pure."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from holdfast.core.errors import UsageError
from holdfast.provider.base import DelegateJob, DelegateStatus

__all__ = [
    "KILL_WAIT_S",
    "Bound",
    "bound_of",
    "comment_of",
    "exit_code_of",
    "fields_of",
    "grace_of",
    "is_definite",
    "is_unknown_job",
    "job_name",
    "options_of",
    "state_of",
]

KILL_WAIT_S = 30
"""Slurm's default, from SIGTERM at the time limit to SIGKILL."""
_OURS = frozenset(
    {
        "array", "chdir", "comment", "export", "get-user-env", "job-name", "kill-on-invalid-dep", "no-requeue", "nodes",
        "open-mode", "output", "error", "parsable", "requeue", "signal", "test-only", "time", "wait", "wrap",
    }
)  # fmt: skip
GRACE = "grace_s"
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"}
)
_REQUEUED = frozenset({"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
_LOST = (
    "timed out",
    "unable to contact",
    "connection refused",
    "connection reset",
    "unexpected message",
    "zero bytes",
    "communication",
)
_State = Literal["waiting", "running", "requeued", "done", "failed", "cancelled", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The most that a job can use, whatever becomes of it."""

    node_s: int | None
    """None: nobody knows."""
    hard: bool
    """Slurm and the batch script hold it. Else a budget over it is soft."""
    said: str


def bound_of(job: DelegateJob, *, kill_wait_s: int = KILL_WAIT_S) -> Bound:
    """Time limit, times (1 + requeues), times nodes: Slurm begins the time limit anew each time."""
    if job.time_limit_s is None or job.max_requeues is None:
        missing = "a time limit" if job.time_limit_s is None else "a limit of requeues"
        return Bound(node_s=None, hard=False, said=f"soft: without {missing} Slurm sets no bound")
    # Slurm counts in whole minutes.
    once_s = math.ceil(job.time_limit_s / 60) * 60 + kill_wait_s
    node_s = once_s * (1 + job.max_requeues) * job.nodes
    said = f"{job.nodes} nodes for {once_s} s, {1 + job.max_requeues} times: Slurm's OverTimeLimit must be 0"
    return Bound(node_s=node_s, hard=True, said=said)


def job_name(job: DelegateJob) -> str:
    """Ends in a digest of the token: the name is what every part of Slurm remembers."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", job.name) or "holdfast"
    return f"{plain[:40]}-{hashlib.sha256(job.token.encode()).hexdigest()[:16]}"


def comment_of(job: DelegateJob) -> str:
    return f"holdfast:{job.token}"


def grace_of(options: Mapping[str, str]) -> int | None:
    """`grace_s`, the one option of ours: how long before the end Slurm is to send SIGUSR1."""
    text = options.get(GRACE)
    if text is None:
        return None
    if not text.isdigit() or not 0 < int(text) <= 65535:
        raise UsageError(f"{GRACE} is a whole number of seconds, not {text!r}")
    return int(text)


def options_of(job: DelegateJob, output: str) -> list[str]:
    """For sbatch. UsageError for what cannot be asked for."""
    given = {name.replace("_", "-"): value for name, value in job.options.items() if name != GRACE}
    if wrong := sorted(name for name in given if name in _OURS or not _OPTION.fullmatch(name)):
        raise UsageError(
            f"options for Slurm: {', '.join(wrong)} cannot be set here; partition, account, constraint, qos, gres and the like can"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]+", job.token) or not job.command or job.nodes < 1:
        raise UsageError("a job for Slurm has a token of letters and digits, a command, and one node or more")
    # Two jobs of one token, should there ever be two, never run at once.
    dependency = ",".join(filter(None, (given.pop("dependency", ""), "singleton")))
    grace_s = grace_of(job.options)
    options = [
        f"--job-name={job_name(job)}", f"--comment={comment_of(job)}", f"--dependency={dependency}", f"--output={output}",
        "--open-mode=append", "--no-requeue" if job.max_requeues == 0 else "--requeue", f"--nodes={job.nodes}",
    ]  # fmt: skip
    if job.time_limit_s is not None:
        options.append(f"--time={math.ceil(job.time_limit_s / 60)}")
    if grace_s is not None:
        options.append(f"--signal=B:USR1@{grace_s}")
    if job.cpus is not None:
        options.append(f"--cpus-per-task={math.ceil(job.cpus)}")
    if job.memory_gib is not None:
        options.append(f"--mem={math.ceil(job.memory_gib * 1024)}M")
    if job.accelerators and not {"gres", "gpus", "gpus-per-node"} & set(given):
        if len(job.accelerators) > 1:
            raise UsageError(
                "Slurm is asked for one kind of accelerator; name others with the options gres or constraint"
            )
        ((name, count),) = job.accelerators
        kind = "" if name.lower() == "gpu" else f":{name.lower()}"
        options.append(f"--gres=gpu{kind}:{count}")
    return options + [f"--{name}={value}" if value else f"--{name}" for name, value in sorted(given.items())]


def fields_of(line: str) -> dict[str, str]:
    """Of one line of `scontrol show job --oneliner`."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def state_of(id: str, said: str, exit_code: str, restarts: int) -> DelegateStatus:
    """`said`: Slurm's word for the state, with or without more behind it; `exit_code` as `75:0`."""
    word = said.split()[0].rstrip("+") if said else "UNKNOWN"
    state: _State
    if word == "PENDING":
        state = "requeued" if restarts else "waiting"
    elif word in _RUNNING:
        state = "running"
    elif word in _REQUEUED:
        state = "requeued"
    else:
        state = "done" if word == "COMPLETED" else "cancelled" if word == "CANCELLED" else "failed"
    ended = state in ("done", "failed", "cancelled")
    return DelegateStatus(
        id=id, state=state, restarts=restarts, exit_code=exit_code_of(exit_code) if ended else None, said=said
    )


def exit_code_of(text: str) -> int | None:
    """`75:0` is 75, `0:9` is 137 as a shell says it."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        return None
    return 128 + int(found[2]) if int(found[2]) else int(found[1])


def is_unknown_job(said: str) -> bool:
    return "invalid job id" in said.lower() or "already completing or completed" in said.lower()


def is_definite(said: str) -> bool:
    """An error of sbatch that is Slurm's answer, and not the want of one."""
    return "error" in said.lower() and not any(word in said.lower() for word in _LOST)
