"""Spot, on-demand or wait: decisions by hand, with their reasons; what is written down; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import FormatError, UsageError
from holdfast.policy.market import facts
from holdfast.policy.market.arrays import Why, cheapest_offer
from holdfast.policy.market.facts import Context, Decision, Job, Market, Offer, PolicyState, Running
from holdfast.policy.market.money import microusd
from holdfast.policy.market.reasons import describe
from holdfast.policy.market.registry import POLICIES, policy_named

HOUR, MINUTE = 3600, 60
NOWHERE, DEMAND = Running(), Running(Market.ON_DEMAND)
SPOT = Running(Market.SPOT, "a")


def at(
    hour: float,
    left: float,
    running: Running = NOWHERE,
    *,
    spot: bool | None = False,
    price: float = 1.0,
    deadline: float = 60.0,
) -> Context:
    """48 h of work in 60, 0.2 h of changeover, a tick of six minutes, $3 on-demand; one pool."""
    return Context(
        job=Job(work_s=48 * HOUR, deadline_s=round(deadline * HOUR), changeover_s=12 * MINUTE),
        now_s=round(hour * HOUR),
        tick_s=6 * MINUTE,
        work_left_s=round(left * HOUR),
        running=running,
        offers=(Offer("a", spot, round(price * 1e6)),),
        on_demand_microusd_h=3_000_000,
    )


def decide(name: str, context: Context) -> Decision:
    policy = policy_named(name)
    state, decision = policy.decide(context, policy.start(len(context.offers)))
    assert state == policy.start(len(context.offers))
    return decision


WAITS, TAKES_SPOT, TAKES_DEMAND = Market.NOTHING, Market.SPOT, Market.ON_DEMAND


@pytest.mark.parametrize(
    ("name", "context", "market", "why"),
    [
        ("greedy", at(0, 48, spot=True), TAKES_SPOT, "spot is there"),
        ("greedy", at(0, 48, spot=None), TAKES_SPOT, "spot is there"),
        ("greedy", at(0, 48), WAITS, "no spot, and there is time to wait"),
        ("greedy", at(0, 48, spot=True, price=3.0), WAITS, "no spot"),
        # The net: 11.6 h after the start slack is two changeovers, and a tick later it is less.
        ("greedy", at(11.6, 48), WAITS, "no spot"),
        ("greedy", at(11.6, 48, spot=True), TAKES_SPOT, "spot is there"),
        ("greedy", at(11.61, 48), TAKES_DEMAND, "the last moment"),
        ("greedy", at(11.61, 48, spot=True), TAKES_DEMAND, "the last moment"),
        ("greedy", at(11.81, 48, spot=True), TAKES_DEMAND, "the deadline cannot be kept for sure"),
        ("greedy", at(12, 47.8, DEMAND, spot=True), TAKES_DEMAND, "to the end"),
        # A last dash: on spot while slack is one changeover; below that a move would be late as well.
        ("greedy", at(20, 39.8, SPOT, spot=True), TAKES_SPOT, "kept until it is taken away"),
        ("greedy", at(20, 39.9, SPOT, spot=True), TAKES_SPOT, "too late to change over"),
        (
            "greedy",
            at(20, 39.75, replace(SPOT, changeover_left_s=600), spot=True),
            TAKES_DEMAND,
            "could cost the deadline",
        ),
        # Uniform progress is 8 h at 10 h.
        ("uniform-progress", at(10, 40), WAITS, "ahead of uniform progress"),
        ("uniform-progress", at(10, 40.1), TAKES_DEMAND, "no spot, and behind uniform progress"),
        ("uniform-progress", at(10, 40.1, spot=True), TAKES_SPOT, "spot is there"),
        # On-demand is left when progress is that of 0.4 h later, 8.32 h.
        ("uniform-progress", at(10, 39.69, DEMAND, spot=True), TAKES_DEMAND, "not far enough ahead"),
        ("uniform-progress", at(10, 39.68, DEMAND, spot=True), TAKES_SPOT, "spot is there again"),
        ("uniform-progress", at(10, 39.68, DEMAND), TAKES_DEMAND, "no spot to change to"),
        ("uniform-progress-as-written", at(10, 39.68, DEMAND), WAITS, "there is time to wait"),
        ("uniform-progress-as-written", at(10, 39.69, DEMAND), TAKES_DEMAND, "not far enough ahead"),
        ("uniform-progress", at(58, 1.7), TAKES_DEMAND, "the last moment"),
        ("on-demand", at(0, 48, spot=True), TAKES_DEMAND, "on-demand only"),
        ("spot", at(59, 48), WAITS, "no spot"),
        ("spot", at(59, 48, spot=True), TAKES_SPOT, "spot is there"),
    ],
)
def test_by_hand(name: str, context: Context, market: Market, why: str) -> None:
    decision = decide(name, context)
    assert (decision.market, decision.pool) == (market, "a" if market is TAKES_SPOT else None)
    assert why in decision.reasons[0]
    assert " of work in " in decision.reasons[1]


def test_reasons_hold_the_figures() -> None:
    assert decide("uniform-progress", at(10, 40.1)).reasons == (
        "no spot, and behind uniform progress",
        "1 d 16 h of work in 2 d 2 h: 9 h 54 min to spare; a changeover takes 12 min",
        "done 7 h 54 min; uniform progress would be 8 h",
    )
    assert decide("spot", at(0, 48, spot=True, price=4)).reasons[-1] == (
        "spot that costs as much as on-demand is passed over: a"
    )
    assert decide("greedy", at(0, 48, spot=None)).reasons[-1] == (
        "a at $1.0000 an hour, if there is capacity; on-demand costs $3.0000"
    )
    for why in Why:
        assert all(describe(at(10, 40), why, "a"))


def test_where_ticks_are_long_the_net_is_reached_earlier() -> None:
    """A wait of an hour from 1.1 h of slack would leave less than one changeover; a start on spot is safe still."""
    context = replace(at(10.9, 48), tick_s=HOUR)
    assert decide("greedy", context).market is TAKES_DEMAND
    assert decide("greedy", replace(context, offers=(Offer("a", True, 1_000_000),))).market is TAKES_SPOT
    assert decide("greedy", replace(context, now_s=context.now_s - 6 * MINUTE)).market is WAITS


def test_what_a_preemption_may_take_back_is_kept_in_hand() -> None:
    context = at(11.2, 48, spot=True)
    risky = replace(context, job=replace(context.job, max_lost_s=HOUR))
    assert decide("greedy", context).market is TAKES_SPOT
    assert decide("greedy", risky).market is TAKES_DEMAND


def test_of_several_pools_the_cheapest_that_is_there() -> None:
    offers = (
        Offer("dear", True, 2_000_000),
        Offer("gone", False, 1),
        Offer("asked", True, 1_000_000),
        Offer("b", None, 1_000_000),
    )
    assert decide("greedy", replace(at(0, 48), offers=offers)).pool == "asked"
    on_dear = Running(Market.SPOT, "dear")
    assert decide("greedy", replace(at(0, 48), offers=offers, running=on_dear)).pool == "dear"
    nobody = cheapest_offer(np.zeros((0, 3), np.int8), np.zeros((0, 3), np.int64), 5)
    assert nobody.tolist() == [-1, -1, -1]
    assert decide("greedy", replace(at(0, 48), offers=())).market is WAITS


def test_a_state_goes_through_text_and_only_to_its_own_policy() -> None:
    state = PolicyState("greedy", (1.5, -2.0, 1e300))
    assert PolicyState.from_json(state.to_json()) == state
    with pytest.raises(UsageError, match="remembers 0 numbers; this state is of policy spot and has 0"):
        policy_named("greedy").decide(at(0, 48), policy_named("spot").start(1))
    with pytest.raises(UsageError, match="has 3"):
        policy_named("greedy").decide(at(0, 48), state)


@given(
    st.sampled_from(["", "[]", "{}", "null", '{"format": 1}', '{"format": 1, "policy": 3, "memory": []}'])
    | st.builds(
        lambda format_, memory: json.dumps({"format": format_, "policy": "greedy", "memory": memory}),
        st.sampled_from([0, 2, None, "1"]),
        st.just([1]),
    )
    | st.builds(
        lambda memory: json.dumps({"format": 1, "policy": "greedy", "memory": memory}),
        st.sampled_from(["x", 7, None, [None], ["a"], [float("nan")], [float("inf")], {"a": 1}]),
    )
)
def test_strange_states_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        PolicyState.from_json(text)


def test_money_is_rounded_once_to_the_nearest_and_halves_to_even() -> None:
    sums = np.array([0, 1799, 1800, 1801, 5399, 5400, 5401, 9000, 3600 * (1 << 40) + 1800], np.int64)
    assert microusd(sums).tolist() == [round(each / 3600) if each < 1 << 30 else 1 << 40 for each in sums.tolist()]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Job(work_s=0, deadline_s=1, changeover_s=0), "work and deadline"),
        (lambda: Job(work_s=1, deadline_s=facts.LONGEST_S + 1, changeover_s=0), "work and deadline"),
        (lambda: Job(work_s=1, deadline_s=1, changeover_s=-1), "changeover and lost work"),
        (lambda: Running(Market.SPOT), "a pool is named"),
        (lambda: Running(Market.ON_DEMAND, "a"), "a pool is named"),
        (lambda: replace(at(0, 48), running=Running(Market.SPOT, "b")), "not among the offers"),
        (lambda: replace(at(0, 48), now_s=-1), "times lie between"),
        (lambda: replace(at(0, 48), tick_s=0), "times lie between"),
        (lambda: at(0, 48, price=-1), "prices lie between"),
        (lambda: replace(at(0, 48), offers=(Offer("a", True, 1), Offer("a", None, 2))), "the same pool: a, a"),
        (lambda: policy_named("thrifty"), "no market policy 'thrifty'; there are greedy, uniform-progress"),
    ],
)
def test_what_cannot_be_is_refused(build: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()  # type: ignore[operator]


def test_the_largest_figures_do_not_overflow() -> None:
    """Products of two times fit: the policy still sees that a job of 34 years is behind."""
    job = Job(work_s=facts.LONGEST_S // 2, deadline_s=facts.LONGEST_S, changeover_s=facts.LONGEST_S // 8)
    context = replace(
        at(0, 48),
        job=job,
        now_s=facts.LONGEST_S // 8,
        work_left_s=job.work_s,
        tick_s=facts.LONGEST_S // 8,
        offers=(Offer("a", False, facts.HIGHEST_MICROUSD_H),),
        on_demand_microusd_h=facts.HIGHEST_MICROUSD_H,
    )
    assert "behind" in decide("uniform-progress", context).reasons[0]


def test_policies_are_known_by_their_names() -> None:
    assert all(policy.name == name and policy.summary for name, policy in POLICIES.items())
    assert [name for name, policy in POLICIES.items() if not policy.keeps_deadline] == ["spot"]
