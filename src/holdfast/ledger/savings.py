"""What spot capacity saved, and what ate the rest: a waterfall that adds up to the micro-dollar.

    the same work, uninterrupted, on demand
      less the same work at the prices that were paid       → the saving in theory
      less lost work, restarts, checkpointing and idle      → the saving in fact  =  on demand less what was paid

The same work: what was kept (useful steps, evaluations, waiting for data, preparation) and one start. Rework is a cost of
interruptions and never counts as work; so a discount that interruptions have eaten shows as a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.ledger.cost import Rate, shares
from holdfast.ledger.goodput import Account, Bucket

__all__ = ["Waterfall", "costs_of", "restart_cost", "same_work", "waterfall_of"]

_WORK = (Bucket.USEFUL, Bucket.EVALUATION, Bucket.DATA)
_START = (Bucket.INITIALISATION, Bucket.RESTORE, Bucket.PREPARATION, Bucket.STARTUP)


@dataclass(frozen=True, slots=True)
class Waterfall:
    """Micro-dollars. `theoretical` is `on_demand` less the same work at the prices paid; `actual` is `theoretical` less the four
    after it, and so `on_demand` less `paid`."""

    on_demand: int
    theoretical: int
    lost_work: int
    restarts: int
    checkpointing: int
    idle: int
    actual: int
    paid: int


def same_work(*, is_first: bool) -> frozenset[Bucket]:
    """The buckets of an attempt that an uninterrupted run would have had as well."""
    return frozenset(_WORK + _START if is_first else _WORK)


def costs_of(account: Account, rate: Rate) -> dict[Bucket, int]:
    """Micro-dollars paid for each bucket of an attempt; they add up to what the attempt cost."""
    buckets = list(account.buckets)
    return dict(zip(buckets, shares([account.buckets[bucket] for bucket in buckets], rate.paid), strict=True))


def waterfall_of(accounts: Sequence[Account], rates: Sequence[Rate]) -> Waterfall | None:
    """For the attempts of a run in order; None where it is not known what one of them would have cost on demand."""
    on_demand = theoretical = lost = restarts = checkpointing = idle = paid = 0
    for index, (account, rate) in enumerate(zip(accounts, rates, strict=True)):
        if rate.on_demand is None:
            return None
        work = same_work(is_first=index == 0)
        costs = costs_of(account, rate)
        baseline = shares([sum(account.buckets[bucket] for bucket in work)], rate.on_demand)[0]
        on_demand += baseline
        theoretical += baseline - sum(costs[bucket] for bucket in work)
        rest = {bucket: cost for bucket, cost in costs.items() if bucket not in work}
        lost += rest.get(Bucket.LOST, 0)
        checkpointing += rest.get(Bucket.SAVE, 0)
        idle += rest.get(Bucket.IDLE, 0)
        restarts += restart_cost(rest)
        paid += sum(costs.values())
    actual = theoretical - lost - restarts - checkpointing - idle
    return Waterfall(on_demand, theoretical, lost, restarts, checkpointing, idle, actual, paid)


def restart_cost(rest: Mapping[Bucket, int]) -> int:
    """Of what is not the same work: what it took to come back."""
    return sum(rest.get(bucket, 0) for bucket in (*_START, Bucket.RECOVERY))
