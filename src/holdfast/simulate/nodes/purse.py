"""What the nodes of each window cost, and how long the budget lasts. Exact: prices times seconds, divided once at the end."""

from __future__ import annotations

import numpy as np

from holdfast.policy.market.arrays import Ints
from holdfast.policy.market.money import microusd
from holdfast.simulate.nodes.fleet import Fleet

__all__ = ["Load", "Purse"]

_FOREVER_S = 1 << 40


class Load:
    """What is held now, and what an hour of it costs."""

    __slots__ = ("microusd_h", "nodes", "on_demand", "spot", "spot_microusd_h")

    def __init__(self, fleet: Fleet, prices: Ints, on_demand_microusd_h: int) -> None:
        held = fleet.held(len(prices))
        self.spot: Ints = held.sum(axis=0)
        self.on_demand: Ints = fleet.on_demand.sum(axis=0)
        self.nodes: Ints = self.spot + self.on_demand
        self.spot_microusd_h: Ints = (held * prices).sum(axis=0)
        self.microusd_h: Ints = self.spot_microusd_h + self.on_demand * on_demand_microusd_h


class Purse:
    """Money in hour-seconds (see `policy.market.money`) until it is asked for."""

    def __init__(self, windows: int, on_demand_microusd_h: int, cap_hs: int | None) -> None:
        self.on_demand_microusd_h, self.cap_hs = on_demand_microusd_h, cap_hs
        self.spot_hs, self.spot_node_s, self.on_demand_node_s = np.zeros((3, windows), np.int64)

    def load(self, fleet: Fleet, prices: Ints) -> Load:
        return Load(fleet, prices, self.on_demand_microusd_h)

    @property
    def spent_hs(self) -> Ints:
        return self.spot_hs + self.on_demand_node_s * self.on_demand_microusd_h

    def paid_s(self, load: Load, seconds: Ints) -> Ints:
        """For how many of these seconds the budget lasts."""
        if self.cap_hs is None:
            return seconds
        lasts_s = (self.cap_hs - self.spent_hs) // np.maximum(load.microusd_h, 1)
        return np.minimum(seconds, np.where(load.microusd_h > 0, lasts_s, _FOREVER_S))

    def pay(self, load: Load, seconds: Ints) -> None:
        self.spot_hs += load.spot_microusd_h * seconds
        self.spot_node_s += load.spot * seconds
        self.on_demand_node_s += load.on_demand * seconds

    @property
    def spot_microusd(self) -> Ints:
        return microusd(self.spot_hs)

    @property
    def on_demand_microusd(self) -> Ints:
        return microusd(self.on_demand_node_s * self.on_demand_microusd_h)

    @property
    def microusd(self) -> Ints:
        return microusd(self.spent_hs)
