"""Which market to run on now: the interface of a market policy.

A policy is asked once per tick. It knows the time, the work left, the deadline, the changeover delay, what runs now, and per
pool whether spot capacity is there (or that nobody has asked yet) and its price. It answers with one target and its reasons:

    (Context, PolicyState) ──→ MarketPolicy.decide ──→ (PolicyState, Decision)      a controller: one job
    Situation, memory      ──→ MarketPolicy.choose ──→ memory, Choice               a simulator: thousands of windows

Both are the same code: `decide` calls `choose` with arrays of length one, and `choose` is all that a policy implements.

**The rule of the asker.** When a decision names a pool whose availability is unknown, the asker tries to get capacity there. If
there is none, it says so (`Offer.available=False`) and asks again in the same tick, with the state from before, and gives
nothing up meanwhile. A stop that the policy decides on loses no work: it is announced, so the state is saved first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Floats, Situation, Why, situation_of
from holdfast.policy.market.facts import Context, Decision, Market, PolicyState
from holdfast.policy.market.reasons import describe

__all__ = ["MarketPolicy"]


class MarketPolicy(ABC):
    """A rule for spot, on-demand or nothing.

    Thread safety and ownership: an instance holds nothing that changes; what a policy remembers goes in and comes out. Failure:
    impossible facts are refused by `Context` and `Job`, the state of another policy by `decide`; `choose` raises nothing.
    """

    name: ClassVar[str]
    """Unique; part of the written state."""
    summary: ClassVar[str]
    keeps_deadline: ClassVar[bool]
    """Whether a job that starts with time for its work and one changeover is never late, whatever the spot market does."""

    @abstractmethod
    def choose(self, situation: Situation, memory: Floats) -> tuple[Floats, Choice]:
        """Decide for every window. `memory` is slots x windows and is not changed in place. Windows do not influence each
        other."""

    def first_memory(self, pools: int) -> tuple[float, ...]:
        """What is remembered before the first decision: as many numbers as ever will be."""
        return ()

    def reasons(self, context: Context, why: Why, pool: str | None, costs: tuple[float, ...]) -> tuple[str, ...]:
        """What a clause means here."""
        return describe(context, why, pool, costs)

    def start(self, pools: int) -> PolicyState:
        """The state before the first decision, for so many pools."""
        return PolicyState(self.name, self.first_memory(pools))

    def decide(self, context: Context, state: PolicyState) -> tuple[PolicyState, Decision]:
        """Decide for one job."""
        slots = len(self.first_memory(len(context.offers)))
        if state.policy != self.name or len(state.memory) != slots:
            raise UsageError(
                f"policy {self.name} for {len(context.offers)} pools remembers {slots} numbers; "
                f"this state is of policy {state.policy} and has {len(state.memory)}"
            )
        memory, choice = self.choose(situation_of(context), np.array(state.memory, np.float64).reshape(slots, 1))
        decision = self.in_words(context, *choice.of(0))
        return PolicyState(self.name, tuple(memory[:, 0].tolist())), decision

    def in_words(self, context: Context, target: int, why: Why, costs: tuple[float, ...] = ()) -> Decision:
        """One window's choice as a decision; `costs` as in `Choice`."""
        if target == NOTHING:
            return Decision(Market.NOTHING, None, self.reasons(context, why, None, costs))
        if target == ON_DEMAND:
            return Decision(Market.ON_DEMAND, None, self.reasons(context, why, None, costs))
        pool = context.offers[target].pool
        return Decision(Market.SPOT, pool, self.reasons(context, why, pool, costs))
