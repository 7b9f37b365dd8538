"""The batch script of a job that Slurm restarts.

    Slurm ── SIGUSR1, SIGTERM ──→ bash ──→ holdfast run --run URL -- command        the agent saves, and leaves with 75
    exit code ──→ a note in the job's folder ──→ 75, and no SIGTERM was heard: scontrol requeue

Slurm requeues what it has preempted by itself. A job that has ended before its grace time is over has not been preempted in
Slurm's eyes, so the script puts it back. Never after SIGTERM: either Slurm has preempted the job, and puts it back, or somebody has
cancelled it, and the agent leaves with the same exit code.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.core.contract import EXIT_PREEMPTED

__all__ = ["CANCELLED", "ENDED", "STARTED", "batch_script"]

STARTED, ENDED, CANCELLED = "started", "ended", "cancelled"
"""Notes in the job's folder: `started-<id>-<restarts>`, `ended-<id>-<restarts>` with the exit code in it. `cancelled` is written by
who cancels, first: a job that is just being put back does not begin again.
"""

_BODY = """\
restarts=${{SLURM_RESTART_COUNT:-0}}
note() {{ printf '%s\\n' "$2" > {folder}/.note.$$ && mv -f {folder}/.note.$$ {folder}/"$1-$SLURM_JOB_ID-$restarts"; }}
child= told= term= ended= usr1= code=1
# A signal that comes before the child waits for it.
trap 'told=1; ended=1; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; else term=1; fi' TERM
trap 'told=1; if [ -n "$child" ]; then kill -USR1 "$child" 2>/dev/null; else usr1=1; fi' USR1
if [ -e {folder}/{cancelled} ]; then note {ended} 1; exit 1; fi
{limit}note {started} "$(hostname)"
{command} &
child=$!
[ -z "$usr1" ] || kill -USR1 "$child" 2>/dev/null
[ -z "$term" ] || kill -TERM "$child" 2>/dev/null
# A signal ends the waiting, and not the child. 127: there is nothing left to wait for, and the code is known.
while :; do
  told=
  wait "$child"
  got=$?
  [ "$got" -eq 127 ] || code=$got
  [ -n "$told" ] || break
done
note {ended} "$code"
if [ "$code" -eq {preempted} ] && [ -z "$ended" ] && [ ! -e {folder}/{cancelled} ]{again}; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
_LIMIT = """\
if [ "$restarts" -gt {most} ]; then
  echo "holdfast: requeued $restarts times, and {most} are allowed" >&2
  note {ended} 1
  exit 1
fi
"""


def batch_script(
    *,
    folder: Path,
    command: Sequence[str],
    agent: Sequence[str],
    run_url: str,
    environment: Mapping[str, str],
    workdir: str | None,
    nodes: int,
    max_requeues: int | None,
    grace_s: int | None,
) -> str:
    """For bash. `folder`: the job's own, on a file system that every node sees. `grace_s`: what the cluster's signal leaves."""
    exports = dict(environment) | ({} if grace_s is None else {"HOLDFAST_NOTICE": f"slurm:{grace_s}s"})
    launcher = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"] if nodes > 1 else []
    words = [*launcher, *agent, "run", "--run", run_url, "--", *command]
    limit = "" if max_requeues is None else _LIMIT.format(most=max_requeues, ended=ENDED)
    again = "" if max_requeues is None else f' && [ "$restarts" -lt {max_requeues} ]'
    lines = [
        "#!/bin/bash",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(exports.items())),
        *([] if workdir is None else [f"cd {shlex.quote(workdir)} || exit 1"]),
    ]
    body = _BODY.format(
        folder=shlex.quote(str(folder)), limit=limit, started=STARTED, ended=ENDED, cancelled=CANCELLED, command=shlex.join(words),
        preempted=EXIT_PREEMPTED, again=again,
    )  # fmt: skip
    return "\n".join(lines) + "\n" + body
