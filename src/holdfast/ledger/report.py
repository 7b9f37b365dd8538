"""What `holdfast report` says of a run: figures per attempt and in total, in seconds and dollars, computed from its events.

    events → timeline → accounts → (prices) costs and waterfall → this

Nothing of it is stored. Seconds have six decimals and come from whole microseconds, dollars from whole micro-dollars, so that parts
add up to their whole exactly when they are added as decimals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from holdfast.ledger.cost import Prices, Rate, rate_of, usd
from holdfast.ledger.goodput import Account, Bucket, accounts_of
from holdfast.ledger.savings import costs_of, restart_cost, same_work, waterfall_of
from holdfast.ledger.timeline import AttemptRecord, Ending, Timeline

__all__ = ["AttemptReport", "Figures", "Report", "Restarts", "Saves", "Savings", "report_of"]


@dataclass(frozen=True, slots=True)
class Saves:
    """Committed checkpoints. `stall_s` is what the loop stood still for, all saves together; the others are medians."""

    count: int
    failed: int
    sent_bytes: int
    deduplicated_bytes: int
    stall_s: float
    stall_median_s: float | None
    durable_median_s: float | None
    """From the snapshot until it was committed."""
    notice_to_durable_s: float | None
    """From the wish to leave until everything was durable; the longest."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one attempt, or of all. `buckets_s` adds up to `billed_s`, and with `queue_wait_s` to `wall_s`."""

    wall_s: float
    billed_s: float
    useful_s: float
    queue_wait_s: float
    goodput: float | None
    """Useful time / billed time."""
    ettr: float | None
    """Useful time / wall time, queueing included."""
    buckets_s: Mapping[str, float]
    computed_steps: int
    lost_steps: int
    """Computed here and computed again by a later attempt."""
    saves: Saves
    cost_usd: float | None
    costs_usd: Mapping[str, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    number: int
    generation: int
    machine: str | None
    market: str | None
    price_per_hour_usd: float | None
    begin_s: float
    """When its process started, counted from the beginning of the run."""
    ending: str
    end_is_assumed: bool
    start_step: int | None
    reached_step: int
    retained_step: int
    fell_back: int
    figures: Figures
    interruption_usd: float | None
    """What its end cost: its lost work, and all that the next attempt needed to come back. None for the last one."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often the run came back, why it had to, and what that cost on average."""

    count: int
    by_cause: Mapping[str, int]
    lost_steps_each: float | None
    lost_work_s_each: float | None
    restart_s_each: float | None
    usd_each: float | None


@dataclass(frozen=True, slots=True)
class Savings:
    """`theoretical` less lost work, restarts, checkpointing and idle is `actual`, which is `on_demand` less `paid`. Dollars."""

    on_demand_usd: float
    theoretical_usd: float
    lost_work_usd: float
    restarts_usd: float
    checkpointing_usd: float
    idle_usd: float
    actual_usd: float
    paid_usd: float
    actual_share: float | None
    """Of what the same work would have cost on demand."""


@dataclass(frozen=True, slots=True)
class Report:
    url: str
    begun_unix_s: float
    attempts: tuple[AttemptReport, ...]
    total: Figures
    restarts: Restarts
    savings: Savings | None
    notes: tuple[str, ...]
    """What was assumed, and what could not be read."""


def report_of(url: str, timeline: Timeline, prices: Prices, unreadable: Sequence[str] = ()) -> Report:
    """Put the figures together. Pure."""
    accounts = accounts_of(timeline)
    rates = [rate_of(account.attempt, prices) for account in accounts]
    notes = [*timeline.notes, *unreadable, *_about_prices(accounts, rates)]
    costs = [None if rate is None else costs_of(account, rate) for account, rate in zip(accounts, rates, strict=True)]
    lost = _interruptions(accounts, costs)
    attempts = tuple(
        _attempt(account, rate, cost, interruption)
        for account, rate, cost, interruption in zip(accounts, rates, costs, lost, strict=True)
    )
    return Report(
        url=url,
        begun_unix_s=timeline.begun_unix_s,
        attempts=attempts,
        total=_figures(accounts, _added(costs)),
        restarts=_restarts(accounts, lost),
        savings=_savings(accounts, rates),
        notes=tuple(notes),
    )


def _attempt(
    account: Account, rate: Rate | None, costs: Mapping[Bucket, int] | None, interruption: int | None
) -> AttemptReport:
    attempt = account.attempt
    return AttemptReport(
        number=attempt.number,
        generation=attempt.generation,
        machine=attempt.machine,
        market=attempt.market,
        price_per_hour_usd=None if rate is None else float(rate.paid / 1_000_000),
        begin_s=_s(attempt.begin_us),
        ending=attempt.ending.value,
        end_is_assumed=attempt.end_is_assumed,
        start_step=attempt.start_step,
        reached_step=attempt.reached_step,
        retained_step=account.retained_step,
        fell_back=attempt.fell_back,
        figures=_figures([account], costs),
        interruption_usd=None if interruption is None else usd(interruption),
    )


def _figures(accounts: Sequence[Account], costs: Mapping[Bucket, int] | None) -> Figures:
    wall_us, billed_us = (sum(getattr(account, name) for account in accounts) for name in ("wall_us", "billed_us"))
    buckets = {bucket: sum(account.buckets[bucket] for account in accounts) for bucket in Bucket}
    useful_us = buckets[Bucket.USEFUL]
    return Figures(
        wall_s=_s(wall_us),
        billed_s=_s(billed_us),
        useful_s=_s(useful_us),
        queue_wait_s=_s(sum(account.queue_wait_us for account in accounts)),
        goodput=_share(useful_us, billed_us),
        ettr=_share(useful_us, wall_us),
        buckets_s={bucket.value: _s(spent_us) for bucket, spent_us in buckets.items()},
        computed_steps=sum(account.attempt.computed_steps for account in accounts),
        lost_steps=sum(account.lost_steps for account in accounts),
        saves=_saves([account.attempt for account in accounts]),
        cost_usd=None if costs is None else usd(sum(costs.values())),
        costs_usd=None if costs is None else {bucket.value: usd(costs[bucket]) for bucket in Bucket},
    )


def _saves(attempts: Sequence[AttemptRecord]) -> Saves:
    saves = [save for attempt in attempts for save in attempt.saves]
    noticed = [attempt.notice_to_durable_us for attempt in attempts if attempt.notice_to_durable_us is not None]
    return Saves(
        count=len(saves),
        failed=sum(attempt.failed_saves for attempt in attempts),
        sent_bytes=sum(save.sent_bytes for save in saves),
        deduplicated_bytes=sum(save.deduplicated_bytes for save in saves),
        stall_s=_s(sum(save.stall_us for save in saves)),
        stall_median_s=_s(round(median(save.stall_us for save in saves))) if saves else None,
        durable_median_s=_s(round(median(save.durable_us for save in saves))) if saves else None,
        notice_to_durable_s=_s(max(noticed)) if noticed else None,
    )


def _interruptions(accounts: Sequence[Account], costs: Sequence[Mapping[Bucket, int] | None]) -> list[int | None]:
    """Per attempt, in micro-dollars: its lost work and its successor's restart."""
    found: list[int | None] = []
    for index in range(len(accounts)):
        mine, following = costs[index], costs[index + 1] if index + 1 < len(costs) else None
        if mine is None or following is None:
            found.append(None)
        else:
            found.append(mine[Bucket.LOST] + restart_cost(following))
    return found


def _restarts(accounts: Sequence[Account], lost: Sequence[int | None]) -> Restarts:
    again = [
        (account, following, cost)
        for (account, following), cost in zip(pairwise(accounts), lost, strict=False)
        if account.attempt.ending is not Ending.FINISHED
    ]
    count, work = len(again), same_work(is_first=False)
    if not count:
        return Restarts(0, {}, None, None, None, None)
    restart_us = sum(
        restart_cost({bucket: us for bucket, us in following.buckets.items() if bucket not in work})
        for _, following, _ in again
    )
    costs = [cost for *_, cost in again if cost is not None]
    return Restarts(
        count=count,
        by_cause=dict(Counter(account.attempt.ending.value for account, *_ in again)),
        lost_steps_each=sum(account.lost_steps for account, *_ in again) / count,
        lost_work_s_each=_s(sum(account.buckets[Bucket.LOST] for account, *_ in again) // count),
        restart_s_each=_s(restart_us // count),
        usd_each=usd(sum(costs) // count) if len(costs) == count else None,
    )


def _savings(accounts: Sequence[Account], rates: Sequence[Rate | None]) -> Savings | None:
    known = [rate for rate in rates if rate is not None]
    waterfall = waterfall_of(accounts, known) if known and len(known) == len(rates) else None
    if waterfall is None:
        return None
    return Savings(
        on_demand_usd=usd(waterfall.on_demand),
        theoretical_usd=usd(waterfall.theoretical),
        lost_work_usd=usd(waterfall.lost_work),
        restarts_usd=usd(waterfall.restarts),
        checkpointing_usd=usd(waterfall.checkpointing),
        idle_usd=usd(waterfall.idle),
        actual_usd=usd(waterfall.actual),
        paid_usd=usd(waterfall.paid),
        actual_share=_share(waterfall.actual, waterfall.on_demand),
    )


def _about_prices(accounts: Sequence[Account], rates: Sequence[Rate | None]) -> list[str]:
    notes: dict[str, list[int]] = {}
    if any(rate is not None for rate in rates):
        for account, rate in zip(accounts, rates, strict=True):
            what = "no price is known, so there are no dollars in total" if rate is None else rate.assumed
            if what is not None:
                notes.setdefault(what, []).append(account.attempt.number)
    return [
        f"{'attempt' if len(numbers) == 1 else 'attempts'} {', '.join(map(str, numbers))}: {what}"
        for what, numbers in notes.items()
    ]


def _added(costs: Sequence[Mapping[Bucket, int] | None]) -> dict[Bucket, int] | None:
    known = [cost for cost in costs if cost is not None]
    if not known or len(known) < len(costs):
        return None
    return {bucket: sum(cost[bucket] for cost in known) for bucket in Bucket}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _s(microseconds: int) -> float:
    return microseconds / 1_000_000
