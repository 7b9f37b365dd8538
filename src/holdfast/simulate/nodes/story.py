"""One window of several nodes told in words: when the policy wanted other nodes than before, why, and what it knew then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.facts import NodeChoice, NodeDecision, NodeFacts, NodeSituation
from holdfast.simulate.nodes.engine import NodeWorkload, simulate_nodes
from holdfast.simulate.nodes.outcome import NodeOutcomes
from holdfast.simulate.traces.trace import Trace

__all__ = ["NodesTold", "tell_nodes"]


@dataclass(frozen=True, slots=True)
class NodesTold:
    """What was known, and what was decided."""

    facts: NodeFacts
    decision: NodeDecision


def tell_nodes(
    trace: Trace, policy: NodePolicy, workload: NodeWorkload, start: int, *, every_tick: bool = False
) -> tuple[NodeOutcomes, tuple[NodesTold, ...]]:
    """The window's outcome, and its decisions: those with other wanted nodes or another clause than the one before, or all."""
    told: list[NodesTold] = []
    before: tuple[int, int, int] | None = None

    def watch(situation: NodeSituation, choice: NodeChoice) -> None:
        nonlocal before
        this = int(choice.spot[0]), int(choice.on_demand[0]), int(choice.why[0])
        if every_tick or this != before:
            facts = NodeFacts.of(situation, 0)
            told.append(NodesTold(facts, policy.in_words(facts, choice, 0)))
        before = this

    outcomes = simulate_nodes(trace, policy, workload, np.array([start], np.int64), watch)
    return outcomes, tuple(told)
