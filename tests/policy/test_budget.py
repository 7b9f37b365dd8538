"""The budget by hand, with reasons; what is refused; what is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import FormatError, UsageError
from holdfast.policy import budget
from holdfast.policy.budget import Granted, Kept, Refused, Renewed, StopNow
from holdfast.policy.budget_facts import BudgetLimits, BudgetState, LaunchAsk


def an_ask(**figures: object) -> LaunchAsk:
    base: dict[str, object] = {"launch": 1, "machine_microusd_h": 3_000_000, "outside_s": 60, "grace_s": 120}
    return LaunchAsk(**(base | figures))  # type: ignore[arg-type]


def test_by_hand_with_reasons() -> None:
    limits = BudgetLimits(cap_microusd=5_000_000, max_nodes=3, slice_s=3600)
    state, first = budget.grant(BudgetState(), limits, an_ask())
    assert isinstance(first, Granted)
    assert first.grant.lifetime_s == 3600
    assert first.reasons == (
        "1 h at $3.0000 an hour at most reserve $3.1500",
        "the budget is $5.0000; spent $0.0000, reserved $3.1500 for 1 launch, 1 of them not seen yet",
    )
    # $1.85 are left: 2220 s at $3, of which 180 are boot and grace.
    state, second = budget.grant(state, limits, an_ask(launch=2))
    assert isinstance(second, Granted)
    assert second.grant.lifetime_s == 2040
    assert "the budget allows no more" in second.reasons[1]
    state, third = budget.grant(state, limits, an_ask(launch=3))
    assert isinstance(third, Refused)
    assert third.needs_microusd == 150_834
    assert third.reasons[1] == "the budget would have to be $0.1508 larger"
    state, nodes = budget.grant(state, limits, an_ask(launch=3, nodes=2))
    assert "the node cap is 3" in nodes.reasons[0]
    assert isinstance(budget.renew(state, limits, 1, 900)[1], Kept)
    state, edge = budget.renew(state, limits, 1, 3000)
    assert edge == Kept(600, ("the budget is used up: the grant is not renewed, and ends in 10 min", edge.reasons[1]))
    assert isinstance(budget.renew(state, limits, 1, 3600)[1], StopNow)
    # The other one has ended early: what it gives back goes to the first, as far as it goes.
    state = budget.ended(state, 2, 250_000)
    state, longer = budget.renew(state, limits, 1, 3000)
    assert isinstance(longer, Renewed)
    assert longer.grant.lifetime_s == (5_000_000 - 250_000) * 3600 // 3_000_000 - 180
    assert "the last renewal" in longer.reasons[1]


def test_what_nobody_granted_stops_what_runs() -> None:
    """A machine that was thought to be absent, a bill above the ceiling, a smaller cap, a lower price."""
    limits = BudgetLimits(cap_microusd=3_200_000)
    lost, _ = budget.grant(BudgetState(), limits, an_ask())
    state = budget.absent(lost, 1)
    state, _ = budget.grant(state, limits, an_ask(launch=2))
    assert isinstance(budget.renew(state, limits, 2, 0)[1], Kept)
    found = budget.seen(state, 1)
    assert isinstance(budget.renew(found, limits, 2, 0)[1], StopNow)
    assert budget.free_microusd(found, limits) == 3_200_000 - 2 * 3_150_000
    dearer = budget.metered(state, 2, 1000, 2_000_000)
    assert isinstance(budget.renew(dearer, limits, 2, 0)[1], StopNow)
    assert isinstance(budget.renew(state, replace(limits, cap_microusd=1), 2, 0)[1], StopNow)
    assert isinstance(budget.renew(state, replace(limits, max_microusd_h=1), 2, 0)[1], StopNow)


def test_what_makes_no_sense_is_refused() -> None:
    state, _ = budget.grant(BudgetState(), BudgetLimits(), an_ask())
    with pytest.raises(UsageError, match="other figures"):
        budget.grant(state, BudgetLimits(), an_ask(nodes=2))
    with pytest.raises(UsageError, match="has no grant"):
        budget.renew(state, BudgetLimits(), 2, 0)
    with pytest.raises(UsageError, match="has been seen"):
        budget.absent(budget.seen(state, 1), 1)
    over = budget.ended(state, 1, 5)
    assert budget.ended(over, 1) == over
    with pytest.raises(UsageError, match="is over"):
        budget.renew(over, BudgetLimits(), 1, 0)
    assert isinstance(budget.grant(over, BudgetLimits(), an_ask())[1], Refused)
    for wrong in ({"nodes": 0}, {"machine_microusd_h": -1}, {"wants_s": 5, "least_s": 9}, {"uses": (("a", -1),)}):
        with pytest.raises(UsageError):
            an_ask(**wrong)
    with pytest.raises(UsageError):
        BudgetLimits(slice_s=0)


@given(st.data())
def test_written_states_are_read_or_refused(data: st.DataObject) -> None:
    """Every field of a written state, set to what it cannot be."""
    state, _ = budget.grant(BudgetState(), BudgetLimits(), an_ask(uses=(("gpus", 8),)))
    state = budget.metered(budget.seen(state, 1), 1, 60, 50_000)
    assert BudgetState.from_json(state.to_json()) == state
    tree = json.loads(state.to_json())
    record = tree["launches"][0]
    place = data.draw(st.sampled_from([tree, record, record["grant"], record["grant"]["ask"]]))
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(st.sampled_from(["x", 1.5, [[1]], {"a": 1}, [["gpus", -1]]]))
    with pytest.raises(FormatError):
        BudgetState.from_json(json.dumps(tree))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\ud800", '{"format": 2}', '{"format": 1}', '{"format": 1, "launches": [1]}']
)
def test_strange_states_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        BudgetState.from_json(text)
