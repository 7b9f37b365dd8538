"""How far a policy may go with a deadline: what is still safe if spot capacity goes away at the worst moment.

Let slack be the time left less the work left, d the changeover, T the tick, L the most work that a preemption takes back.
On-demand is always there, so a job is safe while slack ≥ d at the moment at which it has nothing and on-demand is ordered.

- A start on spot may be lost with its changeover just done and L of work to do again: it needs slack ≥ 2d + L. Running on ready
  spot capacity does not change slack, so from then on a preemption always leaves slack ≥ d.
- A wait is over only at the next tick: it needs slack ≥ d + T. It is also pointless where spot could not be started any more.
- On spot, the coming tick may end in a preemption. It costs min(T, what is left of the changeover) and then L: staying needs
  slack ≥ d + L + that. A start that was safe keeps this true by itself; it fails only for a job that came into being otherwise.

Hence a policy that starts on spot, waits, and stays on spot only where these allow it, and takes on-demand elsewhere, is never
late, on any trace, if slack ≥ d at the start. Nothing is assumed about the relation of d and T.
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Bools, Clause, Situation, Why

__all__ = ["last_resort", "on_spot", "spot_is_safe", "wait_is_safe"]


def spot_is_safe(situation: Situation) -> Bools:
    """Where spot capacity may be started."""
    job = situation.job
    return situation.slack_s >= 2 * job.changeover_s + job.max_lost_s


def wait_is_safe(situation: Situation) -> Bools:
    """Where nothing need run until the next tick, and there is something to wait for."""
    job = situation.job
    least_s = job.changeover_s + max(situation.tick_s, job.changeover_s + job.max_lost_s)
    return situation.slack_s >= least_s


def on_spot(situation: Situation) -> list[Clause]:
    """Clauses for windows that run on spot capacity: it is kept until it is taken, unless the deadline forbids."""
    job = situation.job
    running = situation.running >= 0
    least_s = np.minimum(situation.changeover_left_s, situation.tick_s) + (job.changeover_s + job.max_lost_s)
    slack_s = situation.slack_s
    return [
        Clause(running & (slack_s >= least_s), situation.running, Why.ON_SPOT_UNTIL_TAKEN),
        Clause(running & (slack_s >= job.changeover_s), ON_DEMAND, Why.LEAVE_SPOT_FOR_THE_DEADLINE),
        Clause(running, situation.running, Why.TOO_LATE_TO_LEAVE),
    ]


def last_resort(situation: Situation) -> list[Clause]:
    """Clauses for windows that run on nothing: where they may not wait, they take on-demand."""
    must = (situation.running == NOTHING) & ~wait_is_safe(situation)
    return [
        Clause(must & (situation.slack_s >= situation.job.changeover_s), ON_DEMAND, Why.LAST_MOMENT),
        Clause(must, ON_DEMAND, Why.TOO_LATE),
    ]
