"""Slurm: preemption and scancel arrive as signals, the time limit is known from the start.

Preemption: with `--signal=USR1@30` and `preempt_send_user_signal` the step hears SIGUSR1 first, SIGTERM later, SIGKILL after
KillWait. Without, SIGTERM comes at the end of the partition's GraceTime. The time limit: Slurm exports when the job ends, so that
is told ahead, with its exact deadline, and is the latest deadline that a signal can have.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping

from holdfast.core.clock import Clock
from holdfast.notice.base import Lookout, Notice, NoticeKind
from holdfast.notice.signals import SignalWatcher
from holdfast.notice.times import parse_time_unix_s

__all__ = ["SlurmTimeLimit", "job_end_unix_s", "slurm_signals"]

KILL_WAIT_S = 30.0
"""Slurm's default KillWait, from SIGTERM to SIGKILL."""
_AHEAD_S = 300.0
_LOOK_S = 10.0


def job_end_unix_s(environ: Mapping[str, str]) -> float | None:
    """When the job reaches its time limit; None where Slurm does not say."""
    return parse_time_unix_s(environ.get("SLURM_JOB_END_TIME"))


def slurm_signals(clock: Clock, environ: Mapping[str, str], grace_s: float) -> SignalWatcher:
    """Fed with the process's signals. `grace_s` is what a signal leaves: KillWait, or the seconds given to `--signal`."""
    end_unix_s = job_end_unix_s(environ)
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_PARTITION")
    return SignalWatcher(
        clock,
        name="slurm",
        grace_s={signal.SIGUSR1: grace_s, signal.SIGTERM: grace_s},
        # At the limit comes SIGTERM, and KillWait later the end.
        latest_unix_s=None if end_unix_s is None else end_unix_s + KILL_WAIT_S,
        evidence={name: environ[name] for name in names if name in environ},
    )


class SlurmTimeLimit:
    """Tells of the job's end some minutes ahead. See `Watcher`."""

    name = "slurm:time-limit"

    def __init__(self, end_unix_s: float, *, ahead_s: float = _AHEAD_S) -> None:
        self._end_unix_s, self._ahead_s = end_unix_s, ahead_s

    async def watch(self, lookout: Lookout) -> AsyncIterator[Notice]:
        while True:
            now_s = lookout.clock.unix_s()
            left_s = self._end_unix_s - now_s - self._ahead_s
            if left_s <= 0:
                break
            # In short naps: the wall clock may be set meanwhile.
            await lookout.sleep(min(left_s, _LOOK_S))
        yield Notice(
            kind=NoticeKind.TERMINATION,
            deadline_unix_s=self._end_unix_s,
            source=self.name,
            id="time-limit",
            heard_unix_s=now_s,
            evidence={"SLURM_JOB_END_TIME": self._end_unix_s},
        )
