"""How far a node policy may go with a deadline, if all spot nodes go away at the worst moment.

Slack is the time left less the time that the rest takes on all nodes, d the changeover of a whole gang (launch, then restart),
L the most working time that a preemption takes back. On-demand nodes are always there, so a job is safe while slack ≥ d: all
nodes are ordered on-demand at once, and work after d.

Capacity moves at ticks only. So what a choice leaves of the slack at the next tick can be computed before it is made
(`slack_after_s`, a lower bound), and then all spot nodes may be lost, which takes back L. A choice is safe if
slack_after ≥ d + (L if it holds spot nodes, else 0).

A policy that takes only safe choices, and all nodes on-demand where none of its choices is safe, is never late on any trace if
slack ≥ d at the start. By induction: slack ≥ d at a tick, after preemptions. Either a safe choice is made, and slack ≥ d at the
next tick, or the whole gang is ordered on-demand with slack ≥ d, works after d, and is kept to the end (while it is being
launched no other choice may be safe, so `settle` keeps it; if one is safe, the argument begins anew).

The bound. Working with all nodes leaves slack alone. A tick T in which no node works costs T. In a gang, the members that a
choice keeps work through the tick but for what is left of a restart, one more restart if it drops a member, and one more if a
node may join within the tick (all nodes that are ordered at ticks join at the same moment of a tick, so there is at most one
such moment). In divisible work slack is that of the schedule "longest item first", and it stays as it is only if as many nodes
work as there are items for (so the bound holds where it is d or more: then every item that is left still fits).
"""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import Bools, Ints
from holdfast.policy.nodes.facts import Kind, NodeSituation

__all__ = ["roomy", "safe", "slack_after_s"]


def _kept(situation: NodeSituation, spot: Ints, on_demand: Ints) -> Ints:
    """Ready nodes that stay if so many are wanted: nodes that are being launched are the newest and go first."""
    return np.minimum(situation.spot_ready, spot) + np.minimum(situation.on_demand_ready, on_demand)


def slack_after_s(situation: NodeSituation, spot: Ints, on_demand: Ints) -> Ints:
    """At least so much slack is there at the next tick, before preemptions, if so many nodes are wanted now."""
    job, tick_s = situation.job, situation.tick_s
    stay = _kept(situation, spot, on_demand)
    if job.kind is Kind.DIVISIBLE:
        return situation.slack_s - tick_s * (stay < situation.useful_nodes)
    drops = stay < situation.spot_ready + situation.on_demand_ready
    ordered = (spot > situation.spot) | (on_demand > situation.on_demand)
    launching = np.minimum(situation.spot, spot) + np.minimum(situation.on_demand, on_demand) > stay
    joins = launching | (ordered & (job.launch_s < tick_s))
    stopped_s = np.where(drops, job.restart_s, situation.restart_left_s) + job.restart_s * joins
    rates = np.array(job.rates, np.int64)
    rate = np.where(stay >= job.min_nodes, rates[stay], 0)
    work_left = situation.work_left - rate * np.maximum(tick_s - stopped_s, 0)
    rest_s = -(-np.maximum(work_left, 0) // job.rates[-1])
    slack_s: Ints = (job.deadline_s - situation.now_s - tick_s) - rest_s
    return slack_s


def safe(situation: NodeSituation, spot: Ints, on_demand: Ints, margin_s: Ints | int = 0) -> Bools:
    """Where this choice keeps the deadline whatever happens at the next tick, with so much slack on top."""
    job = situation.job
    least_s = job.changeover_s + job.max_lost_s * (spot > 0) + margin_s
    return slack_after_s(situation, spot, on_demand) >= least_s


def roomy(situation: NodeSituation, spot: Ints, on_demand: Ints) -> Bools:
    """Where a choice is safe, and will not have to be taken back only because of the time that it takes itself: all nodes may
    still be launched and restart. Where fewer nodes than are useful are wanted, time is left to top up with the others kept: a
    changeover, or a tick where that is longer, and what one more preemption takes back."""
    job = situation.job
    ordered = (spot > situation.spot) | (on_demand > situation.on_demand)
    launching_s = situation.launch_left_s + job.restart_s * (situation.launch_left_s > 0)
    underway_s = np.where(ordered, job.changeover_s, np.maximum(launching_s, situation.restart_left_s))
    later_s = max(job.changeover_s, situation.tick_s) + job.max_lost_s
    missing = spot + on_demand < situation.useful_nodes
    margin_s = np.where(missing, later_s, np.maximum(underway_s - situation.tick_s, 0))
    return safe(situation, spot, on_demand, margin_s)
