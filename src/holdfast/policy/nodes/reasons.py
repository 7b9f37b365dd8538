"""Why a node policy decided as it did, in words and figures that a user can check."""

from __future__ import annotations

from holdfast.core.config import format_duration
from holdfast.policy.nodes.facts import NodeFacts, NodeWhy

__all__ = ["describe"]

_RULES = {
    NodeWhy.ALL_SPOT: "all spot nodes that there are; the deadline leaves room for the others to stay away",
    NodeWhy.TOPPED_UP: "the deadline asks for all nodes: on-demand takes the places that spot leaves",
    NodeWhy.LAST_MOMENT: "only on-demand surely keeps the deadline now",
    NodeWhy.TOO_LATE: "the deadline cannot be kept for sure any more: nothing that runs is stopped, on-demand takes the rest",
    NodeWhy.WAIT: "not enough spot nodes to work with, and there is time to wait",
    NodeWhy.BEHIND: "behind uniform progress: on-demand takes the places that spot leaves",
    NodeWhy.KEPT_ON_DEMAND: "not far enough ahead of uniform progress to give on-demand nodes up",
    NodeWhy.NOT_WORTH_A_RESTART: "more spot nodes are there, but a restart of all would cost more than they are likely to bring",
    NodeWhy.MARKET: "the whole gang in one market, as the market policy says",
    NodeWhy.ON_DEMAND_ONLY: "on-demand only",
    NodeWhy.EXCHANGED: "spot nodes in the place of on-demand nodes: they are likely to save more than the restarts cost",
}


def describe(facts: NodeFacts, why: NodeWhy, spot: int, on_demand: int) -> tuple[str, ...]:
    """The rule, what is wanted and what is there, the time, and the prices."""
    job = facts.job
    slack_s = job.deadline_s - facts.now_s - facts.rest_s
    room = f"{format_duration(abs(slack_s))} {'to spare' if slack_s >= 0 else 'too little'}"
    has = facts.spot_ready + facts.spot_launching, facts.on_demand_ready + facts.on_demand_launching
    left_s = max(0, job.deadline_s - facts.now_s)
    wants = f"wants {spot} spot and {on_demand} on-demand nodes of at most {job.nodes}; has {has[0]} and {has[1]}"
    time = f"the rest takes {format_duration(facts.rest_s)} on all nodes, in {format_duration(left_s)}: {room}"
    return (
        _RULES[why],
        f"{wants}, and could have {facts.spot_capacity} spot nodes",
        f"{time}; a changeover takes {format_duration(job.changeover_s)}",
        f"an hour of a spot node costs ${facts.spot_microusd_h / 1e6:.4f}, on-demand ${facts.on_demand_microusd_h / 1e6:.4f}",
    )
