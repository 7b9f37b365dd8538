"""A user's rules: how they are read from a job file, and what they decide, by hand and with reasons."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from holdfast.core.errors import UsageError
from holdfast.policy.backoff import Fallback
from holdfast.policy.market.arrays import Choice, Situation
from holdfast.policy.market.base import MarketPolicy
from holdfast.policy.market.facts import Context, Decision, Job, Market, Offer, PolicyState, Running
from holdfast.policy.market.greedy import Greedy
from holdfast.policy.market.rules import Ruled, Rules, SpotPolicy
from holdfast.policy.market.rules_parse import RULE_KEYS, parse_fallback, parse_rules
from holdfast.policy.market.single_market import OnDemandOnly, SpotOnly
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.market.story import tell
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.trace import Trace

HOUR, MINUTE = 3600, 60
MONDAY = int(datetime(2026, 11, 16, tzinfo=UTC).timestamp())
NOWHERE, DEMAND, SPOT = Running(), Running(Market.ON_DEMAND), Running(Market.SPOT, "a")


def test_the_keys_of_a_job_file() -> None:
    rules = parse_rules(
        {
            "spot_policy": "auto",
            "opportunistic": "no",
            "max_price": "$2.50",
            "on_demand_floor": "12.5 %",
            "fallback_after": "3 tries or 10 min",
            "start_window": "mon-fri 20:00-06:00, sat",
            "reserved": "block-a, block-b",
            "run_window": None,
        }
    )
    assert (rules.max_microusd_h, rules.floor_millionths, rules.fallback) == (2_500_000, 125_000, Fallback(3, 600))
    assert (rules.reserved, rules.start_window.text) == (("block-a", "block-b"), "mon-fri 20:00-06:00, sat")
    assert rules.run_window.always
    assert parse_rules({}) == Rules()
    assert parse_rules({"on_demand_floor": "25%"}, num_nodes=6) == Rules(floor_nodes=2)
    assert parse_rules({"on_demand_floor": 3}, num_nodes=6) == Rules(floor_nodes=3)
    assert parse_rules({"on_demand_floor": 1}) == Rules(floor_millionths=1_000_000)
    assert parse_rules({"on_demand_floor": "33.33333%"}).floor_millionths == 333_334, "rounded up"
    assert parse_rules({"max_price": 3}).max_microusd_h == 3_000_000
    assert parse_fallback("90 s") == Fallback(None, 90)
    assert parse_fallback(5) == Fallback(5, None)
    assert parse_fallback("1 h, 1 try") == Fallback(1, 3600)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_prise": 1}, "unknown rule 'max_prise'; did you mean 'max_price'"),
        ({"zzz": 1}, "known here: spot_policy, opportunistic, max_price"),
        ({"spot_policy": "cheap"}, "spot_policy: spot, on-demand or auto, not 'cheap'"),
        ({"spot_policy": ["spot"]}, "spot_policy: spot, on-demand or auto"),
        ({"opportunistic": 2}, "opportunistic: true or false, not 2"),
        ({"max_price": "cheap"}, "max_price: not an amount: 'cheap'"),
        ({"max_price": 5000}, r"max_price: 5000 is more than \$2,147 per machine"),
        ({"on_demand_floor": "120%"}, "on_demand_floor: not a floor: '120%'; a share"),
        ({"on_demand_floor": "1/0%"}, "on_demand_floor: not a floor"),
        ({"on_demand_floor": 2}, "on_demand_floor: .*does not fit 1 machines"),
        ({"on_demand_floor": "half"}, "on_demand_floor: not a floor"),
        ({"fallback_after": "soon"}, "fallback_after: not a fallback: 'soon'; it is written like"),
        ({"fallback_after": "1 h or 2 h"}, "not a fallback"),
        ({"fallback_after": 0}, "a fallback comes after one try or more"),
        ({"start_window": "at night"}, "start_window: not hours"),
        ({"run_window": 22}, "run_window: not hours: 22"),
        ({"reserved": [3]}, "reserved: names of pools"),
        ({"reserved": ","}, "reserved: names of pools"),
        ({"opportunistic": True, "spot_policy": "on-demand"}, "opportunistic and spot_policy: on-demand contradict"),
        ({"spot_policy": "spot", "on_demand_floor": "5%"}, "on_demand_floor and spot only contradict"),
        ({"spot_policy": "spot", "fallback_after": 3}, "fallback_after and spot only contradict"),
        ({"start_window": "sat", "run_window": "sun"}, "start_window and run_window contradict"),
    ],
)
def test_what_a_job_file_gets_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_rules(values)


def test_every_key_is_documented_where_it_is_read() -> None:
    from holdfast.policy.market import rules_parse

    assert all(
        f"{key}:" in (rules_parse.__doc__ or "") or f"or {key}" in (rules_parse.__doc__ or "") for key in RULE_KEYS
    )


def at(
    hour: float, left: float, running: Running = NOWHERE, *, a: tuple[bool | None, float] = (False, 1.0), **more: object
) -> Context:
    """48 h of work in 60 from Monday 00:00 UTC, 0.2 h of changeover, a tick of six minutes, $3 on-demand; pools a and b."""
    context = Context(
        job=Job(work_s=48 * HOUR, deadline_s=60 * HOUR, changeover_s=12 * MINUTE),
        now_s=round(hour * HOUR),
        tick_s=6 * MINUTE,
        work_left_s=round(left * HOUR),
        running=running,
        offers=(Offer("a", a[0], round(a[1] * 1e6)), Offer("b", False, 2_000_000)),
        on_demand_microusd_h=3_000_000,
    )
    return replace(context, **more)  # type: ignore[arg-type]


def ruled(values: dict[str, object], inner: MarketPolicy | None = None) -> Ruled:
    return Ruled(inner or Greedy(), parse_rules(values), ("a", "b"), start_utc_s=MONDAY)


def decide(values: dict[str, object], context: Context, inner: MarketPolicy | None = None) -> Decision:
    policy = ruled(values, inner)
    return policy.decide(context, policy.start(2))[1]


IDLE, TAKES_SPOT, TAKES_DEMAND = Market.NOTHING, Market.SPOT, Market.ON_DEMAND


@pytest.mark.parametrize(
    ("values", "context", "market", "why"),
    [
        ({"max_price": 0.99}, at(0, 48, a=(True, 1.0)), IDLE, "no spot, and there is time to wait"),
        ({"max_price": 1}, at(0, 48, a=(True, 1.0)), TAKES_SPOT, "spot is there"),
        ({"max_price": 3}, at(0, 48, a=(True, 1.0)), TAKES_SPOT, "spot is there"),
        # The price has risen above the ceiling: what runs there does not run any more; at the edge, on-demand.
        ({"max_price": 3}, at(0, 48, SPOT, a=(True, 3.01)), IDLE, "no spot"),
        ({"max_price": 3}, at(11.7, 48, SPOT, a=(True, 3.01)), TAKES_DEMAND, "the last moment"),
        ({"max_price": 2}, at(11.7, 48), IDLE, "the rules forbid on-demand, and there is no spot"),
        ({"max_price": 2}, at(11.7, 48, DEMAND), IDLE, "the rules forbid on-demand, and there is no spot"),
        ({"spot_policy": "spot"}, at(59, 48, a=(True, 1.0)), TAKES_SPOT, "the rules forbid on-demand: spot"),
        ({"spot_policy": "spot"}, at(20, 39.9, SPOT, a=(True, 1.0)), TAKES_SPOT, "too late to change over"),
        ({"spot_policy": "on-demand"}, at(0, 48, a=(True, 1.0)), TAKES_DEMAND, "on-demand only"),
        ({"opportunistic": True}, at(59, 48, a=(True, 1.0)), TAKES_SPOT, "spot is there"),
        ({"opportunistic": True}, at(59, 48), IDLE, "no spot"),
        # Reserved capacity costs nothing more, whatever its price says; it may be gone, so not at the last moment.
        ({"reserved": ["a"], "max_price": 3}, at(0, 48, a=(True, 9.0)), TAKES_SPOT, "reserved capacity is there"),
        ({"reserved": ["a"]}, at(0, 48, DEMAND, a=(None, 9.0)), TAKES_SPOT, "reserved capacity is there"),
        ({"reserved": ["a"], "spot_policy": "on-demand"}, at(0, 48, a=(True, 1.0)), TAKES_SPOT, "reserved"),
        ({"reserved": ["a"]}, at(11.7, 48, a=(True, 9.0)), TAKES_DEMAND, "the last moment"),
        # Two hours of 48 are owed, less than a tick more is left.
        ({"on_demand_floor": "5%"}, at(40, 2.51, SPOT, a=(True, 1.0)), TAKES_SPOT, "kept until it is taken"),
        ({"on_demand_floor": "5%"}, at(40, 2.49, SPOT, a=(True, 1.0)), TAKES_DEMAND, "owed to on_demand_floor"),
        ({"on_demand_floor": "5%", "max_price": 2}, at(40, 2.4, a=(True, 1.0)), IDLE, "on-demand may not be had"),
        # Monday noon: nothing starts before 20:00, what runs goes on.
        ({"start_window": "20:00-06:00"}, at(12, 40, a=(True, 1.0)), IDLE, "outside the hours"),
        ({"start_window": "20:00-06:00"}, at(12, 38, SPOT, a=(True, 1.0)), TAKES_SPOT, "kept until it is taken"),
        # In the last ten minutes of the night: a preemption by day would wait for ten hours more than there are.
        ({"start_window": "20:00-06:00"}, at(5.9, 42, SPOT, a=(True, 1.0)), TAKES_DEMAND, "ask for on-demand now"),
        ({"start_window": "20:00-06:00"}, at(5.9, 35, SPOT, a=(True, 1.0)), TAKES_SPOT, "kept until it is taken"),
        ({"run_window": "20:00-06:00"}, at(12, 10, DEMAND, a=(True, 1.0)), IDLE, "outside the hours"),
        # Of 60 hours 6 + 10 + 10 are open, less six minutes at each end, and a changeover for the second and third night.
        ({"run_window": "20:00-06:00"}, at(0, 20, a=(True, 1.0)), TAKES_SPOT, "spot is there"),
        ({"run_window": "20:00-06:00"}, at(0, 19.0), IDLE, "no spot"),
        ({"run_window": "20:00-06:00"}, at(0, 24.85), TAKES_DEMAND, "the last moment"),
    ],
)  # fmt: skip
def test_by_hand(values: dict[str, object], context: Context, market: Market, why: str) -> None:
    decision = decide(values, context)
    assert decision.market is market
    assert why in decision.reasons[0]


def test_reasons_name_the_rule() -> None:
    assert decide({"max_price": 0.99}, at(0, 48, a=(True, 1.0))).reasons[-1] == (
        "dearer than max_price, $0.9900 per machine and hour: a, b"
    )
    assert (
        "on-demand costs $3.0000 an hour for 1 machines, which is more than max_price, $2.0000 each"
        in decide({"max_price": 2}, at(11.7, 48)).reasons
    )
    assert "start_window is 20:00-06:00 (UTC)" in decide({"start_window": "20:00-06:00"}, at(12, 40)).reasons
    assert (
        decide({"on_demand_floor": "5%"}, at(40, 2, a=(True, 1.0))).reasons[-1] == "on_demand_floor is 0.05 of the work"
    )


@pytest.mark.parametrize(
    ("values", "context", "kept", "reason"),
    [
        ({}, at(0, 48), True, "11 h 48 min to spare"),
        ({}, at(12, 48), False, "2 d of work and a changeover of 12 min need 12 min more than is left"),
        ({"spot_policy": "spot"}, at(0, 48), False, "spot_policy is spot: on-demand is never taken"),
        ({"opportunistic": True}, at(0, 48), False, "opportunistic: spot only, and no deadline"),
        ({"max_price": 2.99}, at(0, 48), False, "which is more than max_price, $2.9900 each"),
        ({"max_price": 3}, at(0, 48), True, "11 h 48 min to spare"),
        ({"spot_policy": "on-demand"}, at(0, 48), True, "11 h 48 min to spare"),
        ({"start_window": "08:00-09:00"}, at(0, 48), True, "3 h 42 min to spare"),
        ({"start_window": "14:00-15:00"}, at(0, 48), False, "need 2 h 18 min more than is left"),
        ({"run_window": "20:00-06:00"}, at(0, 26), False, "more than is left until the deadline"),
        ({"run_window": "20:00-06:00"}, at(0, 24), True, "to spare"),
    ],
)
def test_what_is_impossible_is_said_before_the_start(
    values: dict[str, object], context: Context, kept: bool, reason: str
) -> None:
    promise = ruled(values).promise(context)
    assert promise.kept is kept
    assert reason in promise.reasons[0]


def test_a_promise_is_that_of_the_policy_inside() -> None:
    assert not ruled({}, SpotOnly()).promise(at(0, 48)).kept
    assert ruled({}).keeps_deadline
    assert ruled({"spot_policy": "on-demand"}, SpotOnly()).keeps_deadline
    for key, value in (("spot_policy", "spot"), ("max_price", 9), ("run_window", "sat")):
        assert not ruled({key: value}).keeps_deadline


def test_fallback_and_back_to_spot_tick_by_tick() -> None:
    """Spot is away for an hour. Half an hour later on-demand fills the gap, however greedy the policy is, and is left again."""
    capacity = np.array([[1] * 10 + [0] * 10 + [1] * 600], np.int32)
    trace = Trace(
        pools=("a",),
        tick_s=360,
        capacity=capacity,
        microusd_h=np.full(capacity.shape, 1_000_000),
        on_demand_microusd_h=3_000_000,
    )
    workload = Workload(job=Job(work_s=40 * HOUR, deadline_s=60 * HOUR, changeover_s=12 * MINUTE))
    for asks in (False, True):
        for values in ({"fallback_after": "30 min"}, {"fallback_after": "6 tries"}):
            policy = Ruled(Greedy(), parse_rules(values), ("a",))
            _, told = tell(trace, policy, replace(workload, asks=asks), 0)
            said = [(each.context.now_s // 360, each.decision.market, each.decision.reasons[0][:24]) for each in told]
            due = 15
            assert said == [
                (0, Market.SPOT, "spot is there"),
                (1, Market.SPOT, "on spot, which is kept u"),
                (10, Market.NOTHING, "no spot, and there is ti"),
                (due, Market.ON_DEMAND, "no spot for so long that"),
                (20, Market.SPOT, "spot is there"),
                (21, Market.SPOT, "on spot, which is kept u"),
            ]


def test_a_share_of_the_work_is_done_on_demand_and_no_more_than_it_must() -> None:
    capacity = np.ones((1, 700), np.int32)
    trace = Trace(
        pools=("a",),
        tick_s=360,
        capacity=capacity,
        microusd_h=np.full(capacity.shape, 1_000_000),
        on_demand_microusd_h=3_000_000,
    )
    workload = Workload(job=Job(work_s=40 * HOUR, deadline_s=60 * HOUR, changeover_s=12 * MINUTE))
    for floor, least_h in (("25%", 10), ("100%", 40), ("0%", 0)):
        policy = Ruled(Greedy(), parse_rules({"on_demand_floor": floor}), ("a",))
        outcomes = simulate(trace, policy, workload, np.array([0]))
        changeover_s = 12 * MINUTE * int(outcomes.on_demand_launches[0])
        worked_s = int(outcomes.on_demand_s[0]) - changeover_s
        assert least_h * HOUR <= worked_s < least_h * HOUR + 360


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="the reserved pool 'x' is not among the pools of this job: a, b"):
        ruled({"reserved": "x"})
    with pytest.raises(UsageError, match="start_utc_s"):
        Ruled(Greedy(), parse_rules({"run_window": "sat"}))
    policy = ruled({})
    with pytest.raises(UsageError, match="the rules are for the pools a, b; offered are a"):
        policy.decide(at(0, 48, offers=(Offer("a", True, 1),)), policy.start(1))
    with pytest.raises(UsageError, match="remembers 6 numbers"):
        policy.decide(at(0, 48), PolicyState("greedy", ()))
    for wrong in (-1, 1_000_001):
        with pytest.raises(UsageError):
            Rules(floor_millionths=wrong)
    with pytest.raises(UsageError):
        Rules(max_microusd_h=-1)
    assert (policy.name, ruled({"opportunistic": True}).name) == ("greedy, ruled", "spot, ruled")
    assert policy.summary.endswith("as far as the rules let it")
    assert ruled({"spot_policy": "on-demand"}).name == f"{OnDemandOnly.name}, ruled"
    assert Rules(spot_policy=SpotPolicy.ON_DEMAND).allow_on_demand


def test_hours_cost_no_wrong_expectations() -> None:
    """What a policy expects the rest to cost is not told where closed hours were counted as work."""
    seen: list[Choice] = []

    def watch(_: Situation, choice: Choice) -> None:
        seen.append(choice)

    from holdfast.policy.market.ours import Ours

    capacity = np.ones((1, 50), np.int32)
    trace = Trace(
        pools=("a",), tick_s=HOUR, capacity=capacity, microusd_h=capacity.astype(np.int64), on_demand_microusd_h=9
    )
    workload = Workload(job=Job(work_s=5 * HOUR, deadline_s=40 * HOUR, changeover_s=60))
    for values, told in (({}, True), ({"run_window": "20:00-06:00"}, False)):
        seen.clear()
        policy = Ruled(Ours(), parse_rules(values), ("a",), start_utc_s=MONDAY + 20 * HOUR)
        simulate(trace, policy, workload, np.array([0]), watch)
        assert (seen[0].costs is not None) is told
