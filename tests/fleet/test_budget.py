"""Random markets and faults, machines that never claim, controllers that die: spend stays below the cap, and nothing is left."""

from __future__ import annotations

import os
import random

import pytest
from fleet_world import DEMAND_MICROUSD_H, SPOT_MICROUSD_H, STEP_S, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagined import Faults, Fuse, GivenUp, Spec, pool

from holdfast.policy.backoff import Fallback
from holdfast.policy.market.rules_facts import Rules, SpotPolicy

LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
MARKET_STEP_S = 300


def drawn_pools(seed: int, zones: int, rough: float) -> dict[object, Spec]:
    """Capacity and prices change every five minutes; a spot price may rise fivefold, above what a grant allows."""
    rng = random.Random(seed)
    pools: dict[object, Spec] = {}
    for zone in range(zones):
        there = [rng.random() >= rough for _ in range(200)]
        prices = [int(SPOT_MICROUSD_H * rng.choice([0.5, 1, 1, 2, 5])) for _ in range(200)]
        pools[pool(f"z{zone}")] = Spec(
            lambda now_s, prices=prices: min(prices[now_s // MARKET_STEP_S % 200], DEMAND_MICROUSD_H),
            lambda now_s, there=there: there[now_s // MARKET_STEP_S % 200],
        )
    pools[pool("z0", "on-demand")] = Spec(lambda _: DEMAND_MICROUSD_H, lambda now_s: rng.random() < 0.9)
    return pools


@settings(max_examples=400 if LONG else 25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32), zones=st.integers(1, 3), rough=st.sampled_from([0.0, 0.3, 0.8]),
    cap=st.integers(450_000, 4_000_000), work_s=st.sampled_from([300, 1200, 3000]),
    lost=st.sampled_from([0.0, 0.5]), error=st.sampled_from([0.0, 0.3]), mute=st.sampled_from([0.0, 0.3]),
    list_error=st.sampled_from([0.0, 0.3]), honours=st.booleans(), free=st.booleans(),
    deaths=st.lists(st.integers(0, 300), max_size=4), away_s=st.sampled_from([0, 60, 1200]),
)  # fmt: skip
def test_never_above_the_cap(
    seed: int, zones: int, rough: float, cap: int, work_s: int, lost: float, error: float, mute: float, list_error: float,
    honours: bool, free: bool, deaths: list[int], away_s: int,
) -> None:  # fmt: skip
    options = {
        "faults": Faults(lost_answer=lost, error=error, list_error=list_error, never_claims=mute),
        "honours_tokens": honours, "first_hour_free": free,
    }  # fmt: skip
    world = World(
        pools=drawn_pools(seed, zones, rough), budget_microusd=cap, rules=Rules(fallback=Fallback(2, 300)), work_s=work_s,
        cloud_options=options, seed=seed % 1000,
    )  # fmt: skip
    rng = random.Random(seed)
    fuses = [Fuse(at, after=rng.random() < 0.5) for at in deaths]
    controller, over = world.controller(fuses.pop(0) if fuses else None), None
    while over is None and world.cloud.now_s < world.born_s + 3 * 3600:
        machine = world.working()
        if machine is not None and machine.preempt_at_s is None and rng.random() < 0.02:
            world.cloud.preempt(machine, rng.choice([0, 120]))
        try:
            over = controller.step()
        except GivenUp:
            world.cloud.advance(away_s)
            controller = world.controller(fuses.pop(0) if fuses else None)
        except Exception as error_:
            if type(error_).__name__ not in ("ProviderError", "StoreUnavailable"):
                raise
        world.check()
        world.cloud.advance(STEP_S)
    world.abandon(3600)
    world.check_end(booked=over is not None)
    if over is not None and over.outcome == "done":
        assert world.cloud.finished >= 1
        assert world.cloud.durable_s >= work_s
    if over is not None and over.outcome == "budget":
        # What every machine had done when it was stopped at the edge is durable.
        for each in world.cloud.machines_:
            if each.exit_code == 78:
                assert each.kept_s <= world.cloud.durable_s
                assert each.done_s <= world.cloud.durable_s


@pytest.mark.parametrize("market", ["spot", "on-demand"])
def test_the_edge_is_sharp(market: str) -> None:
    """At the dearest price that was granted for, cap after cap: the last grant uses what there is, and nothing more is spent."""
    pools = {
        pool("z0", market): Spec(lambda _: DEMAND_MICROUSD_H, lambda _: True),
        pool("z1", "on-demand"): Spec(lambda _: DEMAND_MICROUSD_H, lambda _: True),
    }
    for cap in range(500_000, 2_500_000, 200_000 if not LONG else 10_000):
        world = World(pools=pools, budget_microusd=cap, work_s=20_000)
        over = world.play()
        assert over.outcome == "budget", world.story()
        world.check_end()
        spent = world.cloud.spent_microusd()
        # What a launch needs at least, or the time that is reserved for the end and was not used.
        assert cap - spent < 500_000, (cap, spent)
        assert all(each.done_s <= world.cloud.durable_s for each in world.cloud.machines_), (
            "a last step that was not saved"
        )


def test_the_edge_holds_without_a_controller() -> None:
    """Grants that use the cap up, and nobody there any more: the machine's own timer, and what is reserved for boot and end."""
    pools = {pool("z0", "on-demand"): Spec(lambda _: DEMAND_MICROUSD_H, lambda _: True)}
    closest = 10**9
    for cap in range(480_000, 900_000, 60_000 if not LONG else 5_000):
        for lives_s in (50, 400, 800):
            world = World(
                pools=pools, budget_microusd=cap, work_s=20_000, rules=Rules(spot_policy=SpotPolicy.ON_DEMAND)
            )
            controller = world.controller()
            for _ in range(lives_s // STEP_S):
                controller.step()
                world.cloud.advance(STEP_S)
            world.abandon(3600)
            world.check_end(booked=False)
            closest = min(closest, cap - world.cloud.spent_microusd())
    assert closest < 10_000, "no grant came near its cap: this test has lost its edge"
