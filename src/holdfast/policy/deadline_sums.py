"""The arithmetic of a deadline: every way to make a step durable, when it would be done, and how probable that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.policy.deadline_case import UNMEASURED_BANDWIDTH, DeadlineAction, DeadlineContext, Tier
from holdfast.policy.spread import Spread

__all__ = ["Candidate", "Sums", "is_unsaved", "new_saves", "newest_begun", "ready_saves"]


class Candidate(NamedTuple):
    """One way to make a step durable: where, which step, when it would be done if it began as soon as it can."""

    action: DeadlineAction
    tier: Tier
    step: int
    ends_s: float
    probability: float
    send_bytes: int
    more_steps: int = 0
    latest_s: float | None = None
    abandons: bool = False


@dataclass(frozen=True, slots=True)
class Sums:
    """The arithmetic of one context."""

    context: DeadlineContext
    usable_s: float
    quantile: float = field(init=False)

    def __post_init__(self) -> None:
        # Two uncertain figures, each planned at its own tail, so that both hold together with `confidence`.
        object.__setattr__(self, "quantile", (1 + self.context.confidence) / 2)

    def bandwidth(self, tier: Tier) -> Spread:
        if tier is Tier.LOCAL and self.context.local is not None:
            return self.context.local.bandwidth
        return self.context.bandwidth or UNMEASURED_BANDWIDTH

    def latency_s(self, tier: Tier) -> float:
        if tier is Tier.LOCAL and self.context.local is not None:
            return self.context.local.commit_latency_s
        return self.context.commit_latency_s

    def planned_bytes_per_s(self, tier: Tier) -> float:
        return self.bandwidth(tier).quantile(1 - self.quantile)

    def planned_step_s(self) -> float:
        step_time = self.context.step_time
        return math.inf if step_time is None else step_time.quantile(self.quantile)

    def send_s(self, tier: Tier, size_bytes: int) -> float:
        return _quotient(size_bytes, self.planned_bytes_per_s(tier)) + self.latency_s(tier)

    def wait_s(self, tier: Tier) -> float:
        """Until the writer is free: saves to the store are sent one after the other."""
        in_flight = self.context.in_flight
        if in_flight is None or tier is not Tier.STORE:
            return 0.0
        send_s = _quotient(in_flight.left_bytes, self.planned_bytes_per_s(tier))
        return send_s + (self.latency_s(tier) if in_flight.latency_left_s is None else in_flight.latency_left_s)

    def fits(self, candidate: Candidate) -> bool:
        return candidate.ends_s <= self.usable_s

    def probability(self, tier: Tier, size_bytes: int, *, ready_s: float, behind: bool) -> float:
        """That `size_bytes`, copied at `ready_s`, are durable in time: the bandwidth alone decides."""
        in_flight = self.context.in_flight if behind and tier is Tier.STORE else None
        latency_s = self.latency_s(tier)
        spread = self.bandwidth(tier)
        alone = self._share(spread, size_bytes, self.usable_s - ready_s - latency_s)
        if in_flight is None:
            return alone
        both_s = self.usable_s - 2 * latency_s
        return min(alone, self._share(spread, size_bytes + in_flight.left_bytes, both_s))

    def _share(self, spread: Spread, size_bytes: int, within_s: float) -> float:
        if within_s < 0:
            return 0.0
        return spread.share_at_least(_quotient(size_bytes, within_s)) if size_bytes else 1.0


def _quotient(size_bytes: int, per: float) -> float:
    """0 bytes take no time at any bandwidth, none included."""
    return 0.0 if size_bytes == 0 else size_bytes / per if per > 0 else math.inf


def new_saves(sums: Sums) -> list[Candidate]:
    """A save of the state at the next boundary, in each tier, with as many steps before it as there is time for."""
    context = sums.context
    if context.boundary_in_s is None:
        return []
    candidates = []
    copied_s = context.boundary_in_s + context.snapshot_s
    # Until the insurance is bought its copy is paid for in advance, so that buying it never costs a step that was counted on.
    reserve_s = 0.0 if context.insured or context.in_flight else context.snapshot_s
    for tier, action in ((Tier.STORE, DeadlineAction.SAVE_NOW), (Tier.LOCAL, DeadlineAction.SAVE_LOCALLY)):
        if tier is Tier.LOCAL and context.local is None:
            continue
        send_s = sums.send_s(tier, context.send_bytes)
        alone_s, behind_s = copied_s + send_s, max(copied_s, sums.wait_s(tier)) + send_s
        droppable = context.in_flight is not None and context.in_flight.can_abandon and not context.insured
        abandons = tier is Tier.STORE and droppable and alone_s <= sums.usable_s < behind_s
        ends_s = alone_s if abandons else behind_s
        more = 0
        if ends_s <= sums.usable_s and math.isfinite(sums.planned_step_s()):
            more = max(0, math.floor((sums.usable_s - reserve_s - alone_s) / sums.planned_step_s()))
        if more or is_unsaved(context):
            chance = sums.probability(tier, context.send_bytes, ready_s=copied_s, behind=not abandons)
            latest_s = sums.usable_s - send_s - context.snapshot_s
            candidates.append(
                Candidate(
                    action, tier, context.step, ends_s, chance, context.send_bytes, more, latest_s, abandons
                )
            )  # fmt: skip
    return candidates


def ready_saves(sums: Sums) -> list[Candidate]:
    """What needs no step boundary: the newest snapshot in memory, and the save in flight."""
    context, candidates = sums.context, []
    snapshot, in_flight = context.snapshot, context.in_flight
    for tier in (Tier.STORE, Tier.LOCAL) if context.local else (Tier.STORE,):
        if snapshot is not None and snapshot.step > newest_begun(context):
            ends_s = sums.wait_s(tier) + sums.send_s(tier, snapshot.send_bytes)
            chance = sums.probability(tier, snapshot.send_bytes, ready_s=0.0, behind=True)
            action = DeadlineAction.COMMIT_NEWEST_SNAPSHOT
            candidates.append(Candidate(action, tier, snapshot.step, ends_s, chance, snapshot.send_bytes))
    if in_flight is not None:
        chance = sums.probability(Tier.STORE, in_flight.left_bytes, ready_s=0.0, behind=False)
        action = DeadlineAction.FINISH_IN_FLIGHT
        candidates.append(
            Candidate(action, Tier.STORE, in_flight.step, sums.wait_s(Tier.STORE), chance, in_flight.left_bytes)
        )
    return candidates


def newest_begun(context: DeadlineContext) -> int:
    return max(context.durable_step or 0, context.in_flight.step if context.in_flight else 0)


def is_unsaved(context: DeadlineContext) -> bool:
    """Whether the present state holds steps that no save has. Before the first step there is nothing worth a save."""
    return context.step > newest_begun(context)
