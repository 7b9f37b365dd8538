"""Traces to try things on when there are none of one's own: five kinds of market, made from a seed.

The figures are round ones, not measurements: lifetimes as public traces show them (Weibull, hazard falling with age), prices of
the order of a one-GPU machine. They are there to see what a policy does in a market of a kind, not to foretell a bill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from holdfast.simulate.traces.lifetimes import Weibull
from holdfast.simulate.traces.synthetic import Outages, Pool, PriceWalk, generate
from holdfast.simulate.traces.trace import Trace

__all__ = ["SCENARIOS", "Scenario"]

_HOUR_S, _DAY_S = 3600, 86400
_ON_DEMAND_MICROUSD_H = 3_000_000
_MACHINES = 16
_STILL = PriceWalk(mean_microusd_h=1_000_000)
_MOVING = PriceWalk(mean_microusd_h=1_000_000, spread=0.1, floor_microusd_h=800_000, ceiling_microusd_h=1_250_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A kind of market."""

    name: str
    summary: str
    pools: tuple[Pool, ...]
    outages: tuple[Outages, ...] = ()
    tick_s: int = 300
    on_demand_microusd_h: int = _ON_DEMAND_MICROUSD_H

    def trace(self, *, seed: int, days: float) -> Trace:
        """From midnight on. The same seed makes the same trace."""
        return generate(
            self.pools,
            tick_s=self.tick_s,
            duration_s=round(days * _DAY_S),
            on_demand_microusd_h=self.on_demand_microusd_h,
            seed=seed,
            outages=self.outages,
        )


def _pool(
    name: str,
    up_h: float,
    down_h: float,
    *,
    shape: float = 0.7,
    price: PriceWalk = _STILL,
    tide: float = 0,
    region: str = "",
) -> Pool:
    return Pool(
        name=name,
        up=Weibull(shape, up_h * _HOUR_S),
        down=Weibull(shape, down_h * _HOUR_S),
        price=price,
        machines=_MACHINES,
        tide=tide,
        region=region,
    )


SCENARIOS: Mapping[str, Scenario] = MappingProxyType(
    {
        scenario.name: scenario
        for scenario in (
            Scenario(
                name="steady",
                summary="there nearly all the time: lives of 30 h, gone for 2 h",
                pools=(_pool("steady", 30, 2, shape=0.8),),
            ),
            Scenario(
                name="bursty",
                summary="comes and goes: lives of 1.5 h, gone for 1 h, and most of either are much shorter",
                pools=(_pool("bursty", 1.5, 1, shape=0.6),),
            ),
            Scenario(
                name="diurnal",
                summary="plentiful at night and rare in the afternoon",
                pools=(_pool("diurnal", 4, 2, tide=1.5),),
            ),
            Scenario(
                name="scarce",
                summary="there a fifth of the time, for 2 h each",
                pools=(_pool("scarce", 2, 8),),
            ),
            Scenario(
                name="correlated",
                summary="three pools of one region that fail together every few days; prices move",
                pools=tuple(
                    _pool(f"correlated-{letter}", up_h, 3, price=_MOVING, region="r")
                    for letter, up_h in (("a", 10), ("b", 6), ("c", 4))
                ),
                outages=(Outages(region="r", apart=Weibull(1, 60 * _HOUR_S), last=Weibull(0.8, 4 * _HOUR_S)),),
            ),
        )
    }
)
