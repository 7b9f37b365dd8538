"""Node policies by name: for the command line, for written states, and for whoever wants to compare them all."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from holdfast.core.errors import UsageError
from holdfast.policy.market.registry import POLICIES
from holdfast.policy.nodes.base import NodePolicy
from holdfast.policy.nodes.gang import RigidGang
from holdfast.policy.nodes.greedy import AllOnDemand, AllSpot, ElasticGreedy, NodesUniformProgress
from holdfast.policy.nodes.thrifty import Thrifty

__all__ = ["NODE_POLICIES", "node_policy_named"]

_ALL: tuple[NodePolicy, ...] = (
    AllOnDemand(),
    AllSpot(),
    *(RigidGang(market) for market in POLICIES.values()),
    ElasticGreedy(),
    NodesUniformProgress(),
    Thrifty(),
)
NODE_POLICIES: Mapping[str, NodePolicy] = MappingProxyType({policy.name: policy for policy in _ALL})


def node_policy_named(name: str) -> NodePolicy:
    """The policy of that name. UsageError that lists the names there are."""
    try:
        return NODE_POLICIES[name]
    except KeyError:
        known = ", ".join(NODE_POLICIES)
        raise UsageError(f"there is no node policy {name!r}; there are {known}") from None
