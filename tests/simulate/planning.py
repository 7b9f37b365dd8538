"""Cases for the tests of the planner, small and quick."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from holdfast.core.jobfile import Accelerator
from holdfast.simulate.planner.assumed import Assumptions, assume
from holdfast.simulate.planner.case import Case, Hardware, Known
from holdfast.simulate.planner.figures import Figure, Origin, fixed
from holdfast.simulate.planner.markets import make_worlds
from holdfast.simulate.planner.montecarlo import Option, option_of, play
from holdfast.simulate.planner.prices import Price
from holdfast.simulate.planner.terms import Terms, terms_of

__all__ = ["HOUR_S", "given", "job", "known", "machine", "play_one", "steady"]

HOUR_S = 3600.0


def machine(*, spot: float = 1.0, on_demand: float = 3.0, region: str = "here", notice_s: float = 120.0) -> Price:
    return Price(
        provider="cloud", region=region, instance="box", accelerator="G", gpus=1, gpu_memory_gib=16.0, on_demand_usd_h=on_demand,
        spot_usd_h=spot, notice_s=notice_s, as_of="2026-01-01", source="test",
    )  # fmt: skip


def given(value: float) -> Figure:
    return fixed(value, Origin.GIVEN)


def known(**more: float) -> Known:
    """Everything is known, so that nothing is a matter of luck but the market."""
    said = {
        "life_s": 4 * HOUR_S, "outage_s": 0.5 * HOUR_S, "changeover_s": 300.0, "stall_s": 0.0, "bandwidth": 1e9,
        "checkpoint_bytes": 1e9, "step_s": 1.0,
    } | more  # fmt: skip
    figures: dict[str, Any] = {name: given(value) for name, value in said.items()}
    return Known(**figures)


def job(work_h: float = 6.0, *, pools: tuple[Price, ...] = (machine(),), **more: Any) -> Case:
    hardware = Hardware(Accelerator("G", 1), work_h * HOUR_S, pools)
    facts: dict[str, Any] = {"name": "job", "hardware": (hardware,), "known": known()} | more
    return Case(**facts)


def steady(assumed: Assumptions) -> Assumptions:
    """With the table's prices and the plainest lifetimes."""
    return replace(assumed, spot_price=assumed.spot_price.only(1.0), shape=assumed.shape.only(1.0))


def play_one(case: Case, mix: str, *, samples: int = 30, seed: int = 1) -> tuple[Terms, Option]:
    hardware = case.hardware[0]
    assumed = steady(assume(case, hardware))
    terms = terms_of(case, hardware, hardware.pools, assumed, rough=True)
    worlds = make_worlds(terms, assumed, hardware.pools, samples, seed)
    return terms, option_of(case, "G:1", [pool.pool for pool in hardware.pools], mix, play(case, terms, worlds, mix))
