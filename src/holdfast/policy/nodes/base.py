"""How many spot nodes and how many on-demand nodes now: the interface of a node policy.

A policy is asked once per tick, with one array element per window, as a market policy is (`policy.market.base`). It answers
with two numbers: the spot nodes and the on-demand nodes that it wants until the next tick. Nothing more: which pools the spot
nodes come from, and which nodes go where there are too many, the asker decides (the cheapest pools; the newest nodes).

    NodeFacts, PolicyState ──→ NodePolicy.decide ──→ PolicyState, NodeDecision      a controller: one job
    NodeSituation, memory  ──→ NodePolicy.choose ──→ memory, NodeChoice             a simulator: thousands of windows
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import Floats
from holdfast.policy.market.facts import PolicyState
from holdfast.policy.nodes.facts import Kind, NodeChoice, NodeDecision, NodeFacts, NodeSituation, NodeWhy
from holdfast.policy.nodes.reasons import describe

__all__ = ["NodePolicy"]


class NodePolicy(ABC):
    """A rule for the number of spot and on-demand nodes.

    Thread safety, ownership and failure as for `MarketPolicy`: an instance holds nothing that changes, what is remembered goes in
    and comes out as rows of `memory`, and `choose` raises nothing for the kinds of work that it is for.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    keeps_deadline: ClassVar[bool]
    """Whether a job that starts with time for its work and one changeover is never late, whatever the spot market does."""
    kinds: ClassVar[frozenset[Kind]] = frozenset(Kind)

    @abstractmethod
    def choose(self, situation: NodeSituation, memory: Floats) -> tuple[Floats, NodeChoice]:
        """Wanted nodes of every window: spot up to `spot_capacity`, together up to the job's nodes. Windows do not influence each
        other; `memory` is slots x windows and is not changed in place."""

    def first_memory(self) -> tuple[float, ...]:
        """What is remembered before the first decision: as many numbers as ever will be."""
        return ()

    def start(self) -> PolicyState:
        return PolicyState(self.name, self.first_memory())

    def decide(self, facts: NodeFacts, state: PolicyState) -> tuple[PolicyState, NodeDecision]:
        """Decide for one job."""
        slots = len(self.first_memory())
        if state.policy != self.name or len(state.memory) != slots:
            raise UsageError(
                f"policy {self.name} remembers {slots} numbers; "
                f"this state is of {state.policy} and has {len(state.memory)}"
            )
        memory, choice = self.choose(facts.as_situation(), np.array(state.memory, np.float64).reshape(slots, 1))
        return PolicyState(self.name, tuple(memory[:, 0].tolist())), self.in_words(facts, choice, 0)

    def in_words(self, facts: NodeFacts, choice: NodeChoice, window: int) -> NodeDecision:
        """One window's choice as a decision."""
        spot, on_demand = int(choice.spot[window]), int(choice.on_demand[window])
        return NodeDecision(spot, on_demand, describe(facts, NodeWhy(int(choice.why[window])), spot, on_demand))
