"""Where a run should be now: what has been tried and taken, as the policies want to know it, and what they say.

records ──→ history ──→ RetryState: which pools are held back
offers, history, what runs ──→ ask_market ──→ MarketView: spot in this pool, on-demand, or nothing
MarketView ──→ where ──→ the pools that a launch may use, with their ceilings | wait | give up
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from holdfast.core.errors import FormatError
from holdfast.core.failures import Failure
from holdfast.core.launches import Allowed, Pool
from holdfast.fleet.terms import Terms
from holdfast.fleet.view import LaunchView, MarketView, RunView
from holdfast.policy import retry
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import LONGEST_S, Context, Job, Market, PolicyState, Running
from holdfast.policy.market.facts import Offer as PolicyOffer
from holdfast.policy.market.reasons import about_time
from holdfast.policy.market.registry import policy_named
from holdfast.policy.market.rules import Ruled
from holdfast.policy.retry import GiveUp, LaunchPool, RetryState, Search, WaitUntil, Want

__all__ = ["Place", "Wait", "ask_market", "history", "where", "work_left_s"]

_NO_DEADLINE_WORK_S = 30 * 86400
"""Where nobody has said how much work there is: what fallback and hours decide does not depend on it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Launch in one of these."""

    allowed: tuple[Allowed, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is launched before `until_s`; None: it never will be, a person must look."""

    until_s: int | None
    reasons: tuple[str, ...]


def history(view: RunView, terms: Terms) -> RetryState:
    """Everything that became of launches, in the order of its time. Nothing of it is remembered elsewhere."""
    happened: list[tuple[float, int, str, LaunchView]] = []
    for launch in view.launches:
        answer, ended = launch.answer, launch.ended
        if answer is not None and answer.failure is not None:
            happened.append((answer.at_unix_s, launch.launch, "failed", launch))
        if launch.claimed is not None and launch.answer is not None:
            happened.append((launch.heard_s(launch.claimed), launch.launch, "launched", launch))
        if ended is not None and ended.why == "preempted":
            happened.append((ended.at_unix_s, launch.launch, "preempted", launch))
        if ended is not None and ended.why == "failed" and launch.claimed is None:
            happened.append((ended.at_unix_s, launch.launch, "timeout", launch))
    state = RetryState()
    for at_s, _, what, launch in sorted(happened, key=lambda each: each[:3]):
        for pool in _pools_of(launch, what):
            state = _after(state, terms, pool, what, launch, int(at_s))
    return state


def _pools_of(launch: LaunchView, what: str) -> list[Pool]:
    """A request that fails has failed in every pool that it allowed."""
    assert launch.intent is not None or what != "failed"
    if what == "failed" and launch.intent is not None:
        return [each.pool for each in launch.intent.allowed]
    pool = launch.answer.pool if launch.answer is not None else None
    return [] if pool is None else [pool]


def _after(state: RetryState, terms: Terms, pool: Pool, what: str, launch: LaunchView, at_s: int) -> RetryState:
    place, jitter = _place(pool), _jitter(launch.launch, pool.name)
    answer = launch.answer
    assert answer is not None
    if what == "launched":
        return retry.launched(state, place)
    if what == "preempted":
        lasted_s = max(0, at_s - int(answer.at_unix_s))
        return retry.preempted(state, terms.retry, place, now_s=at_s, lasted_s=lasted_s, jitter=jitter)
    failure = Failure.TIMEOUT if what == "timeout" or answer.failure is None else answer.failure
    return retry.failed(
        state, terms.retry, place, failure, now_s=at_s, jitter=jitter, retry_after_s=answer.retry_after_s,
        detail=answer.detail if what == "failed" else "",
    )  # fmt: skip


def _place(pool: Pool) -> LaunchPool:
    return LaunchPool(pool.name, on_demand=pool.market == "on-demand", account=pool.provider)


def _jitter(launch: int, pool: str) -> float:
    """Drawn from the records, so that every controller holds a pool back for as long."""
    return int.from_bytes(hashlib.blake2b(f"{launch}/{pool}".encode(), digest_size=4).digest(), "big") / 2**32


def work_left_s(view: RunView, terms: Terms) -> int:
    """By what machines have said of checkpoints; never below one second while the run is not done."""
    done_s = sum(launch.pulse.kept_work_s for launch in view.launches if launch.pulse is not None)
    return max(1, (terms.work_s or _NO_DEADLINE_WORK_S) - done_s)


def ask_market(view: RunView, terms: Terms, now_s: int, running: LaunchView | None) -> MarketView | None:
    """What the policy says now, where `running` works or is on its way. Asked once a tick, and again in the same tick, with the
    memory from before, when a pool that it counted on could not be had, or something else runs than it has chosen. None: no offers
    are known yet."""
    spot = sorted((offer for offer in view.offers if offer.pool.market == "spot"), key=lambda offer: offer.pool)
    demand = [offer.microusd_h for offer in view.offers if offer.pool.market == "on-demand"]
    demand += [offer.on_demand_microusd_h for offer in spot] if not demand else []
    if not demand:
        return None
    tried = history(view, terms)
    here = None if running is None or running.answer is None else running.answer.pool
    held = {offer.pool.name for offer in spot if retry.held(tried, _place(offer.pool), now_s) is not None}
    held |= {offer.pool.name for offer in spot if offer.available is False}
    held -= set() if here is None else {here.name}
    unavailable, last = tuple(sorted(held)), view.market
    pools = tuple(offer.pool.name for offer in spot)
    policy = _policy(terms, pools)
    fresh = policy.start(len(pools))
    if last is not None and not _fits(last.before, fresh):
        last = None  # other pools than before
    is_new = last is None or now_s - last.asked_s >= terms.tick_s
    name = None if here is None else here.name
    if last is not None:
        last = _remembering(last, running, here, fresh)
    if last is not None and not is_new and (last.unavailable, last.here) == (unavailable, name):
        return last
    before = _remembered(view, running, fresh) if last is None else last.after if is_new else last.before
    is_here = here is not None and (here.market == "on-demand" or here.name in pools)
    context = Context(
        job=_job(terms),
        now_s=min(max(0, now_s - terms.started_unix_s), LONGEST_S),
        tick_s=terms.tick_s,
        work_left_s=min(work_left_s(view, terms), LONGEST_S),
        running=_running(here, _coming_s(running, terms, now_s)) if is_here and here is not None else Running(),
        offers=tuple(
            PolicyOffer(offer.pool.name, None if offer.pool.name not in held else False, offer.microusd_h)
            if here != offer.pool
            else PolicyOffer(offer.pool.name, True, offer.microusd_h)
            for offer in spot
        ),
        on_demand_microusd_h=min(demand),
    )
    after, decision = policy.decide(context, before)
    asked_s = now_s if is_new or last is None else last.asked_s
    # Where nobody has named a deadline, the one that the policy was told is no reason.
    reasons = tuple(
        each for each in decision.reasons if terms.deadline_unix_s is not None or each != about_time(context)
    )
    return MarketView(
        asked_s, before, after, decision.market.value, decision.pool, reasons, unavailable, name,
        None if here is None or running is None else running.launch,
    )  # fmt: skip


def _fits(state: PolicyState, fresh: PolicyState) -> bool:
    return (state.policy, len(state.memory)) == (fresh.policy, len(fresh.memory))


def _remembering(last: MarketView, running: LaunchView | None, here: Pool | None, fresh: PolicyState) -> MarketView:
    """What is remembered of a choice belongs to the machine that came of it: without it, the policy would find something that it
    never asked for. Where another controller has chosen, its memory counts."""
    if running is None or here is None or running.launch == last.launch:
        return last
    found = None if running.won else _written(running, fresh)
    if found is not None:
        return replace(last, before=found, after=found, launch=running.launch)
    if here.market == last.market and (here.market == "on-demand" or here.name == last.pool):
        return replace(last, before=last.after, here=here.name, launch=running.launch)
    return last


def _remembered(view: RunView, running: LaunchView | None, fresh: PolicyState) -> PolicyState:
    """What the controller before this one remembered when it launched what runs, else what it launched last."""
    for launch in (*(() if running is None else (running,)), *reversed(view.launches)):
        found = _written(launch, fresh)
        if found is not None:
            return found
    return fresh


def _written(launch: LaunchView, fresh: PolicyState) -> PolicyState | None:
    """With its launch; None: nothing, or of another policy, other pools, a newer version."""
    if launch.intent is None or not launch.intent.policy_state:
        return None
    try:
        found = PolicyState.from_json(launch.intent.policy_state)
    except FormatError:
        return None
    return found if _fits(found, fresh) else None


def _policy(terms: Terms, pools: tuple[str, ...]) -> MarketPolicy:
    inner = policy_named(terms.policy if terms.deadline_unix_s is not None else "greedy")
    rules = replace(terms.rules, reserved=tuple(name for name in terms.rules.reserved if name in pools))
    return Ruled(inner, rules, pools=pools, start_utc_s=terms.started_unix_s)


def _job(terms: Terms) -> Job:
    deadline_s = LONGEST_S if terms.deadline_unix_s is None else terms.deadline_unix_s - terms.started_unix_s
    work_s = terms.work_s or _NO_DEADLINE_WORK_S
    return Job(work_s=work_s, deadline_s=max(1, min(deadline_s, LONGEST_S)), changeover_s=terms.changeover_s)


def _coming_s(launch: LaunchView | None, terms: Terms, now_s: int) -> int:
    """Until it works, as a rule."""
    if launch is None or launch.claimed is not None or launch.answer is None:
        return 0
    return min(terms.changeover_s, max(1, int(launch.answer.at_unix_s) + terms.changeover_s - now_s))


def _running(pool: Pool, coming_s: int) -> Running:
    if pool.market == "on-demand":
        return Running(Market.ON_DEMAND, changeover_left_s=coming_s)
    return Running(Market.SPOT, pool.name, coming_s)


def where(view: RunView, terms: Terms, now_s: int, market: MarketView) -> Place | Wait:
    """The pools that a launch may use now, best first: on one market, and in one region, as one request can name them."""
    tried = history(view, terms)
    want = Want.SPOT if market.market == "spot" else Want.ON_DEMAND if market.market == "on-demand" else Want.AUTO
    offers = [offer for offer in view.offers if _affordable(offer.microusd_h, terms)]
    ranked = sorted(offers, key=lambda offer: (offer.pool.name != market.pool, offer.microusd_h, offer.pool))
    places = tuple(_place(offer.pool) for offer in ranked if want is Want.AUTO or offer.pool.market == want.value)
    if not places:
        return Wait(None, ("no pool fits the job and its price ceiling",))
    search = Search(now_s=now_s, pools=places, want=want)
    _, decision = retry.next_try(tried, terms.retry, search)
    if isinstance(decision, GiveUp):
        return Wait(None, decision.reasons)
    if market.market == "nothing":
        return Wait(market.asked_s + terms.tick_s, market.reasons)
    if isinstance(decision, WaitUntil):
        return Wait(decision.until_s, (*market.reasons, *decision.reasons))
    first = Pool.named(decision.pool.name)
    allowed = [
        Allowed(pool=offer.pool, ceiling_microusd_h=_ceiling(offer.microusd_h, offer.on_demand_microusd_h, terms, offer.pool),
                on_demand_microusd_h=offer.on_demand_microusd_h)
        for offer in sorted(ranked, key=lambda offer: offer.pool != first)
        if (offer.pool.market, offer.pool.region) == (first.market, first.region)
        and retry.held(tried, _place(offer.pool), now_s) is None and offer.available is not False
    ]  # fmt: skip
    return Place(tuple(allowed), (*market.reasons, *decision.reasons))


def _affordable(microusd_h: int, terms: Terms) -> bool:
    return terms.rules.max_microusd_h is None or microusd_h <= terms.rules.max_microusd_h


def _ceiling(microusd_h: int, on_demand_microusd_h: int, terms: Terms, pool: Pool) -> int:
    """On-demand has a list price. Spot may rise to the on-demand price, or to the user's `max_price` below it; what the provider
    holds against the machine is this."""
    if pool.market == "on-demand":
        return microusd_h
    most = max(on_demand_microusd_h, microusd_h)
    return most if terms.rules.max_microusd_h is None else min(most, terms.rules.max_microusd_h)
